"""`craton pull`: fetch a model, or register one that lies on this machine."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from craton.cli.options import Json
from craton.cli.terminal import print_json, progress, size, stderr


def pull(
    reference: Annotated[
        str,
        Parameter(
            help="smollm2-135m-instruct or minilm-l6-v2 (built in), hf:org/name[@revision], a folder, "
            "a .gguf or a .safetensors file"
        ),
    ],
    /,
    *,
    name: Annotated[str | None, Parameter(help="the name in the store")] = None,
    json: Json = False,
) -> None:
    """Fetch a model into the store. An interrupted download goes on where it stopped; what lies on this machine
    (folders, files, the hub's cache) is read in place and never copied."""
    from craton import store

    with progress() as report:
        model = store.pull(reference, name, report)
    if json:
        print_json(
            {
                "id": model.id,
                "source": model.source,
                "location": str(model.path),
                "bytes": model.size,
                "new": model.is_new,
            }
        )
        return
    if model.is_new:
        place = f"read in place from {model.path}" if model.in_place else "fetched and checked"
        stderr.print(f"[bold]{stderr.escape(model.id)}[/]  {size(model.size)}, {stderr.escape(place)}")
    else:
        stderr.print(f"[bold]{stderr.escape(model.id)}[/] is here already, unchanged")
