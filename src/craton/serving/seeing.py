"""Vectors of pictures, and of texts in the same space, from a model that sees."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from craton.errors import CratonError
from craton.inference.images import TOKENS, ImageModel
from craton.models import DualEncoder
from craton.serving.call import Call
from craton.serving.errors import ApiError, from_any
from craton.serving.pictures import PicturePolicy, read_picture
from craton.serving.schemas.vectors import EmbeddingItem

# Between two parts of about so many patches, or of so many texts, engines step: answers that are being written do not
# wait for a long list.
PART_TOKENS: Final = 512
PART_TEXTS: Final = 16

Vectors = NDArray[np.float32]


async def vectors_of_seen(
    call: Call, name: str, model: ImageModel, items: Sequence[EmbeddingItem], field: str
) -> Vectors:
    """One fp32 vector of length 1 for each item, [B, D].

    A text that is a picture's data URL stands for that picture: some clients know no other form. Raises ApiError (400)
    for a text that the model cannot read, too many pictures, and whatever is wrong with one of them; nothing is fetched
    or decoded before the rest is checked.
    """
    shown = {number: picture for number, item in enumerate(items) if (picture := _picture(item)) is not None}
    texts = {number: item.text or "" for number, item in enumerate(items) if number not in shown}
    if texts and not model.reads:
        said = f'{name} sees and reads no text: send pictures, as {{"image": "data:image/png;base64,..."}}'
        raise ApiError(400, said, param=field, code="no_texts")
    policy = call.state.settings.pictures
    if len(shown) > policy.most:
        raise ApiError(400, f"{len(shown)} pictures, and at most {policy.most} in one request", param=field)
    encoded = await asyncio.to_thread(_encoded, model, list(texts.values()))
    if isinstance(model.module, DualEncoder):
        check_lengths(name, zip(texts, encoded, strict=True), model.module.config.context, field)
    prepared = await asyncio.to_thread(_prepared, model, shown, policy, field)
    call.prompt_tokens = sum(map(len, encoded)) + sum(_tokens(model, pixels_CHW) for pixels_CHW in prepared)
    parts = chain(_text_parts(model, list(texts.values())), _picture_parts(model, prepared))
    found_BD = np.concatenate(await call.state.worker.work(parts))
    vectors_BD = np.empty_like(found_BD)
    vectors_BD[[*texts, *shown]] = found_BD
    return vectors_BD


def check_lengths(name: str, encoded: Iterable[tuple[int, Sequence[int]]], limit: int, field: str) -> None:
    """encoded: (number in the request, token ids) of each text. Raises ApiError (400) for one of none or too many."""
    for number, ids in encoded:
        if not 0 < len(ids) <= limit:
            said = f"{field}[{number}] has {len(ids)} tokens; {name} reads 1 to {limit}"
            raise ApiError(400, said, param=field, code="context_length_exceeded")


def _picture(item: EmbeddingItem) -> str | None:
    if item.text is not None and item.text[:11].lower() == "data:image/":
        return item.text
    return item.image


def _encoded(model: ImageModel, texts: Sequence[str]) -> list[list[int]]:
    """The tokens that the model will read of each text."""
    if not texts or not isinstance(model.module, DualEncoder) or model.tokenizer is None:
        return []
    lower = model.module.config.lower_case
    return model.tokenizer.encode_batch([text.lower() if lower else text for text in texts])


def _prepared(model: ImageModel, shown: dict[int, str], policy: PicturePolicy, field: str) -> list[NDArray[np.float32]]:
    """What the model eats, [C, H, W] of each picture. One is decoded at a time: a large one may take 100 MB."""
    rows, columns = model.vision.config.grid
    most = max(TOKENS, rows * columns + model.vision.config.extra)
    prepared = []
    for number, picture in shown.items():
        try:
            pixels_CHW = model.preprocessing.prepare(read_picture(picture, policy))
            if (tokens := _tokens(model, pixels_CHW)) > most:  # where a picture is not brought to the model's own size
                raise ApiError(400, f"the picture has {tokens} patches, and at most {most} are read", code="too_large")
        except (ApiError, CratonError) as error:
            refusal = from_any(error)
            where = f"{field}[{number}]: {refusal.message}"
            raise ApiError(refusal.status, where, param=field, code=refusal.code) from None
        prepared.append(pixels_CHW)
    return prepared


def _tokens(model: ImageModel, pixels_CHW: NDArray[Any]) -> int:
    config = model.vision.config
    _, height, width = pixels_CHW.shape
    return (height // config.patch) * (width // config.patch) + config.extra


def _text_parts(model: ImageModel, texts: Sequence[str]) -> Iterator[Vectors]:
    for first in range(0, len(texts), PART_TEXTS):
        yield model.embed(texts[first : first + PART_TEXTS]).numpy()


def _picture_parts(model: ImageModel, prepared: Sequence[NDArray[np.float32]]) -> Iterator[Vectors]:
    for _, group in groupby(prepared, key=np.shape):
        alike = list(group)
        together = max(1, PART_TOKENS // _tokens(model, alike[0]))
        for first in range(0, len(alike), together):
            yield _seen(model, np.stack(alike[first : first + together]))


@torch.inference_mode()
def _seen(model: ImageModel, pixels_BCHW: NDArray[np.float32]) -> Vectors:
    vectors: Vectors = F.normalize(model.vision.encode(torch.from_numpy(pixels_BCHW)).float(), dim=-1).numpy()
    return vectors
