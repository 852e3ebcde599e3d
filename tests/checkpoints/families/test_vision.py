"""ViT, DINOv2, DINOv3, CLIP and SigLIP, on random small models: parity with transformers and the way back."""

from __future__ import annotations

import pytest
import torch

from craton.checkpoints.families import family_of
from craton.checkpoints.families.family import Keys
from craton.checkpoints.save import save_checkpoint
from craton.errors import CheckpointError, UsageError
from craton.models import DualEncoder, ImageClassifier, VisionTransformer
from craton.trunk import replace_linears

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
    "bos_token_id": 97,
    "eos_token_id": 98,
    "pad_token_id": 1,
}


def relative_error(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def check_way_back(kind, ours, checkpoint, folder, values):
    """What transformers says of our files is what it said of its own. values(model): a tensor."""
    save_checkpoint(ours, checkpoint.family, folder)
    again = kind.from_pretrained(folder).eval()
    with torch.inference_mode():
        return values(again)


ENCODERS = {
    "vit": lambda: (transformers.ViTModel, transformers.ViTConfig(**SIDE)),
    "vit, odd": lambda: (
        transformers.ViTModel,
        transformers.ViTConfig(**SIDE | {"image_size": (16, 24), "num_channels": 1}, qkv_bias=False, hidden_act="relu"),
    ),
    "dinov2": lambda: (transformers.Dinov2Model, transformers.Dinov2Config(**SIDE, mlp_ratio=2)),
    "dinov2, gated": lambda: (
        transformers.Dinov2Model,
        transformers.Dinov2Config(**SIDE, use_swiglu_ffn=True, qkv_bias=False, use_mask_token=False),
    ),
    "dinov2 with registers": lambda: (
        transformers.Dinov2WithRegistersModel,
        transformers.Dinov2WithRegistersConfig(**SIDE, num_register_tokens=3),
    ),
    "dinov3": lambda: (transformers.DINOv3ViTModel, transformers.DINOv3ViTConfig(**SIDE, num_register_tokens=4)),
    "dinov3, odd": lambda: (
        transformers.DINOv3ViTModel,
        transformers.DINOv3ViTConfig(
            **SIDE, num_register_tokens=0, use_gated_mlp=True, key_bias=True, proj_bias=False, mlp_bias=False
        ),
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(random_model, tmp_path, name):
    kind, config = ENCODERS[name]()
    theirs, checkpoint, ours = random_model(kind, config)
    assert isinstance(ours, VisionTransformer)
    sides = config.image_size if isinstance(config.image_size, tuple | list) else (config.image_size,) * 2
    pixels = torch.randn(2, config.num_channels, *sides)
    with torch.inference_mode():
        reference = theirs(pixels)
        tokens = ours(pixels)
        assert relative_error(tokens, reference.last_hidden_state) < TOLERANCE
        assert relative_error(ours.pool(tokens), reference.pooler_output) < TOLERANCE
        taps = {0: tokens, 1: tokens}
        ours(pixels, taps=taps)
        for layer, hidden in taps.items():
            expected = theirs(pixels, output_hidden_states=True).hidden_states[layer + 1]
            assert relative_error(hidden, expected) < TOLERANCE
    found = check_way_back(kind, ours, checkpoint, tmp_path / "ours", lambda model: model(pixels).last_hidden_state)
    assert relative_error(found, reference.last_hidden_state) < 1e-5


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov2 with registers", "dinov3"])
def test_pictures_of_another_size(random_model, name):
    kind, config = ENCODERS[name]()
    theirs, _, ours = random_model(kind, config)
    pixels = torch.randn(1, 3, 28, 12)
    extra = {"interpolate_pos_encoding": True} if name == "vit" else {}
    with torch.inference_mode():
        assert relative_error(ours(pixels), theirs(pixels, **extra).last_hidden_state) < TOLERANCE


@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_hidden_patches(random_model, name):
    kind, config = ENCODERS[name]()
    theirs, _, ours = random_model(kind, config)
    pixels, hidden = torch.randn(2, 3, 20, 20), torch.rand(2, 25) < 0.4
    with torch.inference_mode():
        reference = theirs(pixels, bool_masked_pos=hidden).last_hidden_state
        assert relative_error(ours(pixels, hidden), reference) < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("ViTForImageClassification", "ViTConfig"),
        ("Dinov2ForImageClassification", "Dinov2Config"),
        ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig"),
    ],
)
def test_classifiers(random_model, tmp_path, kind, config):
    labels = {"id2label": {0: "cat", 1: "dog", 2: "گربه"}, "label2id": {"cat": 0, "dog": 1, "گربه": 2}}
    kind = getattr(transformers, kind)
    theirs, checkpoint, ours = random_model(kind, getattr(transformers, config)(**SIDE, **labels))
    assert isinstance(ours, ImageClassifier)
    assert ours.config.labels == ("cat", "dog", "گربه")
    pixels = torch.randn(2, 3, 20, 20)
    with torch.inference_mode():
        reference = theirs(pixels).logits
        if kind.__name__ == "Dinov2WithRegistersForImageClassification":
            # transformers counts the registers among the patches that it averages.
            hidden = theirs.dinov2_with_registers(pixels).last_hidden_state
            reference = theirs.classifier(torch.cat((hidden[:, 0], hidden[:, 5:].mean(1)), 1))
        assert relative_error(ours(pixels), reference) < TOLERANCE
    found = check_way_back(kind, ours, checkpoint, tmp_path / "ours", lambda model: model(pixels).logits)
    assert relative_error(found, theirs(pixels).logits) < 1e-5


def texts(end=None):
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(2, 97, (n,), generator=generator).tolist() for n in (3, 9, 11)]
    return [[*row, end] for row in rows] if end is not None else rows


