"""Conversations of very unequal length from text that every machine has: docstrings of Python's standard library."""

from __future__ import annotations

import ast
import math
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from craton.data.example import TokenSequence
from craton.data.records import Record
from craton.data.rendering import Renderer
from craton.modalities.text import Tokenizer

SHORTEST, LONGEST = 30, 900  # tokens
TOKEN_CHARACTERS = 4  # of English, about

Message = dict[str, str]


def docstring_sequences(count: int, tokenizer: Tokenizer, seed: int) -> list[TokenSequence]:
    """`count` conversations in the tokeniser's own chat template, what the assistant says trained.

    The same for every contender and run with one version of Python.
    """
    renderer = Renderer(tokenizer, "messages")
    sequences: list[TokenSequence] = []
    for messages in _chats(random.Random(seed)):
        record = Record({"messages": messages, "tools": None}, "docstrings")
        (sequence,) = renderer.render(record).sequences
        if SHORTEST <= len(sequence) <= LONGEST:
            sequences.append(sequence)
        if len(sequences) == count:
            break
    return sequences


def _chats(rng: random.Random) -> Iterator[list[Message]]:
    """Without end: questions on one module after another until a length is reached, which is log-uniform."""
    modules = _docstrings()
    names = sorted(modules)
    while True:
        module = rng.choice(names)
        members = modules[module]
        first = rng.randrange(len(members))
        wanted = TOKEN_CHARACTERS * math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST)))
        messages: list[Message] = []
        for name, text in members[first:]:
            messages.append({"role": "user", "content": f"What is {name} in Python's module {module}?"})
            messages.append({"role": "assistant", "content": text})
            if sum(len(message["content"]) for message in messages) > wanted:
                break
        yield messages


def _docstrings() -> dict[str, list[tuple[str, str]]]:
    """(name, docstring) of the documented classes and functions of each top-level module of pure Python."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"):
        nodes: list[Any] = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        documented = [
            (node.name, text)
            for node in nodes
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node))
        ]
        if documented:
            found[path.stem] = documented
    return found
