"""What Craton does, on real input: a chat model answers, and then the question that every owner of a model asks is
decided by measurement: prompt, retrieve or fine-tune? `make demo` runs it; `--full` asks about the whole library."""

from __future__ import annotations

import subprocess
import sys
import time

import craton
from craton import store
from craton.compare.library_task import NAME, SMALL_NAME

QUESTIONS = ["What is the capital of France?", "Write one sentence about the ocean."]
# Small enough for a few minutes on two cores; without --full, also fewer candidates and one seed.
SMALL = ["--seeds", "1", "--trials", "5", "--minutes", "1"]


def chat() -> None:
    """Questions, answered as they come."""
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


def compare(full: bool) -> int:
    """Questions about the Python standard library against its docstrings (the rule: craton.compare.library_task)."""
    words = ["compare", NAME if full else SMALL_NAME, *([] if full else SMALL), "--apply"]
    print(f"\n$ craton {' '.join(words)}", flush=True)
    return subprocess.run([sys.executable, "-m", "craton.cli", *words], check=False).returncode


if __name__ == "__main__":
    for name in ("smollm2-135m-instruct", "minilm-l6-v2"):
        store.pull(name)
    chat()
    sys.exit(compare("--full" in sys.argv))