@pytest.mark.parametrize("legacy", [False, True], ids=["end by its id", "end is the highest id"])
def test_clip(random_model, tmp_path, legacy):
    text = TEXT | ({"eos_token_id": 2} if legacy else {"hidden_act": "gelu"})
    config = transformers.CLIPConfig(text_config=text, vision_config=SIDE, projection_dim=16)
    theirs, checkpoint, ours = random_model(transformers.CLIPModel, config)
    assert isinstance(ours, DualEncoder)
    pixels, rows = torch.randn(2, 3, 20, 20), texts(end=98)
    padded = torch.tensor([row + [1] * (12 - len(row)) for row in rows])
    with torch.inference_mode():
        reference = theirs(input_ids=padded, pixel_values=pixels)
        assert relative_error(ours.encode_images(pixels), reference.image_embeds) < TOLERANCE
        assert relative_error(ours.encode_texts(rows), reference.text_embeds) < TOLERANCE
        assert relative_error(ours(pixels, rows), reference.logits_per_image) < TOLERANCE
    found = check_way_back(
        transformers.CLIPModel,
        ours,
        checkpoint,
        tmp_path / "ours",
        lambda model: model(input_ids=padded, pixel_values=pixels).logits_per_image,
    )
    assert relative_error(found, reference.logits_per_image) < 1e-5


@pytest.mark.parametrize("projection", [24, 32])
def test_siglip(random_model, tmp_path, projection):
    # The published ones have one width everywhere; the text side's projection must reach the pictures' width.
    text = TEXT | {"projection_size": 32, "hidden_size": projection, "num_attention_heads": 4}
    config = transformers.SiglipConfig(text_config=text, vision_config=SIDE)
    theirs, checkpoint, ours = random_model(transformers.SiglipModel, config)
    assert isinstance(ours, DualEncoder)
    pixels, rows = torch.randn(2, 3, 20, 20), texts()
    padded = torch.tensor([row + [1] * (12 - len(row)) for row in rows])
    with torch.inference_mode():
        reference = theirs(input_ids=padded, pixel_values=pixels)
        assert relative_error(ours.encode_images(pixels), reference.image_embeds) < TOLERANCE
        assert relative_error(ours.encode_texts(rows), reference.text_embeds) < TOLERANCE
        assert relative_error(ours(pixels, rows), reference.logits_per_image) < TOLERANCE
        assert relative_error(ours.vision(pixels), theirs.vision_model(pixels).last_hidden_state) < TOLERANCE
    found = check_way_back(
        transformers.SiglipModel,
        ours,
        checkpoint,
        tmp_path / "ours",
        lambda model: model(input_ids=padded, pixel_values=pixels).logits_per_image,
    )
    assert relative_error(found, reference.logits_per_image) < 1e-5


def test_a_linear_swap_reaches_the_patches(random_model):
    _, _, ours = random_model(*ENCODERS["vit"]())
    names = replace_linears(ours, lambda _, module: isinstance(module, torch.nn.Linear), lambda _, module: module)
    assert "patches" in names
    assert len(names) == 1 + 3 * 6 + 1


def test_what_does_not_fit_is_refused(random_model):
    _, checkpoint, ours = random_model(*ENCODERS["vit"]())
    with pytest.raises(UsageError, match="1 channels"):
        ours(torch.randn(1, 1, 20, 20))
    with pytest.raises(UsageError, match="whole patches of 4"):
        ours(torch.randn(1, 3, 20, 22))
    with pytest.raises(UsageError, match="sees pictures"):
        _ = checkpoint.text_config


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"patch_size": [4, 2]}, "not square"),
        ({"image_size": "large"}, "'image_size' must be"),
        ({"image_size": 2}, "larger than the picture"),
        ({"pooler_act": "gelu"}, "pooler_act"),
        ({"num_attention_heads": 5}, "multiple of"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
    ],
)
def test_configs_that_make_no_model(changes, match):
    hf = transformers.ViTConfig(**SIDE).to_dict() | {"architectures": ["ViTModel"]} | changes
    with pytest.raises(CheckpointError, match=match):
        family_of(hf, "config.json").config(Keys(hf, "config.json"))


def test_a_vision_language_model_that_is_not_known_is_called_so():
    with pytest.raises(CheckpointError, match="sees images as well"):
        family_of({"architectures": ["SomethingElse"], "vision_config": {}}, "config.json")
