"""How much do a text encoder and a recogniser lose in fewer bits and with zeros, and which method loses least?

Cases (limit, and first column of the peers: the model as it is)
    minilm/8-bit, 4-bit, 3-bit, 2-bit    nDCG@10, more is better: questions of XQuAD over all of its paragraphs
    minilm/50% zeros, 2:4 zeros          the same
    whisper/8-bit, 4-bit, 3-bit          word error rate, %, less is better: 60 telephone prompts
    whisper/50% zeros                    the same
    Craton's figure is that of the command's default method (AWQ; Wanda); the peers are its others in the same run.

How the figures are made
    all-MiniLM-L6-v2 comes in 32 bits and Whisper tiny.en in 16, so rounding costs what it costs. Each method is the
    command's own (`craton quantize`, `craton prune`) with its own defaults, groups of 32 among them; what it publishes
    is loaded as `craton embed` and `craton transcribe` load it and run on its packed weights. MiniLM is calibrated on
    the default text, Python's docstrings, which is far from the questions. Whisper has no default: 64 prompts of the
    same voice, none of which is scored. Search is exact, by cosine over 240 paragraphs. Errors are counted as
    `benchmarks/transcribe.py` counts them, where the sounds come from, too.
    Behind each figure stand the file's size and the 95 % interval of the difference to the model as it is: the
    bootstrap of articles, or of prompts. Craton's own stands with the model as it is.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from harness import Case, ContenderError, Document, case, machine, parser, report
from transcribe import edits, prompts

from craton.compression import prune, quantize
from craton.compression.job import Outcome
from craton.compression.quantize_settings import PruneSettings, QuantizeSettings
from craton.errors import CratonError
from craton.evaluation.intervals import estimate_ratio
from craton.evaluation.ranking_metrics import ndcg_at
from craton.inference.model import load
from craton.modalities.audio import read_audio
from craton.retrieval.index import Encoder
from craton.store import find
from craton.store.folders import HOME_VARIABLE

Array = npt.NDArray[np.float64]

PACKAGES = ("craton", "torch", "transformers", "soundfile", "soxr")
XQUAD = Path(__file__).parents[2] / "shared" / "data" / "xquad" / "xquad.en.json"
AS_IT_IS: Final = "as it is"
LABELS: Final = {"awq": "AWQ", "rtn": "RTN", "gptq": "GPTQ", "hqq": "HQQ"}
ZEROS: Final = {"wanda": "Wanda", "sparsegpt": "SparseGPT", "magnitude": "magnitude"}
DEPTH, PROMPTS, MOST_PROMPTS = 10, 60, 200


@dataclass(frozen=True)
class Bench:
    """A model, and what it is judged by.

    model: its folder. told: what the commands are told of calibration. score: one figure an item for a model's folder.
    weight_N: what each item counts; the figure of a model is the sum of its scores over that of these. clusters: which
    items resemble each other. plain_N: the scores of the model as it is.
    """

    model: str
    told: dict[str, Any]
    unit: str
    less_is_better: bool
    score: Callable[[str], Array]
    weight_N: Array
    clusters: list[int] | None
    plain_N: Array

    def bits(self, bits: int, methods: tuple[str, ...]) -> Case:
        """Each method at so many bits, the first of them ours."""

        def make(method: str) -> Outcome:
            settings = QuantizeSettings(**self.told, method=method, bits=bits)
            return quantize.quantize(self.model, settings, {}, f"{method}-{bits}")

        return self._compared({LABELS[method]: method for method in methods}, make)

    def zeros(self, sparsity: str, methods: tuple[str, ...]) -> Case:
        """Each method with so many zeros, the first of them ours."""

        def make(method: str) -> Outcome:
            settings = PruneSettings(**self.told, method=method, sparsity=sparsity)
            return prune.prune(self.model, settings, {}, f"{method}-zeros")

        return self._compared({ZEROS[method]: method for method in methods}, make)

    def figure(self, score_N: Array) -> float:
        """Of all items together."""
        return float(score_N.sum() / self.weight_N.sum())

    def difference(self, score_N: Array) -> str:
        """The interval of how much more it is than that of the model as it is."""
        if np.array_equal(score_N, self.plain_N):
            return "each item the same"
        found = estimate_ratio(score_N - self.plain_N, self.weight_N, self.clusters)
        return f"{found.low:+.2g} to {found.high:+.2g}"

    def _compared(self, methods: dict[str, str], make: Callable[[str], Outcome]) -> Case:
        figures, said, size = {}, {}, 0
        for label, method in methods.items():
            print(f"  {label}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as home:
                os.environ[HOME_VARIABLE] = home
                outcome = make(method)
                score_N = self.score(str(find(outcome.model).path))
            size = outcome.bytes_before
            figures[label] = self.figure(score_N)
            said[label] = f"{megabytes(outcome.bytes_after)}, {self.difference(score_N)}"
        ours, *_ = methods
        limit = self.figure(self.plain_N)
        said[AS_IT_IS] = f"{megabytes(size)}; {ours} {said.pop(ours)}"
        peers = {AS_IT_IS: limit} | {label: figure for label, figure in figures.items() if label != ours}
        return case(figures[ours], peers, self.unit, less_is_better=self.less_is_better, limit=limit, settings=said)


def main() -> int:
    """Run it."""
    options = parser(__doc__)
    options.add_argument("--xquad", type=Path, default=XQUAD, help="XQuAD's English file")
    options.add_argument("--sounds", type=Path, default=Path("/"), help="where Debian's packages are unpacked")
    options.add_argument("--encoder", default="minilm-l6-v2")
    options.add_argument("--recogniser", default="whisper-tiny.en")
    args = options.parse_args()
    document = Document(machine=machine(PACKAGES), cases={})
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "minilm": lambda: searching(args.encoder, args.xquad, quick=args.quick),
            "whisper": lambda: hearing(args.recogniser, args.sounds, Path(folder), quick=args.quick),
        }
        benches = {}
        for name, set_up in found.items():  # all of them before the home folder, where the models are, is another one
            try:
                benches[name] = set_up()
            except (ContenderError, CratonError, ImportError) as error:
                print(f"{name} is not measured: {error}", file=sys.stderr)
        for name, bench in benches.items():
            for what, measure in cases(name, bench, quick=args.quick):
                print(what, file=sys.stderr, flush=True)
                document["cases"][what] = measure()
                if args.json is not None:  # a run takes long, and what it has found so far is kept
                    args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    report(document, args.json)
    return 0


def cases(name: str, bench: Bench, *, quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    """(name, what measures it)."""
    methods = first(QuantizeSettings().method, LABELS)
    if quick:
        yield f"{name}/4-bit", lambda: bench.bits(4, methods[:2])
        return
    for bits in (8, 4, 3, 2) if name == "minilm" else (8, 4, 3):
        yield f"{name}/{bits}-bit", lambda bits=bits: bench.bits(bits, methods)  # type: ignore[misc]
    zeros = first(PruneSettings().method, ZEROS)
    yield f"{name}/50% zeros", lambda: bench.zeros("0.5", zeros)
    if name == "minilm":
        yield f"{name}/2:4 zeros", lambda: bench.zeros("2:4", zeros)


def first(default: str, labels: dict[str, str]) -> tuple[str, ...]:
    """The command's default method, and the others behind it."""
    return (default, *(method for method in labels if method != default))


