"""The documentation says what is there: its examples run, and it names every option."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from cute_attn.emulator import __main__ as command
from cute_attn.emulator import errors
from cute_attn.emulator.settings import Settings

from .conftest import assert_page_is_current

DOCS = Path(__file__).parents[1] / "docs"


def test_findings_are_what_their_examples_print() -> None:
    """Each example raises its finding, its fixed twin none, and the page quotes them."""
    assert_page_is_current("make_findings.py")


def test_every_setting_and_option_of_the_emulator_is_documented() -> None:
    page = (DOCS / "emulator.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(Settings):
        assert f"`{field.name}=" in page, field.name
    for action in command._parser()._actions:
        for option in set(action.option_strings) - {"-h", "--help"}:
            assert f"`{option}" in page, option


def test_every_finding_is_documented() -> None:
    table = (DOCS / "emulator.md").read_text(encoding="utf-8")
    page = (DOCS / "findings.md").read_text(encoding="utf-8")
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.EmulatorError) and kind is not errors.EmulatorError:
            assert f"| `{kind.__name__}` |" in table, kind
            assert f"`{kind.__name__}`" in page, kind


def test_links_lead_somewhere() -> None:
    readme = DOCS.parent / "README.md"
    for page in (readme, *DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)", text):
            other = (page.parent / target).resolve() if target else page
            assert other.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in anchors, f"{page.name}: {target}#{anchor}"
