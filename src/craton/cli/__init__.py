"""The command line: one thin file for each verb. Nothing here imports torch before a verb needs it."""

from __future__ import annotations

import json
import os
import sys
import traceback

from cyclopts import App, Group

from craton import __version__
from craton.errors import CratonError

MODELS, TEXT = Group("Models", sort_key=1), Group("Text", sort_key=2)

app = App(
    name="craton",
    version=__version__,
    help="One codebase for the whole life of a foundation model. Start with: craton chat",
    help_epilogue="Exit codes: 0 ok; 1 a negative finding; 2 wrong use or bad input; 3 a fault of Craton's.",
)
for verb, group, line in (
    ("pull", MODELS, "Fetch a model, or register one that lies on this machine."),
    ("list", MODELS, "List the models in the store."),
    ("show", MODELS, "Show what a model is: architecture, size, context, licence, template, lineage."),
    ("export", MODELS, "Write a model as a GGUF file or in Hugging Face's layout."),
    ("verify", MODELS, "Check a stored model's files against their checksums."),
    ("rm", MODELS, "Remove a model from the store."),
    ("chat", TEXT, "Talk with a model."),
    ("generate", TEXT, "Continue a text, or a batch of them from JSON lines."),
    ("embed", TEXT, "Turn texts into vectors."),
):
    module = {"list": "list_models", "rm": "remove"}.get(verb, verb)
    app.command(f"craton.cli.{module}:{module}", name=verb, help=line, group=group)


def main() -> None:
    """Entry point of the `craton` command."""
    try:
        app(sys.argv[1:])
    except CratonError as error:
        _report(error)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`| head`); keep the interpreter's last flush from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception:
        traceback.print_exc()
        print("\nThis is a fault of Craton's, not yours. Please report it with the lines above.", file=sys.stderr)
        sys.exit(3)


def _report(error: CratonError) -> None:
    if "--json" in sys.argv:
        print(json.dumps({"error": error.as_dict()}, ensure_ascii=False))
        return
    from craton.cli.terminal import stderr

    stderr.print(f"[bold red]error:[/] {stderr.escape(error.what)}")
    if error.where:
        stderr.print(f"  [dim]where:[/] {stderr.escape(error.where)}")
    if error.remedy:
        stderr.print(f"  [dim]remedy:[/] {stderr.escape(error.remedy)}")
