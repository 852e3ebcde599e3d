"""What does a click mean? A segmenter of 1M parameters, grown from nothing on pasted cut-outs, beside GrabCut and flood
fill, on things and backgrounds that it was never shown.

Cases (mean intersection over union with the exact mask; more is better; peers on the same pictures and prompts)
    stamps/click    one click at the most interior point of what is seen of a thing
    stamps/box      the box around it, which is what GrabCut was made for

Peers
    GrabCut     OpenCV's (Rother 2004). It has no click of its own, so several fair ways to seed it by one are tried on
                the validation part, 28 in all, and the best goes on to the test: which pixels are taken for probable
                foreground (a disc around the click, whose radius is a share of the side; what flood fill found; all but
                the frame), whether the rest is certainly or probably background, and whether only the part that holds
                the click is kept. A box: OpenCV's own mode for rectangles, as it is and with its largest part alone.
    flood fill  the connected pixels whose colour is near that of the click; how near is chosen on the validation part
                as well. For a box: from its middle, within it.

Data
    Debian's tuxpaint-stamps-default (public domain, GPL and the like; not redistributed here): PNG drawings and photos
    whose alpha channel is an exact mask. `apt-get install` puts them where they are looked for; else `apt-get
    download`, `dpkg -x` and --stamps FOLDER/usr/share/tuxpaint/stamps. Backgrounds: the photos that scikit-image and
    scikit-learn bring along, where they are installed, and for training those of tuxpaint-data to draw on, beside the
    stamps (`templates`); or --photos FOLDER; without any, generated ones.

How the figures are made
    Split by concept, the main noun of a stamp's caption (`image_text.main_noun`): by their SHA-256, a quarter of the
    nouns are the test and an eighth the validation part, with all stamps of them; training stamps whose caption holds
    one of these words anywhere are dropped. Letters, digits and coins (the folder `symbols`) are left out. Photos of
    the test (TEST_PHOTOS) and the validation part are in no training scene.
    Scenes of SIZE x SIZE pixels, made as in training (`craton.pretraining.masks`): up to four stamps, which may cover
    each other, three scenes with each held-out stamp. Every thing of which 1 % of the picture is seen is asked for, as
    in training. The recipe was chosen with --validate, which scores the validation part and never looks at the test.
    The last weights are scored once, as `look(..., mirrored=True)` uses them: the mean of the picture and its mirror
    image, and of three guesses the one that is thought the best.
    Intervals (95 %) are of clusters of one noun (`craton.evaluation.intervals`); CPU time is that of all threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from harness import Case, Document, case, machine, parser, report
from image_text import INSTALLED, Stamp, read_stamps, words_of
from numpy.typing import NDArray

import craton
from craton.config.resolve import resolve
from craton.evaluation.intervals import estimate
from craton.modalities.image import list_images
from craton.pretraining.masks.data import read_masks
from craton.pretraining.masks.draws import Draws
from craton.pretraining.masks.pretrain import pretrain_masks
from craton.pretraining.masks.settings import USUAL, MaskPretrainSettings, SceneSettings
from craton.store.folders import HOME_VARIABLE

SIZE = 64
SCENES = 3  # for each held-out stamp
TEST_PHOTOS = frozenset(("astronaut", "chelsea", "rocket"))
VALIDATION_PHOTOS = frozenset(("flower", "gravel"))
# Diagrams, texts and pictures that are mostly of one colour are no background of anything.
NO_PHOTOS = frozenset(
    ("cell", "chessboard_GRAY", "chessboard_RGB", "clock_motion", "color", "horse", "logo", "microaneurysms", "moon",
     "multipage", "multipage_rgb", "no_time_for_that_tiny", "page", "phantom", "retina", "text")
)  # fmt: skip
PACKAGES = ("craton", "torch", "pillow", "opencv-python-headless", "scikit-image", "scikit-learn")
SETTINGS: dict[str, Any] = {
    "size": "1m", "image_size": SIZE, "patch": 8, "holdout": 0.0,
    "scenes": {"plain": 0.1, "channels": 0.3},
    # Here a click means one thing: guesses that go apart would have to be chosen among, which a small model does badly.
    "prompts": {"prompts": 3, "corrections": 0, "central": 1.0, "shared": 1.0},
    "training": {
        "optimiser": "muon",
        "batch": 24, "micro_tokens": 32768, "learning_rate": 2e-3, "warmup": 0.012, "steps": 4400, "threads": 1,
        "dtype": "float32",
    },
}  # fmt: skip

Mask = NDArray[np.bool_]
Pixels = NDArray[np.uint8]
Peer = Callable[["Question"], Mask]


class Question(NamedTuple):
    """A picture [S, S, 3], the thing that is meant [S, S], a click (x, y) and a box (x0, y0, x1, y1, edges) for it."""

    pixels: Pixels
    wanted: Mask
    click: tuple[int, int]
    box: tuple[int, int, int, int]
    noun: str


class Part(NamedTuple):
    """Stamps of some concepts, and photos to lay them on."""

    stamps: list[Stamp]
    photos: list[Path]


def main() -> int:
    """Train once, choose how the peers are seeded, score all on the same questions."""
    flags = parser(__doc__.partition("\n")[0])
    flags.add_argument("--stamps", type=Path, default=INSTALLED, help="the folder of the stamps")
    flags.add_argument("--photos", type=Path, action="append", help="a folder of photos, instead of those found")
    flags.add_argument("--validate", action="store_true", help="score the validation part instead of the test")
    flags.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting of the run")
    arguments = flags.parse_args()
    if not arguments.stamps.is_dir():
        print(f"no stamps in {arguments.stamps}: apt-get install tuxpaint-stamps-default", file=sys.stderr)
        return 2
    training, validation, test = split(
        read_stamps(arguments.stamps), arguments.photos or photo_folders(arguments.stamps)
    )
    document: Document = {"machine": machine(PACKAGES), "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ[HOME_VARIABLE] = str(home / "home")  # runs and models of a benchmark are nobody's
        tuning = questions(validation, home / "validation", seed=1)
        scored = tuning if arguments.validate else questions(test, home / "test", seed=2)
        if arguments.quick:
            tuning, scored = tuning[::6], scored[::6]
        minutes = train(training, home, quick=arguments.quick, changes=arguments.set)
        model = craton.load_segmenter("stamps", dtype="float32", threads=1)
        held_out = validation if arguments.validate else test
        said = (
            f"{minutes:.1f} CPU-min, {len(training.stamps)} training stamps on {len(training.photos)} photos, "
            f"{len(held_out.photos)} others behind these"
        )
        document["cases"] = {f"stamps/{kind}": score(model, kind, tuning, scored, said) for kind in ("click", "box")}
    report(document, arguments.json)
    return 0


# --- data ---------------------------------------------------------------------------------------------------------


def photo_folders(stamps: Path) -> list[Path]:
    """Where the photos of Tux Paint, scikit-image and scikit-learn lie; none is imported."""
    templates = stamps.parent / "templates"
    found = [templates] if templates.is_dir() else []
    for package, inside in (("skimage", "data"), ("sklearn", "datasets/images")):
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            found.append(Path(spec.origin).parent / inside)
    return found


def split(stamps: Sequence[Stamp], folders: Sequence[Path]) -> tuple[Part, Part, Part]:
    """(training, validation, test): no noun and no photo of one is in another."""
    things = [one for one in stamps if one.folders[:1] != ("symbols",)]
    held = [{one.noun for one in things if low <= share(one.noun) < high} for low, high in ((64, 96), (0, 64))]
    parts = [[one for one in things if one.noun in nouns] for nouns in held]
    words = held[0] | held[1]
    rest = [one for one in things if not words & set(words_of(one.placed.replace("_", " ")))]
    photos = [path for folder in folders for path in list_images(folder) if path.stem not in NO_PHOTOS]
    behind = ([path for path in photos if path.stem in names] for names in (VALIDATION_PHOTOS, TEST_PHOTOS))
    others = [path for path in photos if path.stem not in VALIDATION_PHOTOS | TEST_PHOTOS]
    return Part(rest, others), *(Part(some, paths) for some, paths in zip(parts, behind, strict=True))


def share(noun: str) -> int:
    """From 0 to 255, the same for a noun for ever."""
    return hashlib.sha256(noun.encode()).digest()[0]


def link(paths: Sequence[Path], folder: Path) -> dict[str, int]:
    """A folder of links to files; the number of the file for each link."""
    folder.mkdir(parents=True)
    numbers = {}
    for number, path in enumerate(paths):
        place = folder / f"{number:04}{path.suffix}"
        place.symlink_to(path.resolve())
        numbers[str(place)] = number
    return numbers


def questions(part: Part, folder: Path, *, seed: int) -> list[Question]:
    """What is asked about a part: a pure function of it and the seed."""
    numbers = link([stamp.path for stamp in part.stamps], folder / "stamps")
    link(part.photos, folder / "photos")
    behind = [str(folder / "photos")] if part.photos else []
    masks = read_masks([str(folder / "stamps")], size=SIZE, backgrounds=behind)
    nouns = [part.stamps[numbers[origin]].noun for origin in masks.origins]
    settings = SceneSettings(plain=0.0, colour=0.0)
    found = []
    for place in range(SCENES * len(masks)):
        scene = masks.scene(place % len(masks), settings, Draws(seed, place))
        for thing, wanted in zip(scene.things, scene.masks, strict=True):
            found.append(Question(scene.pixels, wanted, interior(wanted), box_of(wanted), nouns[thing]))
    return found


def interior(mask: Mask) -> tuple[int, int]:
    """The pixel (x, y) that is farthest from everything outside; beyond the picture is outside."""
    from scipy.ndimage import distance_transform_edt

    far = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(far.argmax()), mask.shape)
    return int(x), int(y)


def box_of(mask: Mask) -> tuple[int, int, int, int]:
    """The edges x0, y0, x1, y1 around a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# --- figures ----------------------------------------------------------------------------------------------------


