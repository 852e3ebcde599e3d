"""Prompts in the store: every version is kept, and what used one can say which."""

from __future__ import annotations

from pathlib import Path

from craton.checkpoints.disk import replace_file
from craton.checkpoints.sources import SourceKind
from craton.errors import UsageError
from craton.prompting.prompt import SUFFIXES, Prompt, prompt_toml, read_prompt
from craton.store import find
from craton.store.artifacts import FILE_PREFIX, MARKS, RUN_PREFIX, publish_model
from craton.store.models import StoredModel


def save_prompt(prompt: Prompt, name: str, *, file: str | None = None, run: str | None = None) -> StoredModel:
    """Store a prompt as the next version of `name`. file, run: where it comes from, one of the two."""

    def build(folder: Path) -> None:
        replace_file(folder / MARKS[SourceKind.PROMPT], prompt_toml(prompt).encode())

    source = f"{RUN_PREFIX}{run}" if run is not None else f"{FILE_PREFIX}{file}"
    return publish_model(name, build, source=source, parents=(), licence=None)


def load_prompt(name_or_path: str) -> Prompt:
    """The prompt in a file, or of this name in the store. Raises UsageError for something else of that name."""
    if Path(name_or_path).suffix.lower() in SUFFIXES:
        return read_prompt(name_or_path)
    stored = find(name_or_path)
    if stored.kind not in (SourceKind.PROMPT, SourceKind.APPLICATION):
        raise UsageError(f"{name_or_path} is no prompt", remedy="craton list shows what is one")
    return read_prompt(stored.path / MARKS[SourceKind.PROMPT])
