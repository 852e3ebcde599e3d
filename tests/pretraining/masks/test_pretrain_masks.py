"""Runs of `craton pretrain-masks`: from files to a model that segments what it is pointed at, resume, and what
transformers makes of the result."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from craton.checkpoints.safetensors import open_weights
from craton.inference.segmentation import load_segmenter
from craton.modalities.image import encode_png, encode_rle
from craton.models import Segmenter
from craton.pretraining.masks.pretrain import resume, segmenter_config
from craton.store.runs import Run

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")

SIDE = 32


@pytest.fixture
def discs(tmp_path):
    """Cut-outs: discs of one colour each."""
    folder = tmp_path / "discs"
    folder.mkdir()
    y, x = np.mgrid[:24, :24] - 11.5
    opaque = (255 * (np.hypot(x, y) < 11)).astype(np.uint8)[..., None]
    for number, colour in enumerate(np.random.default_rng(0).integers(0, 256, (12, 3))):
        pixels = np.concatenate((np.broadcast_to(colour.astype(np.uint8), (24, 24, 3)), opaque), 2)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def outlined(tmp_path):
    """COCO's annotations of four pictures, with polygons and run lengths."""
    document = {"images": [], "annotations": []}
    for number in range(4):
        mask = np.zeros((20, 32), np.bool_)
        mask[4 : 10 + number, 6:18] = True
        pixels = np.where(mask[..., None], (200, 60, 20), (30, 90, 160)).astype(np.uint8)
        (tmp_path / f"{number}.png").write_bytes(encode_png(pixels))
        document["images"].append({"id": number, "file_name": f"{number}.png", "height": 20, "width": 32})
        polygon = [[6, 4, 18, 4, 18, 10 + number, 6, 10 + number]]
        outline = polygon if number % 2 else encode_rle(mask)
        document["annotations"].append({"id": number, "image_id": number, "segmentation": outline})
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(document))
    return path


def small(**changes: object) -> list[str]:
    """Flags of a run of a few seconds."""
    flags = {
        "image_size": SIDE, "patch": 8, "size": "300k", "holdout": 0.25, "batch": 4, "steps": 4, "threads": 1,
        "dtype": "float32", "prompts": 2, "corrections": 1,
    } | changes  # fmt: skip
    return [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_a_run_ends_in_a_model_that_segments(craton, discs):
    status, out, err = craton("pretrain-masks", discs, *small(name="discs", corrections=2), "--json")
    assert status == 0, err
    evaluation = json.loads(out)["evaluation"]
    assert evaluation["targets"] == 6  # three discs, two prompts each
    assert {"first_iou", "best_iou", "last_iou"} <= set(evaluation)
    model = load_segmenter("discs", dtype="float32")
    assert isinstance(model.module, Segmenter)
    seen = model.look(np.full((40, 64, 3), 90, np.uint8))
    (one,) = seen.segment(points=[(10, 20)])
    assert one.mask.shape == (40, 64)
    assert len(seen.segment(box=(5, 5, 30, 30), several=True)) == 3
    # It goes on, at its own size.
    status, _, err = craton("pretrain-masks", discs, *small(model="discs", name="more", steps=2, image_size=64))
    assert status == 0, err
    assert "of 32 x 32" in err
    more = load_segmenter("more", dtype="float32")
    assert more.preparation == model.preparation
    # What is not trained is what it was.
    assert torch.equal(more.module.prompts.positions.frequencies, model.module.prompts.positions.frequencies)
    assert not torch.equal(more.module.neck_in.weight, model.module.neck_in.weight)


@pytest.mark.slow
def test_it_learns_what_a_click_means(craton, discs):
    flags = small(name="discs", steps=500, batch=16, learning_rate=2e-3, corrections=0, objects=2)
    assert craton("pretrain-masks", discs, *flags)[0] == 0
    y, x = np.mgrid[:SIDE, :SIDE]
    wanted = np.hypot(x - 9, y - 20) < 7
    other = np.hypot(x - 24, y - 9) < 6
    pixels = np.where(wanted[..., None], (220, 40, 40), np.where(other[..., None], (40, 60, 220), 128)).astype(np.uint8)
    found = load_segmenter("discs", dtype="float32").look(pixels).segment(points=[(9, 20)])[0].mask
    assert (found & wanted).sum() / (found | wanted).sum() > 0.7


def test_outlined_pictures_and_backgrounds_go_in_too(craton, discs, outlined, tmp_path):
    behind = tmp_path / "behind"
    behind.mkdir()
    (behind / "a.png").write_bytes(encode_png(np.full((50, 40, 3), 77, np.uint8)))
    status, _, err = craton(
        "pretrain-masks", discs, outlined, *small(name="both", backgrounds=behind), "--evaluation", outlined
    )
    assert status == 0, err
    assert "4 pictures with 4 outlined things" in err
    assert "on 1 backgrounds and generated" in err


@pytest.mark.parametrize("corrections", [0, 1])
def test_a_run_that_was_stopped_is_the_run_that_was_not(craton, discs, corrections):
    flags = {"evaluate_every": 2, "save_every": 3, "keep_last": 9, "steps": 6, "micro_tokens": 40}
    flags["corrections"] = corrections
    assert craton("pretrain-masks", discs, *small(**flags, name="whole"))[0] == 0
    status, _, err = craton("pretrain-masks", discs, *small(**flags, name="cut"))
    assert status == 0, err
    run = Run.open("cut")
    shutil.rmtree(run.checkpoints_folder / "step-00000006")
    result = resume(run)
    whole, again = (open_weights(load_segmenter(name).checkpoint.path) for name in ("whole", result.model.id))
    assert set(whole.tensors) == set(again.tensors)
    for name in whole.tensors:
        assert torch.equal(whole.tensor(name), again.tensor(name)), name
    assert craton("runs", "resume", run.id)[0] == 2  # it is done


def test_other_masks_are_not_gone_on_with(craton, discs):
    assert craton("pretrain-masks", discs, *small(save_every=3, keep_last=9, name="discs"))[0] == 0
    run = Run.open("discs")
    shutil.rmtree(run.checkpoints_folder / "step-00000004")
    for path in discs.glob("*.png"):
        Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).rotate(9).save(path)
    with pytest.raises(Exception, match="changed"):
        resume(run)


