"""A process that compiles grammars and is killed where one takes too long: `python -m craton.inference.grammar_worker`.

Reads orders from standard input, one JSON object a line: {"grammar": llguidance's form, "seconds": how long it may
take}. Answers each with a line once the grammar is compiled, for better or worse. Holds nothing of what it compiled.
"""

from __future__ import annotations

import json
import signal
import sys
from types import ModuleType
from typing import Any


def compile_grammar(library: ModuleType, tokenizer: Any, grammar: str) -> Any:
    """llguidance's matcher at the beginning of a grammar; it says itself whether it is in error. llguidance limits most
    of its work by its own measures (fuel, states, items), though not all."""
    limits = library.LLParserLimits(verbose_errors=False)
    return library.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


def main() -> None:
    """Answer orders until the input ends."""
    import llguidance

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of an interrupted answer; this process ends with its input
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel ends it, whatever it is in
    # Of all tokenizers, bytes: what takes long to compile is the grammar, and hardly depends on the vocabulary.
    tokenizer = llguidance.LLTokenizer("byte")
    for line in sys.stdin:
        order = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, order["seconds"])
        compile_grammar(llguidance, tokenizer, order["grammar"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        print("{}", flush=True)


if __name__ == "__main__":
    main()
