"""Quantising and pruning models that see: what is published is what was made, runs on its packed weights, and what
cannot be done is refused before anything is begun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import processors

import craton
from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families import FAMILIES, classifier_family
from craton.checkpoints.save import save_checkpoint
from craton.compression.blocks import open_source
from craton.compression.job import Outcome, Watch
from craton.compression.material_pictures import PictureMaterial
from craton.compression.merge_models import merge_models
from craton.compression.merge_settings import MergeSettings
from craton.compression.prune import prune
from craton.compression.quantize import quantize, resume
from craton.compression.quantize_settings import CalibrationSettings, PruneSettings, QuantizeSettings
from craton.compression.structured import prune_structured
from craton.compression.structured_settings import StructuredSettings
from craton.errors import DataError, FileFormatError, UsageError
from craton.inference import native
from craton.inference.images import ImageModel
from craton.inference.linears import PackedLinear
from craton.modalities.image import ImagePreprocessing, encode_png
from craton.modalities.text import Tokenizer
from craton.models import (
    DualEncoderConfig,
    EncoderConfig,
    ImageClassifierConfig,
    ModelConfig,
    VisionConfig,
    build,
)
from craton.models.initialisation import initialise
from craton.store import find
from craton.store.models import list_models
from craton.store.runs import list_runs
from craton.trunk import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    LearnedPositions,
    NormConfig,
    RotaryConfig,
    TrunkConfig,
)

pytest.importorskip("PIL", reason="pictures need Pillow")

NORM = NormConfig(kind="layer", bias=True)
LETTERS = "<>_ abcdefghijklmnopqrstuvwxyz.-"
SAMPLES = 8
# The matrices of the blocks of each model.
MATRICES = {"vit": 12, "dinov2": 14, "dinov3": 12, "clip": 24, "siglip": 24}


def trunk(mask: str = "full", *, gated: bool = False, rotary: bool = False, **switches: Any) -> TrunkConfig:
    attention = AttentionConfig(
        heads=4,
        kv_heads=4,
        head_size=16,
        mask=mask,
        bias=("q", "k", "v", "o"),
        rotary=RotaryConfig(dims=16, theta=100.0, axes=2) if rotary else None,
    )
    hidden = 176 if gated else 96
    feedforward = FeedForwardConfig(hidden=hidden, activation="silu" if gated else "gelu", gated=gated, bias=True)
    scale = switches.pop("layer_scale", None)
    layer = LayerConfig(attention=attention, feedforward=feedforward, norm=NORM, layer_scale=scale)
    return TrunkConfig(width=64, layers=(layer,) * 2, final_norm=NORM, **switches)


def text(mask: str) -> EncoderConfig:
    return EncoderConfig(vocab=len(LETTERS), context=40, trunk=trunk(mask, positions=LearnedPositions(count=40)))


IMAGE: dict[str, Any] = {"image": (24, 24), "patch": 8}
CONFIGS: dict[str, ModelConfig] = {
    "vit": ImageClassifierConfig(labels=("cat", "dog", "گربه"), backbone=VisionConfig(**IMAGE, trunk=trunk())),
    "dinov2": VisionConfig(**IMAGE, trunk=trunk(gated=True, layer_scale=1.0), mask_token=True),
    "dinov3": VisionConfig(
        **IMAGE, trunk=trunk(rotary=True, layer_scale=1.0), registers=2, mask_token=True, positions="centres"
    ),
    "clip": DualEncoderConfig(
        vision=VisionConfig(**IMAGE, trunk=trunk(input_norm=NORM), patch_bias=False, projection=32),
        text=text("causal"),
        projection=32,
    ),
    "siglip": DualEncoderConfig(
        vision=VisionConfig(**IMAGE, trunk=trunk(), class_token=False, pooling="attention"),
        text=text("full"),
        projection=64,
        projection_bias=True,
        pad=1,
        logit_bias=True,
    ),
}


@pytest.fixture(autouse=True)
def craton_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of its own."""
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of each kind."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({letter: number for number, letter in enumerate(LETTERS)}, unk_token="_")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing("< $A >", special_tokens=[("<", 0), (">", 1)])
    tokenizer = Tokenizer(backend, special_tokens={"bos_token": "<", "eos_token": ">"})
    families = {family.name: family for family in FAMILIES}
    root, folders = tmp_path_factory.mktemp("seeing"), {}
    for name, config in CONFIGS.items():
        model = build(config)
        initialise(model, 0)
        for parameter in model.parameters():  # as large as in a trained model, so that rounding is seen
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        folders[name] = save_checkpoint(
            model.to(torch.bfloat16 if name == "siglip" else torch.float32),
            classifier_family(families[name]) if name == "vit" else families[name],
            root / name,
            tokenizer=tokenizer if isinstance(config, DualEncoderConfig) else None,
            preprocessing=ImagePreprocessing.square(24).model_copy(update={"floating": name == "dinov3"}),
        )
    return folders


