"""Launch capture: what a program's host code asks of the CUDA runtime, answered by the emulator.

One process has one pretended device and one call in progress at a time (a lock sees to it). A call names the
architecture and the tensors; the host code then loads its library, asks for attributes and launches kernels, all of
which arrive here as callbacks. An exception inside a callback is kept, the host code is told that the call failed, and
the exception is raised again when control is back in Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cute_attn.emulator.device import Device, device_for
from cute_attn.emulator.device_view import present
from cute_attn.emulator.errors import EmulatorError, InvalidLaunch
from cute_attn.emulator.heap import Heap
from cute_attn.emulator.launch import LaunchRecord, launch
from cute_attn.emulator.launch_attributes import read_attributes
from cute_attn.emulator.launch_size import LaunchSize, Shape
from cute_attn.emulator.memory import GlobalMemory, Span
from cute_attn.emulator.module import Kernel
from cute_attn.emulator.parser import parse
from cute_attn.emulator.runtime import Callbacks, LaunchConfig, TensorMapArguments, bind
from cute_attn.emulator.settings import current_settings
from cute_attn.emulator.tensor_map_encoding import TiledMap, encode

__all__ = [
    "call",
    "clear_launches",
    "findings",
    "heap",
    "launches",
    "register",
    "session",
]

_FATBIN_MAGIC = 0xBA55ED50
_ERROR_UNKNOWN = 999  # cudaErrorUnknown; the stored exception says more

# CUfunction_attribute and cudaFuncAttribute numbers that host code uses
_MAX_THREADS, _STATIC_SHARED, _MAX_DYNAMIC_SHARED, _LARGE_CLUSTERS = 0, 1, 8, 14


@dataclass
class _Module:
    """One registered program: its machine code, by which it is recognised, and the PTX that is run in its place."""

    cubin: bytes
    ptx: str
    kernels: dict[str, Kernel] | None = None

    def kernel(self, name: str) -> Kernel:
        if self.kernels is None:
            self.kernels = parse(self.ptx)
        if name not in self.kernels:
            raise EmulatorError(f"the program has no kernel {name!r}; it has {', '.join(self.kernels) or 'none'}")
        return self.kernels[name]


@dataclass
class _LoadedKernel:
    """What a cudaKernel_t stands for.

    dynamic_shared_limit: what the host code asked to be allowed, in bytes
    large_clusters:       it also asked for clusters of a size that not every GPU has
    """

    kernel: Kernel
    dynamic_shared_limit: int
    large_clusters: bool = False


@dataclass
class _Session:
    """One call in progress: the device, the memory it may touch, and the exception that ended it."""

    device: Device
    spans: list[Span] = field(default_factory=list)
    error: BaseException | None = None


class _Runtime:
    """The CUDA runtime's state, and its functions as callbacks."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.session: _Session | None = None
        self.modules: list[_Module] = []
        self.handles: dict[int, _Module | _LoadedKernel] = {}
        self.kernel_handles: dict[tuple[int, str], int] = {}
        self.heap = Heap()
        self.records: deque[LaunchRecord] = deque(maxlen=10_000)
        self.findings: list[EmulatorError] = []
        self.callbacks: Callbacks | None = None

    def bind(self) -> None:
        if self.callbacks is None:
            names = [name for name, _ in Callbacks._fields_]  # type: ignore[misc]
            self.callbacks = bind({name: self._guarded(getattr(self, name)) for name in names})

    def _guarded(self, function: Callable[..., None]) -> Callable[..., int]:
        def callback(*arguments: Any) -> int:
            try:
                function(*arguments)
            except BaseException as error:
                if self.session is not None and self.session.error is None:
                    self.session.error = error
                    if isinstance(error, EmulatorError):
                        self.findings.append(error)
                return _ERROR_UNKNOWN
            return 0

        return callback

    def current(self) -> _Session:
        if self.session is None:
            raise EmulatorError("a program called the emulator's CUDA runtime outside of cute_attn.emulator.call")
        return self.session

    def _new_handle(self, thing: _Module | _LoadedKernel) -> int:
        handle = 16 * (len(self.handles) + 1)  # never 0, which host code takes for "not loaded"
        self.handles[handle] = thing
        return handle

    def library_load(self, library: Any, image: int) -> None:
        content = _fatbin(image)
        module = next((m for m in reversed(self.modules) if m.cubin in content), None)
        if module is None:
            raise EmulatorError("a program loaded machine code whose PTX was not registered with the emulator")
        known = next((handle for handle, thing in self.handles.items() if thing is module), None)
        library[0] = self._new_handle(module) if known is None else known

    def library_get_kernel(self, kernel: Any, library: int, name: bytes) -> None:
        key = (library, name.decode())
        if key not in self.kernel_handles:
            module = self.handles[library]
            assert isinstance(module, _Module)
            parsed = module.kernel(key[1])
            limit = self.current().device.default_shared_bytes - parsed.static_shared_bytes
            self.kernel_handles[key] = self._new_handle(_LoadedKernel(parsed, limit))
        kernel[0] = self.kernel_handles[key]

    def _loaded(self, handle: int) -> _LoadedKernel:
        loaded = self.handles[handle]
        assert isinstance(loaded, _LoadedKernel)
        return loaded

    def device_attribute(self, value: Any, attribute: int) -> None:
        try:
            value[0] = self.current().device.attribute(attribute)
        except KeyError:
            raise EmulatorError(f"the program asked for cudaDeviceAttr {attribute}, which is not modelled") from None

    def kernel_get_attribute(self, value: Any, attribute: int, handle: int) -> None:
        loaded = self._loaded(handle)
        values = {
            _MAX_THREADS: loaded.kernel.max_threads or self.current().device.max_threads,
            _STATIC_SHARED: loaded.kernel.static_shared_bytes,
            _MAX_DYNAMIC_SHARED: loaded.dynamic_shared_limit,
        }
        if attribute not in values:
            raise EmulatorError(f"the program asked for CUfunction_attribute {attribute}, which is not modelled")
        value[0] = values[attribute]

    def kernel_set_attribute(self, handle: int, attribute: int, value: int) -> None:
        """The others (carveout) are hints."""
        loaded = self._loaded(handle)
        if attribute == _LARGE_CLUSTERS:
            loaded.large_clusters = bool(value)
        if attribute != _MAX_DYNAMIC_SHARED:
            return
        limit = self.current().device.shared_optin_bytes
        if value + loaded.kernel.static_shared_bytes > limit:
            raise InvalidLaunch(
                f"kernel {loaded.kernel.name}: {value} bytes of dynamic and {loaded.kernel.static_shared_bytes} of "
                f"static shared memory are more than the device's {limit}"
            )
        loaded.dynamic_shared_limit = value

    def occupancy(self, ctas: Any, handle: int, threads: int, dynamic_shared_bytes: int) -> None:
        shared = self._loaded(handle).kernel.static_shared_bytes + dynamic_shared_bytes
        ctas[0] = self.current().device.resident_ctas(threads, shared)

    def launch(self, handle: int, config: Any, arguments: Any) -> None:
        session, loaded = self.current(), self._loaded(handle)
        requested: LaunchConfig = config.contents
        grid = (requested.grid.x, requested.grid.y, requested.grid.z)
        block = (requested.block.x, requested.block.y, requested.block.z)
        attributes = read_attributes(loaded.kernel.name, requested)
        cluster = _cluster(loaded, attributes.cluster, session.device)
        _check_against_device(loaded, session.device, block, requested.dynamic_shared_bytes)
        size = LaunchSize(grid, block, requested.dynamic_shared_bytes, cluster, attributes.cooperative)
        memory = GlobalMemory([*session.spans, *self.heap.spans()])
        parameters = _parameters(loaded.kernel, arguments)
        self.records.append(launch(loaded.kernel, size, parameters, memory, current_settings()))

    def allocate(self, memory: Any, nbytes: int) -> None:
        memory[0] = self.heap.allocate(nbytes)

    def release(self, address: int | None) -> None:
        self.heap.free(address or 0)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self.heap.copy(target, source, nbytes)

    def fill(self, address: int, value: int, nbytes: int) -> None:
        self.heap.fill(address, value, nbytes)

    def encode_tensor_map(self, target: int, arguments: Any) -> None:
        wanted: TensorMapArguments = arguments.contents
        rank = wanted.rank
        content = encode(
            TiledMap(
                wanted.data_type,
                wanted.address or 0,
                wanted.sizes[:rank],
                wanted.strides[: rank - 1],
                wanted.box[:rank],
                wanted.steps[:rank],
                wanted.interleave,
                wanted.swizzle,
                wanted.promotion,
                wanted.fill,
            )
        )
        ctypes.memmove(target, content, len(content))

    def unsupported(self, symbol: bytes) -> None:
        raise EmulatorError(
            f"the program called {symbol.decode()} of the CUDA runtime, which the emulator does not offer"
        )


