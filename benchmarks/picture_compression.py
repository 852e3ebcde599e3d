"""How much does a model of pictures lose in fewer bits and with zeros, and which method loses least?

Cases (accuracy on Fashion-MNIST's 10,000 test pictures, more is better; limit: the model as it is, in fp32)
    8-bit, 4-bit, 3-bit, 2-bit  GPTQ in groups of 32; peers in the same run: rounding to nearest (RTN), AWQ, HQQ
    50% zeros, 2:4 zeros        SparseGPT; peers: Wanda, magnitude

How the figures are made
    The model is a ViT of about a million parameters, grown as `benchmarks/pictures.py` grows it, or --model: a folder
    of one. Each method is the command's own (`craton quantize`, `craton prune`), calibrated with 256 training pictures;
    what it publishes is loaded as `craton classify` loads it and run on its packed weights. All methods are scored by
    the same pictures, once, and nothing is chosen by them. `settings` says the file's size in MB.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import Case, Document, case, machine, parser, report
from pictures import DEBIAN, FASHION, fashion_mnist, read, trained

from craton.compression import prune, quantize
from craton.compression.job import Outcome
from craton.compression.quantize_settings import PruneSettings, QuantizeSettings
from craton.data.pictures import PictureSet
from craton.inference.images import load_images
from craton.store import find
from craton.store.folders import HOME_VARIABLE

PACKAGES = ("craton", "torch")
OURS, PEERS = "GPTQ", ("RTN", "AWQ", "HQQ")
OUR_ZEROS, PEER_ZEROS = "SparseGPT", ("Wanda", "magnitude")


@dataclass(frozen=True)
class Bench:
    """model: a folder. train: what calibrates. test: what is scored."""

    model: str
    train: str
    test: PictureSet
    samples: int
    limit: float

    def bits(self, bits: int, peers: tuple[str, ...]) -> Case:
        """Each method at so many bits."""
        return self._compared(OURS, peers, lambda method: self._quantized(method, bits))

    def zeros(self, sparsity: str) -> Case:
        """Each method with so many zeros."""
        return self._compared(OUR_ZEROS, PEER_ZEROS, lambda method: self._pruned(method, sparsity))

    def _compared(self, ours: str, peers: tuple[str, ...], make: Callable[[str], Outcome]) -> Case:
        outcomes = {method: make(method) for method in (ours, *peers)}
        found = {method: accuracy(str(find(made.model).path), self.test) for method, made in outcomes.items()}
        sizes = {method: f"{made.bytes_after / 1e6:.2f} MB" for method, made in outcomes.items()}
        settings = {"Craton": f"{ours}, {sizes.pop(ours)}"} | sizes
        return case(found.pop(ours), found, "accuracy", limit=self.limit, settings=settings)

    def _quantized(self, method: str, bits: int) -> Outcome:
        settings = QuantizeSettings(**self._told(method), bits=bits)
        return quantize.quantize(self.model, settings, {}, f"{method.lower()}-{bits}")

    def _pruned(self, method: str, sparsity: str) -> Outcome:
        settings = PruneSettings(**self._told(method), sparsity=sparsity)
        return prune.prune(self.model, settings, {}, f"{method.lower()}-zeros")

    def _told(self, method: str) -> dict[str, Any]:
        return {"method": method.lower(), "calibration": (self.train,), "samples": self.samples}


def main() -> int:
    """Run it."""
    options = parser(__doc__)
    options.add_argument("--fashion", type=Path, default=DEBIAN, help="the folder of Fashion-MNIST's IDX files")
    options.add_argument("--model", type=Path, help="the folder of a classifier of these pictures (none: one is grown)")
    args = options.parse_args()
    document = Document(machine=machine(PACKAGES), cases={})
    if not (args.fashion / "train-images-idx3-ubyte.gz").is_file():
        print(f"no cases: Fashion-MNIST is not in {args.fashion}", file=sys.stderr)
        report(document, args.json)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ[HOME_VARIABLE] = str(Path(folder) / "home")
        bench = set_up(args.fashion, Path(folder), args.model, quick=args.quick)
        for name, measured in cases(bench, quick=args.quick):
            document["cases"][name] = measured()
            report(document, args.json)
    return 0


def set_up(fashion: Path, home: Path, model: Path | None, *, quick: bool) -> Bench:
    """The model, and how good it is."""
    train, test = fashion_mnist(fashion, home, 4_000 if quick else 60_000)
    if model is None:
        result, _ = trained(train, None, "classes", FASHION, 100 if quick else 3500)
        assert result.model is not None
        model = result.model.path
    _, pictures = read(train, test, FASHION)
    return Bench(str(model), train, pictures, 32 if quick else 256, accuracy(str(model), pictures))


def cases(bench: Bench, *, quick: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    """(name, what measures it)."""
    for bits in (4,) if quick else (8, 4, 3, 2):
        yield f"{bits}-bit", lambda bits=bits: bench.bits(bits, PEERS[:1] if quick else PEERS)  # type: ignore[misc]
    if not quick:
        yield "50% zeros", lambda: bench.zeros("0.5")
        yield "2:4 zeros", lambda: bench.zeros("2:4")


def accuracy(model: str, test: PictureSet) -> float:
    """The share of the pictures whose likeliest class is right."""
    loaded = load_images(model, dtype="float32")
    assert test.labels is not None
    pixels = [np.ascontiguousarray(picture[..., 0]) for picture in test.pixels]
    guesses = [guess[0].label for guess in loaded.classify(pixels)]
    return float(np.mean([guess == test.names[label] for guess, label in zip(guesses, test.labels, strict=True)]))


if __name__ == "__main__":
    raise SystemExit(main())