def write_pictures(folder: Path, *, captions: bool) -> Path:
    """More pictures than are wanted, smooth ones of different shapes."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(SAMPLES + 20):
        down, along = draw.integers(20, 60, 2)
        waves = np.sin(
            np.add.outer(np.linspace(0, draw.uniform(1, 9), down), np.linspace(0, draw.uniform(1, 9), along))
        )
        pixels = (128 + 100 * waves[..., None] * draw.uniform(0, 1, 3)).astype(np.uint8)
        (folder / f"{number}.png").write_bytes(encode_png(pixels))
        if captions:
            (folder / f"{number}.txt").write_text(f"A wave {'of ' * (number % 5)}water\nmore")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with captions."""
    return write_pictures(tmp_path_factory.mktemp("pictures") / "waves", captions=True)


def settings(pictures: Path, **values: Any) -> QuantizeSettings:
    return QuantizeSettings(**{"calibration": (str(pictures),), "samples": SAMPLES, **values})


def run(model: Path, chosen: QuantizeSettings, name: str = "small", watch: Watch | None = None) -> Outcome:
    return quantize(str(model), chosen, {}, name, watch)


def loaded(name: str | Path) -> ImageModel:
    return craton.load_images(name, threads=1)


@pytest.mark.parametrize(
    ("kind", "method", "bits"),
    [("vit", "rtn", 8), ("dinov2", "gptq", 4), ("dinov3", "awq", 4), ("clip", "awq", 4), ("siglip", "rtn", 8)],
)
def test_what_is_published_is_what_was_made(
    seeing: dict[str, Path], pictures: Path, kind: str, method: str, bits: int
) -> None:
    chosen = settings(pictures, method=method, bits=bits)
    if kind == "dinov2":  # 176 channels are no whole groups
        with pytest.raises(UsageError, match="rows of 176 weights") as refused:
            run(seeing[kind], chosen)
        assert "--keep" in str(refused.value.remedy)
        chosen = chosen.model_copy(update={"keep": ("weights_out",)})
    outcome = run(seeing[kind], chosen)
    assert outcome.difference < 1e-4
    assert len(outcome.rows) == MATRICES[kind] - (2 if kind == "dinov2" else 0)
    assert outcome.bytes_after < outcome.bytes_before
    assert outcome.measured.cosine is not None
    assert outcome.measured.cosine > (0.9995 if bits == 8 else 0.9)
    assert (outcome.measured.text_cosine is not None) == (kind in ("clip", "siglip"))
    checkpoint = Checkpoint.open(find("small").path)
    assert checkpoint.quantized_kinds() == {"Q8_0" if bits == 8 else "Q4_0"}
    model, before = loaded("small"), loaded(seeing[kind])
    files = sorted(pictures.glob("*.png"))[:3]
    likeness = (model.embed_images(files) * before.embed_images(files)).sum(-1)
    assert float(likeness.min()) > (0.999 if bits == 8 else 0.9)
    if native.available():
        packed = [name for name, module in model.module.named_modules() if isinstance(module, PackedLinear)]
        assert len(packed) == {"vit": 8, "dinov2": 8 - 2, "dinov3": 8, "clip": 16, "siglip": 16}[kind]
    assert model.features(files[0])[0].patches.shape == (3, 3, 64)
    if model.reads:
        assert float((model.embed("wave") * before.embed("wave")).sum()) > (0.999 if bits == 8 else 0.9)
    if kind == "vit":
        assert len(model.classify(files)[0]) == 3


