"""Parity of a family with transformers: one small random model, saved by it, loaded by us, compared everywhere."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families import family_of
from craton.checkpoints.families.family import Keys
from craton.checkpoints.save import save_checkpoint
from craton.models import CausalLM, Encoder, ModelConfig
from craton.trunk import KVCache
from craton.trunk.trunk import sequence_layout

TOLERANCE = 2e-4  # of the largest logit


def assert_close(ours: Tensor, theirs: Tensor, what: str) -> None:
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error < TOLERANCE, f"{what}: relative error {error:.1e}"


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights (and saved buffers) large enough that every switch shows in the logits; norms near one."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(tensor + 0.3 * noise if tensor.dim() == 1 else noise * tensor.shape[-1] ** -0.5)


@pytest.fixture
def random_model(tmp_path: Path) -> Callable[..., tuple[Any, Checkpoint, Any]]:
    """random_model(kind, config): a model of transformers as files, their checkpoint, and ours of it."""

    def make(kind: Any, config: Any) -> tuple[Any, Checkpoint, Any]:
        torch.manual_seed(0)
        model = kind(config).float().eval().requires_grad_(False)
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            # Embeddings, tables and scales large enough that each of them shows.
            parameter.copy_(parameter + 0.3 * noise if parameter.dim() < 2 else noise * parameter.shape[-1] ** -0.5)
        model.save_pretrained(tmp_path / "theirs")
        checkpoint = Checkpoint.open(tmp_path / "theirs")
        return model, checkpoint, checkpoint.load(torch.float32)

    return make


@pytest.fixture
def check_causal(tmp_path: Path) -> Callable[..., CausalLM]:
    """check(config, length=48): prefill, cached decoding, packing, batched decoding, and the round trip."""
    transformers = pytest.importorskip("transformers")

    def check(config: Any, length: int = 48) -> CausalLM:
        theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        randomise(theirs)
        theirs.save_pretrained(tmp_path / "theirs")
        checkpoint = Checkpoint.open(tmp_path / "theirs")
        ours = checkpoint.load(torch.float32)
        assert isinstance(ours, CausalLM)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, config.vocab_size, (length,), generator=generator)
        positions = torch.arange(length)
        with torch.inference_mode():
            reference = theirs(ids[None]).logits[0]
            assert_close(ours(ids, positions), reference, "prefill")

            cache = KVCache(ours.config.trunk, 1, dtype=torch.float32)
            first = length // 3
            outs = [ours(ids[:first], positions[:first], None, cache)]
            outs += [ours(ids[i : i + 1], positions[i : i + 1], None, cache) for i in range(first, length)]
            assert_close(torch.cat(outs), reference, "one token at a time through the cache")

            lengths = [length // 6, length // 3, length // 3, length - length // 6 - 2 * (length // 3) - 4]
            packed = ids[: sum(lengths)]
            separate = torch.cat([theirs(part[None]).logits[0] for part in packed.split(lengths)])
            layout = sequence_layout(lengths)
            assert_close(ours(packed, *layout), separate, "packed sequences of unequal lengths")

            cache = KVCache(ours.config.trunk, len(lengths), dtype=torch.float32)
            ours(packed, *layout, cache)
            following = ids[: len(lengths)]
            step = ours(following, torch.tensor(lengths), torch.arange(len(lengths)), cache)
            longer = [torch.cat((part, following[i : i + 1])) for i, part in enumerate(packed.split(lengths))]
            expected = torch.cat([theirs(part[None]).logits[0, -1:] for part in longer])
            assert_close(step, expected, "a decode step of unequal sequences")

            save_checkpoint(ours, checkpoint.family, tmp_path / "ours")
            reloaded = transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / "ours", attn_implementation="eager", dtype=torch.float32
            ).eval()
            assert type(reloaded) is type(theirs)
            assert_close(reloaded(ids[None]).logits[0], reference, "saved by us, loaded by transformers")
            again = Checkpoint.open(tmp_path / "ours")
            assert again.config == checkpoint.config
        return ours

    return check


def read(values: Mapping[str, Any]) -> ModelConfig:
    """What we make of a config.json."""
    return family_of(values, "config.json").config(Keys(values, "config.json"))


@pytest.fixture
def read_published() -> Callable[[Mapping[str, Any]], ModelConfig]:
    """read(published): our config of a published config.json, having checked that it means the same to transformers.

    transformers reads the keys of all its versions, puts its own default where one is absent, and writes the keys of
    its last version; we must read both alike, and what we write must mean the same to it.
    """
    transformers = pytest.importorskip("transformers")

    def through_transformers(values: Mapping[str, Any]) -> dict[str, Any]:
        config = transformers.CONFIG_MAPPING[values["model_type"]].from_dict(copy.deepcopy(dict(values)))
        rewritten: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
        return rewritten

    def check(published: Mapping[str, Any]) -> ModelConfig:
        ours = read(published)
        assert read(through_transformers(published)) == ours
        written = json.loads(json.dumps(family_of(published, "config.json").write_config(ours)))
        assert read(written) == ours
        assert read(through_transformers(written)) == ours
        return ours

    return check


@pytest.fixture
def check_encoder(tmp_path: Path) -> Callable[..., Encoder]:
    """check(config, length=48): token vectors alone and packed, and the round trip."""
    transformers = pytest.importorskip("transformers")

    def check(config: Any, length: int = 48) -> Encoder:
        theirs = transformers.AutoModel.from_config(config, attn_implementation="eager").float().eval()
        randomise(theirs)
        theirs.save_pretrained(tmp_path / "theirs")
        checkpoint = Checkpoint.open(tmp_path / "theirs")
        ours = checkpoint.load(torch.float32)
        assert isinstance(ours, Encoder)
        # Special ids are left out: RoBERTa computes positions from the padding id.
        ids = torch.randint(5, config.vocab_size, (length,), generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            reference = theirs(ids[None]).last_hidden_state[0]
            assert_close(ours(ids, torch.arange(length)), reference, "one sequence")
            lengths = [1, length // 4, length // 4, length - 1 - 2 * (length // 4)]
            separate = torch.cat([theirs(part[None]).last_hidden_state[0] for part in ids.split(lengths)])
            assert_close(ours(ids, *sequence_layout(lengths)), separate, "packed sequences of unequal lengths")
            save_checkpoint(ours, checkpoint.family, tmp_path / "ours")
            reloaded = transformers.AutoModel.from_pretrained(
                tmp_path / "ours", attn_implementation="eager", dtype=torch.float32
            ).eval()
            assert_close(reloaded(ids[None]).last_hidden_state[0], reference, "saved by us, loaded by transformers")
            assert Checkpoint.open(tmp_path / "ours").config == checkpoint.config
        return ours

    return check


@pytest.fixture
def check_masked_lm(tmp_path: Path) -> Callable[..., Encoder]:
    """check(config, length=40): the encoder within a masked language model's files, whose head is left there."""
    transformers = pytest.importorskip("transformers")

    def check(config: Any, length: int = 40) -> Encoder:
        theirs = transformers.AutoModelForMaskedLM.from_config(config, attn_implementation="eager").float().eval()
        randomise(theirs)
        theirs.save_pretrained(tmp_path / "theirs")
        ours = Checkpoint.open(tmp_path / "theirs").load(torch.float32)
        assert isinstance(ours, Encoder)
        ids = torch.randint(5, config.vocab_size, (length,), generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            reference = theirs.base_model(ids[None]).last_hidden_state[0]
            assert_close(ours(ids, torch.arange(length)), reference, "one sequence")
        return ours

    return check
