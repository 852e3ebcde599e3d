"""Pictures and captions from nothing: does a model of 1M parameters find pictures of things that it was never shown?

Cases (recall of the right picture by its caption among all held-out ones; more is better; peers on the same queries)
    stamps/captions/recall@1, @5        queries are the captions alone: their nouns were in no caption of the training
                                        data, so that only what is said beside them (colours, kinds, materials) helps
    stamps/with-folders/recall@1, @5    captions followed by the names of the picture's folders ("An owl. animals,
                                        birds"): kinds of things, whose names were in the training data

Peers
    chance            what a random order finds
    colour histogram  the 5 training pictures of the most similar colours (intersection of 4 x 4 x 4 RGB histograms),
                      their captions, and how much these resemble the query (cosine of TF-IDF of words); equal scores
                      count as in a random order

Data
    Debian's tuxpaint-stamps-default (public domain, GPL and the like; not redistributed here): PNG drawings and photos
    with transparency, each with a caption. `apt-get install` puts them where they are looked for; else
    `apt-get download`, `dpkg -x` and --stamps FOLDER/usr/share/tuxpaint/stamps.

How the figures are made
    Split by concept. A caption's concept is its main noun: the last word of what stands before the first verb,
    preposition or sign (`main_noun`), in the singular. A quarter of the nouns, by their SHA-256, are held out with all
    pictures of them; training pictures whose caption holds one of these words anywhere are dropped. So are held-out
    captions of more than 12 words, which are sentences about a thing and name none. Letters, digits and coins (the
    folder `symbols`) are never held out: nothing tells a letter that was never shown.
    Each training picture is laid on four plain backgrounds, half of them with the folders' names in the caption;
    held-out ones on white. The last weights are scored once. Intervals (95 %) are of clusters of one noun
    (`craton.evaluation.intervals`); CPU time is that of all threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from math import comb, log
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from harness import Document, case, machine, parser, report
from numpy.typing import NDArray

from craton.config.resolve import resolve
from craton.evaluation.intervals import estimate
from craton.inference.images import load_images
from craton.modalities.image import encode_png, read_alpha, read_image
from craton.pretraining.image_text.pretrain import pretrain_pairs
from craton.pretraining.image_text.settings import USUAL, PairPretrainSettings
from craton.store.folders import HOME_VARIABLE

INSTALLED = Path("/usr/share/tuxpaint/stamps")
SIZE = 64
# The same few for all pictures: a picture with colours of its own is known by them, whatever it shows.
BACKGROUNDS = ((255, 255, 255), (40, 44, 60), (150, 190, 140), (225, 180, 130))
NEIGHBOURS = 5
LONGEST = 12  # words of a held-out caption
SHUFFLES = 200
PACKAGES = ("craton", "torch", "pillow")
SETTINGS: dict[str, Any] = {
    "size": "1m", "image_size": SIZE, "patch": 16, "vocab": 2048, "context": 64, "holdout": 0.0,
    "augment": {"crop": 0.5, "shift": 0.05, "flip": True, "colour": 0.3},
    "training": {
        "batch": 256, "micro_tokens": 32768, "learning_rate": 1e-3, "weight_decay": 0.2, "steps": 240, "threads": 1,
    },
}  # fmt: skip

# What ends the first noun phrase of a caption: signs, prepositions, verbs that captions of this data have.
PHRASE_END = re.compile(
    r"[^\w\s'’-]|\b(?:of|in|on|at|with|for|from|to|by|like|that|which|who|called|known|named|is|are|was|were|can|has|"
    r"have|had|and|or|playing|wearing|holding|riding|made|carry|stands?|used|using|without|under|over|lying|eating|"
    r"sitting|standing|looking|goes|gets|ahead)\b"
)


class Stamp(NamedTuple):
    """A picture with transparency and its caption. folders: the names of its folders, from the outermost."""

    path: Path
    caption: str
    folders: tuple[str, ...]

    @property
    def noun(self) -> str:
        """The concept."""
        return main_noun(self.caption)

    @property
    def placed(self) -> str:
        """The caption with the folders' names."""
        return f"{self.caption} {', '.join(self.folders)}"


