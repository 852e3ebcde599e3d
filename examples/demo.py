"""What Craton does, on real input: a chat model answers, and an encoder finds documentation. `make demo` runs it."""

from __future__ import annotations

import importlib
import inspect
import time

import craton
from craton import store

QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the ocean.",
    "Why is the sky blue?",
]
MODULES = ["bisect", "calendar", "collections", "csv", "difflib", "fnmatch", "functools", "glob", "gzip", "hashlib"]
MODULES += ["heapq", "itertools", "json", "random", "re", "shutil", "statistics", "string", "textwrap", "zipfile"]
SEARCHES = [
    "How do I keep a sorted list sorted when I insert into it?",
    "remember the results of earlier calls of a function",
    "make a whole directory tree disappear",
]


def docstrings() -> dict[str, str]:
    """The first paragraph of every documented function and class of some standard modules."""
    passages = {}
    for module in map(importlib.import_module, MODULES):
        for name, thing in vars(module).items():
            # Some modules are written in C: bisect.insort says that it is from _bisect.
            home = (getattr(thing, "__module__", None) or "").removeprefix("_")
            if not name.startswith("_") and callable(thing) and home == module.__name__:
                paragraph = (inspect.getdoc(thing) or "").split("\n\n")[0]
                if len(paragraph) > 20:
                    passages[f"{module.__name__}.{name}"] = f"{module.__name__}.{name}: {paragraph[:600]}"
    return passages


def chat() -> None:
    """Three questions, answered as they come."""
    started = time.perf_counter()
    model = craton.load("smollm2-135m-instruct")
    print(f"{model.name}, loaded in {time.perf_counter() - started:.1f} s")
    for decision in model.plan.decisions:
        print(f"  {decision}")
    for question in QUESTIONS:
        print(f"\n› {question}")
        stream = model.chat([{"role": "user", "content": question}], stream=True, max_tokens=48)
        for piece in stream:
            print(piece, end="", flush=True)
        done = stream.completion
        print(
            f"\n  [{done.tokens_per_second:.0f} tokens/s, first token after {done.first_token_seconds * 1000:.0f} ms]"
        )


def search() -> None:
    """The nearest docstring to each question, by cosine."""
    model = craton.load("minilm-l6-v2")
    passages = docstrings()
    names, texts = list(passages), list(passages.values())
    started = time.perf_counter()
    vectors = model.embed(texts)
    seconds = time.perf_counter() - started
    print(f"\n{model.name}: {len(texts)} docstrings of the standard library in {seconds:.1f} s")
    for decision in model.plan.decisions:
        print(f"  {decision}")
    for query in SEARCHES:
        scores = vectors @ model.embed(query)[0]
        best = int(scores.argmax())
        first_line = texts[best].partition(": ")[2].splitlines()[0]
        print(f"\n› {query}\n  {names[best]}  (cosine {float(scores[best]):.2f})\n  {first_line}")


if __name__ == "__main__":
    for name in ("smollm2-135m-instruct", "minilm-l6-v2"):
        store.pull(name)
    chat()
    search()
