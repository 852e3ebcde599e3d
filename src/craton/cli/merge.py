"""`craton merge`: an adapter and its base as one model, or several models as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from craton.cli.options import Json
from craton.cli.terminal import print_json, status, stderr
from craton.compression.merge_settings import MergeMethod
from craton.errors import UsageError


def merge(
    adapter: Annotated[str, Parameter(help="an adapter: a folder with PEFT's files, or a name in the store")],
    /,
    *models: Annotated[str, Parameter(help="or several models, which become one")],
    base: Annotated[
        str | None, Parameter(help="the model it was trained on, if not the one that it names; for several, of all")
    ] = None,
    out: Annotated[Path | None, Parameter(help="a new folder, or with --requantize a new .gguf file")] = None,
    name: Annotated[str | None, Parameter(help="the merged model's name in the store")] = None,
    requantize: Annotated[
        Literal["Q8_0", "Q4_0"] | None, Parameter(help="write a GGUF file with matrices of so many bits")
    ] = None,
    method: Annotated[
        MergeMethod | None,
        Parameter(help="models: average (linear), between two on the sphere (slerp), or changes of --base (others)"),
    ] = None,
    weights: Annotated[str | None, Parameter(help="models: a weight for each, as 0.7,0.3 (all the same)")] = None,
    density: Annotated[float | None, Parameter(help="models: ties, dare: share of each change that is kept")] = None,
    seed: Annotated[int | None, Parameter(help="models: dare: of what is dropped")] = None,
    json: Json = False,
) -> None:
    """Merge an adapter into its base, or several models of one architecture into one; written is one plain model, which
    is read again and compared before it counts."""
    if not models:
        given = {"--method": method, "--weights": weights, "--density": density, "--seed": seed}
        surplus = [flag for flag, value in given.items() if value is not None]
        if surplus:
            raise UsageError(
                f"{', '.join(surplus)}: for several models, and one is named",
                remedy="name the others: craton merge MODEL MODEL ... --name NAME",
            )
        _merge_adapter(adapter, base, out, name, requantize, json)
        return
    if out is not None or requantize is not None or name is None:
        raise UsageError("merged models go into the store", remedy="say --name NAME; craton export writes files")
    values = {"method": method, "weights": _numbers(weights), "density": density, "base": base, "seed": seed}
    _merge_models((adapter, *models), {key: value for key, value in values.items() if value is not None}, name, json)


def _merge_adapter(
    adapter: str,
    base: str | None,
    out: Path | None,
    name: str | None,
    requantize: Literal["Q8_0", "Q4_0"] | None,
    json: bool,
) -> None:
    from dataclasses import asdict

    from craton.finetuning.merge_files import merge_files

    result = merge_files(adapter, base=base, out=out, name=name, requantize=requantize)
    if json:
        print_json(asdict(result))
        return
    stderr.print(
        f"[bold]{stderr.escape(result.target)}[/]: {stderr.escape(result.adapter)} merged into {result.layers} layers "
        f"of {stderr.escape(result.base)} ({result.base_weights} weights); outputs differ by {result.difference:.1e}"
    )
    if result.lost is not None:
        stderr.print(f"[dim]of what the adapter changes, {min(result.lost, 1):.0%} is lost in {requantize}[/]")
    for note in result.notes:
        stderr.print(f"[yellow]note:[/] {stderr.escape(note)}")


def _merge_models(models: tuple[str, ...], values: dict[str, object], name: str, json: bool) -> None:
    from dataclasses import asdict

    from craton.compression.merge_models import merge_models
    from craton.compression.merge_settings import MergeSettings
    from craton.config import parse

    settings = parse(MergeSettings, values, where="the flags")
    with status(quiet=json) as doing:
        result = merge_models(models, settings, name=name, on_progress=doing)
    if json:
        print_json(asdict(result))
        return
    stderr.print(f"[bold]{stderr.escape(result.model)}[/]: {len(models)} models by {result.method}")
    for model, weight, distance in zip(result.models, result.weights, result.distance, strict=True):
        stderr.print(f"  {stderr.escape(model)}: weight {weight:.3g}, its weights are {distance:.2%} away")


def _numbers(text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{text!r} is not a list of numbers", where="--weights", remedy="as in 0.7,0.3") from None