def test_a_calibrated_method_is_nearer_than_rounding(seeing: dict[str, Path], pictures: Path) -> None:
    before = loaded(seeing["vit"])
    files = sorted(pictures.glob("*.png"))
    errors = {}
    for method in ("rtn", "gptq"):
        run(seeing["vit"], settings(pictures, method=method, bits=3), method)
        made = loaded(method)
        errors[method] = float((made.embed_images(files) - before.embed_images(files)).norm())
    assert errors["gptq"] < errors["rtn"]


def test_the_hidden_states_are_the_models_own(seeing: dict[str, Path], pictures: Path) -> None:
    for name, folder in seeing.items():
        checkpoint = Checkpoint.open(folder)
        source = open_source(checkpoint)
        material = PictureMaterial.read(checkpoint, CalibrationSettings(calibration=(str(pictures),), samples=SAMPLES))
        done = {}
        for tower in source.towers:
            flow = material.flow(source, tower, held_out=True, done=done)
            assert flow is not None
            for number, block in enumerate(tower.trunk.layers):
                flow.advance(block, number)  # type: ignore[arg-type]
            done[tower.name] = flow
        expected, given = material.expected(source.model, done), material.given(source.model)
        assert len(expected) == len(given) == (2 if name in ("clip", "siglip") else 1)
        for ours, theirs in zip(expected, given, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_captions_the_side_of_texts_is_rounded(seeing: dict[str, Path], tmp_path: Path) -> None:
    bare = write_pictures(tmp_path / "bare", captions=False)
    outcome = run(seeing["clip"], settings(bare, method="gptq"))
    assert outcome.calibration["captions"] is False
    unread = [row["matrix"] for row in outcome.rows if row["tokens"] is None]
    assert len(unread) == 12
    assert all(name.startswith("text_model.") for name in unread)
    assert any("no captions" in note for note in outcome.notes)
    assert outcome.measured.text_cosine is not None


def test_captions_are_read_from_tables_and_as_utf8_alone(seeing: dict[str, Path], tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "waves", captions=True)
    table = tmp_path / "table.jsonl"
    records = [{"image": str(path), "caption": "a wave"} for path in sorted(folder.glob("*.png"))]
    table.write_text("\n".join(map(json.dumps, records)))
    outcome = run(seeing["siglip"], settings(table, method="gptq"))
    assert outcome.calibration["captions"] is True
    assert all(row["tokens"] for row in outcome.rows)
    for path in folder.glob("*.txt"):
        path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(FileFormatError, match="not UTF-8"):
        run(seeing["clip"], settings(folder), "other")


class Stop:
    """Interrupts a run when it comes to a block."""

    def __call__(self, doing: str) -> None:
        if doing.startswith("block 4 of 4"):
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(seeing: dict[str, Path], pictures: Path) -> None:
    run(seeing["clip"], settings(pictures), "whole")
    with pytest.raises(KeyboardInterrupt):
        run(seeing["clip"], settings(pictures), "stopped", Watch(on_progress=Stop()))
    assert [model.name for model in list_models()] == ["whole"]
    resume(next(one for one in list_runs() if one.name == "stopped"))
    files = [(find(name).path / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]


def test_rounded_inputs_are_asked_for_in_the_file(seeing: dict[str, Path], pictures: Path) -> None:
    outcome = run(seeing["vit"], settings(pictures, bits=8, method="rtn", act="int8"))
    assert Checkpoint.open(find("small").path).int8_activations
    assert outcome.difference < 1e-4


@pytest.mark.parametrize(("kind", "method"), [("vit", "magnitude"), ("dinov3", "sparsegpt"), ("clip", "wanda")])
def test_zeros_are_saved_in_a_plain_checkpoint(seeing: dict[str, Path], pictures: Path, kind: str, method: str) -> None:
    chosen = PruneSettings(calibration=(str(pictures),), samples=SAMPLES, method=method, sparsity="2:4")
    outcome = prune(str(seeing[kind]), chosen, {}, "sparse")
    assert outcome.facts["zeros"] == pytest.approx(0.5, abs=0.01)
    assert outcome.difference < 1e-4
    model = loaded("sparse")
    matrices = [t for name, t in Checkpoint.open(find("sparse").path).load(torch.float32).state_dict().items()
                if ".layers." in name and t.dim() == 2]  # fmt: skip
    assert len(matrices) == MATRICES[kind]
    for matrix in matrices:
        assert int((matrix == 0).view(-1, 4).sum(1).min()) >= 2
    assert model.embed_images(sorted(pictures.glob("*.png"))[:2]).isfinite().all()


def test_refusals_leave_nothing(seeing: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"calibration": ()}, UsageError, "judged by pictures"),
        ({"samples": 64}, DataError, "there are 28 pictures; 64 to calibrate with and 16 to judge by"),
        ({"tune": 5}, UsageError, "--tune is for models of text"),
        ({"size": "80MB"}, UsageError, "--size is for models of text"),
        ({"format": "gguf"}, UsageError, "--format gguf is for models of text"),
        ({"calibration": (str(tmp_path / "nothing"),)}, UsageError, "no such file"),
    ]
    for values, error, words in cases:
        with pytest.raises(error, match=words) as refused:
            run(seeing["vit"], settings(pictures, **values))
        assert getattr(refused.value, "remedy", None)
    with pytest.raises(UsageError, match="cuts language models") as refused:
        prune_structured(str(seeing["vit"]), StructuredSettings(layers=1), name="less")
    assert "--sparsity" in str(refused.value.remedy)
    assert list_models() == []
    assert list_runs() == []


