"""PTX as text: comments, braces, statements and lists of operands."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .errors import ParseError


def strip_comments(ptx: str) -> str:
    pattern = r'("(?:[^"\\]|\\.)*")|//[^\n]*|/\*.*?\*/'
    return re.sub(pattern, lambda m: m[1] or " ", ptx, flags=re.S)


def matching_brace(text: str, start: int) -> int:
    """Where the brace at `start` is closed."""
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise ParseError("unbalanced braces in the PTX text")


def tokenize(body: str) -> Iterator[tuple[str, str]]:
    """Yields ("open" | "close" | "label" | "loc" | "statement", text) in order."""
    scan = re.compile(
        r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<loc>\.(?:loc|file)\b[^\n]*)|(?P<label>[\w$%]+)\s*:(?!:)"
        r"|(?P<statement>[^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)"
    )
    position = 0
    end = len(body.rstrip())
    while position < end:
        match = scan.match(body, position)
        if match is None or match.end() == position:
            raise ParseError(f"cannot parse PTX near: {body[position : position + 80].strip()!r}")
        position = match.end()
        kind = str(match.lastgroup)
        if text := " ".join(match[kind].split()):
            yield kind, text


def split_operands(text: str) -> list[str]:
    """Splits at commas outside brackets: "{%r1, %r2}, [%rd1+8]" -> ["{%r1, %r2}", "[%rd1+8]"]."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,{\[(])+", text)
    return [p.strip() for p in parts if p.strip()]
