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
PICTURES, SOUND = Group("Pictures", sort_key=2.2), Group("Sound", sort_key=2.5)
TRAINING = Group("Training", sort_key=3)
ADAPTING = Group("Adapting and judging", sort_key=4)
SHRINKING = Group("Making smaller and faster", sort_key=5)
SERVING = Group("Serving", sort_key=6)

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
    ("embed", TEXT, "Turn texts, pictures or recordings into vectors."),
    ("classify", PICTURES, "Say what pictures show, of any classes or of a trained head's."),
    ("search", PICTURES, "Find pictures of a folder by a text or by a picture."),
    ("segment", PICTURES, "Cut out of a picture what a click or a box means, or everything."),
    ("probe", PICTURES, "Measure a model's vectors of pictures by classes learnt on top of them."),
    ("features", PICTURES, "Take the vectors of a picture's patches from a model's layers."),
    ("transcribe", SOUND, "Write down what is said in sound files."),
    ("tokenizer", TRAINING, "Train a tokeniser, measure it, extend a model's by a new language."),
    ("data", TRAINING, "Look at data before a run, and prepare it."),
    ("pretrain", TRAINING, "Train a model on text, from nothing or from another model."),
    ("pretrain-images", TRAINING, "Train a Vision Transformer on pictures, with labels or without."),
    ("pretrain-pairs", TRAINING, "Train pictures and texts into one space, from pictures with captions."),
    ("pretrain-masks", TRAINING, "Train a model that segments what a click or a box means, from masks."),
    ("pretrain-chat", TRAINING, "Join a CLIP and a language model into one that chats about pictures."),
    ("pretrain-speech", TRAINING, "Train a model that writes down speech, from recordings with their texts."),
    ("scaling", TRAINING, "Train a ladder of small models and foretell a larger one's loss."),
    ("finetune", TRAINING, "Teach a model a task: chats, classes, vectors, preferences."),
    ("merge", TRAINING, "Merge an adapter into its base model, or several models into one."),
    ("compare", ADAPTING, "Prompt, retrieve or fine-tune? Measure the ways on your own task."),
    ("prompt", ADAPTING, "Run prompt files, search for better ones, keep them in the store."),
    ("index", ADAPTING, "Index documents for questions: add, update, tune, show and remove."),
    ("ask", ADAPTING, "Answer a question from indexed documents, each sentence with its quote."),
    ("eval", ADAPTING, "Measure models on tasks, with intervals and paired tests."),
    ("shrink", SHRINKING, "How small can it be for a task? A ladder of smaller models, measured."),
    ("quantize", SHRINKING, "Store a model's weights in 8, 4, 3 or 2 bits."),
    ("prune", SHRINKING, "Remove single weights, or layers, heads, channels and vocabulary."),
    ("distill", SHRINKING, "Teach a smaller model what a larger one thinks of every token."),
    ("convert", SHRINKING, "Give a model a longer context, sliding windows or experts."),
    ("serve", SERVING, "Serve models over HTTP, for OpenAI's and Anthropic's clients."),
    ("bench", SERVING, "Measure servers under load."),
    ("runs", TRAINING, "List runs; show, compare, resume, apply or remove them."),
):
    module = {"list": "list_models", "rm": "remove", "eval": "evaluate"}.get(verb, verb).replace("-", "_")
    app.command(f"craton.cli.{module}:{module}", name=verb, help=line, group=group)


def main() -> None:
    """Entry point of the `craton` command."""
    status = _run()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Beside other ranks, leave at once: threads of gloo live on after its groups, and one that frees a Python
        # object while the interpreter goes down aborts the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _run() -> int:
    try:
        app(sys.argv[1:])
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except CratonError as error:
        _report(error)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`| head`); keep the interpreter's last flush from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception:
        traceback.print_exc()
        print("\nThis is a fault of Craton's, not yours. Please report it with the lines above.", file=sys.stderr)
        return 3
    return 0


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
