"""Pictures with captions from files, and the tokens that the captions are read as."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from craton.data.pictures import PictureSet, read_pictures
from craton.errors import DataError, FileFormatError, UsageError
from craton.modalities.text import Tokenizer, tokenizer_json
from craton.modalities.text.tokenizer_training import TokenizerSettings, train_tokenizer

START: Final = "<|startoftext|>"
END: Final = "<|endoftext|>"
MOST_CAPTION: Final = 1 << 20  # bytes of a caption's file


def read_pairs(
    sources: Sequence[str], *, size: int, on_progress: Callable[[str], None] = lambda doing: None
) -> PictureSet:
    """Every picture of `sources` with its caption, squared to `size` as `read_pictures` does it.

    A source is a table (.jsonl, .csv ...) of records {"image": PATH, "caption": ...}, or a folder of pictures in which
    the first line of NAME.txt is the caption of NAME.png.

    Raises DataError for a picture without a caption, and what `read_pictures` raises.
    """
    found = [_read_source(source, size, on_progress) for source in sources]
    return PictureSet(
        np.concatenate([pictures.pixels for pictures in found]),
        None,
        (),
        tuple(caption for pictures in found for caption in pictures.captions or ()),
        tuple(origin for pictures in found for origin in pictures.origins),
    )


def _read_source(source: str, size: int, on_progress: Callable[[str], None]) -> PictureSet:
    pictures = read_pictures([source], size=size, on_progress=on_progress)
    if Path(source).expanduser().is_dir():
        captions = tuple(_caption_beside(Path(origin)) for origin in pictures.origins)
        pictures = replace(pictures, captions=captions)
    if pictures.captions is None:
        raise DataError(
            "these pictures have no captions",
            where=source,
            remedy='use records {"image": "a.png", "caption": "..."}, or write a.txt beside a.png',
        )
    return replace(pictures, labels=None, names=())


def _caption_beside(picture: Path) -> str:
    path = picture.with_suffix(".txt")
    try:
        if path.stat().st_size > MOST_CAPTION:
            raise FileFormatError("this is no caption: more than 1 MiB", where=str(path), remedy="write one line")
        first = path.read_text(encoding="utf-8-sig").strip().partition("\n")[0].strip()
    except FileNotFoundError:
        raise DataError(
            "this picture has no caption", where=str(picture), remedy=f"write it into {path.name} beside it"
        ) from None
    except UnicodeDecodeError:
        raise FileFormatError("the caption is not UTF-8", where=str(path), remedy="save it as UTF-8") from None
    except OSError as error:
        raise UsageError(f"the caption cannot be read: {error.strerror}", where=str(path)) from None
    if not first:
        raise DataError("the caption is empty", where=str(path), remedy="write one line, or move the picture away")
    return first


def caption_tokenizer(captions: Sequence[str], vocab: int) -> Tokenizer:
    """A tokeniser of captions in CLIP's form, learnt on them: lower case, <|startoftext|> before and <|endoftext|>
    behind each text. The latter has the highest id, by which Hugging Face's CLIP finds the end of a text, and pads.

    vocab: tokens in all, at most. Raises UsageError for fewer than the 256 bytes and the special ones take.
    """
    learnt = TokenizerSettings(vocab=vocab)
    trained = train_tokenizer((caption.lower() for caption in captions), learnt)
    description = json.loads(trained.backend.to_str())
    ids = description["model"]["vocab"]
    pieces = [token for token in sorted(ids, key=ids.__getitem__) if token not in learnt.special]
    whole = [*pieces, START, END]
    places = {START: len(pieces), END: len(pieces) + 1}
    description["model"]["vocab"] = {token: number for number, token in enumerate(whole)}
    description["added_tokens"] = [
        tokenizer_json.added_token(token, place, special=True) for token, place in places.items()
    ]
    description["normalizer"] = {"type": "Lowercase"}
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": START, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": END, "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [at], "tokens": [token]} for token, at in places.items()},
    }
    backend = tokenizer_json.build(description, where="the tokeniser just learnt")
    return Tokenizer(backend, special_tokens={"bos_token": START, "eos_token": END, "pad_token": END})


def encode_captions(
    tokenizer: Tokenizer, captions: Sequence[str], context: int, *, lower: bool
) -> tuple[list[tuple[int, ...]], int]:
    """The tokens of each caption, and how many captions were too long: of those the end is cut, but for the last token,
    whose vector may stand for the text.

    lower: in lower case (see `DualEncoderConfig.lower_case`).
    """
    encoded = tokenizer.encode_batch([caption.lower() if lower else caption for caption in captions])
    cut = sum(len(ids) > context for ids in encoded)
    return [tuple(ids) if len(ids) <= context else (*ids[: context - 1], ids[-1]) for ids in encoded], cut
