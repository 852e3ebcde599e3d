"""Model cards: README.md as Hugging Face's hub reads it, from the record of a run. What was not measured says so.

Format: https://github.com/huggingface/hub-docs/blob/main/modelcard.md (YAML front matter, then Markdown).
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Final

from craton.checkpoints.sources import BUILT_IN, HUB_PREFIX
from craton.config.resolve import DEFAULT
from craton.errors import StoreError, UnknownName
from craton.store.models import stored_model
from craton.store.runs import LOSSES, Run

# Ours, and what the hub calls it. A model that is distilled has no relation there.
_HUB_RELATIONS: Final = {
    "adapter_of": "adapter",
    "base": "finetune",
    "merged_from": "merge",
    "quantised_from": "quantized",
}
_CURVE_POINTS: Final = 8


def model_card(run: Run, *, name: str, licence: str | None, metrics: Mapping[str, float]) -> str:
    """The card of the model `name` that `run` makes. metrics: what was measured on it, by name; may be empty."""
    sections = [
        _front_matter(run, licence, metrics),
        f"# {name}\n\n{_summary(run)}",
        "## Lineage\n\n" + _lineage(run),
        "## Evaluation\n\n" + _evaluation(metrics),
        "## Training\n\n" + _training(run),
        "## Loss\n\n" + _loss(run),
        "## Reproduce\n\n```sh\n" + shlex.join(_portable(word) for word in run.record.command) + "\n```",
        "## Limits\n\nNot assessed: bias, safety, behaviour outside the data above. Test it on your own task first.",
    ]
    return "\n\n".join(sections) + "\n"


def hub_id(name: str) -> str | None:
    """The hub's name ("org/name") of a model or data set that the store or a user calls `name`; None if the hub does
    not have it."""
    stored = None
    with contextlib.suppress(UnknownName, StoreError):  # removed or damaged since: then only the name speaks
        stored = stored_model(name)
    text = re.sub(r"@v\d+$", "", name) if stored is None else stored.source
    if text in BUILT_IN:
        return BUILT_IN[text].hub
    return re.split(r"[@:]", text.removeprefix(HUB_PREFIX))[0] if text.startswith(HUB_PREFIX) else None


def _front_matter(run: Run, licence: str | None, metrics: Mapping[str, float]) -> str:
    parents = run.record.parents
    bases = [parent for parent in parents if parent.relation in _HUB_RELATIONS]
    base_ids = [found for parent in bases if (found := hub_id(parent.name))]
    data_ids = [found for parent in parents if parent.relation == "trained_on" and (found := hub_id(parent.name))]
    adapter = any(parent.relation == "adapter_of" for parent in parents)
    fields: dict[str, Any] = {
        "license": licence.lower() if licence else None,
        "library_name": "peft" if adapter else "transformers",
        "base_model": base_ids,
        "base_model_relation": _HUB_RELATIONS[bases[0].relation] if base_ids else None,
        "datasets": data_ids,
        "metrics": list(metrics),
        "tags": ["craton", run.kind],
    }
    lines = ["---"]
    for key, value in fields.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {_quoted(item)}" for item in value)] if value else []
        elif value is not None:
            lines.append(f"{key}: {_quoted(value)}")
    return "\n".join([*lines, "---"])


def _summary(run: Run) -> str:
    facts, row = run.environment(), run.last_metrics()
    steps = f" after {row['step']} steps" if row else ""
    return (
        f"Made by `{run.kind}` of Craton {facts['craton']}{steps}, in {duration(run.seconds)} on {facts['cpu']} "
        f"({facts['threads']} threads, {facts['system']}; Python {facts['python']}, torch {facts['torch']})."
    )


def _lineage(run: Run) -> str:
    lines = [f"- {p.relation.replace('_', ' ')}: `{_portable(p.name)}`" for p in run.record.parents]
    return "\n".join([*lines, f"- run: `{run.id}`"])


def _evaluation(metrics: Mapping[str, float]) -> str:
    if not metrics:
        return "Not measured."
    return _table(("metric", "value"), [(key, f"{value:.4g}") for key, value in metrics.items()])


def _training(run: Run) -> str:
    rows = [
        (f"`{key}`", f"`{_portable(_plain(value))}`", _portable(origin))
        for key, (value, origin) in run.settings().items()
        if origin != DEFAULT
    ]
    if not rows:
        return "Every setting had its default value."
    return "Settings that differ from the defaults:\n\n" + _table(("setting", "value", "from"), rows)


def _loss(run: Run) -> str:
    rows = run.metrics()
    keys = [key for key in LOSSES if any(row.get(key) is not None for row in rows)]
    if not keys:
        return "Not recorded."
    lines = []
    for key in keys:
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        step, least = min(points, key=lambda point: (point[1], point[0]))
        # Steps double from row to row: the curve falls fastest at first.
        wanted = {0, len(points) - 1} | {len(points) >> shift for shift in range(1, _CURVE_POINTS - 1)}
        cells = [(str(points[i][0]), f"{points[i][1]:.4g}") for i in sorted(wanted)]
        lines += [f"Lowest {loss_name(key)}: {least:.4g} at step {step}.", _table(("step", loss_name(key)), cells)]
    return "\n\n".join(lines)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def loss_name(key: str) -> str:
    """What people call one of `LOSSES`."""
    return {"loss": "training loss", "held_out/loss": "held-out loss"}[key]


def duration(seconds: float) -> str:
    """Seconds for people: "45 s", "12 min", "3 h 20 min", "2 d 4 h"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 36 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _portable(text: str) -> str:
    # A card is for others: where a file lay on this machine is not their business.
    option, equals, path = text.rpartition("=")
    return option + equals + PurePath(path).name if PurePath(path).is_absolute() else text


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a JSON string is a YAML string