def score(model: Any, kind: str, tuning: Sequence[Question], scored: Sequence[Question], said: str) -> Case:
    """Ours and the peers on the same questions, by a click or a box. said: of how the model was made."""
    ours = np.array([overlap(own(model, question, kind), question.wanted) for question in scored])
    nouns = [question.noun for question in scored]
    found = estimate(ours, nouns)
    text = f"{len(scored)} things of {found.clusters} nouns, 95 %: {found.low:.3f} to {found.high:.3f}; {said}"
    print(f"{kind}: {found.value:.3f}, {text}", file=sys.stderr)
    figures, settings = {}, {"Craton": text}
    for name, ways in peers(kind).items():
        way, peer = choose(ways, tuning)
        theirs = np.array([overlap(peer(question), question.wanted) for question in scored])
        figures[name], settings[name] = float(theirs.mean()), way
        ahead = estimate(ours - theirs, nouns, score=False)
        line = f"{kind}: ahead of {name} ({theirs.mean():.3f}, {way}) by {ahead.value:.3f}"
        print(f"{line}, 95 %: {ahead.low:.3f} to {ahead.high:.3f}", file=sys.stderr)
    absent = {} if "GrabCut" in figures else {"GrabCut": "opencv-python-headless is not installed"}
    return case(found.value, figures, "IoU", settings=settings, absent=absent)


