"""Source code: the text as it stands; for Python, classes and functions are its headings."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from typing import Final

from craton.retrieval.documents import Heading
from craton.retrieval.reading.content import Content

MAX_PARSED: Final = 4 << 20
"""Characters of Python that are parsed: a syntax tree takes a hundred times the memory of its source."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def python_source(text: str) -> Content:
    """The content of a Python file: definitions of the module are headings of level 2, those in classes of level 3.

    What Python cannot parse is text without headings.
    """
    tree = parse_python(text)
    if tree is None:
        return Content(text)
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    headings = []
    for level, node in _definitions(tree.body, 2):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        headings.append(Heading(level, node.name, starts[first - 1]))
    return Content(text, headings=tuple(sorted(headings, key=lambda heading: heading.start)))


def parse_python(text: str) -> ast.Module | None:
    """The syntax tree, or None for what is no Python of this version."""
    if len(text) > MAX_PARSED:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's escape sequences
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, and those under its conditions and attempts: all that may define a name there."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            yield from statements([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            handled = [inner for handler in node.handlers for inner in handler.body]
            yield from statements([*node.body, *node.orelse, *handled, *node.finalbody])
        elif isinstance(node, ast.With):
            yield from statements(node.body)


def _definitions(body: list[ast.stmt], level: int) -> Iterator[tuple[int, Definition]]:
    for node in statements(body):
        if isinstance(node, Definition):
            yield level, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node.body, level + 1)
