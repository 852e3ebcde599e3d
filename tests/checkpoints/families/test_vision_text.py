"""Two encoders side by side, on random small models: parity with transformers and the way back."""

from __future__ import annotations

import pytest
import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families import family_of
from craton.checkpoints.families.family import Keys
from craton.checkpoints.save import save_checkpoint
from craton.errors import CheckpointError
from craton.models import DualEncoder

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

TOLERANCE = 2e-4  # of the largest number

SIDE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 20,
    "patch_size": 4,
}
TEXT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "vocab_size": 99,
    "max_position_embeddings": 12,
}

# Of the side of pictures, and what is odd about that of texts.
MODELS = {
    "vit": lambda: (transformers.ViTConfig(**SIDE), {}),
    "vit, odd": lambda: (
        transformers.ViTConfig(**SIDE | {"image_size": (16, 24)}, qkv_bias=False, hidden_act="relu"),
        {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3, "type_vocab_size": 3},
    ),
    "dinov2": lambda: (transformers.Dinov2Config(**SIDE, mlp_ratio=2), {}),
    "dinov2, gated": lambda: (
        transformers.Dinov2Config(**SIDE, use_swiglu_ffn=True, qkv_bias=False, use_mask_token=False),
        {"type_vocab_size": 1},
    ),
    "dinov2 with registers": lambda: (transformers.Dinov2WithRegistersConfig(**SIDE, num_register_tokens=3), {}),
}


def relative_error(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def whole_config(vision, **text):
    kind = transformers.VisionTextDualEncoderConfig
    return kind.from_vision_text_configs(vision, transformers.BertConfig(**TEXT | text), projection_dim=16)


@pytest.mark.parametrize("name", MODELS)
def test_two_encoders(random_model, tmp_path, name):
    vision, text = MODELS[name]()
    theirs, checkpoint, ours = random_model(transformers.VisionTextDualEncoderModel, whole_config(vision, **text))
    assert isinstance(ours, DualEncoder)
    sides = vision.image_size if isinstance(vision.image_size, tuple | list) else (vision.image_size,) * 2
    pixels = torch.randn(2, 3, *sides)
    rows = [torch.randint(1, 99, (n,)).tolist() for n in (1, 7, 12)]
    inputs = {
        "pixel_values": pixels,
        "input_ids": torch.tensor([row + [0] * (12 - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (12 - len(row)) for row in rows]),
    }
    with torch.inference_mode():
        reference = theirs(**inputs)
        assert relative_error(ours.encode_images(pixels), reference.image_embeds) < TOLERANCE
        assert relative_error(ours.encode_texts(rows), reference.text_embeds) < TOLERANCE
        assert relative_error(ours(pixels, rows), reference.logits_per_image) < TOLERANCE
    save_checkpoint(ours, checkpoint.family, tmp_path / "ours")
    assert Checkpoint.open(tmp_path / "ours").config == checkpoint.config
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.inference_mode():
        found = again.eval()(**inputs).logits_per_image
    assert relative_error(found, reference.logits_per_image) < 1e-5


def read(hf):
    return family_of(hf, "config.json").config(Keys(hf, "config.json"))


def config_of(vision, **changes):
    return whole_config(vision).to_dict() | {"architectures": ["VisionTextDualEncoderModel"]} | changes


def test_what_files_leave_out_is_as_published():
    # google/vit-base-patch16-224 beside bert-base-uncased, as transformers has them without a word.
    short = config_of(transformers.ViTConfig(**SIDE), text_config={}, vision_config={}, projection_dim=512)
    text = transformers.BertConfig().to_dict()
    long = short | {"text_config": text, "vision_config": transformers.ViTConfig().to_dict()}
    assert read(short) == read(long)
    assert read(short).vision.trunk.width == read(short).text.trunk.width == 768


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"vision_config": {"model_type": "swin"}}, "'swin' beside a text encoder"),
        ({"text_config": {"model_type": "t5"}}, "model_type"),
        ({"vision_config": {"model_type": "vit", "patch_size": [4, 2]}}, "not square"),
        ({"projection_dim": "wide"}, "projection_dim"),
        ({"projection_dim": 0}, "makes no model"),
        ({"text_config": []}, "text_config"),
    ],
)
def test_configs_that_make_no_model(changes, match):
    with pytest.raises(CheckpointError, match=match):
        read(config_of(transformers.ViTConfig(**SIDE)) | changes)
