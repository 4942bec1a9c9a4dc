"""What a run leaves: rows, where they come from, and a JSON file that nobody edits by hand."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cute_attn.bench.contender import Formats
from cute_attn.bench.provenance import Clocks, Provenance
from cute_attn.bench.timing import Timing
from cute_attn.problem import Problem
from cute_attn.reference import Errors

__all__ = ["SCHEMA", "Results", "Row", "load"]

SCHEMA = 1
"""Of the file. A change that makes old files unreadable adds one."""


@dataclass(frozen=True)
class Row:
    """One contender on one problem.

    attention: attention alone; whole: with quantisation. Of a contender that does not quantise only `attention` is
               there. None where it was not measured
    errors:    of the output against float64, on a sample of the rows
    reason:    why something is missing; None if nothing is
    clocks:    of the GPU, while one of the contenders ran
    """

    problem: Problem
    contender: str
    ours: bool
    quantises: bool
    formats: Formats
    attention: Timing | None = None
    whole: Timing | None = None
    errors: Errors | None = None
    reason: str | None = None
    clocks: Clocks | None = None


@dataclass(frozen=True)
class Results:
    """A run.

    settings: what was asked for: inputs, seed, pace
    absent:   contender to the reason why it could not run at all
    """

    provenance: Provenance
    settings: dict[str, Any]
    absent: dict[str, str]
    rows: tuple[Row, ...]

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all, with a checksum of its contents."""
        contents = {"schema": SCHEMA, **asdict(self)}
        text = json.dumps({"checksum": _checksum(contents), **contents}, indent=1) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)


def _checksum(contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def load(path: Path) -> Results:
    """The results that `Results.save` wrote.

    Raises ValueError for a file of another schema, and for one whose contents are not those that were written.
    """
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        checksum = contents.pop("checksum")
        schema = contents.pop("schema")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of cute-attn bench: {error}") from error
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema}, this version reads {SCHEMA}: measure again")
    if checksum != _checksum({"schema": schema, **contents}):
        raise ValueError(f"{path} was changed after it was written; results are not edited by hand: measure again")
    rows = tuple(_row(row) for row in contents["rows"])
    return Results(Provenance(**contents["provenance"]), contents["settings"], contents["absent"], rows)


def _row(fields: dict[str, Any]) -> Row:
    kinds = {"attention": Timing, "whole": Timing, "errors": Errors, "clocks": Clocks}
    parts = {name: kind(**fields[name]) if fields[name] is not None else None for name, kind in kinds.items()}
    return Row(**{**fields, **parts, "problem": Problem(**fields["problem"]), "formats": Formats(**fields["formats"])})