def test_a_merge_keeps_how_pictures_are_prepared(seeing: dict[str, Path], pictures: Path) -> None:
    for kind in ("vit", "clip"):
        merge_models([str(seeing[kind])] * 2, MergeSettings(), name=kind)
        files = sorted(pictures.glob("*.png"))[:2]
        ours, theirs = (loaded(name).embed_images(files) for name in (kind, seeing[kind]))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_commands_say_what_was_made(craton: Any, seeing: dict[str, Path], pictures: Path) -> None:
    base, flags = str(seeing["siglip"]), ("--calibration", str(pictures), "--samples", "8", "--method", "rtn")
    said = craton("quantize", base, "--name", "small", *flags)[2]
    assert "16 held-out pictures of" in said
    assert "and 16 captions" in said
    assert "of texts 0.9" in said
    made = craton("quantize", str(seeing["vit"]), "--name", "other", "--json", *flags)
    found = json.loads(made[1])
    assert 0.9 < found["measured"]["cosine"] <= 1


@pytest.mark.peer
def test_transformers_opens_the_folder(seeing: dict[str, Path], pictures: Path) -> None:
    """Of a ViT; its CLIP, SigLIP and DINOv3 stumble over any packed layer where they set initial weights (5.23)."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    run(seeing["vit"], settings(pictures))
    path = find("small").path
    theirs = transformers.AutoModelForImageClassification.from_pretrained(path, dtype=torch.float32).eval()
    pixels_BCHW = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = Checkpoint.open(path).load(torch.float32)(pixels_BCHW)  # type: ignore[call-arg]
        torch.testing.assert_close(ours, theirs(pixels_BCHW).logits, rtol=2e-4, atol=1e-4)
