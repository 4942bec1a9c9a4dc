"""``python -m cute_attn.emulator script.py``: runs a CuTe DSL program on the CPU, as if it had a GPU."""

from __future__ import annotations

import argparse
import contextlib
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType

from cute_attn.arch import ARCHS
from cute_attn.emulator.capture import findings, launches
from cute_attn.emulator.errors import EmulatorError
from cute_attn.emulator.launch import LaunchRecord
from cute_attn.emulator.settings import Settings, settings
from cute_attn.emulator.trace import short_name, trace

_DESCRIPTION = """\
Run a program that compiles and launches CuTe DSL kernels, without a GPU: its kernels' PTX is executed on the CPU, and
"cuda" means the CPU wherever the program names a device. Every kernel is checked as by a sanitizer on the way. At the
end the launches are listed, and what was found wrong with them."""

_EPILOG = """\
examples:
  python -m cute_attn.emulator --arch sm_90a dense_gemm.py --mnkl 256,256,128,1
  python -m cute_attn.emulator --arch sm_120a --races --seed 7 my_kernel.py
  python -m cute_attn.emulator --arch sm_90a -m pytest -x tests/test_softmax.py

exit status: the program's own, or 1 if a launch raised a finding. The kernels' times are the emulator's and say nothing
about a GPU; for accuracy and limits see docs/emulator.md."""


def _parser() -> argparse.ArgumentParser:
    usual = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m cute_attn.emulator",
        usage="%(prog)s [options] (script.py | -m MODULE) [arguments of the program ...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arch", default="sm_90a", choices=ARCHS, help="the GPU to pretend to be (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        help="step warps and CTAs, and complete asynchronous work, in another order; results must not depend on it",
    )
    parser.add_argument(
        "--races",
        action=argparse.BooleanOptionalAction,
        default=usual.races,
        help="look for accesses to shared memory that nothing orders (default: %(default)s)",
    )
    parser.add_argument(
        "--accumulation",
        choices=("float32", "hardware"),
        default=usual.accumulation,
        help="tensor cores sum in float32, or as the hardware does, which is slower (default: %(default)s)",
    )
    parser.add_argument(
        "--multiprocessors",
        type=int,
        default=usual.multiprocessors,
        metavar="N",
        help="how many the GPU has, by which persistent kernels size their grid "
        f"(default: {usual.device_multiprocessors})",
    )
    parser.add_argument(
        "--uninitialized-shared",
        choices=("error", "poison"),
        default=usual.uninitialized_shared,
        help="reads of shared memory that nobody wrote are a finding, or give NaN, for programs that load rows which "
        "they never use (default: %(default)s)",
    )
    parser.add_argument("--profile", action="store_true", help="measure seconds per instruction family (slower)")
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="write what the warps of each launch's first CTAs do and wait for, for ui.perfetto.dev (logical time)",
    )
    parser.add_argument("--quiet", action="store_true", help="do not list the launches")
    parser.add_argument(
        "-m", dest="module", action="store_true", help="the program is a module's name, as in python -m"
    )
    parser.add_argument("program", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _run(program: str, arguments: list[str], module: bool) -> int:
    """Run the program as ``python`` would. Returns its exit status."""
    sys.argv = [program, *arguments]
    try:
        if module:
            sys.path.insert(0, "")
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program, run_name="__main__")
    except SystemExit as exit_request:
        if exit_request.code is None or isinstance(exit_request.code, int):
            return exit_request.code or 0
        print(exit_request.code, file=sys.stderr)
        return 1
    except EmulatorError:
        return 1  # reported at the end, with those that the program swallowed
    except Exception as error:
        traceback.print_exception(error.with_traceback(_from_program(error.__traceback__, program)))
        return 1
    return 0


def _from_program(trace: TracebackType | None, program: str) -> TracebackType | None:
    """A traceback without the frames of this module and of runpy, which come before the program's first."""
    start = trace
    while start is not None and start.tb_frame.f_code.co_filename != program:
        start = start.tb_next
    return start or trace


def _table(records: list[LaunchRecord]) -> str:
    """The launches, consecutive ones that differ in nothing but their time counted together."""
    rows: list[list] = []
    for record in records:
        shape = [" × ".join(map(str, size)) for size in (record.grid, record.cluster, record.block)]
        key = [record.name, *shape, str(record.shared_bytes)]
        if rows and rows[-1][0] == key:
            rows[-1][1] += 1
            rows[-1][2] += record.seconds
        else:
            rows.append([key, 1, record.seconds])
    head = ["kernel", "grid", "cluster", "block", "shared", "launches", "seconds"]
    cells = [head, *([short_name(key[0]), *key[1:], str(count), f"{seconds:.3f}"] for key, count, seconds in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def _report(quiet: bool) -> None:
    records = launches()
    if records and not quiet:
        seconds = sum(record.seconds for record in records)
        print(f"\nemulator: {len(records)} launches in {seconds:.2f} s\n{_table(records)}", file=sys.stderr)
        families: dict[str, float] = {}
        for record in records:
            for family, spent in record.profile.items():
                families[family] = families.get(family, 0.0) + spent
        for family, spent in sorted(families.items(), key=lambda item: -item[1]):
            print(f"  {family:<16} {spent:8.3f} s", file=sys.stderr)
    for number, finding in enumerate(findings(), 1):
        print(f"\nemulator: finding {number}, {type(finding).__name__}:\n  {finding}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    if not options.module and not os.path.exists(options.program):
        parser.error(f"there is no {options.program}; -m runs a module by its name")
    # The compiler reads it when it is imported. Findings name the kernel's source lines then; the code is the same.
    os.environ.setdefault("CUTE_DSL_LINEINFO", "1")
    from cute_attn.emulator import foreign  # brings PyTorch, which --help does without

    names = ("seed", "races", "accumulation", "multiprocessors", "uninitialized_shared", "profile")
    changes = {name: getattr(options, name) for name in names}
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(settings(**changes))
            recorder = stack.enter_context(trace(options.trace)) if options.trace else None
        except (ValueError, OSError) as error:
            parser.error(str(error))
        foreign.install(options.arch)
        status = _run(options.program, options.arguments, options.module)
    _report(options.quiet)
    if recorder is not None and not options.quiet:
        print(f"\n{recorder.summary()}\nwritten to {options.trace}", file=sys.stderr)
    return status or int(bool(findings()))


if __name__ == "__main__":
    sys.exit(main())
