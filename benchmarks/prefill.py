"""How fast Craton reads a prompt, beside transformers and llama.cpp, from the same weights in the same run.

Cases
    prefill/KIND/prompt=P/threads=T  tokens/s of reading a prompt of P tokens, the first token's logits included

Kinds, contenders and rounds are those of `decode.py`: each turn reads another prompt, which no cache holds, and turns
interleave. transformers reads through its bare forward pass and keeps the last row's logits, in its better dtype.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from contenders.weights import plain_folder
from decode import AS_PUBLISHED, MODEL, PACKAGES, Scope, line_up, published_file
from harness import Case, Document, machine, parser, report

FULL = Scope((AS_PUBLISHED, "q4_0", "q8_0", "bf16"), (32, 128, 512), rounds=7, steps={}, processes=False)
QUICK = Scope((AS_PUBLISHED, "q8_0"), (32, 512), rounds=3, steps={}, processes=False)


def main() -> None:
    """Measure, print the table, write the JSON."""
    arguments = parser(__doc__.partition("\n")[0]).parse_args()
    facts = machine(PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        cases = measure(published_file(MODEL), QUICK if arguments.quick else FULL, Path(folder))
    report(Document(machine=facts, cases=cases), arguments.json)


def measure(published: Path, scope: Scope, folder: Path) -> dict[str, Case]:
    """All cases of the scope, by name. `folder` takes the weights in their other forms."""
    cases: dict[str, Case] = {}
    with ExitStack() as stack:
        race = line_up(stack, published, plain_folder(published, folder), scope, folder)
        for length in scope.prompts:
            for threads in scope.threads:
                setting = f"prompt={length}/threads={threads}"
                print(f"{setting} ...", file=sys.stderr, flush=True)
                read = race.run("read", scope.rounds, threads=threads, batch=1, length=length)
                for kind in scope.kinds:
                    cases[f"prefill/{kind}/{setting}"] = race.case(read, kind, "tokens/s")
    return dict(sorted(cases.items(), key=lambda item: scope.kinds.index(item[0].split("/")[1])))


if __name__ == "__main__":
    main()
