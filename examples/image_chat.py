"""A language model learns to see, in minutes and on one core: a small CLIP is grown on captioned pictures of clothes, a
projector joins it to SmolLM2-135M and is trained alone, and pictures that neither has seen are asked about.

Data: Fashion-MNIST (Debian's dataset-fashion-mnist; MIT). The pictures asked about are of its official test split,
chosen before anything is trained. Models go into the store as garments-clip and garments-chat.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import craton
from craton.data.idx import read_idx
from craton.evaluation.intervals import estimate
from craton.modalities.image import encode_png

NAMES = ("t-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
QUESTION = "What is this?"


def write(part: str, count: int, random: np.random.Generator, source: Path, folder: Path) -> Path:
    """So many pictures of a split with their captions, as a table with its pictures beside it."""
    pixels = read_idx(source / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(source / f"{part}-labels-idx1-ubyte.gz")
    (folder / part).mkdir()
    table = folder / f"{part}.jsonl"
    with table.open("w") as file:
        for i in np.sort(random.permutation(len(pixels))[:count]):
            (folder / part / f"{i}.png").write_bytes(encode_png(np.repeat(pixels[i][..., None], 3, 2)))
            file.write(json.dumps({"image": f"{part}/{i}.png", "caption": f"a photo of a {NAMES[labels[i]]}"}) + "\n")
    return table


def run(*words: object) -> None:
    """One command of Craton's."""
    print(f"\n$ craton {' '.join(map(str, words))}", flush=True)
    subprocess.run([sys.executable, "-m", "craton.cli", *map(str, words)], check=True)


def ask(table: Path) -> list[bool]:
    """Whether the answer about each picture of a table is its caption, word for word."""
    model, right = craton.load("garments-chat", threads=1), []
    for line in table.read_text().splitlines():
        record = json.loads(line)
        shown = {"type": "image", "image": str(table.parent / record["image"])}
        asked = {"role": "user", "content": [shown, {"type": "text", "text": QUESTION}]}
        right.append(model.chat([asked], max_tokens=12, temperature=0).text.strip() == record["caption"])
    return right


def main() -> None:
    """Grow, join, ask."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    data = flags.parse_args().data
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        training, test = (write(part, n, random, data, Path(folder)) for part, n in (("train", 20_000), ("t10k", 500)))
        few = training.with_name("few.jsonl")
        few.write_text("\n".join(training.read_text().splitlines()[:5000]))
        tower = ("--size", "1m", "--image-size", 28, "--patch", 7, "--vocab", 400, "--context", 16, "--crop", 0.8)
        how = ("--threads", 1, "--batch", 128, "--steps", 500, "--name", "garments-clip")
        run("pretrain-pairs", training, *tower, "--colour", 0, *how)
        joined = ("--vision", "garments-clip", "--language", "smollm2-135m-instruct", "--question", QUESTION)
        run("pretrain-chat", few, *joined, "--threads", 1, "--batch", 16, "--steps", 120, "--name", "garments-chat")
        found = estimate(ask(test))
    print(f"\nright: {found.value:.3f} of {found.n} (95 %: {found.low:.3f} to {found.high:.3f}; by chance 0.1)")


if __name__ == "__main__":
    main()
