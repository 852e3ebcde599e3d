"""Structured pruning: whole layers, heads, channels and vocabulary rows are taken out, and a smaller dense model of the
same family stays, which runs faster in every program.

What each part is worth is measured on text (`importance`). The result is a plain checkpoint whose config says the new
sizes; what it lost is measured on held-out text, and what it gained on this machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.disk import replace_file
from craton.checkpoints.families.family import Family, Keys
from craton.checkpoints.save import copy_preprocessing, save_checkpoint
from craton.compression.calibration import read_calibration
from craton.compression.importance import layer_losses, text_nats, unit_importance
from craton.compression.structured_settings import StructuredSettings
from craton.compression.vocabulary import CutVocabulary, cut_vocabulary
from craton.data.records import read_records
from craton.errors import CheckpointError, UsageError
from craton.inference.model import load
from craton.inference.plan import DTypeChoice, fast_bfloat16
from craton.modalities.text import Tokenizer
from craton.models import AnyModel, CausalLM, CausalLMConfig, ImageChatConfig, build
from craton.store import find
from craton.store.artifacts import check_model_name, publish_model
from craton.store.cards import model_card
from craton.store.manifest import Parent
from craton.store.runs import Run
from craton.trunk import FeedForwardConfig, LayerConfig
from craton.trunk.attention import Attention

KIND: Final = "prune"
# Channels are kept in whole blocks of so many: kernels and quantised formats work on these.
CHANNEL_STEP: Final = 32
# Layers are compared on so many tokens, and after the first turn so many times as many as shall go.
LAYER_TOKENS: Final = 2048
CANDIDATES: Final = 2
STORED_DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16}
SPEED_ROUNDS: Final = 3
SPEED_PROMPT: Final = 256
SPEED_WRITTEN: Final = 32


@dataclass(frozen=True)
class Cut:
    """A model after the cut, fp32. removed_layers: of the old ones, from 0. decisions: a sentence each."""

    model: CausalLM
    removed_layers: tuple[int, ...] = ()
    decisions: tuple[str, ...] = ()


@dataclass(frozen=True)
class StructuredResult:
    """What was made. Pairs are (before, after). bytes: of the weights in the number format that the result has. loss:
    nats for each token of the old tokeniser, on held-out text. decode, prefill: tokens a second here, at batch 1, both
    models in one number format (0.0 where not measured)."""

    model: str
    path: str
    run: str
    sizes: tuple[dict[str, int], dict[str, int]]
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    loss: tuple[float, float]
    decode: tuple[float, float]
    prefill: tuple[float, float]
    removed_layers: tuple[int, ...]
    decisions: tuple[str, ...]


def prune_structured(
    model: str,
    settings: StructuredSettings,
    *,
    name: str | None = None,
    sources: Sequence[str] = (),
    window: int = 256,
    samples: int = 16,
    seed: int = 0,
    measure_speed: bool = True,
    on_progress: Callable[[str], None] = lambda doing: None,
) -> StructuredResult:
    """Take parts out of a stored model (or a path) and publish what stays under `name` (none: MODEL-cut).

    sources: text that importance is measured on (none: Python's docstrings); windows at its end are held out and judge.

    Raises UsageError for a model or settings that cannot be cut so, DataError for too little text.
    """
    base = find(model)
    name = name or f"{base.name}-cut"
    check_model_name(name)
    checkpoint = Checkpoint.open(base.path)
    if not isinstance(checkpoint.config, CausalLMConfig):
        raise UsageError(
            f"structured pruning cuts language models, and this is a {checkpoint.hf['architectures'][0]}",
            where=base.id,
            remedy="prune single weights instead: --sparsity 0.5",
        )
    family, tokenizer = checkpoint.family, checkpoint.tokenizer()
    on_progress(f"loading {base.id}")
    loaded = check_prunable(checkpoint.load(torch.float32), settings)
    held_out = read_calibration(tokenizer, sources, window=window, samples=samples, seed=seed).heldout_MT
    before = text_nats(loaded, list(held_out))
    smaller = _smaller_vocabulary(tokenizer, settings, on_progress)
    start = loaded if smaller is None else keep_tokens(loaded, smaller.kept)
    chosen = smaller.tokenizer if smaller is not None else tokenizer
    calibration = read_calibration(chosen, sources, window=window, samples=samples, seed=seed)
    done = cut(start, settings, calibration.ids_NT, on_progress)
    if smaller is not None:
        fact = f"{len(smaller.kept):,} of {loaded.config.vocab:,} tokens stay; the texts use {smaller.used:,} of them"
        done = replace(done, decisions=(fact, *done.decisions))
    check_family(done.model.config, family)
    texts = [tokenizer.decode(ids_T.tolist(), skip_special_tokens=False) for ids_T in held_out]
    again = [torch.tensor(chosen.encode(text, add_special_tokens=False)) for text in texts] if smaller else held_out
    tokens = held_out.numel() - len(held_out)
    loss = (before / tokens, text_nats(done.model, list(again)) / tokens)
    dtype = STORED_DTYPES.get(checkpoint.stored_kind(), torch.float32)
    config = {"model": model, "settings": settings.model_dump(mode="json"), "calibration": calibration.facts}
    parents = (Parent(relation="pruned_from", name=base.id if base.folder is not None else base.source),)
    origins = {f"settings.{key}": "the command" for key in settings.model_fields_set}
    run = Run.create(KIND, config=config, provenance={"model": "the command", **origins}, parents=parents, name=name)

    def write(folder: Path) -> None:
        on_progress("writing and reading again")
        save_cut(done.model, family, folder, chosen, dtype)
        copy_preprocessing(checkpoint.folder, folder)
        card = model_card(run, name=name, licence=base.licence, metrics={"held-out loss": loss[1]})
        replace_file(folder / "README.md", card.encode())

    with run.lock():
        stored = publish_model(name, write, source=f"run:{run.id}", parents=parents, licence=base.licence)
        prefill, decode = (0.0, 0.0), (0.0, 0.0)
        if measure_speed:
            on_progress("measuring both models' speed")
            prefill, decode = speeds(base.path, stored.path)
        counts = _parameters(loaded), _parameters(done.model)
        metrics = {"loss_before": loss[0], "loss": loss[1], "parameters": counts[1]}
        run.finish("done", {"model": stored.id, "metrics": metrics})
    return StructuredResult(
        model=stored.id,
        path=str(stored.path),
        run=run.id,
        sizes=(sizes(loaded.config), sizes(done.model.config)),
        parameters=counts,
        bytes=(counts[0] * dtype.itemsize, counts[1] * dtype.itemsize),
        loss=loss,
        decode=decode,
        prefill=prefill,
        removed_layers=done.removed_layers,
        decisions=done.decisions,
    )


def cut(
    model: CausalLM,
    settings: StructuredSettings,
    ids_NT: Tensor,
    on_progress: Callable[[str], None] = lambda doing: None,
) -> Cut:
    """Take out the layers, heads and channels that `model` (fp32) misses least on the windows `ids_NT`.

    Layers first; heads and channels are measured on what then stays.
    """
    removed: tuple[int, ...] = ()
    decisions: list[str] = []
    if settings.layers is not None:
        removed = least_layers(model, settings.layers, ids_NT, on_progress)
        model = without_layers(model, removed)
        decisions.append(f"removed layers {', '.join(str(number) for number in removed)} (from 0)")
    if settings.heads is not None or settings.channels is not None:
        on_progress("measuring heads and channels")
        importance = unit_importance(model, ids_NT)
        attention, hidden = model.config.trunk.layers[0].attention, dense(model.config.trunk.layers[0]).hidden
        if settings.heads is not None:
            kept = max(1, round(attention.kv_heads * (1 - settings.heads)))
            model = keep_groups(model, [_best(scores, kept) for scores in importance.groups])
            decisions.append(f"{kept} of {attention.kv_heads} key-value heads stay in each layer")
        if settings.channels is not None:
            kept = _kept_channels(hidden, settings.channels)
            model = keep_channels(model, [_best(scores, kept) for scores in importance.channels])
            decisions.append(f"{kept} of {hidden} channels stay in each layer")
    return Cut(model, removed, tuple(decisions))


def least_layers(
    model: CausalLM, count: int, ids_NT: Tensor, on_progress: Callable[[str], None] = lambda doing: None
) -> tuple[int, ...]:
    """The layers to remove, one after another: always the one without which the loss is then the lowest.

    Better than to take those that are missed least one by one (docs/log.md), as layers stand in for one another. Tried
    are, after the first turn, only those that came out best there, and on no more text than tells them apart.
    """
    ids_NT = ids_NT[: max(1, LAYER_TOKENS // ids_NT.shape[1])]
    # Losses are compared here and not reported: where the machine multiplies bfloat16, that is several times as fast.
    model = deepcopy(model).bfloat16() if fast_bfloat16() else model
    left = list(range(len(model.trunk.layers)))  # by its place in what stays, each layer's number in the whole
    candidates = set(left)
    for turn in range(count):

        def told(done: int, total: int, turn: int = turn) -> None:
            on_progress(f"removing layer {turn + 1} of {count}: {done} of {total} tried")

        places = [place for place, number in enumerate(left) if number in candidates]
        losses = layer_losses(model, ids_NT, told, only=places)
        order = sorted(losses, key=losses.__getitem__)
        if turn == 0:
            candidates = {left[place] for place in order[: CANDIDATES * count]}
        candidates.discard(left[order[0]])
        del left[order[0]]
        model = without_layers(model, (order[0],))
    return tuple(sorted(set(range(len(left) + count)) - set(left)))


# --- the cuts: each gives a new model that shares what it can with the old one ------------------------------------


def without_layers(model: CausalLM, removed: Sequence[int]) -> CausalLM:
    """The model without these layers."""
    kept = [number for number in range(len(model.trunk.layers)) if number not in removed]
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("trunk.layers.")}
    for new, old in enumerate(kept):
        layer = model.trunk.layers[old].state_dict()
        state |= {f"trunk.layers.{new}.{name}": tensor for name, tensor in layer.items()}
    return _built(model.config, [model.config.trunk.layers[number] for number in kept], state)


def keep_groups(model: CausalLM, kept: Sequence[Sequence[int]]) -> CausalLM:
    """The model with only these key-value heads of each layer, and the query heads that share them."""
    state, layers = model.state_dict(), []
    for number, (layer, groups) in enumerate(zip(model.config.trunk.layers, kept, strict=True)):
        attention = layer.attention
        share, size = attention.heads // attention.kv_heads, attention.head_size
        heads = [group * share + i for group in groups for i in range(share)]
        queries, keys = _rows(heads, size), _rows(groups, size)
        values, outputs = _rows(groups, attention.value_size or size), _rows(heads, attention.value_size or size)
        at = f"trunk.layers.{number}.attention"
        rows = {"q.weight": queries, "q.bias": queries, "k.weight": keys, "k.bias": keys}
        rows |= {"v.weight": values, "v.bias": values}
        if attention.qk_norm is not None and attention.qk_norm_over == "width":
            rows |= {"q_norm.weight": queries, "k_norm.weight": keys, "q_norm.bias": queries, "k_norm.bias": keys}
        for name, chosen in rows.items():
            if f"{at}.{name}" in state:
                state[f"{at}.{name}"] = state[f"{at}.{name}"][chosen]
        state[f"{at}.o.weight"] = state[f"{at}.o.weight"][:, outputs].contiguous()
        changed = attention.model_copy(update={"heads": len(heads), "kv_heads": len(groups)})
        layers.append(layer.model_copy(update={"attention": changed}))
    return _built(model.config, layers, state)


def keep_channels(model: CausalLM, kept: Sequence[Sequence[int]]) -> CausalLM:
    """The model with only these channels of each layer's feed-forward."""
    state, layers = model.state_dict(), []
    for number, (layer, channels) in enumerate(zip(model.config.trunk.layers, kept, strict=True)):
        at, chosen = f"trunk.layers.{number}.feedforward", torch.tensor(channels)
        for name in ("gate.weight", "gate.bias", "up.weight", "up.bias"):
            if f"{at}.{name}" in state:
                state[f"{at}.{name}"] = state[f"{at}.{name}"][chosen]
        state[f"{at}.down.weight"] = state[f"{at}.down.weight"][:, chosen].contiguous()
        changed = dense(layer).model_copy(update={"hidden": len(channels)})
        layers.append(layer.model_copy(update={"feedforward": changed}))
    return _built(model.config, layers, state)


def keep_tokens(model: CausalLM, kept: Sequence[int]) -> CausalLM:
    """The model with only these rows of its embedding and head, in this order."""
    state, chosen = model.state_dict(), torch.tensor(kept)
    for name in ("embedding.weight", "head.weight", "head.bias"):
        if name in state:
            state[name] = state[name][chosen]
    changed: dict[str, Any] = {"vocab": len(kept)}
    if isinstance(model.config, ImageChatConfig):
        changed["image_token"] = list(kept).index(model.config.image_token)  # special tokens stay, and it is one
    config = model.config.model_copy(update=changed)
    return _built(config, list(config.trunk.layers), state)


def _built(config: CausalLMConfig, layers: Sequence[LayerConfig], state: Mapping[str, Tensor]) -> CausalLM:
    trunk = config.trunk.model_copy(update={"layers": tuple(layers)})
    changed = config.model_copy(update={"trunk": trunk})
    with torch.device("meta"):
        model = build(changed)
    assert isinstance(model, CausalLM)
    model.load_state_dict(state, assign=True)
    if changed.tied:
        model.head.weight = model.embedding.weight
    return model.requires_grad_(False).eval()


def dense(layer: LayerConfig) -> FeedForwardConfig:
    """A layer's feed-forward, which is no mixture of experts."""
    assert isinstance(layer.feedforward, FeedForwardConfig)
    return layer.feedforward


def _kept_channels(hidden: int, share: float) -> int:
    """How many channels stay, in whole steps where there are such."""
    step = CHANNEL_STEP if hidden % CHANNEL_STEP == 0 else 1
    return max(step, step * round(hidden * (1 - share) / step))


def _rows(units: Iterable[int], size: int) -> Tensor:
    return torch.tensor([unit * size + i for unit in units for i in range(size)])


def _best(scores: Tensor, count: int) -> list[int]:
    """The units of the highest scores, in their order."""
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


# --- what can be cut, and what was written ------------------------------------------------------------------------


def check_prunable(model: AnyModel, settings: StructuredSettings) -> CausalLM:
    """Raises UsageError unless these settings take something out of this model and leave a model."""
    if not isinstance(model, CausalLM):
        raise UsageError(f"structured pruning cuts language models, and this is a {type(model).__name__}")
    layers = model.config.trunk.layers
    if any(not isinstance(layer.feedforward, FeedForwardConfig) for layer in layers):
        raise UsageError(
            "this model is a mixture of experts, which is not cut: an expert is worth what the router makes of it",
            remedy="prune single weights instead: craton prune --method wanda",
        )
    if any(not isinstance(layer.attention, Attention) for layer in model.trunk.layers):
        raise UsageError("this model's heads share one latent (multi-head latent attention) and cannot be cut apart")
    if settings.layers is not None and settings.layers >= len(layers):
        raise UsageError(f"{settings.layers} of {len(layers)} layers: nothing would be left", where="--layers")
    shapes = {
        (layer.attention.heads, layer.attention.kv_heads, layer.attention.head_size, dense(layer).hidden)
        for layer in layers
    }
    if len(shapes) > 1 and (settings.heads is not None or settings.channels is not None):
        raise UsageError("this model's layers differ in size, so no one number of heads or channels fits all")
    attention, hidden = layers[0].attention, dense(layers[0]).hidden
    if settings.heads is not None and round(attention.kv_heads * (1 - settings.heads)) == attention.kv_heads:
        raise UsageError(
            f"{settings.heads:g} of {attention.kv_heads} key-value heads is none: they go as whole groups of "
            f"{attention.heads // attention.kv_heads} query heads",
            where="--heads",
            remedy="say a larger share" if attention.kv_heads > 1 else "remove channels or layers",
        )
    if settings.channels is not None and _kept_channels(hidden, settings.channels) == hidden:
        raise UsageError(
            f"{settings.channels:g} of {hidden} channels is none: they go in steps of {CHANNEL_STEP}",
            where="--channels",
            remedy="say a larger share",
        )
    return model


def check_family(config: CausalLMConfig, family: Family) -> None:
    """Raises UsageError where the family's config.json cannot say these sizes (as GPT-2's, whose heads share the width
    out among them)."""
    hf: dict[str, Any] = family.write_config(config)
    try:
        read = family.config(Keys(hf, "the config of the cut model"))
    except CheckpointError as error:
        raise UsageError(f"{family.name} has no config for this cut: {error.what}", where=family.name) from None
    if read != config:
        raise UsageError(
            f"the config of {family.name} cannot say these sizes",
            where=family.name,
            remedy="remove whole layers or channels instead",
        )


def save_cut(model: CausalLM, family: Family, folder: Path, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    """Write a model in `dtype`, read it again and compare every number. Raises CheckpointError where they differ."""
    stored = _built(
        model.config,
        model.config.trunk.layers,
        {name: tensor.to(dtype).clone() for name, tensor in model.state_dict().items()},
    )
    save_checkpoint(stored, family, folder, tokenizer=tokenizer)
    opened = Checkpoint.open(folder)
    again = opened.load(dtype).state_dict()
    different = [name for name, tensor in stored.state_dict().items() if not torch.equal(again[name], tensor)]
    if opened.config != model.config or different:
        raise CheckpointError(
            f"the model was written with other values: {(different or ['its config'])[0]}",
            remedy="nothing was kept; please report this with the model's name",
        )


def sizes(config: CausalLMConfig) -> dict[str, int]:
    """The sizes that a cut changes, by their names in a config.json."""
    attention, hidden = config.trunk.layers[0].attention, dense(config.trunk.layers[0]).hidden
    return {
        "num_hidden_layers": len(config.trunk.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "intermediate_size": hidden,
        "vocab_size": config.vocab,
    }


def _smaller_vocabulary(
    tokenizer: Tokenizer, settings: StructuredSettings, on_progress: Callable[[str], None]
) -> CutVocabulary | None:
    if settings.vocab is None:
        return None
    on_progress("reading the vocabulary's texts")
    records = read_records(list(settings.vocab))
    return cut_vocabulary(tokenizer, (text for record in records for text in _strings(record.value)))


def _strings(value: Any) -> list[str]:
    """All text in a record, whatever its form."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [text for part in parts for text in _strings(part)]


def _parameters(model: CausalLM) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def speeds(base: Path, made: Path) -> tuple[tuple[float, float], tuple[float, float]]:
    """((prefill before, after), (decode before, after)) in tokens a second at batch 1, both in one number format:
    medians of rounds in which they take turns."""
    dtype: DTypeChoice = "bfloat16" if fast_bfloat16() else "float32"
    models = [load(one, dtype=dtype, threads=torch.get_num_threads()) for one in (base, made)]
    room = min(one.context for one in models)
    prompt, written = min(SPEED_PROMPT, room // 2), min(SPEED_WRITTEN, room // 4)
    reading: list[list[float]] = [[], []]
    writing: list[list[float]] = [[], []]
    for turn in range(SPEED_ROUNDS + 1):
        for number, one in enumerate(models):
            vocab = one.module.config.vocab
            ids = [(turn * 7919 + i * 31 + number) % (vocab - 1) + 1 for i in range(prompt)]  # nothing of it is cached
            settings: dict[str, Any] = {"temperature": 0.0, "logit_bias": dict.fromkeys(one.tokenizer.eos_ids, -100.0)}
            answer = one.generate(ids, max_tokens=written, **settings)
            if turn:  # what is made at the first call is no part of the speed
                reading[number].append(len(ids) / answer.first_token_seconds)
                writing[number].append(answer.tokens_per_second)
    prefill, decode = ([statistics.median(one) for one in kind] for kind in (reading, writing))
    return (prefill[0], prefill[1]), (decode[0], decode[1])
