"""`craton convert`: a model in another form, to be trained on from there."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from craton.cli.flags import Flags, given
from craton.cli.options import Json
from craton.cli.terminal import print_json, status, stderr
from craton.compression.convert_settings import ConvertSettings


def convert(
    model: Annotated[str, Parameter(help="a name or a path")],
    /,
    *,
    name: Annotated[str, Parameter(help="the new model's name in the store")],
    json: Json = False,
    settings: Flags[ConvertSettings] | None = None,
) -> None:
    """Give a model a longer context, windows of attention or experts. Its weights stay what they are; a short training
    (craton pretrain --model NAME) then makes use of the new form."""
    from dataclasses import asdict

    from craton.compression.convert import convert as run_conversion
    from craton.config.resolve import FLAGS, resolve

    chosen, provenance = resolve(ConvertSettings, [(FLAGS, given(settings))])
    with status(quiet=json) as say:
        result = run_conversion(model, chosen, provenance, name=name, on_progress=say)
    if json:
        print_json(asdict(result))
        return
    stderr.print(f"[bold]{stderr.escape(result.model)}[/]: {stderr.escape(result.source)} in {result.family}'s layout")
    for change in result.changes:
        stderr.print(f"  {change}")
    before, after = result.numbers
    grown = f"{before:,} -> {after:,} parameters; " if after != before else ""
    stderr.print(f"  [dim]{grown}outputs on a short text differ by {result.difference:.2g} of their size[/]")