@pytest.mark.peer
def test_what_is_published_opens_in_transformers(craton, discs):
    transformers = pytest.importorskip("transformers")
    assert craton("pretrain-masks", discs, *small(name="discs"))[0] == 0
    ours = load_segmenter("discs", dtype="float32")
    theirs, info = transformers.SamModel.from_pretrained(ours.checkpoint.path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    prepared = SamImageProcessorPil.from_pretrained(ours.checkpoint.path)(pixels, return_tensors="pt")["pixel_values"]
    square, (right, down) = ours.preparation.prepare(pixels)
    torch.testing.assert_close(torch.from_numpy(square)[None], prepared, atol=1e-5, rtol=1e-5)
    point = torch.tensor([[[[20.0 * right, 30.0 * down]]]])
    with torch.inference_mode():
        expected = theirs(pixel_values=prepared, input_points=point, input_labels=torch.ones(1, 1, 1, dtype=torch.long))
        logits, iou = ours.module.decode(
            ours.module.encode(prepared), point[0], torch.ones(1, 1, dtype=torch.long), several=True
        )
    torch.testing.assert_close(logits, expected.pred_masks[0], atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(iou, expected.iou_scores[0], atol=2e-4, rtol=2e-4)


def test_a_dry_run_keeps_nothing(craton, discs):
    status, _, err = craton("pretrain-masks", discs, *small(), "--dry-run")
    assert status == 0
    assert "12 cut-outs, pasted on generated backgrounds of 32 x 32" in err
    assert json.loads(craton("runs", "--json")[1])["runs"] == []


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((), "no masks to train on"),
        (("nowhere",), "neither a folder"),
        (("DATA", *small(patch=7)), "whole patches of 7"),
        (("DATA", *small(name="No Name")), "name"),
        (("DATA", *small(model="nobody")), "nobody"),
        (("DATA", *small(boxes=2)), "boxes"),
        (("DATA", *small(smallest=0.9, largest=0.2)), "larger than the largest"),
        (("DATA", *small(backgrounds="nowhere")), "no such"),
    ],
)
def test_wrong_use(craton, discs, arguments, match):
    status, _, err = craton("pretrain-masks", *(discs if word == "DATA" else word for word in arguments))
    assert status == 2
    assert match in err


def test_sizes_come_out_about_right():
    for parameters in (800_000, 2_000_000, 10_000_000, 90_000_000):
        with torch.device("meta"):
            model = Segmenter(segmenter_config(parameters, image=96, patch=8))
        count = sum(p.numel() for p in model.parameters())
        assert 0.75 < count / parameters < 1.35, (parameters, count)
