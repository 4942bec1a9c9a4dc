"""A page of the documentation that is partly generated: figures by file name, and the parts between its markers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .svg import Svg

__all__ = ["Page"]


@dataclass(frozen=True)
class Page:
    """file: a Markdown file in docs/; figures: by name, docs/figures/`name`.svg; parts: by name, Markdown."""

    file: str
    figures: dict[str, Callable[[], Svg]]
    parts: dict[str, Callable[[], str]]

    def filled(self, text: str) -> str:
        """The page's text with every part made anew.

        Raises KeyError for a marker without a part, or a part without a marker.
        """
        seen = []

        def part(match: re.Match[str]) -> str:
            seen.append(match[1])
            return f"<!-- begin: {match[1]} -->\n\n{self.parts[match[1]]()}\n\n<!-- end -->"

        text = re.sub(r"<!-- begin: ([\w ]+) -->\n.*?<!-- end -->", part, text, flags=re.DOTALL)
        if missing := [name for name in self.parts if name not in seen]:
            raise KeyError(f"{self.file} has no place for {', '.join(missing)}")
        return text
