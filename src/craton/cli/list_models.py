"""`craton list`: the models in the store."""

from __future__ import annotations

from craton.cli.options import Json
from craton.cli.terminal import print_json, size, stderr, stdout


def list_models(*, json: Json = False) -> None:
    """List the stored models, every version."""
    from rich.table import Table

    from craton import store

    models, damaged = store.list_models(), store.damaged_models()
    if json:
        rows = [
            {
                "id": m.id,
                "source": m.source,
                "adapter_of": m.base,
                "bytes": m.size,
                "licence": m.licence,
                "location": str(m.path),
                "in_place": m.in_place,
                "created": m.created,
            }
            for m in models
        ]
        print_json({"models": rows, "damaged": [error.as_dict() for error in damaged]})
        return
    if models:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column, justify in (("model", "left"), ("size", "right"), ("licence", "left"), ("from", "left")):
            table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for model in models:
            origin = f"adapter of {model.base}, {model.source}" if model.base else model.source
            table.add_row(model.id, size(model.size), model.licence or "?", origin)
        stdout.print(table)
    else:
        stderr.print("The store is empty. [dim]Start with: craton pull smollm2-135m-instruct[/]")
    for error in damaged:
        stderr.print(f"[red]{stderr.escape(str(error))}[/]")