def megabytes(count: int) -> str:
    """For people."""
    return f"{count / 1e6:.1f} MB"


# --- searching ----------------------------------------------------------------------------------------------------


def searching(model: str, xquad: Path, *, quick: bool) -> Bench:
    """An encoder judged by the places of the right paragraphs. Raises ContenderError without the questions."""
    if not xquad.is_file():
        raise ContenderError(f"{xquad} is not there")
    folder = str(find(model).path)
    paragraphs, asked = read_questions(xquad)
    if quick:
        asked = asked[::4]

    def score(folder: str) -> Array:
        return gains(Encoder(folder), paragraphs, [(question, right) for question, right, _ in asked])

    plain_N, articles = score(folder), [article for _, _, article in asked]
    told = {"samples": 8} if quick else {}
    return Bench(folder, told, f"nDCG@{DEPTH}", False, score, np.ones(len(asked)), articles, plain_N)


def read_questions(path: Path) -> tuple[list[str], list[tuple[str, int, int]]]:
    """All paragraphs; and of each question its text, the number of its paragraph, and that of its article."""
    paragraphs: list[str] = []
    asked = []
    for article, one in enumerate(json.loads(path.read_text(encoding="utf-8"))["data"]):
        for paragraph in one["paragraphs"]:
            asked += [(item["question"], len(paragraphs), article) for item in paragraph["qas"]]
            paragraphs.append(paragraph["context"])
    return paragraphs, asked


def gains(encoder: Encoder, paragraphs: list[str], asked: list[tuple[str, int]]) -> Array:
    """nDCG@10 of each (question, number of its paragraph)."""
    cosine_NP = encoder([question for question, _ in asked]) @ encoder(paragraphs).T
    ranked_NP = np.argsort(-cosine_NP, axis=1, kind="stable")[:, :DEPTH]
    return np.array(
        [ndcg_at(ranked.tolist(), {right}, DEPTH) for ranked, (_, right) in zip(ranked_NP, asked, strict=True)]
    )


# --- hearing ------------------------------------------------------------------------------------------------------


def hearing(model: str, sounds: Path, home: Path, *, quick: bool) -> Bench:
    """A recogniser judged by the words that it gets wrong. Raises ContenderError without the prompts, ImportError
    without the normaliser's package."""
    scored, others = parted(sounds, 12 if quick else PROMPTS)
    if not scored:
        raise ContenderError(f"Debian's asterisk-core-sounds-en(-wav) is not in {sounds}")
    folder, normalise = str(find(model).path), normaliser()
    table = home / "others.jsonl"
    table.write_text("".join(f"{json.dumps({'audio': str(path)})}\n" for path in others), encoding="utf-8")
    texts = [normalise(text) for _, text in scored]
    recordings = [read_audio(path) for path, _ in scored]

    def score(folder: str) -> Array:
        heard = [normalise(transcript.text) for transcript in load(folder).transcriber.transcribe(recordings)]
        return np.array([100.0 * edits(said, written) for said, written in zip(texts, heard, strict=True)])

    told = {"calibration": (str(table),)} | ({"samples": 8} if quick else {})
    words_N = np.array([len(text) for text in texts], np.float64)
    return Bench(folder, told, "word error rate, %", True, score, words_N, None, score(folder))


def parted(sounds: Path, count: int) -> tuple[list[tuple[Path, str]], list[Path]]:
    """The prompts that are scored, with their texts; and others to calibrate with. Both empty where they are absent."""
    scored = prompts(sounds, count)
    taken = {path for path, _ in scored}
    return scored, [path for path, _ in prompts(sounds, MOST_PROMPTS) if path not in taken]


def normaliser() -> Callable[[str], list[str]]:
    """The words of a text as `benchmarks/transcribe.py` compares them. Raises ImportError without transformers."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    plain = EnglishTextNormalizer({})
    return lambda text: plain(text.replace("*", "star").replace("#", "pound")).split()


if __name__ == "__main__":
    raise SystemExit(main())