# --- ours ---------------------------------------------------------------------------------------------------------


def train(part: Part, home: Path, *, quick: bool, changes: Sequence[str]) -> float:
    """One run, named "stamps"; the minutes of CPU time that it took."""
    link([stamp.path for stamp in part.stamps], home / "training")
    link(part.photos, home / "photos")
    own: dict[str, Any] = {"name": "stamps"}
    if part.photos:
        own["backgrounds"] = [str(home / "photos")]
    if quick:
        own["training"] = {"steps": 150}
    for change in changes:
        keys, _, value = change.partition("=")
        *sections, last = keys.split(".")
        place = own
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = json.loads(value)
    settings, provenance = resolve(MaskPretrainSettings, [("usual", USUAL), ("benchmark", SETTINGS), ("flags", own)])
    started = time.process_time()
    pretrain_masks([str(home / "training")], settings, provenance)
    return (time.process_time() - started) / 60


def own(model: Any, question: Question, kind: str) -> Mask:
    """What a model answers that has seen the mirror image as well."""
    seen = model.look(question.pixels, mirrored=True)
    if kind == "click":
        return seen.segment(points=[question.click])[0].mask
    return seen.segment(box=question.box)[0].mask


def overlap(mask: Mask, wanted: Mask) -> float:
    """Intersection over union."""
    return float((mask & wanted).sum() / (mask | wanted).sum())


# --- peers --------------------------------------------------------------------------------------------------------


def choose(ways: Mapping[str, Peer], tuning: Sequence[Question]) -> tuple[str, Peer]:
    """The way of a peer that is the best on these questions."""
    scores = {name: np.mean([overlap(way(one), one.wanted) for one in tuning]) for name, way in ways.items()}
    best = max(scores, key=lambda name: scores[name])
    return best, ways[best]


