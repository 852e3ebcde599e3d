"""A model in another form, to be trained on from there: longer positions, windows of attention, experts.

The weights stay what they are, but for copies and a new router. What is written is read again before it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.disk import replace_file
from craton.checkpoints.families import FAMILIES
from craton.checkpoints.families.family import Family, Keys, yarn_magnitude
from craton.checkpoints.save import copy_preprocessing, save_checkpoint
from craton.compression.convert_settings import ConvertSettings
from craton.errors import CheckpointError, CratonError, UsageError
from craton.models import AnyModel, CausalLM, CausalLMConfig, build
from craton.store import find
from craton.store.artifacts import check_model_name, publish_model
from craton.store.cards import model_card
from craton.store.manifest import Parent
from craton.store.runs import Run
from craton.trunk import ExpertsConfig, FeedForwardConfig, LayerConfig, RotaryScaling

KIND: Final = "convert"
STORED_DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16}
# Tried for a new form that the model's own family has no words for, the plainest first.
OTHER_FAMILIES: Final = ("llama", "mistral", "smollm3", "mixtral", "qwen3", "qwen3_moe")
ROUTER_STD: Final = 0.02  # as such routers begin where they are trained from nothing
PROBE: Final = "A small model was converted and is whole again.\nThis is read to see how far its answers have moved.\n"


@dataclass(frozen=True)
class Conversion:
    """What was made. family: whose layout it is written in. changes: what is different, for people. numbers: how many
    the model has, before and after. difference: of the outputs on a short text from the source's, relative."""

    model: str
    path: str
    run: str
    source: str
    family: str
    changes: tuple[str, ...]
    numbers: tuple[int, int]
    difference: float


def convert(
    model: str,
    settings: ConvertSettings,
    provenance: Mapping[str, str],
    *,
    name: str,
    on_progress: Callable[[str], None] = lambda doing: None,
) -> Conversion:
    """Convert a language model as `settings` say and publish it under `name`.

    Raises UsageError for a model that cannot be converted so, and what opening raises.
    """
    settings.check()
    check_model_name(name)
    found = find(model)
    checkpoint = Checkpoint.open(found.path)
    if not isinstance(checkpoint.config, CausalLMConfig):
        raise UsageError(f"{model} writes no text, and only language models are converted")
    config, changes = converted_config(checkpoint.config, settings)
    family = family_for(config, checkpoint.family)
    known_as = found.id if found.folder is not None else found.source
    run = Run.create(
        KIND,
        config={"model": model, "settings": settings.model_dump(mode="json")},
        provenance={"model": "the command", **{f"settings.{key}": value for key, value in provenance.items()}},
        parents=(Parent(relation="converted_from", name=known_as),),
        name=name,
    )
    measured: list[float] = []
    numbers: list[int] = []

    def write(folder: Path) -> None:
        on_progress("reading")
        before = checkpoint.load(STORED_DTYPES.get(checkpoint.stored_kind(), torch.float32))
        assert isinstance(before, CausalLM)
        after = converted_model(before, config, settings.seed)
        on_progress("writing and reading again")
        save_checkpoint(after, family, folder, tokenizer=checkpoint.tokenizer())
        copy_preprocessing(checkpoint.folder, folder)
        check_written(after, folder)
        ids = checkpoint.tokenizer().encode(PROBE)
        measured.append(difference(before, after, ids))
        numbers.extend(sum(p.numel() for p in one.parameters()) for one in (before, after))
        card = model_card(run, name=name, licence=found.licence, metrics={})
        replace_file(folder / "README.md", card.encode())

    with run.lock():
        stored = publish_model(name, write, source=f"run:{run.id}", parents=run.record.parents, licence=found.licence)
        run.finish("done", {"model": stored.id, "metrics": {"difference": measured[0]}})
    return Conversion(
        model=stored.id,
        path=str(stored.path),
        run=run.id,
        source=known_as,
        family=family.name,
        changes=changes,
        numbers=(numbers[0], numbers[1]),
        difference=measured[0],
    )


def converted_config(config: CausalLMConfig, settings: ConvertSettings) -> tuple[CausalLMConfig, tuple[str, ...]]:
    """The config of the new form, and what is different in it."""
    layers, changes = list(config.trunk.layers), []
    context = settings.context or config.context
    if settings.context is not None:
        scaling = _scaling(config, settings)
        layers = [_stretched(layer, scaling) for layer in layers]
        changes.append(f"context {config.context:,} -> {context:,}: {scaling.kind}, factor {scaling.factor:g}")
    if settings.window is not None:
        layers, change = _windowed(layers, settings.window, settings.full_every)
        changes.append(change)
    if settings.experts is not None:
        layers = [_with_experts(layer, settings.experts, settings.per_token) for layer in layers]
        changes.append(f"feed-forwards: {settings.experts} experts, {settings.per_token} a token")
    trunk = config.trunk.model_copy(update={"layers": tuple(layers)})
    return config.model_copy(update={"context": context, "trunk": trunk}), tuple(changes)


