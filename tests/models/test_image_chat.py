"""The image chat model as a module: squares of patches, what adapters see, and where gradients go."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from tests.inference.test_pictures import IMAGE, SEEING, make_seeing

from craton.finetuning.lora import linear_layers
from craton.models import ImageChatConfig
from craton.models.image_chat import shuffled


def test_squares_of_patches_stand_side_by_side_row_by_row():
    patches = torch.arange(4 * 6 * 3).view(1, 24, 3)
    squares = shuffled(patches, (4, 6), 2)
    grid = patches.view(4, 6, 3)
    expected = [grid[r : r + 2, c : c + 2].reshape(-1) for r in (0, 2) for c in (0, 2, 4)]
    assert torch.equal(squares[0], torch.stack(expected))


def test_adapters_and_quantisation_find_every_linear_layer_by_its_name():
    names = set(linear_layers(SEEING))
    assert {"projector.up", "projector.down", "vision.patches", "vision.trunk.layers.0.attention.q"} <= names
    assert {"trunk.layers.1.feedforward.gate", "trunk.layers.0.attention.o"} <= names


def test_gradients_reach_projector_vision_and_text_but_not_the_image_tokens_embedding():
    model = make_seeing().requires_grad_(True)
    ids = torch.tensor([1, 2, *[IMAGE] * model.config.picture_tokens, 3])
    pixels = torch.randn(1, 3, *model.config.vision.image)
    model.logits_of(ids, torch.arange(len(ids)), pixels)[-1].logsumexp(0).backward()
    for name in (
        "projector.up.weight",
        "projector.down.bias",
        "vision.patches.weight",
        "trunk.layers.0.attention.q.weight",
    ):
        assert model.get_parameter(name).grad.abs().max() > 0, name
    embedded = model.embedding.weight.grad
    assert embedded[1].abs().max() > 0
    assert embedded[IMAGE].abs().max() == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [({"image_token": 97}, "vocabulary"), ({"keep_class": True}, "class token"), ({"shuffle": 4}, "squares of 4")],
)
def test_configs_that_make_no_model(change, said):
    values = {name: getattr(SEEING.config, name) for name in ImageChatConfig.model_fields}
    with pytest.raises(ValidationError, match=said):
        ImageChatConfig(**values | change)
