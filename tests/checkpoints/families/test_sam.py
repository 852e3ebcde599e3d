"""SamModel over a plain Vision Transformer, on random small models: parity with transformers and the way back."""

from __future__ import annotations

import pytest
import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families import family_of
from craton.checkpoints.families.family import Keys
from craton.checkpoints.save import save_checkpoint
from craton.errors import CheckpointError
from craton.models import Segmenter

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

TOLERANCE = 2e-4  # of the largest number
SIDE, PATCH = 32, 8
VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": SIDE,
    "patch_size": PATCH,
    "window_size": 0,
    "use_rel_pos": False,
    "mlp_dim": 40,
}
ODD = {
    "vision": {"qkv_bias": False, "hidden_act": "relu", "num_channels": 1, "layer_norm_eps": 1e-5},
    "prompts": {"hidden_act": "relu", "mask_input_channels": 8, "layer_norm_eps": 1e-5},
    "decoder": {
        "hidden_act": "gelu",
        "num_hidden_layers": 3,
        "num_multimask_outputs": 2,
        "iou_head_depth": 4,
        "iou_head_hidden_dim": 12,
        "layer_norm_eps": 1e-5,
    },
}


def sam_config(vision=(), prompts=(), decoder=()):
    width = 32
    return transformers.SamConfig(
        vision_config=VISION | {"output_channels": width, "num_pos_feats": width // 2} | dict(vision),
        prompt_encoder_config={"hidden_size": width, "image_size": SIDE, "patch_size": PATCH} | dict(prompts),
        mask_decoder_config={"hidden_size": width, "num_attention_heads": 4, "mlp_dim": 48} | dict(decoder),
    )


@pytest.fixture(params=["plain", "odd"])
def pair(tmp_path, request):
    """transformers' model, the checkpoint of its files, and ours."""
    torch.manual_seed(0)
    theirs = transformers.SamModel(sam_config(**ODD if request.param == "odd" else {})).float().eval()
    theirs.requires_grad_(False)
    for parameter in theirs.parameters():
        noise = torch.randn_like(parameter)
        parameter.copy_(parameter + 0.3 * noise if parameter.dim() < 2 else noise * parameter[0].numel() ** -0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    checkpoint = Checkpoint.open(tmp_path / "theirs")
    ours = checkpoint.load(torch.float32)
    assert isinstance(ours, Segmenter)
    return theirs, checkpoint, ours


def relative_error(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def prompts():
    points, labels = torch.rand(3, 2, 2) * SIDE, torch.tensor([[1, 0], [1, 1], [0, -1]])
    boxes = torch.tensor([[2.0, 3, 20, 25], [0, 0, 31, 31], [7, 7, 9, 30]])
    masks = 5 * torch.randn(1, 1, 4 * SIDE // PATCH, 4 * SIDE // PATCH)
    return {
        "points": {"points_BQ2": points, "labels_BQ": labels},
        "a point": {"points_BQ2": points[:, :1], "labels_BQ": labels[:, :1]},
        "boxes": {"boxes_B4": boxes},
        "points and boxes": {"points_BQ2": points, "labels_BQ": labels, "boxes_B4": boxes},
        "points and a mask": {"points_BQ2": points, "labels_BQ": labels, "masks_B1HW": masks.expand(3, -1, -1, -1)},
    }


def ask(theirs, image, prompt, *, several):
    """The same of transformers, whose prompts of one picture are a dimension of their own, and whose mask is all's."""
    points, labels, boxes, masks = (prompt.get(k) for k in ("points_BQ2", "labels_BQ", "boxes_B4", "masks_B1HW"))
    said = theirs(
        image_embeddings=image,
        input_points=None if points is None else points[None],
        input_labels=None if labels is None else labels[None],
        input_boxes=None if boxes is None else boxes[None],
        input_masks=None if masks is None else masks[:1],
        multimask_output=several,
    )
    return said.pred_masks[0], said.iou_scores[0]


def test_like_transformers(pair, tmp_path):
    theirs, checkpoint, ours = pair
    pixels = torch.randn(1, theirs.config.vision_config.num_channels, SIDE, SIDE)
    with torch.inference_mode():
        image = theirs.get_image_embeddings(pixels)
        assert relative_error(ours.encode(pixels), image) < TOLERANCE
        save_checkpoint(ours, checkpoint.family, tmp_path / "ours")
        again = transformers.SamModel.from_pretrained(tmp_path / "ours").eval()
        for name, prompt in prompts().items():
            for several in (True, False):
                logits, quality = ours.decode(ours.encode(pixels), **prompt, several=several)
                expected, scores = ask(theirs, image, prompt, several=several)
                assert relative_error(logits, expected) < TOLERANCE, name
                assert relative_error(quality, scores) < TOLERANCE, name
                back, _ = ask(again, again.get_image_embeddings(pixels), prompt, several=several)
                assert relative_error(back, expected) < 1e-5, name


@pytest.mark.parametrize(
    ("part", "values", "match"),
    [
        ("vision", {"window_size": 7}, "windows"),
        ("vision", {"use_rel_pos": True}, "relative"),
        ("vision", {"use_abs_pos": False}, "use_abs_pos"),
        ("vision", {"num_pos_feats": 8}, "frequencies"),
        ("decoder", {"attention_downsample_rate": 4}, "attention_downsample_rate"),
        ("prompts", {"image_size": 64}, "image_size"),
    ],
)
def test_what_is_refused(part, values, match):
    hf = sam_config(**{part: values}).to_dict() | {"architectures": ["SamModel"]}
    with pytest.raises(CheckpointError, match=match):
        family_of(hf, "config.json").config(Keys(hf, "config.json"))


def test_the_published_models_are_refused_with_the_reason():
    hf = {"architectures": ["SamModel"], "model_type": "sam", "vision_config": {}}
    with pytest.raises(CheckpointError, match="ViTDet") as caught:
        family_of(hf, "config.json").config(Keys(hf, "config.json"))
    assert "pretrain-masks" in (caught.value.remedy or "")