def family_for(config: CausalLMConfig, own: Family) -> Family:
    """The family whose config.json can say `config`: the model's own, or one that shares its tensors.

    Raises UsageError where there is none.
    """
    by_name = {family.name: family for family in FAMILIES}
    for family in (own, *(by_name[name] for name in OTHER_FAMILIES)):
        if _says(family, config):
            return family
    raise UsageError(
        f"no published layout holds a {own.name} model in this form",
        remedy="convert one thing alone, or a model of Llama's kind",
    )


def converted_model(before: CausalLM, config: CausalLMConfig, seed: int) -> CausalLM:
    """The same weights under `config`; a new router's are small random numbers, its experts copies of the old layer."""
    with torch.device("meta"):
        after = build(config)
    assert isinstance(after, CausalLM)
    old, state = before.state_dict(), {}
    generator = torch.Generator().manual_seed(seed)
    for name, wanted in after.state_dict().items():
        if name in old:
            state[name] = old[name]
        elif name.endswith(".router.weight"):
            state[name] = (torch.randn(wanted.shape, generator=generator) * ROUTER_STD).to(before.head.weight.dtype)
        else:
            layer, _, rest = name.partition(".experts.")
            state[name] = old[f"{layer}.{rest.partition('.')[2]}"].clone()
    after.load_state_dict(state, assign=True)
    if config.tied:
        after.head.weight = after.embedding.weight
    return after.requires_grad_(False).eval()


@torch.inference_mode()
def difference(before: CausalLM, after: CausalLM, ids: Sequence[int]) -> float:
    """|after - before| / |before| of the logits on `ids`, computed in fp32."""
    logits = []
    for model in (before, after):
        whole = deepcopy(model).float() if model.head.weight.dtype != torch.float32 else model
        logits.append(whole.eval()(torch.tensor(ids), torch.arange(len(ids))))
    centred = [logits_TV - logits_TV.mean(-1, keepdim=True) for logits_TV in logits]
    return float((centred[1] - centred[0]).norm() / centred[0].norm())


def check_written(model: AnyModel, folder: Path) -> None:
    """Raises CheckpointError unless the files hold this model: its config, and each number."""
    again = Checkpoint.open(folder)
    if again.config != model.config:
        raise CheckpointError("the written config is another model's", remedy="nothing was kept; please report this")
    read: Mapping[str, Tensor] = again.load(next(model.parameters()).dtype).state_dict()
    for name, tensor in model.state_dict().items():
        if not torch.equal(read[name], tensor):
            raise CheckpointError(
                f"{name!r} was written with other values", remedy="nothing was kept; please report this"
            )


def _scaling(config: CausalLMConfig, settings: ConvertSettings) -> RotaryScaling:
    assert settings.context is not None
    rotaries = [r for layer in config.trunk.layers if (r := layer.attention.rotary) is not None]
    if not rotaries:
        raise UsageError("the model has no rotary positions to stretch")
    stretched = next((r.scaling for r in rotaries if r.scaling is not None), None)
    if stretched is not None:
        raise UsageError(
            f"its positions are stretched already: {stretched.kind}, factor {stretched.factor:g}",
            remedy="convert the model before that",
        )
    factor = settings.context / config.context
    if factor <= 1:
        raise UsageError(
            f"a context of {settings.context} is not longer than its {config.context}", remedy="name a longer one"
        )
    return RotaryScaling(
        kind=settings.scaling,
        factor=factor,
        original_context=config.context if settings.scaling != "linear" else None,
        attention_factor=yarn_magnitude(factor) if settings.scaling == "yarn" else 1.0,
    )


def _stretched(layer: LayerConfig, scaling: RotaryScaling) -> LayerConfig:
    rotary = layer.attention.rotary
    if rotary is None:
        return layer
    attention = layer.attention.model_copy(update={"rotary": rotary.model_copy(update={"scaling": scaling})})
    return layer.model_copy(update={"attention": attention})


def _windowed(layers: Sequence[LayerConfig], window: int, full_every: int | None) -> tuple[list[LayerConfig], str]:
    new, full = [], 0
    for number, layer in enumerate(layers, 1):
        if full_every is not None and number % full_every == 0:
            new.append(layer)
            full += 1
            continue
        narrow = min(window, layer.attention.window or window)
        new.append(layer.model_copy(update={"attention": layer.attention.model_copy(update={"window": narrow})}))
    rest = f", {full} see everything" if full else ""
    return new, f"attention: a window of {window:,} in {len(new) - full} layers{rest}"


def _with_experts(layer: LayerConfig, count: int, per_token: int) -> LayerConfig:
    dense = layer.feedforward
    if not isinstance(dense, FeedForwardConfig):
        raise UsageError("the model has experts already")
    # The chosen weights sum to one, so that copies of one feed-forward give what it gave.
    return layer.model_copy(update={"feedforward": ExpertsConfig(count=count, per_token=per_token, expert=dense)})


def _says(family: Family, config: CausalLMConfig) -> bool:
    """Whether a family's config.json, read again, is `config`, and its tensors are all of the model's."""
    try:
        if family.config(Keys(family.write_config(config), family.name)) != config:
            return False
        named = {name for entry in family.entries(config) for name in entry.ours}
    except (AssertionError, AttributeError, CratonError):
        return False
    with torch.device("meta"):
        wanted = set(build(config).state_dict())
    return wanted - ({"head.weight"} if config.tied else set()) == named
