"""`craton search`: pictures of a folder by what they show."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from craton.cli.options import DType, Json, Threads
from craton.cli.terminal import load_seeing, print_json, status, stderr, stdout
from craton.errors import UsageError


def search(
    folder: Annotated[str, Parameter(help="a folder of pictures, and those below it")],
    text: Annotated[str | None, Parameter(help="what they are to show")] = None,
    /,
    *,
    like: Annotated[str | None, Parameter(help="a picture that they are to be like")] = None,
    model: Annotated[str, Parameter(name=["--model", "-m"], help="a name or a path")],
    top: Annotated[int, Parameter(name=["--top", "-k"], help="pictures to show")] = 5,
    dtype: DType = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Find pictures by a text or by a picture. The folder is indexed once; later only what changed is read."""
    if (text is None) == (like is None):
        raise UsageError("say what to look for: a text, or a picture with --like")
    if top < 1:
        raise UsageError(f"--top is 1 or more, not {top}")
    from craton.retrieval.pictures import open_pictures

    loaded = load_seeing(model, dtype=dtype, threads=threads, quiet=json)
    # What cannot be looked for is refused before the folder is read.
    sought = loaded.embed_images([like]) if like is not None else loaded.embed(text or "")
    index = open_pictures(folder, loaded)
    with status(quiet=json) as say:
        report = index.sync(lambda done, total: say(f"{done} of {total} new pictures read"))
    hits = index.search(sought[0].numpy(), top)
    if json:
        print_json(
            {
                "model": loaded.name,
                "pictures": len(index.paths),
                "added": report.added,
                "removed": report.removed,
                "unreadable": [{"path": str(path), "why": why} for path, why in report.unreadable],
                "hits": [{"path": str(hit.path), "score": round(hit.score, 6)} for hit in hits],
            }
        )
        return
    for path, why in report.unreadable:
        stderr.print(f"[yellow]left out:[/] {stderr.escape(str(path))}: {stderr.escape(why)}")
    stderr.print(f"[dim]{len(index.paths)} pictures, {report.added} of them new, {report.removed} gone or changed[/]")
    for hit in hits:
        stdout.print(f"{hit.score:.3f}  {hit.path}", markup=False, soft_wrap=True)