def _fatbin(address: int) -> bytes:
    """The image that host code loads: a fatbin, whose header gives its size (fatbinary: magic, version, sizes)."""
    magic, _, header_bytes, payload_bytes = struct.unpack("<IHHQ", ctypes.string_at(address, 16))
    if magic != _FATBIN_MAGIC:
        raise EmulatorError(f"a program loaded machine code that is no fatbin (it starts with {magic:#x})")
    return ctypes.string_at(address, header_bytes + payload_bytes)


def _cluster(loaded: _LoadedKernel, requested: Shape | None, device: Device) -> Shape:
    """The cluster that CTAs of a launch form, from what the launch asks for and the kernel's own directives.

    PTX ISA, "Cluster Dimension Directives". Raises InvalidLaunch where the two disagree or the device has none such.
    """
    kernel = loaded.kernel
    cluster = requested or kernel.required_cluster or (1, 1, 1)
    size = math.prod(cluster)
    problem = None
    if requested is None and kernel.required_cluster is None and kernel.needs_cluster:
        problem = "the kernel has to be launched in clusters (.explicitcluster), and the launch names none"
    elif kernel.required_cluster is not None and cluster != kernel.required_cluster:
        problem = f"clusters of {cluster}, the kernel requires {kernel.required_cluster}"
    elif kernel.max_cluster is not None and size > kernel.max_cluster:
        problem = f"clusters of {size} CTAs, the kernel allows {kernel.max_cluster} (.maxclusterrank)"
    elif size > device.max_cluster and not (loaded.large_clusters and device.max_cluster > 1):
        allowed = f"{device.max_cluster} without the non-portable cluster size" if device.max_cluster > 1 else "none"
        problem = f"clusters of {size} CTAs, the device allows {allowed}"
    if problem is not None:
        raise InvalidLaunch(f"launch of {kernel.name}: {problem}")
    return cluster


