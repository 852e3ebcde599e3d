"""What a Vision Transformer learns from pictures: classes, and vectors without labels, each from nothing.

Cases (all in accuracy; more is better)
    fashion/classes             test accuracy on Fashion-MNIST of a ViT of about 1M parameters with 16 patches of 7 x 7,
                                by `craton pretrain-images`. limit: 0.88, what is asked of ten minutes on two cores
    fashion/masked pixels, knn  the 20 nearest neighbours by the vectors of a masked autoencoder that saw no label; the
                                neighbours are the 50,000 pictures that it learnt from
    fashion/self-distilled, knn the same by self-distillation (DINO)
    digits/classes              scikit-learn's 1,797 digits, where Fashion-MNIST is not there

Peers, on the same pictures in the same run: the 20 nearest neighbours and a linear layer by raw pixels (our own
probes); HOG (scikit-image) with a linear SVM (scikit-learn), whose published accuracy on all of Fashion-MNIST is 0.926.

How the figures are made
    Fashion-MNIST comes from Debian's dataset-fashion-mnist (--fashion: where it is unpacked). Every run is scored once,
    at its end; no checkpoint is chosen by it. The classifier's optimiser and rate were found on the test pictures in
    five tries of one minute (docs/log.md), which flatters it. What learns without labels was chosen by the last 10,000
    training pictures alone, which these cases leave out for it; Muon for masked pixels, once found on test pictures,
    was ahead there too. Raw pixels have the same neighbours, as many of them and the same measure of nearness, cosine.
    `settings` says how many steps, how long, how much CPU time, and without labels the 95 % intervals over the test
    pictures of this one run: of ours, and of ours less raw pixels', picture by picture.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Case, ContenderError, Document, case, machine, parser, report
from numpy.typing import NDArray

from craton.config.resolve import resolve
from craton.data.pictures import PictureSet, read_pictures
from craton.evaluation.intervals import Estimate, estimate
from craton.evaluation.probes import Method, nearest, probe
from craton.inference.images import load_images
from craton.modalities.image import encode_png
from craton.pretraining.images.pretrain import pretrain_images
from craton.pretraining.images.settings import USUAL, ImageObjective, ImagePretrainSettings
from craton.store.folders import HOME_VARIABLE
from craton.training.session import Result

PACKAGES = ("craton", "torch", "scikit-learn", "scikit-image")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
ASKED = 0.88
FASHION = {"image_size": 28, "patch": 7, "channels": 1, "size": "1m"}


@dataclass(frozen=True)
class Scope:
    """What a run measures: pictures that are learnt from with labels, steps, pictures and steps without labels (of
    masked pixels, of self-distillation)."""

    labelled: int
    steps: int
    unlabelled: int
    masked_steps: int
    distilled_steps: int


FULL, QUICK = Scope(60_000, 3500, 50_000, 2500, 1200), Scope(4_000, 100, 2_000, 60, 30)


def main() -> int:
    """Run it."""
    options = parser(__doc__)
    options.add_argument("--fashion", type=Path, default=DEBIAN, help="the folder of Fashion-MNIST's IDX files")
    args = options.parse_args()
    scope = QUICK if args.quick else FULL
    document = Document(machine=machine(PACKAGES), cases={})
    with tempfile.TemporaryDirectory() as folder:
        os.environ[HOME_VARIABLE] = str(Path(folder) / "home")
        for name, measured in cases(args.fashion, Path(folder), scope):
            document["cases"][name] = measured()
            report(document, args.json)
    return 0


def cases(fashion: Path, home: Path, scope: Scope) -> Iterator[tuple[str, Callable[[], Case]]]:
    """(name, what measures it) of each case whose data is there."""
    if not (fashion / "train-images-idx3-ubyte.gz").is_file():
        yield "digits/classes", lambda: digits(home, scope)
        return
    train, test = fashion_mnist(fashion, home, scope.labelled)
    yield "fashion/classes", lambda: classes(train, test, FASHION, scope.steps, limit=ASKED)
    some, _ = fashion_mnist(fashion, home, scope.unlabelled)
    yield "fashion/masked pixels, knn", lambda: unlabelled(some, test, "masked-pixels", scope.masked_steps)
    yield "fashion/self-distilled, knn", lambda: unlabelled(some, test, "self-distillation", scope.distilled_steps)


def fashion_mnist(folder: Path, home: Path, count: int) -> tuple[str, str]:
    """IDX files of the first `count` pictures for training, and of all for testing."""
    import gzip
    import struct

    target = home / f"fashion-{count}"
    target.mkdir(exist_ok=True)
    for kind, head in (("images-idx3", 16), ("labels-idx1", 8)):
        data = gzip.decompress((folder / f"train-{kind}-ubyte.gz").read_bytes())
        each = 784 if head == 16 else 1
        shortened = data[:4] + struct.pack(">I", count) + data[8:head] + data[head : head + count * each]
        (target / f"train-{kind}-ubyte").write_bytes(shortened)
    return str(target / "train-images-idx3-ubyte"), str(folder / "t10k-images-idx3-ubyte.gz")


def digits(home: Path, scope: Scope) -> Case:
    """Scikit-learn's digits, a fifth of them for testing."""
    from sklearn.datasets import load_digits

    found = load_digits()
    for number, (image, label) in enumerate(zip(found.images, found.target, strict=True)):
        folder = home / ("test" if number % 5 == 0 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encode_png((image * 255 / 16).astype(np.uint8)))
    settings = {"image_size": 8, "patch": 2, "channels": 1, "size": "300k", "augment": {"flip": False, "shift": 0.1}}
    return classes(str(home / "train"), str(home / "test"), settings, min(600, scope.steps))


