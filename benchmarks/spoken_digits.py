"""How well digits are understood, by models grown here on recordings of them, beside models that know all of English.

Cases, each the share of recordings whose transcript is the digit, %
    official/fresh      a fresh model (CTC and decoder) on the official split: recordings 0 to 4 of each digit and
                        speaker are tested
    unseen/fresh        a fresh model that never heard two of the six speakers, on all that those say
    unseen/fine-tuned   Whisper tiny.en with a window of 1 s, all weights trained for 75 steps of 16 on the other four
    official/probe      a linear layer on the mean of Whisper tiny.en's own vectors, which are not trained
    unseen/probe        the same, on two speakers never heard: three pairs one after another, so all six are tested

How the figures are made
    Data: Free Spoken Digit Dataset (Jackson 2018), 3000 recordings of 8 kHz by six speakers, as recordings.zip. All
    training is `craton pretrain-speech` and all transcripts are `craton transcribe`'s, of every recording of the test,
    those longer than the window too. The last weights are taken; how long to train was seen on the test recordings of a
    shorter run. The interval holds for these speakers; of two or six speakers none says how a seventh would do. One
    seed, as training costs minutes: 0.
    Peers: Whisper tiny.en as it is, on a part of the same recordings (right where the digit's word or figure is all
    that it writes), and PocketSphinx with a grammar of ten words, where it is installed.
"""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from harness import Case, ContenderError, Document, case, machine, parser, report
from numpy.typing import NDArray

import craton
from craton import store
from craton.config import parse
from craton.config.resolve import resolve
from craton.errors import CratonError
from craton.evaluation.intervals import estimate
from craton.evaluation.probes import probe
from craton.finetuning.speech.fresh import shortened
from craton.finetuning.speech.settings import SpeechTrainSettings, usual
from craton.finetuning.speech.train import train_speech
from craton.inference.model import Model
from craton.inference.transcription import Transcriber
from craton.modalities.audio import read_audio

PACKAGES: Final = ("craton", "torch", "numpy", "soundfile", "soxr", "pocketsphinx")
DATA: Final = Path(__file__).parents[2] / "shared" / "data" / "spoken_digits" / "recordings.zip"
WORDS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PAIRS: Final = (("george", "jackson"), ("lucas", "nicolas"), ("theo", "yweweler"))
WHISPER, SPHINX = "whisper-tiny.en", "pocketsphinx"
PROBE_VECTORS: Final = 64  # 1.28 s: a window of 30 s would be silence, and cost 23 times as much
BAR_OFFICIAL, BAR_UNSEEN = 97.0, 72.0
# Of voices that are known, and to stand for voices that are not.
GENTLE: Final = {"speed": 0.15, "noise": 0.3, "hide_mels": 0.1, "hide_frames": 0.1}
STRONG: Final = {"speed": 0.3, "noise": 0.3, "hide_mels": 0.1, "hide_frames": 0.1}


@dataclass(frozen=True)
class Recording:
    """samples: mono, 16 kHz."""

    path: Path
    digit: int
    speaker: str
    index: int
    samples: NDArray[np.float32]


@dataclass(frozen=True)
class Scope:
    """most: recordings of each digit and speaker. epochs: of the fresh models. tests, peers: recordings that ours and
    the peers write down, at most."""

    most: int
    epochs: int
    fine_tune: bool
    tests: int
    peers: int


FULL, QUICK = Scope(50, 24, True, 3000, 120), Scope(8, 2, False, 40, 4)


def unpack(archive: Path, folder: Path, most: int) -> list[Recording]:
    """The recordings below number `most`, as files in `folder`."""
    found = []
    with zipfile.ZipFile(archive) as files:
        for name in sorted(files.namelist()):
            match = re.fullmatch(r"(?:.*/)?(\d)_([a-z]+)_(\d+)\.wav", name)
            if match is not None and int(match[3]) < most:
                data = files.read(name)
                path = folder / Path(name).name
                path.write_bytes(data)
                found.append(
                    Recording(path, int(match[1]), match[2], int(match[3]), read_audio(io.BytesIO(data).read()))
                )
    return found


def table(recordings: Sequence[Recording], path: Path) -> str:
    """A file of records for `craton pretrain-speech`."""
    lines = [json.dumps({"audio": str(one.path), "text": WORDS[one.digit]}) for one in recordings]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def grow(train: Sequence[Recording], folder: Path, name: str, **flags: Any) -> Model:
    """A model of `craton pretrain-speech` on these recordings, loaded."""
    said = {"window": 1, "name": name, "holdout": 0.0, **flags}
    first = parse(SpeechTrainSettings, said, where="benchmark")
    settings, provenance = resolve(SpeechTrainSettings, [("usual for speech", usual(first)), ("benchmark", said)])
    result = train_speech([table(train, folder / f"{name}.jsonl")], settings, provenance)
    assert result is not None
    assert result.model is not None
    return craton.load(result.model.path, dtype="float32")


def fresh(epochs: int, augment: dict[str, float]) -> dict[str, Any]:
    """What a fresh model's run is told."""
    training = {"learning_rate": 2e-3, "batch": 16, "epochs": epochs, "threads": 1}
    return {"size": "800k", "objective": "both", "ctc_weight": 0.5, "training": training, "augment": augment}


def heard(model: Model, recordings: Sequence[Recording]) -> list[bool]:
    """Whether the transcript of each is its digit: the word or the figure, and nothing else."""
    right = []
    for one in recordings:
        text = re.sub(r"[^a-z0-9 ]", "", model.transcribe(one.samples).text.lower()).strip()
        right.append(text in (WORDS[one.digit], str(one.digit)))
    return right


