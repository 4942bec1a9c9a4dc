"""Writes docs/findings.md from the kernels in docs/findings/: runs each with its bug and without it.

python docs/make_findings.py [--check]

With --check nothing is written; the exit status says whether the page is what would be. Stops with an error if an
example does not raise what it says, or raises something when it is fixed.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import inspect
import itertools
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["CUTE_DSL_LINEINFO"] = "1"  # before cutlass is imported

from cute_attn.emulator import errors, foreign

foreign.install("sm_90a")

if TYPE_CHECKING:
    from findings.example import Example

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "findings.md"
MODULES = ("memory", "warps", "barriers", "races", "wgmma", "launches")
WIDTH = 120

INTRODUCTION = """\
# What the emulator finds

Every kind of finding of [the emulator](emulator.md), with small kernels that have the bug. They are in
[docs/findings/](findings/). This page is written by `python docs/make_findings.py`, which compiles and runs each of
them for `sm_90a`; the tests do the same and compare. `fixed` is a compile-time flag: the message is what the emulator
says without it, and with it there is none.

A message says what happened and then where: the PTX instruction with its line of the source, the kernel, and the first
thread for which it happened. Lines that a message names are marked below. They are the compiler's: an instruction
without a line of its own, as those of `wgmma`, has that of the instruction before it. Numbers of registers are the
compiler's, too. Addresses and the long names of kernels are cut short here.

Source lines are there for programs compiled with line information (`CUTE_DSL_LINEINFO=1`), which
`python -m cute_attn.emulator` and `cute-attn check` see to.
"""

WITHOUT_EXAMPLE = """\
## Without an example

No kernel for these: programs of the CuTe DSL do not reach them on the architectures that the emulator pretends to be,
or they are not about kernels.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    arguments = parser.parse_args()
    page = make_page()
    if not arguments.check:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    committed = PAGE.read_text(encoding="utf-8")
    if comparable(page) == comparable(committed):
        return 0
    difference = difflib.unified_diff(committed.splitlines(), page.splitlines(), "findings.md", "its examples", n=1)
    print("docs/findings.md is not what its examples print: run python docs/make_findings.py", file=sys.stderr)
    print("\n".join(itertools.islice(difference, 60)), file=sys.stderr)
    return 1


def comparable(page: str) -> str:
    """A page without what another version of the compiler may number, and hence wrap, differently."""
    return " ".join(re.sub(r"%(r|rd|p|P)\d+", r"%\1", page).split())


def make_page() -> str:
    for name in MODULES:
        importlib.import_module(f"findings.{name}")
    from findings.example import EXAMPLES

    kinds = list(dict.fromkeys(example.error for example in EXAMPLES))
    others = [kind for kind in all_findings() if kind not in kinds]
    by_kind = sorted(EXAMPLES, key=lambda example: kinds.index(example.error))
    parts = [INTRODUCTION, table(by_kind)]
    for kind, examples in itertools.groupby(by_kind, lambda example: example.error):
        parts += [f"## {kind.__name__}\n", f"{prose(kind)}\n", *map(section, examples)]
    parts += [WITHOUT_EXAMPLE, "\n".join(f"* `{kind.__name__}`: {prose(kind)}" for kind in others) + "\n"]
    return "\n".join(parts)


def all_findings() -> list[type[errors.EmulatorError]]:
    """In the order of their definition."""
    found = [kind for kind in vars(errors).values() if inspect.isclass(kind)]
    return [kind for kind in found if issubclass(kind, errors.EmulatorError) and kind is not errors.EmulatorError]


def prose(kind: type) -> str:
    """What an exception means: the first paragraph of its docstring, on one line."""
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


def table(examples: list[Example]) -> str:
    rows = ["| finding | examples |", "|---|---|"]
    for kind, group in itertools.groupby(examples, lambda example: example.error):
        links = ", ".join(f"[{title}](#{anchor(title)})" for title in (documentation(e)[0] for e in group))
        rows.append(f"| `{kind.__name__}` | {links} |")
    return "\n".join(rows) + "\n"


def anchor(title: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def section(example: Example) -> str:
    title, before, after = documentation(example)
    message = shown(str(findings_of(example)), example)
    return "\n".join(
        [
            f"### {title}\n",
            f"{before}\n",
            f"```python\n{excerpt(example, message)}\n```\n",
            f"```text\n{wrapped(message)}\n```\n",
            f"{after}\n",
        ]
    )


def findings_of(example: Example) -> errors.EmulatorError:
    """The finding of an example. Raises RuntimeError if it is another one, or there is one when it is fixed."""
    found, left = example.run(fixed=False), example.run(fixed=True)
    if type(found) is not example.error:
        raise RuntimeError(f"{example.name} should raise {example.error.__name__}, and it raised {found!r}")
    if left is not None:
        raise RuntimeError(f"{example.name} is fixed, and it raised {left!r}")
    return found


def documentation(example: Example) -> tuple[str, str, str]:
    """(title, what is wrong, what the message means and how to mend it), from the kernel's docstring."""
    title, before, *after = (inspect.getdoc(inspect.unwrap(example.kernel)) or "").split("\n\n")
    return title, before, "\n\n".join(after)


def shown(message: str, example: Example) -> str:
    """A message without what depends on the machine or the run."""
    message = message.replace(f"{DOCS.parent}/", "")
    message = re.sub(r"\bkernel_cutlass_\w+", example.name, message)
    return re.sub(r"0x[0-9a-f]{9,}", "0x…", message)


def wrapped(message: str) -> str:
    """Long lines broken, but not inside of coordinates and lists."""
    message = re.sub(r"[(\[](\d+, )+\d+[)\]]", lambda match: match[0].replace(" ", "\0"), message)
    lines = (
        textwrap.fill(line, WIDTH, subsequent_indent=" " * (len(line) - len(line.lstrip()) + 4), break_long_words=False)
        for line in message.splitlines()
    )
    return "\n".join(lines).replace("\0", " ")


def excerpt(example: Example, message: str) -> str:
    """The kernel without its docstring and our decorator; lines that the message names are marked."""
    path = Path(example.source)
    lines = path.read_text(encoding="utf-8").splitlines()
    tree = ast.parse("\n".join(lines))
    kernel = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == example.name)
    named = {int(n) for n in re.findall(rf"\({re.escape(str(path.relative_to(DOCS.parent)))}:(\d+)\)", message)}
    body = kernel.body[1].lineno
    kept = [kernel.decorator_list[-1].lineno, *range(kernel.lineno, kernel.body[0].lineno)]
    kept += range(body, (kernel.end_lineno or body) + 1)
    return "\n".join(lines[n - 1] + (f"  # line {n}" if n in named else "") for n in kept)


if __name__ == "__main__":
    sys.exit(main())
