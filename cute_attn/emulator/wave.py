"""The state of a set of CTAs that run together, and the groups of lanes that step through a block.

Lanes are numbered CTA by CTA; a CTA whose block is not a multiple of 32 threads is padded with lanes that have
already left.
"""

from __future__ import annotations

from collections import Counter, deque
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .assembly import EXIT
from .errors import DivergentWarp, EmulatorError
from .launch_size import LaunchSize, Shape
from .memory import Array, GlobalMemory, SharedMemory
from .module import Kernel
from .registers import RegisterWindow
from .settings import Settings
from .types import carrier_dtype

if TYPE_CHECKING:
    from .races import Races
    from .trace.wave_trace import WaveTrace
    from .traffic import Traffic

_REMEMBERED_GROUPS = 64


class Wave:
    """CTAs `ctas` (linear numbers in the grid) of one launch; those of a cluster stand together, in order of rank.

    queue: the launch's clusters that have not started yet, a row of CTAs each. random: the source of shuffled order,
    None for the fixed one. `state` is where families keep what they need per wave (see `wave_state`), by class or name.
    A lane that is `waiting` cannot run; one that has `yielded` runs when no other can. Those of `awaits_others`, while
    they wait, wait for what need not happen in their own warp. `races` is told of all accesses
    to shared memory and of what orders them, where races are looked for; `trace` of what warps do and wait for, where
    that is recorded; `profile` counts seconds per instruction family and `traffic` bytes of global memory, where they
    are measured.
    """

    def __init__(
        self,
        kernel: Kernel,
        ctas: Array,
        size: LaunchSize,
        parameters: bytes,
        memory: GlobalMemory,
        constants: dict[str, int],
        settings: Settings,
        *,
        queue: deque[Array] | None = None,
        random: np.random.Generator | None = None,
    ) -> None:
        self.kernel = kernel
        self.ctas = ctas
        self.grid = size.grid
        self.cluster = size.cluster
        self.cluster_size = size.cluster_ctas
        self.block = size.block
        self.queue = deque() if queue is None else queue
        self.random = random
        self.parameters = np.frombuffer(parameters.ljust(kernel.parameter_bytes + 16, b"\0"), np.uint8)
        self.memory = memory
        self.constants = constants
        self.poison = settings.uninitialized_shared == "poison"
        self.accumulation = settings.accumulation
        self.threads = size.threads
        self.cta_lanes = size.cta_lanes
        self.lanes = len(ctas) * self.cta_lanes
        self.shared_bytes = kernel.shared_bytes(size.shared_bytes)
        self.shared = SharedMemory(len(ctas), self.shared_bytes)
        self.registers: list[Any] = [np.dtype(carrier_dtype(bits)).type(0) for bits in kernel.register_bits]
        self.cta_of_lane = np.repeat(np.arange(len(ctas), dtype=np.int64), self.cta_lanes)
        self.thread_of_lane = np.tile(np.arange(self.cta_lanes, dtype=np.int64), len(ctas))
        self.pc = np.where(self.thread_of_lane < self.threads, 0, EXIT)
        self.waiting = np.zeros(self.lanes, bool)
        self.awaits_others = np.zeros(self.lanes, bool)
        self.yielded = np.zeros(self.lanes, bool)
        self.everyone = Group(self, slice(0, self.lanes))
        self.state: dict[Any, Any] = {}
        self.races: Races | None = None
        self.trace: WaveTrace | None = None
        self.profile: Counter[str] | None = None
        self.traffic: Traffic | None = None
        self._groups: dict[bytes, Group] = {}

    def group(self, mask: Array) -> Group:
        """The group of the lanes in `mask`: the same object as last time, where that was not long ago."""
        key = np.packbits(mask).tobytes()
        if (known := self._groups.get(key)) is not None:
            return known
        lanes = np.flatnonzero(mask)
        if lanes.size == self.lanes:
            return self.everyone
        first, last = int(lanes[0]), int(lanes[-1])
        group = Group(self, slice(first, last + 1) if last - first + 1 == lanes.size else lanes)
        if len(self._groups) >= _REMEMBERED_GROUPS:
            self._groups.clear()
        self._groups[key] = group
        return group

    @cached_property
    def local(self) -> SharedMemory:
        """Local memory: a slice for each lane."""
        return SharedMemory(self.lanes, self.kernel.local_bytes)

    @cached_property
    def thread_index(self) -> tuple[Array, Array, Array]:
        x, y, _ = self.block
        t = self.thread_of_lane
        return tuple(v.astype(np.uint32) for v in (t % x, t // x % y, t // (x * y)))  # type: ignore[return-value]

    @cached_property
    def cta_index(self) -> tuple[Array, Array, Array]:
        x, y, _ = self.grid
        c = self.ctas[self.cta_of_lane]
        return tuple(v.astype(np.uint32) for v in (c % x, c // x % y, c // (x * y)))  # type: ignore[return-value]

    @cached_property
    def warp_of_lane(self) -> Array:
        return np.arange(self.lanes) // 32

    @cached_property
    def warpgroup_of_lane(self) -> Array:
        """[lanes] number of the warpgroup (four consecutive warps of a CTA), unique in the wave."""
        return self.cta_of_lane * -(-self.cta_lanes // 128) + self.thread_of_lane // 128

    def whole_warpgroups(self, mask: Array) -> Array:
        """The lanes in `mask` whose warpgroup is there with all its 128 threads."""
        return mask & (np.bincount(self.warpgroup_of_lane, mask) == 128)[self.warpgroup_of_lane]

    def locate(self, lane: int) -> tuple[Shape, Shape]:
        """(cta, thread) coordinates of a lane."""
        cta, thread = int(self.ctas[self.cta_of_lane[lane]]), int(self.thread_of_lane[lane])
        (gx, gy, _), (bx, by, _) = self.grid, self.block
        return (cta % gx, cta // gx % gy, cta // (gx * gy)), (thread % bx, thread // bx % by, thread // (bx * by))


class Group:
    """The lanes that execute a block together: a slice or a sorted index array into the wave's lanes."""

    def __init__(self, wave: Wave, lanes: slice | Array) -> None:
        self.wave = wave
        self.lanes = lanes
        self.size = lanes.stop - lanes.start if isinstance(lanes, slice) else len(lanes)
        self.is_whole = self.size == wave.lanes
        self.registers = RegisterWindow(self)
        self._common: dict[Group, tuple[Array, Array] | None] = {}

    @cached_property
    def lane_numbers(self) -> Array:
        """[size] int64: lane numbers in the wave."""
        return np.arange(self.wave.lanes)[self.lanes]

    @cached_property
    def warps(self) -> Array:
        """Numbers in the wave of the warps that have a lane here, ascending."""
        return np.unique(self.lane_numbers >> 5)

    @cached_property
    def cta(self) -> Array:
        """[size] int64: the CTA of each lane, as a number within the wave."""
        return self.wave.cta_of_lane[self.lanes]

    @cached_property
    def _bases(self) -> dict[tuple[str, int], Array]:
        return {}

    def shared_base(self, nbytes: int) -> Array:
        """[size] int64: index of the first element of each lane's shared memory, in units of `nbytes`."""
        if ("shared", nbytes) not in self._bases:
            self._bases["shared", nbytes] = self.wave.shared.base(self.cta, nbytes)
        return self._bases["shared", nbytes]

    def local_base(self, nbytes: int) -> Array:
        if ("local", nbytes) not in self._bases:
            self._bases["local", nbytes] = self.wave.local.base(self.lane_numbers, nbytes)
        return self._bases["local", nbytes]

    @cached_property
    def has_whole_warps(self) -> bool:
        if self.size % 32:
            return False
        warps = self.lane_numbers.reshape(-1, 32)
        return bool((warps[:, 0] % 32 == 0).all() and (warps[:, 31] - warps[:, 0] == 31).all())

    @cached_property
    def warps_per_cta(self) -> int:
        """How many warps of each CTA are here, if all CTAs have equally many; else 1."""
        if not self.has_whole_warps:
            return 1
        ctas = self.cta[::32]
        counts = np.diff(np.flatnonzero(np.diff(ctas, prepend=-1)), append=ctas.size)
        return int(counts[0]) if (counts == counts[0]).all() else 1

    def matrix_lanes(self, count: int) -> Array:
        """Positions of the lanes that name the rows of `count` 8x8 matrices, [count, warps, 8]."""
        key = ("matrix lanes", count)
        if key not in self._bases:
            first = np.arange(0, self.size, 32)
            self._bases[key] = np.arange(count)[:, None, None] * 8 + first[None, :, None] + np.arange(8)
        return self._bases[key]

    def common(self, other: Group) -> tuple[Array, Array] | None:
        """Positions in the other group, and in this one, of the lanes that both have; None if they have none."""
        if other not in self._common:
            if len(self._common) >= _REMEMBERED_GROUPS:
                self._common.clear()
            position = np.full(self.wave.lanes, -1)
            position[other.lanes] = np.arange(other.size)
            theirs = position[self.lanes]
            ours = np.flatnonzero(theirs >= 0)
            self._common[other] = (theirs[ours], ours) if ours.size else None
        return self._common[other]

    def part(self, chosen: Array) -> Group:
        """The group of some of the lanes: `chosen` [size] bool."""
        mask = np.zeros(self.wave.lanes, bool)
        mask[self.lane_numbers[chosen]] = True
        return self.wave.group(mask)

    def take(self, values: Array) -> Array:
        """The group's part of a per-lane array of the wave."""
        return values[self.lanes]

    def spread(self, value: Any) -> Array:
        """A scalar as an array over the lanes; an array as it is."""
        return value if value.ndim else np.full(self.size, value)

    def taking(self, mask: Any) -> Array:
        """[size] bool: the lanes that take part under a guard; None is none."""
        return np.ones(self.size, bool) if mask is None else self.spread(mask)

    def lanes_where(self, mask: Any) -> Array:
        """Numbers in the wave of the lanes that take part under a guard."""
        return self.lane_numbers if mask is None else self.lane_numbers[self.spread(mask)]

    def lanes_at(self, positions: Array | None) -> Array:
        """Numbers in the wave of the lanes at these positions of the group; None is all of them."""
        return self.lane_numbers if positions is None else self.lane_numbers[positions]

    def values_at(self, value: Any, positions: Array | None) -> Array:
        """An operand of the lanes at these positions; None is all of them."""
        spread = self.spread(value)
        return spread if positions is None else spread[positions]

    def require_whole_warps(self, index: int) -> int:
        """Number of warps; raises DivergentWarp unless all 32 lanes of each of them are here."""
        if not self.has_whole_warps:
            self._fail_divergent(index, "warp", self.lane_numbers // 32, "32 lanes", 32)
        return self.size // 32

    @cached_property
    def warpgroups(self) -> Array:
        """Numbers of the warpgroups that have lanes here, ascending."""
        return np.unique(self.wave.warpgroup_of_lane[self.lanes])

    @cached_property
    def _warpgroups(self) -> Array | None:
        """Lane numbers of the first lanes of the warpgroups, if the group consists of whole warpgroups."""
        if self.size % 128:
            return None
        lanes = self.lane_numbers.reshape(-1, 128)
        first: Array = lanes[:, 0]
        whole = (lanes[:, 127] - first == 127) & (self.wave.thread_of_lane[first] % 128 == 0)
        return first if whole.all() else None

    def require_whole_warpgroups(self, index: int) -> Array:
        """First lane (in the wave) of each warpgroup; raises DivergentWarp unless all its 128 threads are here."""
        if self._warpgroups is None:
            self._fail_divergent(index, "warpgroup", self.wave.warpgroup_of_lane[self.lanes], "128 threads", 128)
        return self._warpgroups

    def _fail_divergent(self, index: int, unit: str, number: Array, whole: str, size: int) -> NoReturn:
        """Raises DivergentWarp for the first warp or warpgroup of which lanes are missing; `number` is each lane's."""
        counts = np.bincount(number)[number]
        culprit = int(np.argmax(counts < size))
        what = f"{unit}-wide instruction executed by {int(counts[culprit])} of the {whole} of a {unit}"
        self.fail(DivergentWarp, index, culprit, what)

    def fail(self, error: type[EmulatorError], index: int, position: int, what: str) -> NoReturn:
        """Raises `error` for instruction `index` and the lane at `position` of the group."""
        wave = self.wave
        instruction = wave.kernel.instructions[index]
        lane = int(self.lane_numbers[position])
        cta, thread = wave.locate(lane)
        place = f" ({instruction.source})" if instruction.source else ""
        finding = error(
            f"{what}\n  instruction: {instruction.text}{place}\n  kernel: {wave.kernel.name}\n"
            f"  CTA {cta}, thread {thread}, warp {int(wave.thread_of_lane[lane]) // 32} lane {lane % 32}"
        )
        finding.instruction, finding.kernel = instruction.text, wave.kernel.name
        finding.cta, finding.thread = cta, thread
        raise finding
