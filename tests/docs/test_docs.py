"""The manual says what the code does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from craton.inference.settings import SamplingSettings

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["commands", "settings"])
def test_the_references_are_up_to_date(generator, name):
    written = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert written == getattr(generator, name)(), "run `make docs`"


def test_every_setting_is_documented(generator):
    assert generator.undocumented(SamplingSettings) == []


def test_every_verb_is_in_the_reference(generator):
    text = (DOCS / "commands.md").read_text(encoding="utf-8")
    for verb in ("pull", "list", "show", "verify", "rm", "chat", "generate", "embed"):
        assert f"## craton {verb}\n" in text


def test_links_in_the_manual_lead_somewhere():
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
