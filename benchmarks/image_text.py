"""Pictures taught to a text encoder: does a model of few pictures find those of things that it was never shown?

Cases (recall of the right picture by its caption among all held-out ones; more is better; peers on the same queries)
    stamps/captions/recall@1, @5        queries are the captions alone: their nouns were in no caption of the training
                                        data, so that what is said beside them (colours, kinds, materials) helps, and
                                        what the text encoder knows of the nouns
    stamps/with-folders/recall@1, @5    captions followed by the names of the picture's folders ("An owl. animals,
                                        birds"): kinds of things, whose names were in the training data
    from-nothing/...                    the same of a CLIP of both sides, whose words are those of the training captions

Peers
    chance            what a random order finds
    colour histogram  the 5 training pictures of the most similar colours (intersection of 4 x 4 x 4 RGB histograms),
                      their captions, and how much these resemble the query (cosine of TF-IDF of words); equal scores
                      count as in a random order
    histogram + MiniLM  the same, but captions resemble the query as all-MiniLM-L6-v2 has it: what the text encoder
                      brings by itself

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
    held-out ones on white. What is taught is the side of pictures alone, beside all-MiniLM-L6-v2. The recipe was chosen
    on validation parts (--validation: nouns of the training data, by the next bytes of their SHA-256); the last weights
    are scored once. Intervals (95 %) are of clusters of one noun (`craton.evaluation.intervals`); CPU time is that of
    all threads.
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
from craton.errors import CratonError
from craton.evaluation.intervals import estimate
from craton.inference.images import load_images
from craton.inference.model import load
from craton.modalities.image import encode_png, read_alpha, read_image
from craton.pretraining.image_text.pretrain import pretrain_pairs
from craton.pretraining.image_text.settings import USUAL, PairPretrainSettings
from craton.store import find
from craton.store.folders import HOME_VARIABLE

INSTALLED = Path("/usr/share/tuxpaint/stamps")
SIZE = 64
# The same few for all pictures: a picture with colours of its own is known by them, whatever it shows.
BACKGROUNDS = ((255, 255, 255), (40, 44, 60), (150, 190, 140), (225, 180, 130))
# First bytes of the digests of the nouns that are held out; and of those that a recipe may be chosen by.
HELD_OUT, VALIDATION = range(64), range(64, 112)
NEIGHBOURS = 5
LONGEST = 12  # words of a held-out caption
SHUFFLES = 200
PACKAGES = ("craton", "torch", "pillow")
ENCODER = "minilm-l6-v2"
FROM_NOTHING: dict[str, Any] = {
    "size": "1m", "image_size": SIZE, "patch": 16, "vocab": 2048, "context": 64, "holdout": 0.0,
    "augment": {"crop": 0.5, "shift": 0.05, "flip": True, "colour": 0.3},
    "training": {
        "batch": 256, "micro_tokens": 32768, "learning_rate": 1e-3, "weight_decay": 0.2, "steps": 240, "threads": 1,
    },
}  # fmt: skip
TAUGHT: dict[str, Any] = FROM_NOTHING | {"training": FROM_NOTHING["training"] | {"steps": 160}}

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
    """Build the data, train, score everything on the same queries."""
    flags = parser(__doc__.partition("\n")[0])
    flags.add_argument("--stamps", type=Path, default=INSTALLED, help="the folder of the stamps")
    flags.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting of the run")
    flags.add_argument("--validation", action="store_true", help="score on a part of the training data: for choosing")
    arguments = flags.parse_args()
    if not arguments.stamps.is_dir():
        print(f"no stamps in {arguments.stamps}: apt-get install tuxpaint-stamps-default", file=sys.stderr)
        return 2
    try:
        encoder = find(ENCODER).path
    except CratonError as error:
        print(error, file=sys.stderr)
        return 2
    training, held_out = split(read_stamps(arguments.stamps))
    if arguments.validation:
        training, held_out = split(training, VALIDATION)
    document: Document = {"machine": machine(PACKAGES), "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ[HOME_VARIABLE] = str(home / "home")  # runs and models of a benchmark are nobody's
        seen = build(training, home / "training", BACKGROUNDS)
        shown = build(held_out, home / "held_out", BACKGROUNDS[:1])
        table = home / "training" / "pairs.jsonl"
        changes = changed(arguments.set, quick=arguments.quick)
        for name, own in (("stamps", TAUGHT | {"text_model": str(encoder)}), ("from-nothing", FROM_NOTHING)):
            minutes = train(table, name, own, changes)
            model = load_images(name, dtype="float32", threads=1)
            pictures = model.embed_images(list(shown)).numpy()
            for kind, field in (("captions", "caption"), ("with-folders", "placed")):
                queries, clusters, right = relevant(held_out, field)
                ours = hits(model.embed(queries).numpy() @ pictures.T, right)
                captions = [getattr(one, field) for one in training]
                nearest = nearest_colours(seen, shown)
                floors = {
                    "colour histogram": hits(tfidf_likeness(queries, captions)[:, nearest].mean(-1), right),
                    "histogram + MiniLM": hits(
                        encoder_likeness(encoder, queries, captions)[:, nearest].mean(-1), right
                    ),
                }
                for k in (1, 5):
                    found = estimate(ours[k], clusters)
                    text = (
                        f"{len(queries)} captions of {found.clusters} nouns, {len(shown)} pictures, 95 %: "
                        f"{found.low:.3f} to {found.high:.3f}"
                    )
                    for peer, floor in floors.items():
                        ahead = estimate(ours[k] - floor[k], clusters, score=False)
                        # A recall's difference cannot be more, whatever a few hits among many zeros say.
                        low, high = max(ahead.low, -1.0), min(ahead.high, 1.0)
                        text += f"; ahead of {peer} by {low:.3f} to {high:.3f}"
                    text += f"; {minutes:.1f} CPU-min, {len(training)} training pictures"
                    document["cases"][f"{name}/{kind}/recall@{k}"] = case(
                        found.value,
                        {"chance": chance(right, k)} | {peer: float(floor[k].mean()) for peer, floor in floors.items()},
                        "recall",
                        settings={"Craton": text},
                    )
                    print(f"{name} {kind} recall@{k} {found.value:.3f}: {text}", file=sys.stderr)
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


def split(stamps: Sequence[Stamp], apart: range = HELD_OUT) -> tuple[list[Stamp], list[Stamp]]:
    """(training, held-out) pictures, with no held-out noun anywhere in the training captions or folders' names.

    apart: the first bytes of the SHA-256 of the nouns that are held out.
    """
    things = [one for one in stamps if one.folders[:1] != ("symbols",)]
    held = {one.noun for one in things if hashlib.sha256(one.noun.encode()).digest()[0] in apart}
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


def train(table: Path, name: str, recipe: dict[str, Any], changes: dict[str, Any]) -> float:
    """One run; the minutes of CPU time that it took."""
    layers = [("usual", USUAL), ("benchmark", recipe | {"name": name}), ("flags", changes)]
    settings, provenance = resolve(PairPretrainSettings, layers)
    started = time.process_time()
    pretrain_pairs([str(table)], settings, provenance)
    return (time.process_time() - started) / 60


def changed(words: Sequence[str], *, quick: bool) -> dict[str, Any]:
    """What the command line says differs in the settings of the runs."""
    own: dict[str, Any] = {"training": {"steps": 40}} if quick else {}
    for word in words:
        keys, _, value = word.partition("=")
        *sections, last = keys.split(".")
        place = own
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = json.loads(value)
    return own


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


def nearest_colours(seen: Sequence[Path], shown: Sequence[Path]) -> NDArray[np.int64]:
    """The numbers of the training pictures with the most similar colours, [pictures, NEIGHBOURS]."""
    near = np.minimum(histograms(shown)[:, None], histograms(seen)[None]).sum(-1)
    return np.argsort(-near, 1, kind="stable")[:, :NEIGHBOURS]


def tfidf_likeness(queries: Sequence[str], captions: Sequence[str]) -> NDArray[np.float64]:
    """How much captions resemble queries, word by word: [queries, captions]."""
    return tfidf(queries, captions) @ tfidf(captions, captions).T


def encoder_likeness(encoder: Path, queries: Sequence[str], captions: Sequence[str]) -> NDArray[np.float32]:
    """The same, by the text encoder's vectors."""
    model = load(encoder, dtype="float32", threads=1)
    return model.embed(queries).numpy() @ model.embed(captions).numpy().T


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