def _check_against_device(loaded: _LoadedKernel, device: Device, block: Sequence[int], shared_bytes: int) -> None:
    """Raise InvalidLaunch where this device would refuse what `launch` allows for some device."""
    kernel = loaded.kernel
    if any(n > limit for n, limit in zip(block, device.max_block, strict=True)):
        raise InvalidLaunch(f"launch of {kernel.name}: block {tuple(block)} exceeds {device.max_block}")
    if shared_bytes > loaded.dynamic_shared_limit:
        raise InvalidLaunch(
            f"launch of {kernel.name}: {shared_bytes} bytes of dynamic shared memory, but "
            f"{loaded.dynamic_shared_limit} are allowed ({kernel.static_shared_bytes} are static, the device has "
            f"{device.shared_optin_bytes} per CTA)"
        )


def _parameters(kernel: Kernel, arguments: Any) -> bytes:
    """The kernel's parameter space, put together from the host code's array of pointers to its arguments."""
    space = bytearray(kernel.parameter_bytes)
    for i, parameter in enumerate(kernel.parameters):
        space[parameter.offset : parameter.offset + parameter.size] = ctypes.string_at(arguments[i], parameter.size)
    return bytes(space)


_runtime = _Runtime()


def register(cubin: bytes, ptx: str) -> None:
    """Make a program known: whoever loads machine code that contains ``cubin`` runs ``ptx``.

    Kernel names cannot tell programs apart (a causal kernel and its non-causal sibling have the same), the machine code
    can.
    """
    with _runtime.lock:
        if all(known.cubin != cubin for known in _runtime.modules):
            _runtime.modules.append(_Module(cubin, ptx))


@contextlib.contextmanager
def session(spans: list[Span], arch: str) -> Iterator[None]:
    """A period in which host code may call the runtime.

    spans: the memory that launches may touch; read at each launch, so it may still grow
    arch:  the device to pretend to be

    An exception raised inside a launch replaces whatever the host code made of it.
    """
    with _runtime.lock:
        _runtime.bind()
        outer, current = _runtime.session, _Session(device_for(arch, current_settings().device_multiprocessors), spans)
        _runtime.session = current
        try:
            yield
        except Exception:
            if current.error is None:
                raise
        finally:
            _runtime.session = outer
        if current.error is not None:
            raise current.error


def call(function: Callable[..., Any], arguments: Sequence[Any], arch: str, *, names: Sequence[str] = ()) -> Any:
    """Call compiled host code, linked against `runtime_library`, on CPU tensors.

    function:  the compiled TVM-FFI function
    arguments: tensors (anything with ``__dlpack__``, on the CPU), scalars, None, or tuples of them. Launches may touch
               exactly the memory of these tensors
    arch:      the device to pretend to be
    names:     the arguments' names, for error messages

    Raises what the emulator raised inside a launch, and otherwise what the function raises.
    """
    views = present(arguments, names)
    with session(views.spans, arch):
        return function(*views.arguments)


def launches() -> list[LaunchRecord]:
    """Records of the kernels that ran in this process, oldest first (the last 10 000)."""
    return list(_runtime.records)


def findings() -> list[EmulatorError]:
    """What launches of this process raised, oldest first, also where the program went on."""
    return list(_runtime.findings)


def heap() -> Heap:
    """The memory that programs of this process have allocated by themselves."""
    return _runtime.heap


def clear_launches() -> None:
    """Forget the records."""
    _runtime.records.clear()