def main() -> int:
    """Build the data, train once, score everything on the same queries."""
    flags = parser(__doc__.partition("\n")[0])
    flags.add_argument("--stamps", type=Path, default=INSTALLED, help="the folder of the stamps")
    flags.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting of the run")
    arguments = flags.parse_args()
    if not arguments.stamps.is_dir():
        print(f"no stamps in {arguments.stamps}: apt-get install tuxpaint-stamps-default", file=sys.stderr)
        return 2
    training, held_out = split(read_stamps(arguments.stamps))
    document: Document = {"machine": machine(PACKAGES), "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ[HOME_VARIABLE] = str(home / "home")  # runs and models of a benchmark are nobody's
        seen = build(training, home / "training", BACKGROUNDS)
        shown = build(held_out, home / "held_out", BACKGROUNDS[:1])
        minutes = train(home / "training" / "pairs.jsonl", quick=arguments.quick, changes=arguments.set)
        model = load_images("stamps", dtype="float32", threads=1)
        pictures = model.embed_images(list(shown)).numpy()
        for name, kind in (("captions", "caption"), ("with-folders", "placed")):
            queries, clusters, right = relevant(held_out, kind)
            ours = hits(model.embed(queries).numpy() @ pictures.T, right)
            floor = hits(histogram_scores(queries, [getattr(one, kind) for one in training], seen, shown), right)
            for k in (1, 5):
                found = estimate(ours[k], clusters)
                ahead = estimate(ours[k] - floor[k], clusters, score=False)
                text = (
                    f"{len(queries)} captions of {found.clusters} nouns, {len(shown)} pictures, 95 %: {found.low:.3f} "
                    f"to {found.high:.3f}; ahead of histogram by {ahead.low:.3f} to {ahead.high:.3f}; "
                    f"{minutes:.1f} CPU-min, {len(training)} training pictures"
                )
                document["cases"][f"stamps/{name}/recall@{k}"] = case(
                    found.value,
                    {"chance": chance(right, k), "colour histogram": float(floor[k].mean())},
                    "recall",
                    settings={"Craton": text},
                )
                print(f"{name} recall@{k}: {text}", file=sys.stderr)
    report(document, arguments.json)
    return 0


# --- data ---------------------------------------------------------------------------------------------------------


def read_stamps(root: Path) -> list[Stamp]:
    """Every PNG with a caption, in the order of its path."""
    found = []
    for path in sorted(root.rglob("*.png")):
        text = path.with_suffix(".txt")
        if text.is_file():
            caption = text.read_text(encoding="utf-8").partition("\n")[0].strip()
            folders = tuple(part.lstrip("0123456789_") for part in path.relative_to(root).parent.parts)
            found.append(Stamp(path, caption, folders))
    return [stamp for stamp in found if stamp.noun]


def main_noun(caption: str) -> str:
    """The last word of the first noun phrase, in the singular: "A sliced orange on a plate." -> "orange"."""
    phrase = re.sub(r"[“”\"‘]", "", caption.lower())
    words = re.findall(r"[^\W_]+", PHRASE_END.split(phrase, maxsplit=1)[0])
    # "The letter f": the noun is the letter.
    if len(words) > 1 and words[-2] in ("letter", "number", "sign"):
        words = words[:-1]
    return singular(words[-1]) if words else ""


def singular(word: str) -> str:
    """Good enough to find a word in another number."""
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word


def split(stamps: Sequence[Stamp]) -> tuple[list[Stamp], list[Stamp]]:
    """(training, held-out) pictures, with no held-out noun anywhere in the training captions or folders' names."""
    things = [one for one in stamps if one.folders[:1] != ("symbols",)]
    held = {one.noun for one in things if hashlib.sha256(one.noun.encode()).digest()[0] < 64}
    held_out = [one for one in things if one.noun in held and len(one.caption.split()) <= LONGEST]
    training = [one for one in stamps if not held & set(words_of(one.placed.replace("_", " ")))]
    return training, held_out


def build(stamps: Sequence[Stamp], folder: Path, backgrounds: Sequence[tuple[int, int, int]]) -> list[Path]:
    """Square pictures on each of the backgrounds and a table of them in `folder`; the paths of those on white."""
    folder.mkdir(parents=True)
    white = []
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as table:
        for number, stamp in enumerate(stamps):
            pixels, alpha = read_image(stamp.path), read_alpha(stamp.path)
            for version, colour in enumerate(backgrounds):
                name = f"{number:04}-{version}.png"
                (folder / name).write_bytes(encode_png(laid_on(pixels, alpha, np.array(colour))))
                caption = stamp.placed if (number + version) % 2 else stamp.caption
                table.write(json.dumps({"image": name, "caption": caption}) + "\n")
            white.append(folder / f"{number:04}-0.png")
    return white


def laid_on(pixels: NDArray[np.uint8], alpha: NDArray[np.uint8] | None, colour: NDArray[np.int64]) -> NDArray[np.uint8]:
    """A picture in the middle of a square of one colour, SIZE pixels wide."""
    from PIL import Image

    height, width = pixels.shape[:2]
    scale = SIZE / max(height, width)
    sides = max(1, round(width * scale)), max(1, round(height * scale))
    opaque = np.full((height, width), 255, np.uint8) if alpha is None else alpha
    # `read_image` has laid it on white; that is taken off again where the background shows through.
    part = np.asarray(Image.fromarray(pixels).resize(sides, Image.Resampling.BOX), np.float64)
    solid = np.asarray(Image.fromarray(opaque).resize(sides, Image.Resampling.BOX), np.float64)[..., None] / 255
    square = np.broadcast_to(colour.astype(np.float64), (SIZE, SIZE, 3)).copy()
    top, left = (SIZE - sides[1]) // 2, (SIZE - sides[0]) // 2
    square[top : top + sides[1], left : left + sides[0]] = part + (1 - solid) * (colour - 255.0)
    return np.clip(np.rint(square), 0, 255).astype(np.uint8)


# --- figures ------------------------------------------------------------------------------------------------------


def train(table: Path, *, quick: bool, changes: Sequence[str]) -> float:
    """One run, named "stamps"; the minutes of CPU time that it took."""
    own: dict[str, Any] = {"name": "stamps"}
    if quick:
        own["training"] = {"steps": 40}
    for change in changes:
        keys, _, value = change.partition("=")
        *sections, last = keys.split(".")
        place = own
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = json.loads(value)
    settings, provenance = resolve(PairPretrainSettings, [("usual", USUAL), ("benchmark", SETTINGS), ("flags", own)])
    started = time.process_time()
    pretrain_pairs([str(table)], settings, provenance)
    return (time.process_time() - started) / 60


def relevant(held_out: Sequence[Stamp], kind: str) -> tuple[list[str], list[str], NDArray[np.bool_]]:
    """The different texts, their nouns, and which pictures have them, [texts, pictures]."""
    texts = [getattr(one, kind) for one in held_out]
    nouns = {text: one.noun for text, one in zip(texts, held_out, strict=True)}
    queries = list(nouns)
    return queries, list(nouns.values()), np.array([[text == query for text in texts] for query in queries])


def hits(scores: NDArray[Any], right: NDArray[np.bool_]) -> dict[int, NDArray[np.float64]]:
    """For k = 1 and 5 whether a right picture is among the k best of each text, on average over orders of equals."""
    rng = np.random.default_rng(0)
    found = {k: np.zeros(len(scores)) for k in (1, 5)}
    for _ in range(SHUFFLES):
        order = np.lexsort((rng.random(scores.shape), -scores), axis=-1)
        ranked = np.take_along_axis(right, order, 1)
        for k, sums in found.items():
            sums += ranked[:, :k].any(1)
    return {k: sums / SHUFFLES for k, sums in found.items()}


def chance(right: NDArray[np.bool_], k: int) -> float:
    """What a random order of the pictures finds."""
    total = right.shape[1]
    return float(np.mean([1 - comb(total - count, k) / comb(total, k) for count in right.sum(1).tolist()]))


def histogram_scores(
    queries: Sequence[str], captions: Sequence[str], seen: Sequence[Path], shown: Sequence[Path]
) -> NDArray[np.float64]:
    """The floor: [queries, pictures]."""
    near = np.minimum(histograms(shown)[:, None], histograms(seen)[None]).sum(-1)
    nearest = np.argsort(-near, 1, kind="stable")[:, :NEIGHBOURS]
    likeness = tfidf(queries, captions) @ tfidf(captions, captions).T
    return likeness[:, nearest].mean(-1)


def histograms(paths: Sequence[Path]) -> NDArray[np.float64]:
    """Shares of 4 x 4 x 4 colours, [pictures, 64]."""
    rows = []
    for path in paths:
        levels = read_image(path).reshape(-1, 3) // 64
        rows.append(np.bincount(levels @ np.array([16, 4, 1]), minlength=64) / len(levels))
    return np.array(rows)


def tfidf(texts: Sequence[str], corpus: Sequence[str]) -> NDArray[np.float64]:
    """Unit vectors of the words of texts, weighted by how rare they are in the corpus (of one: 0 throughout)."""
    counts = Counter(word for text in corpus for word in set(words_of(text)))
    places = {word: place for place, word in enumerate(sorted(counts))}
    found = np.zeros((len(texts), len(places)))
    for row, text in zip(found, texts, strict=True):
        for word in words_of(text):
            if word in places:
                row[places[word]] += log((1 + len(corpus)) / counts[word])
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def words_of(text: str) -> list[str]:
    """Words in lower case and the singular."""
    return [singular(word) for word in re.findall(r"[^\W_]+", text.lower())]


if __name__ == "__main__":
    sys.exit(main())
