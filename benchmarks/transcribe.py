"""How fast and how well speech is written down, beside faster-whisper (CTranslate2) with the same weights.

Cases
    prompts/alone       s of sound a second: telephone prompts of some seconds, one after another, one window at a time
    prompts/together    the same, several files in one call; the peer has no such call and takes them one by one
    long/in order       one recording of all prompts with pauses between them, window after window, as each one ends
    long/batched        the same recording cut at its pauses, eight windows at a time
    long/word times     batched, with the time of every word
    .../cpu             the same case in seconds of CPU for a minute of sound, which other work moves less
    .../wer             word error rate, %, against the prompts' published texts

How the figures are made
    Model: Whisper tiny.en, the very file (CTranslate2, fp16) for both; `craton pull whisper-tiny.en` fetches it. Sound:
    Debian's asterisk-core-sounds-en and asterisk-core-sounds-en-wav (--sounds: where they are unpacked). Both decode
    greedily with temperature fallback. Peers: faster-whisper in its default on a CPU (fp32) and in int8, by this Python
    or by --peer-python. A turn is a process that loads its model and reads a file before the clock runs; turns
    interleave and the figure is the median of the rounds. Texts are compared after Whisper's own normaliser (Radford
    2022, appendix C), as transformers has it, with * read as "star" and # as "pound".
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from harness import Case, ContenderError, Document, case, interleave, machine, parser, report

from craton import store
from craton.errors import CratonError
from craton.modalities.audio import SAMPLE_RATE, read_audio

PACKAGES = ("craton", "torch", "numpy", "soundfile", "soxr")
TURN = Path(__file__).parent / "contenders" / "transcribe_turn.py"
FP32, INT8 = "faster-whisper", "faster-whisper int8"
PAUSE_SECONDS = 0.6


@dataclass(frozen=True)
class Scope:
    """What a run measures: prompts, minutes of the long recording, rounds."""

    prompts: int
    minutes: float
    rounds: int


FULL, QUICK = Scope(60, 10.0, 5), Scope(12, 1.5, 1)


@dataclass
class Job:
    """A case: its files, their texts, and what each contender is told."""

    files: list[str]
    texts: list[str]
    seconds: float
    ours: dict[str, Any]
    batch: int | None = None
    words: bool = False
    heard: dict[str, list[str]] = field(default_factory=dict)


def prompts(root: Path, count: int) -> list[tuple[Path, str]]:
    """`count` prompts of at least five words, evenly spread over all of them, with their texts."""
    texts = root / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    folder = root / "usr/share/asterisk/sounds/en_US_f_Allison"
    found = []
    for line in gzip.decompress(texts.read_bytes()).decode().splitlines() if texts.is_file() else ():
        name, colon, text = line.partition(": ")
        path = folder / f"{name}.wav"
        if colon and not name.startswith(";") and "[" not in text and len(text.split()) >= 5 and path.is_file():
            found.append((path, text))
    found.sort()
    return [found[i * len(found) // count] for i in range(count)] if len(found) >= count else []


def joined(chosen: list[tuple[Path, str]], minutes: float, path: Path) -> tuple[str, float]:
    """Write one recording of prompts with pauses between them: its text, and its length in seconds."""
    import soundfile

    pause = np.zeros(int(PAUSE_SECONDS * SAMPLE_RATE), np.float32)
    parts: list[np.ndarray[Any, Any]] = []
    texts, length = [], 0
    for file, text in chosen:
        samples = read_audio(file)
        if length > minutes * 60 * SAMPLE_RATE:
            break
        parts += [samples, pause]
        texts.append(text)
        length += len(samples) + len(pause)
    soundfile.write(path, np.concatenate(parts), SAMPLE_RATE)
    return " ".join(texts), length / SAMPLE_RATE


def turn(python: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The figures of one process. Raises ContenderError with its reason."""
    done = subprocess.run([python, str(TURN), json.dumps(settings)], capture_output=True, text=True)
    if done.returncode != 0:
        raise ContenderError((done.stderr.strip().splitlines() or ["it ended without a word"])[-1])
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "absent" in figures:
        raise ContenderError(figures["absent"])
    return figures