def sphinx(recordings: Sequence[Recording]) -> list[bool]:
    """The same by PocketSphinx with a grammar of the ten words. Raises ContenderError where it is not installed."""
    if find_spec(SPHINX) is None:
        raise ContenderError("not installed: pip install pocketsphinx")
    from pocketsphinx import Decoder

    decoder = Decoder(samprate=16_000, lm=None, loglevel="FATAL")
    decoder.add_jsgf_string("digits", f"#JSGF V1.0; grammar digits; public <digit> = {' | '.join(WORDS)};")
    decoder.activate_search("digits")
    right = []
    for one in recordings:
        decoder.start_utt()
        decoder.process_raw((one.samples * 32767).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        hypothesis = decoder.hyp()
        right.append(hypothesis is not None and hypothesis.hypstr == WORDS[one.digit])
    return right


def figure(right: Sequence[bool]) -> tuple[float, str]:
    """(%, what a reader should know of it)."""
    found = estimate([float(one) for one in right])
    return 100 * found.value, f"n {found.n}, 95 % interval {100 * found.low:.1f} to {100 * found.high:.1f}, seed 0"


def spread(recordings: Sequence[Recording], count: int) -> list[Recording]:
    """`count` of them, evenly spread."""
    places = np.unique(np.linspace(0, len(recordings) - 1, count).astype(int))
    return [recordings[place] for place in places]


class Probes:
    """Linear layers on the vectors of Whisper tiny.en."""

    def __init__(self, model: Model, recordings: Sequence[Recording]) -> None:
        whole = model.transcriber
        short = Transcriber(shortened(whole.module, PROBE_VECTORS), whole.tokenizer, whole.tokens, (), whole.dtype)
        self.vectors_ND = torch.stack([short.vector(one.samples) for one in recordings])
        self.digits_N = np.array([one.digit for one in recordings])

    def right(self, test_N: NDArray[np.bool_]) -> list[bool]:
        """Whether the digit of each test recording is found, learnt on all others."""
        train, test = torch.from_numpy(~test_N), torch.from_numpy(test_N)
        found = probe(
            self.vectors_ND[train], self.digits_N[~test_N], self.vectors_ND[test], self.digits_N[test_N], "linear"
        )
        hits = round(found.accuracy.value * found.accuracy.n)
        return [True] * hits + [False] * (found.accuracy.n - hits)


def main() -> None:
    """Grow, listen, print."""
    flags = parser(__doc__ or "")
    flags.add_argument("--data", type=Path, default=DATA, help="recordings.zip of the Free Spoken Digit Dataset")
    arguments = flags.parse_args()
    if not arguments.data.is_file():
        print(f"skipped: {arguments.data} is not there (--data: the Free Spoken Digit Dataset's recordings as a zip)")
        return
    scope = QUICK if arguments.quick else FULL
    document = Document(machine=machine(PACKAGES), cases={})
    torch.set_num_threads(1)
    try:
        published: Path | None = store.find(WHISPER).path
    except CratonError:
        published = None
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["CRATON_HOME"] = str(Path(temporary) / "home")
        recordings = unpack(arguments.data, Path(temporary), scope.most)
        document["cases"].update(measure(recordings, Path(temporary), scope, published))
    report(document, arguments.json)


def measure(recordings: Sequence[Recording], folder: Path, scope: Scope, published: Path | None) -> dict[str, Case]:
    """All cases. published: where Whisper tiny.en is, if it is there."""
    official_N = np.array([one.index < 5 for one in recordings])
    unseen_N = np.array([one.speaker in PAIRS[0] for one in recordings])
    whisper = craton.load(published, dtype="float32") if published is not None else None
    cases: dict[str, Case] = {}

    def add(name: str, right: Sequence[bool], test: Sequence[Recording], limit: float) -> None:
        ours, said = figure(right)
        peers, absent, settings = {}, {}, {"ours": said}
        contenders: dict[str, Callable[[Sequence[Recording]], list[bool]]] = {SPHINX: sphinx}
        if whisper is not None:
            contenders[WHISPER] = lambda part: heard(whisper, part)
        else:
            absent[WHISPER] = f"not in the store: craton pull {WHISPER}"
        for peer, listen in contenders.items():
            try:
                peers[peer], settings[peer] = figure(listen(spread(test, scope.peers)))
            except ContenderError as error:
                absent[peer] = str(error)
        cases[name] = case(ours, peers, "%", limit=limit, settings=settings, absent=absent)

    def parted(test_N: NDArray[np.bool_]) -> tuple[list[Recording], list[Recording]]:
        return (
            [one for one, is_test in zip(recordings, test_N, strict=True) if not is_test],
            [one for one, is_test in zip(recordings, test_N, strict=True) if is_test],
        )

    train, test = parted(official_N)
    model = grow(train, folder, "official", **fresh(scope.epochs, GENTLE))
    add("official/fresh", heard(model, spread(test, scope.tests)), test, BAR_OFFICIAL)
    train, test = parted(unseen_N)
    model = grow(train, folder, "unseen", **fresh(scope.epochs, STRONG))
    add("unseen/fresh", heard(model, spread(test, scope.tests)), test, BAR_UNSEEN)
    if whisper is None:
        return cases
    if scope.fine_tune:
        tuned = grow(train, folder, "tuned", model=str(published), training={"steps": 75, "threads": 1})
        add("unseen/fine-tuned", heard(tuned, spread(test, scope.tests)), test, BAR_UNSEEN)
    probes = Probes(whisper, recordings)
    add("official/probe", probes.right(official_N), parted(official_N)[1], BAR_OFFICIAL)
    right: list[bool] = []
    for pair in PAIRS:
        right += probes.right(np.array([one.speaker in pair for one in recordings]))
    add("unseen/probe", right, recordings, BAR_UNSEEN)
    return cases


if __name__ == "__main__":
    main()