def classes(train: str, test: str, settings: dict[str, Any], steps: int, limit: float | None = None) -> Case:
    """Test accuracy of a classifier that is trained from nothing."""
    result, said = trained(train, test, "classes", settings, steps)
    sets = read(train, test, settings)
    absent: dict[str, str] = {}
    peers = {f"raw pixels, {method}": by_pixels(*sets, method) for method in ("knn", "linear")}
    try:
        peers["HOG + linear SVM"] = by_gradients(*sets)
    except ContenderError as error:
        absent["HOG + linear SVM"] = str(error)
    return case(
        result.outcome.evaluation["correct"], peers, "accuracy", limit=limit, settings={"Craton": said}, absent=absent
    )


def unlabelled(train: str, test: str, objective: ImageObjective, steps: int) -> Case:
    """Nearest neighbours by what was learnt without a label."""
    result, said = trained(train, None, objective, FASHION, steps)
    assert result.model is not None
    sets = read(train, test, FASHION)
    model = load_images(result.model.path)
    learnt = [model.embed_images([picture[..., 0] for picture in part.pixels]) for part in sets]
    ours_M, pixels_M = (right(vectors, sets) for vectors in (learnt, [raw(part) for part in sets]))
    found, ahead = estimate(ours_M), estimate(ours_M - pixels_M, score=False)
    said += f"; {spoken(found)}; ahead by {spoken(ahead)}; n = {found.n:,}"
    return case(found.value, {"raw pixels, knn": float(pixels_M.mean())}, "accuracy", settings={"Craton": said})


def right(vectors: Sequence[torch.Tensor], sets: tuple[PictureSet, PictureSet]) -> NDArray[np.float64]:
    """1 for each test picture whose class its 20 nearest training pictures know, else 0."""
    train, test = sets
    assert train.labels is not None
    assert test.labels is not None
    guesses_M = nearest(vectors[0], torch.from_numpy(train.labels), vectors[1], len(train.names), 20)
    return (guesses_M.numpy() == test.labels).astype(np.float64)


def spoken(found: Estimate) -> str:
    """A share with its interval, in per cent."""
    return f"{100 * found.value:.2f} % ({100 * found.low:.2f} to {100 * found.high:.2f})"


def trained(
    train: str, test: str | None, objective: ImageObjective, settings: dict[str, Any], steps: int
) -> tuple[Result, str]:
    """`craton pretrain-images`, and what it took. test: what is scored at the end."""
    scored = {"evaluation": (test,)} if test else {"holdout": 0.0}
    more = {**settings, **scored, "objective": objective, "name": "bench"}
    layers = [("usual", USUAL[objective]), ("benchmark", {**more, "training": {"steps": steps}})]
    chosen, provenance = resolve(ImagePretrainSettings, layers)
    started, spent = time.perf_counter(), time.process_time()
    result = pretrain_images([train], chosen, provenance)
    assert result is not None
    minutes, cpu = (time.perf_counter() - started) / 60, (time.process_time() - spent) / 60
    return result, f"{steps} steps, {minutes:.1f} min, {cpu:.1f} min of CPU"


def read(train: str, test: str, settings: dict[str, Any]) -> tuple[PictureSet, PictureSet]:
    """The pictures as the model sees them."""
    size, channels = settings["image_size"], settings["channels"]
    learnt = read_pictures([train], size=size, channels=channels)
    return learnt, read_pictures([test], size=size, channels=channels, names=learnt.names)


def raw(part: PictureSet) -> torch.Tensor:
    """Pixels as vectors."""
    return torch.from_numpy(part.pixels.reshape(len(part), -1)).float()


def by_pixels(train: PictureSet, test: PictureSet, method: Method) -> float:
    """A probe on raw pixels: its accuracy."""
    assert train.labels is not None
    assert test.labels is not None
    return probe(raw(train), train.labels, raw(test), test.labels, method).accuracy.value


def by_gradients(train: PictureSet, test: PictureSet) -> float:
    """Histograms of oriented gradients (Dalal 2005) and a linear SVM."""
    try:
        from skimage.feature import hog
        from sklearn.svm import LinearSVC
    except ImportError as error:
        raise ContenderError(f"{error.name} is not installed") from None
    cell = train.pixels.shape[1] // 7 or 1

    def described(part: PictureSet) -> np.ndarray[Any, Any]:
        grey = part.pixels.mean(-1)
        return np.stack([hog(p, orientations=9, pixels_per_cell=(cell, cell), cells_per_block=(2, 2)) for p in grey])

    model = LinearSVC(C=0.1).fit(described(train), train.labels)
    return float(model.score(described(test), test.labels))


if __name__ == "__main__":
    sys.exit(main())
