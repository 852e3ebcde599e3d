"""`craton rm`: take a model out of the store."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from craton.cli.options import Json
from craton.cli.terminal import print_json, stderr


def remove(name: Annotated[str, Parameter(help="a name (every version) or name@vN")], /, *, json: Json = False) -> None:
    """Remove a model. Files that the store does not own (your folders, the hub's cache) stay where they are."""
    from craton import store

    removed = store.remove(name)
    if json:
        print_json({"removed": removed})
        return
    for model_id in removed:
        stderr.print(f"removed [bold]{stderr.escape(model_id)}[/]")