def measure(name: str, job: Job, model: str, args: argparse.Namespace, rounds: int) -> dict[str, Case]:
    """The cases of one job: speed, CPU time and error rate."""
    shared = {"threads": args.threads, "warm_up": job.files[:1] if len(job.files) > 1 else args.warm_up}
    cpu: dict[str, list[float]] = {}

    def race(contender: str, python: str, settings: dict[str, Any]) -> float:
        figures = turn(python, {**shared, **settings, "files": job.files})
        job.heard[contender] = figures["texts"]
        cpu.setdefault(contender, []).append(figures["cpu"] / job.seconds * 60)
        return job.seconds / float(figures["seconds"])

    folder = str(store.find(model).path)
    ours = {"contender": "craton", "model": model, "settings": {**job.ours, "word_times": job.words}}
    peer = {"contender": "faster_whisper", "model": folder, "batch": job.batch, "words": job.words}
    contenders = {
        "ours": lambda: race("ours", sys.executable, ours),
        FP32: lambda: race(FP32, args.peer_python, {**peer, "compute_type": "float32"}),
        INT8: lambda: race(INT8, args.peer_python, {**peer, "compute_type": "int8"}),
    }
    speed, failed = interleave(contenders, rounds)
    if "ours" in failed:
        raise SystemExit(f"Craton: {failed['ours']}")
    used = {contender: float(np.median(figures)) for contender, figures in cpu.items() if contender in speed}
    errors = {contender: error_rate(job.texts, heard) for contender, heard in job.heard.items() if contender in speed}
    out = {
        name: case(speed.pop("ours"), speed, "s of sound/s", absent=failed),
        f"{name}/cpu": case(used.pop("ours"), used, "CPU s/min", less_is_better=True, absent=failed),
    }
    if None not in errors.values():
        rates = {contender: float(rate) for contender, rate in errors.items() if rate is not None}
        out[f"{name}/wer"] = case(rates.pop("ours"), rates, "%", less_is_better=True, absent=failed)
    return out


def error_rate(texts: list[str], heard: list[str]) -> float | None:
    """Word error rate in %, or None without the normaliser's package."""
    try:
        from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
    except ImportError:
        return None
    normalizer = EnglishTextNormalizer({})
    wrong = total = 0
    for text, found in zip(texts, heard, strict=True):
        said, written = (
            normalizer(words.replace("*", "star").replace("#", "pound")).split() for words in (text, found)
        )
        wrong += edits(said, written)
        total += len(said)
    return 100 * wrong / total


def edits(one: list[str], other: list[str]) -> int:
    """Words to be changed, put in or taken out."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def main() -> None:
    """Measure and report."""
    flags = parser(__doc__.partition("\n")[0])
    flags.add_argument("--sounds", type=Path, default=Path("/"), help="where Debian's packages are unpacked")
    flags.add_argument("--peer-python", default=sys.executable, help="a Python that has faster-whisper")
    flags.add_argument("--threads", type=int, default=2)
    flags.add_argument("--model", default="whisper-tiny.en")
    args = flags.parse_args()
    scope = QUICK if args.quick else FULL
    document = Document(machine=machine(PACKAGES), cases={})
    chosen = prompts(args.sounds, scope.prompts)
    try:
        store.find(args.model)
    except CratonError as error:
        print(error, file=sys.stderr)
        chosen = []
    if not chosen:
        print("not measured: the model or Debian's asterisk-core-sounds-en(-wav) is not here", file=sys.stderr)
        report(document, args.json)
        return
    files, texts = [str(path) for path, _ in chosen], [text for _, text in chosen]
    args.warm_up = files[:1]
    seconds = sum(len(read_audio(file)) for file in files) / SAMPLE_RATE
    with tempfile.TemporaryDirectory() as folder:
        long = Path(folder) / "long.wav"
        text, length = joined(prompts(args.sounds, 200) or chosen, scope.minutes, long)
        jobs = {
            "prompts/alone": Job(files, texts, seconds, {"batch": 1, "skip_silence": False}),
            "prompts/together": Job(files, texts, seconds, {}),
            "long/in order": Job([str(long)], [text], length, {"batch": 1, "skip_silence": False}),
            "long/batched": Job([str(long)], [text], length, {}, batch=8),
            "long/word times": Job([str(long)], [text], length, {}, batch=8, words=True),
        }
        for name, job in jobs.items():
            document["cases"] |= measure(name, job, args.model, args, scope.rounds)
    report(document, args.json)


if __name__ == "__main__":
    main()
