"""`craton serve`: models behind an OpenAI-compatible HTTP API, and the keys to it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from craton.cli.flags import Flags, given
from craton.cli.options import DEFAULT_CHAT_MODEL, DEFAULT_EMBED_MODEL, DType, Json, Threads
from craton.cli.pretrain import Recipe
from craton.cli.terminal import print_json, stderr
from craton.errors import UsageError
from craton.serving.settings import ServeSettings, check_exposure

KeyPath = Annotated[Path, Parameter(name="--api-key-file", help="the file of hashed keys; made if it is not there")]
KeyName = Annotated[str, Parameter(help="what logs call whoever has this key")]

serve = App(name="serve", help="Serve models over HTTP, for OpenAI's and Anthropic's clients.")
key = App(name="key", help="Make, list and remove API keys.")
serve.command(key)


@serve.default
def start(
    *models: Annotated[str, Parameter(help="models, adapters and applications to serve")],
    recipe: Recipe = None,
    settings: Flags[ServeSettings] | None = None,
    dtype: DType = "auto",
    threads: Threads = None,
) -> None:
    """Serve models until SIGTERM or Ctrl-C. Without names: the default models for chat and vectors."""
    from craton.config.resolve import FLAGS, read_toml, resolve

    layers = [(str(recipe), read_toml(recipe))] if recipe is not None else []
    chosen, _ = resolve(ServeSettings, [*layers, (FLAGS, given(settings))])
    check_exposure(chosen)
    gc.disable()  # nothing that is imported can go: to look for it costs a seventh of the imports' time
    try:
        from craton.serving.server import run
    except ImportError as error:
        raise UsageError(
            f"serving needs {error.name}, which is not installed", remedy="pip install craton[serve]"
        ) from None
    finally:
        gc.enable()
    run(models or (DEFAULT_CHAT_MODEL, DEFAULT_EMBED_MODEL), chosen, dtype=dtype, threads=threads)


@key.command
def add(
    name: KeyName,
    /,
    *,
    api_key_file: KeyPath,
    priority: Annotated[int, Parameter(help="-100 to 100: the higher is answered first")] = 0,
    admin: Annotated[bool, Parameter(help="may load and unload models", negative=())] = False,
) -> None:
    """Make a key. It is printed once, on standard output, and kept only as a hash."""
    from craton.serving.keys import KeyFile

    print(KeyFile(api_key_file).add(name, priority=priority, admin=admin))
    stderr.print("[dim]Keep it: it is not shown again.[/]")


@key.command(name="list")
def list_keys(*, api_key_file: KeyPath, json: Json = False) -> None:
    """List the names of keys."""
    from craton.serving.keys import KeyFile

    keys = KeyFile(api_key_file).keys()
    if json:
        print_json({"keys": [one.model_dump(include={"name", "created", "priority", "admin"}) for one in keys]})
        return
    for one in keys:
        print(f"{one.name}\t{one.created}\tpriority {one.priority}" + ("\tadmin" if one.admin else ""))


@key.command(name="rm")
def remove(name: KeyName, /, *, api_key_file: KeyPath) -> None:
    """Remove a key. A running server refuses it from its next request on."""
    from craton.serving.keys import KeyFile

    KeyFile(api_key_file).remove(name)
