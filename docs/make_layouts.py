"""Writes the figures and tables of docs/int8_layouts.md and docs/hopper.md from the objects that the kernels use.

python docs/make_layouts.py [--check]

No GPU is needed. With --check nothing is written; the exit status says whether pages and figures are what would be.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import sys
from pathlib import Path

os.environ["CUTE_DSL_LINEINFO"] = "1"  # before cutlass is imported: instructions are told by the line that made them

from layouts.int8_page import INT8
from layouts.warpgroup.page import HOPPER

DOCS = Path(__file__).resolve().parent
PAGES = (INT8, HOPPER)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    arguments = parser.parse_args()
    made = {DOCS / page.file: page.filled((DOCS / page.file).read_text(encoding="utf-8")) for page in PAGES}
    for page in PAGES:
        made |= {DOCS / "figures" / f"{name}.svg": draw().render() for name, draw in page.figures.items()}
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    stale += [path for path in (DOCS / "figures").glob("*.svg") if path not in made]
    if not arguments.check:
        (DOCS / "figures").mkdir(exist_ok=True)
        for path in stale:
            if path in made:
                path.write_text(made[path], encoding="utf-8")
            else:
                path.unlink()
        return 0
    for path in stale:
        print(f"{path.relative_to(DOCS.parent)} is stale: run python docs/make_layouts.py", file=sys.stderr)
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = difflib.unified_diff(before.splitlines(), made.get(path, "").splitlines(), "there", "made now", n=1)
        print("\n".join(line[:300] for line in itertools.islice(lines, 20)), file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
