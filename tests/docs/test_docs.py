"""The manual says what the code does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from craton.cli import app
from craton.config.resolve import section_of

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
    assert [model for _, _, model in generator.SETTINGS if generator.undocumented(model)] == []


def test_every_settings_class_that_is_flags_or_a_recipe_is_in_the_reference(generator):
    shown = {model for _, _, model in generator.SETTINGS}
    for model in list(shown):
        sections = {section_of(field.annotation) for field in model.model_fields.values()} - {None}
        assert sections <= shown, model.__name__


def test_every_verb_is_in_the_reference(generator):
    text = (DOCS / "commands.md").read_text(encoding="utf-8")
    words = [" ".join(verb) for verb in generator.verbs(app)]
    assert {"generate", "pretrain", "finetune", "data inspect", "tokenizer train", "runs resume"} <= set(words)
    assert [verb for verb in words if f"## craton {verb}\n" not in text] == []


def test_links_in_the_manual_lead_somewhere():
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_test_that_the_manual_names_is_there():
    named = set(re.findall(r"`(test_\w+)`", (DOCS / "pitfalls.md").read_text(encoding="utf-8")))
    written = "".join(path.read_text(encoding="utf-8") for path in (DOCS.parent / "tests").rglob("test_*.py"))
    assert sorted(name for name in named if f"def {name}(" not in written) == []
