"""`craton embed`: texts, picture files with a model that sees, sound files with one that hears, to vectors."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from craton.cli.options import DEFAULT_EMBED_MODEL, DType, Json, Threads
from craton.cli.terminal import load_model, load_seeing, print_json, stderr
from craton.errors import UsageError


def embed(
    *texts: Annotated[
        str,
        Parameter(help="texts, or files of pictures or sound; without any, one a line from standard input"),
    ],
    model: Annotated[str, Parameter(name=["--model", "-m"], help="a name or a path")] = DEFAULT_EMBED_MODEL,
    images: Annotated[
        bool, Parameter(negative="", help="for a model of texts and pictures: what is given are picture files")
    ] = False,
    dtype: DType = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Print one vector a line, as a JSON array of numbers."""
    given = list(texts) if texts else [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not given:
        raise UsageError("there is nothing to embed")
    from craton.inference.images import sees

    if sees(model):
        seeing = load_seeing(model, dtype=dtype, threads=threads, quiet=json)
        name, kind = seeing.name, "texts" if seeing.reads and not images else "pictures"
        vectors = seeing.embed(given) if kind == "texts" else seeing.embed_images(given)
    elif images:
        raise UsageError(f"{model} sees no pictures", remedy="take a model of pictures, such as CLIP")
    else:
        loaded = load_model(model, dtype=dtype, threads=threads, quiet=json)
        name, kind = loaded.name, "recordings" if loaded.hears else "texts"
        vectors = loaded.embed_audio(given) if loaded.hears else loaded.embed(given)
    rows = [[float(f"{value:.7g}") for value in row] for row in vectors.tolist()]
    if json:
        print_json({"model": name, "width": vectors.shape[1], "vectors": rows})
        return
    for row in rows:
        print_json(row)
    stderr.print(f"[dim]{len(given)} {kind}, {vectors.shape[1]} numbers each[/]")
