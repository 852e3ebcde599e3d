"""A task that is on every machine: questions about the Python standard library, against its own docstrings.

The rule: for every public function and method of the modules below that has a docstring and a parameter whose default
is a number or a text, ask what that default is; the right answer is the default as the signature has it. The document
that holds it is the docstring under its signature. A split never cuts a module, so what is trained on teaches the form
of an answer and no fact of the test.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Final

import numpy as np

from craton.evaluation.items import Item
from craton.evaluation.tasks import Sealed, SplitSettings, Task, split_by_group, without_leaks
from craton.retrieval.documents import Document
from craton.retrieval.readers import find_sources

NAME: Final = "stdlib"
SMALL_NAME: Final = "stdlib-small"
# Small ones that such questions can be asked about: they are read and embedded within a minute on two cores.
SMALL_MODULES: Final = (
    *(
        "re",
        "bisect",
        "timeit",
        "textwrap",
        "pprint",
        "difflib",
        "warnings",
        "argparse",
        "tempfile",
        "random",
        "pickle",
    ),
    *(
        "optparse",
        "calendar",
        "doctest",
        "codecs",
        "zipfile",
        "fileinput",
        "tarfile",
        "statistics",
        "urllib",
        "smtplib",
    ),
    *("ftplib", "sqlite3", "shutil", "lzma", "gzip", "io"),
)
MODULES: Final = (
    *SMALL_MODULES,
    *(
        "threading",
        "socket",
        "imaplib",
        "ssl",
        "multiprocessing",
        "traceback",
        "inspect",
        "logging",
        "email",
        "pathlib",
    ),
    *("http", "webbrowser", "functools", "base64", "os", "subprocess", "configparser", "asyncio", "unittest", "json"),
    *("socketserver", "wsgiref", "decimal", "xml"),
)
MOST_OF_A_MODULE: Final = 8
"""So that no module outweighs the others."""


def library_task(name: str = NAME, seed: int = 0) -> Task:
    """The task; SMALL_NAME asks about fewer modules."""
    modules = MODULES if name == NAME else SMALL_MODULES
    items: list[Item] = []
    for module in modules:
        found = [item for s in find_sources([f"package:{module}"]) for d in s.documents() for item in _items(d, module)]
        chosen = np.random.default_rng([seed, len(found)]).permutation(len(found))[:MOST_OF_A_MODULE]
        items += [found[i] for i in sorted(chosen.tolist())]
    train, dev, test = split_by_group(items, SplitSettings(train=0.25, dev=0.13, seed=seed))
    train, dev, leaks = without_leaks(train, dev, test)
    return Task(
        name=name,
        kind="answer",
        metric="exact_match",
        train=tuple(train),
        dev=tuple(dev),
        test=Sealed(test),
        docs=tuple(f"package:{module}" for module in modules),
        leaks=leaks,
        decisions=(f"{len(items)} questions by rule about {len({i.group for i in items})} modules, split by module",),
    )


def _items(document: Document, module: str) -> Iterator[Item]:
    signature, _, rest = document.text.partition("\n\n")
    name, bracket, arguments = signature.partition("(")
    if not bracket or not rest.strip() or any(part.startswith("_") for part in name.split(".")):
        return
    try:
        tree = ast.parse(f"def f({arguments}: pass").body[0]
    except SyntaxError:
        return
    assert isinstance(tree, ast.FunctionDef)
    positional = [*tree.args.posonlyargs, *tree.args.args]
    with_default = [
        *zip(positional[len(positional) - len(tree.args.defaults) :], tree.args.defaults, strict=True),
        *zip(tree.args.kwonlyargs, tree.args.kw_defaults, strict=True),
    ]
    for parameter, default in with_default:
        # None, True and False are too easily guessed.
        if isinstance(default, ast.Constant) and isinstance(default.value, int | float | str) and default.value != "":
            if isinstance(default.value, bool):
                continue
            yield Item(
                id=f"{name}:{parameter.arg}",
                input=f"What is the default value of {parameter.arg} in {name}?",
                answers=tuple(dict.fromkeys([ast.unparse(default), str(default.value)])),
                group=module,
                gold=(document.name,),
            )