def peers(kind: str) -> dict[str, dict[str, Peer]]:
    """For each peer the ways to use it."""
    tolerances = (8, 16, 24, 32, 48, 64, 96)
    found: dict[str, dict[str, Peer]] = {
        "flood fill": {f"tolerance {most}": flooding(most, kind) for most in tolerances}
    }
    if find_spec("cv2") is not None:
        found["GrabCut"] = dict(click_ways() if kind == "click" else box_ways())
    return found


def flooding(most: int, kind: str) -> Peer:
    """Flood fill by the largest difference of a channel."""

    def way(question: Question) -> Mask:
        if kind == "click":
            return flood(question.pixels, question.click, most)
        x0, y0, x1, y1 = question.box
        found = np.zeros(question.wanted.shape, np.bool_)
        inner = question.pixels[y0:y1, x0:x1]
        found[y0:y1, x0:x1] = flood(inner, ((x1 - x0) // 2, (y1 - y0) // 2), most)
        return found

    return way


def flood(pixels: Pixels, click: tuple[int, int], most: int) -> Mask:
    """The connected pixels around a click none of whose channels is farther from it."""
    x, y = click
    near = (np.abs(pixels.astype(np.int16) - pixels[y, x].astype(np.int16)) <= most).all(-1)
    return holding(near, click)


def holding(mask: Mask, click: tuple[int, int]) -> Mask:
    """The connected part of a mask that holds a pixel; nothing where it is not in the mask."""
    from scipy.ndimage import label

    parts, _ = label(mask)
    return mask & (parts == parts[click[1], click[0]])


def largest(mask: Mask) -> Mask:
    """The connected part of the most pixels."""
    from scipy.ndimage import label

    parts, count = label(mask)
    return parts == 1 + np.argmax(np.bincount(parts.ravel(), minlength=2)[1:]) if count else mask


def click_ways() -> Iterator[tuple[str, Peer]]:
    """GrabCut by one click. sure: the rest is certainly background. joined: what does not hang together with the click
    is dropped."""
    for seed in ("disc 0.15", "disc 0.2", "disc 0.25", "disc 0.3", "disc 0.35", "flood 48", "frame"):
        for certain in (True, False):
            for whole in (True, False):
                name = f"{seed}{', sure' if certain else ''}{'' if whole else ', joined'}"
                yield name, seeded(seed, certain=certain, whole=whole)


def seeded(seed: str, *, certain: bool, whole: bool) -> Peer:
    """GrabCut from `seed` as probable foreground and the click as certain."""
    import cv2

    def way(question: Question) -> Mask:
        pixels, (x, y) = question.pixels, question.click
        rows, columns = np.indices(question.wanted.shape)
        far = np.hypot(columns - x, rows - y)
        kind, _, number = seed.partition(" ")
        if kind == "disc":
            likely = far <= float(number) * SIZE
        elif kind == "flood":
            likely = flood(pixels, question.click, int(number))
        else:
            likely = np.zeros(question.wanted.shape, np.bool_)
            likely[2:-2, 2:-2] = True
        states = np.where(likely, cv2.GC_PR_FGD, cv2.GC_BGD if certain else cv2.GC_PR_BGD).astype(np.uint8)
        states[far <= 2] = cv2.GC_FGD
        found = cut(pixels, states, None)
        return found if whole else holding(found, question.click)

    return way


def box_ways() -> Iterator[tuple[str, Peer]]:
    """GrabCut by a box."""

    def way(question: Question, *, whole: bool) -> Mask:
        x0, y0, x1, y1 = question.box
        found = cut(question.pixels, np.zeros(question.wanted.shape, np.uint8), (x0, y0, x1 - x0, y1 - y0))
        return found if whole else largest(found)

    yield "whole", lambda question: way(question, whole=True)
    yield "largest part", lambda question: way(question, whole=False)


def cut(pixels: Pixels, states: NDArray[np.uint8], box: tuple[int, int, int, int] | None) -> Mask:
    """Five rounds of GrabCut, from a mask of states or a box; all that could be foreground where it cannot begin."""
    import cv2

    cv2.setRNGSeed(0)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    mode = cv2.GC_INIT_WITH_MASK if box is None else cv2.GC_INIT_WITH_RECT
    before = (states & 1) == 1
    if box is not None:
        x, y, width, height = box
        before[y : y + height, x : x + width] = True
    if before.all() or not before.any():
        return before
    # OpenCV wants blue first.
    cv2.grabCut(np.ascontiguousarray(pixels[..., ::-1]), states, box, *models, 5, mode)
    return (states == cv2.GC_FGD) | (states == cv2.GC_PR_FGD)


if __name__ == "__main__":
    sys.exit(main())
