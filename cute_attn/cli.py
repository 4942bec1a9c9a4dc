"""The ``cute-attn`` command."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# Modules of cute_attn.commands, each imported only when its command runs.
COMMANDS = {
    "demo": "run a real transformer through the compiled kernels and show the error",
    "info": "devices, architectures, recipes and versions",
    "compile": "compile a kernel for an architecture and print its registers, spills and main-loop cost",
    "check": "run a kernel against its simulator, and the simulator against float64",
    "bench": "measure ours and every installed peer on this GPU",
    "trace": "draw what every warp of a kernel does and waits for, as a file for ui.perfetto.dev",
}


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cute-attn", description="Low-bit attention in the CuTe DSL, with or without a GPU."
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=summary)
        if name in argv:
            importlib.import_module(f"cute_attn.commands.{name}").add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 right, 1 a check failed, 2 wrong usage."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(argv)
    arguments = parser.parse_args(argv)
    if arguments.version:
        from cute_attn import __version__

        print(__version__)
        return 0
    if arguments.command is None:
        parser.print_help()
        return 2
    try:
        return importlib.import_module(f"cute_attn.commands.{arguments.command}").run(arguments)
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"cute-attn {arguments.command}: {error}", file=sys.stderr)
        return 2
