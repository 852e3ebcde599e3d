"""`craton verify`: a stored model's files against their checksums."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from craton.cli.options import Json
from craton.cli.terminal import print_json, progress, stderr


def verify(name: Annotated[str, Parameter(help="a name in the store")], /, *, json: Json = False) -> None:
    """Hash the files again. Exit code 1 if anything changed, is missing or was added."""
    from craton import store

    with progress() as report:
        problems = store.verify(name, report)
    if json:
        print_json({"name": name, "problems": [{"what": p.what, "path": p.path} for p in problems]})
    elif problems:
        for problem in problems:
            stderr.print(f"[red]{stderr.escape(str(problem))}[/]")
    else:
        stderr.print(f"[bold]{stderr.escape(name)}[/]: every file is as it was fetched")
    sys.exit(1 if problems else 0)
