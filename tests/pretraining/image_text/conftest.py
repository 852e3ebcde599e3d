"""Pictures with captions, and a small text encoder that knows the captions' words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from craton.checkpoints.families import bert
from craton.checkpoints.families.family import Keys
from craton.checkpoints.safetensors import open_weights
from craton.checkpoints.save import save_checkpoint
from craton.inference.images import load_images
from craton.modalities.image import encode_png
from craton.models import Encoder, PoolingConfig
from craton.models.initialisation import initialise
from craton.pretraining.image_text.data import caption_tokenizer
from craton.pretraining.image_text.pretrain import resume
from craton.store.runs import Run

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}


@pytest.fixture
def patches(tmp_path):
    """A table of plain pictures, whose captions name their colours: several pictures have the same one."""
    rng, folder = np.random.default_rng(0), tmp_path / "data"
    folder.mkdir()
    lines = []
    for number in range(32):
        name, colour = list(COLOURS.items())[number % 4]
        pixels = np.clip(rng.normal(colour, 12, (16, 16, 3)), 0, 255).astype(np.uint8)
        (folder / f"{number}.png").write_bytes(encode_png(pixels))
        lines.append(json.dumps({"image": f"{number}.png", "caption": f"A {name} wall."}))
    table = folder / "pairs.jsonl"
    table.write_text("\n".join(lines))
    return table


@pytest.fixture
def check_resumed(craton, patches):
    """check_resumed(flags of a name): a run of 6 steps in parts that lost its last checkpoint ends as one that did not,
    bit for bit."""

    def check(flags: Callable[[str], list[str]]) -> None:
        assert craton("pretrain-pairs", patches, *flags("whole"))[0] == 0
        status, _, err = craton("pretrain-pairs", patches, *flags("cut"))
        assert status == 0, err
        assert "gradient caching" in err
        run = Run.open("cut")
        shutil.rmtree(run.checkpoints_folder / "step-00000006")
        result = resume(run)
        whole, again = open_weights(load_images("whole").checkpoint.path), open_weights(result.model.path)
        assert set(whole.tensors) == set(again.tensors)
        for name in whole.tensors:
            assert torch.equal(whole.tensor(name), again.tensor(name)), name
        assert craton("runs", "resume", run.id)[0] == 2  # it is done

    return check


@pytest.fixture
def make_encoder() -> Callable[[], Encoder]:
    """A fresh BERT of the tiniest kind, whose norms have scales and biases."""

    def make() -> Encoder:
        hf = {
            "vocab_size": 280, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 64, "max_position_embeddings": 24,
        }  # fmt: skip
        model = Encoder(bert.read_config(Keys(hf, "config.json")))
        initialise(model, 0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        return model.eval()

    return make


@pytest.fixture
def encoder(tmp_path, make_encoder) -> Path:
    """The same as a folder, read by the mean of its tokens."""
    tokenizer = caption_tokenizer([f"A {name} wall." for name in COLOURS], 270)
    return save_checkpoint(
        make_encoder(), bert.BERT, tmp_path / "encoder", tokenizer=tokenizer, pooling=PoolingConfig(mode="mean")
    )
