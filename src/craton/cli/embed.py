"""`craton embed`: texts, or sound files with a speech model, to vectors."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from craton.cli.options import DEFAULT_EMBED_MODEL, DType, Json, Threads
from craton.cli.terminal import load_model, print_json, stderr
from craton.errors import UsageError


def embed(
    *texts: Annotated[
        str, Parameter(help="texts, or sound files for a speech model; without any, one a line from standard input")
    ],
    model: Annotated[str, Parameter(name=["--model", "-m"], help="a name or a path")] = DEFAULT_EMBED_MODEL,
    dtype: DType = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Print one vector a line, as a JSON array of numbers."""
    given = list(texts) if texts else [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not given:
        raise UsageError("there is nothing to embed")
    loaded = load_model(model, dtype=dtype, threads=threads, quiet=json)
    vectors = loaded.embed_audio(given) if loaded.hears else loaded.embed(given)
    rows = [[float(f"{value:.7g}") for value in row] for row in vectors.tolist()]
    if json:
        print_json({"model": loaded.name, "width": vectors.shape[1], "vectors": rows})
        return
    for row in rows:
        print_json(row)
    stderr.print(f"[dim]{len(given)} {'recordings' if loaded.hears else 'texts'}, {vectors.shape[1]} numbers each[/]")
