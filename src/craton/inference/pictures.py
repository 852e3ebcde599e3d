"""Prompts with pictures: from a conversation to token ids and the pictures whose tokens stand among them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from craton.data.chat_pictures import ChatPictures, opened, pictures_of
from craton.errors import UsageError
from craton.modalities.image import check_pixels, read_image
from craton.modalities.text import Tokenizer
from craton.models import CausalLM, ImageChat, ImageChatConfig

Message = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class PromptPicture:
    """A picture of a prompt. at: where its first token stands. tokens: how many it has. pixels_CHW: fp32, prepared as
    the model was trained."""

    at: int
    tokens: int
    pixels_CHW: NDArray[np.float32]
    key: int = field(init=False)

    def __post_init__(self) -> None:
        # Of 16 bytes: two pictures of one key are not found by anybody.
        data = np.ascontiguousarray(self.pixels_CHW)
        digest = hashlib.blake2b(data.tobytes(), digest_size=16, person=str(data.shape).encode()[:16]).digest()
        object.__setattr__(self, "key", int.from_bytes(digest, "big"))

    @property
    def end(self) -> int:
        """Where its last token stands, plus 1."""
        return self.at + self.tokens


class Sight:
    """The pictures of one prompt, in the order of their places. They are looked at when their tokens are read, and so
    never where these are found in the cache."""

    def __init__(self, pictures: Sequence[PromptPicture]) -> None:
        self._pictures = sorted(pictures, key=lambda picture: picture.at)
        self._vectors: dict[int, Tensor] = {}

    def check(self, prompt: Sequence[int], model: CausalLM) -> None:
        """Raises UsageError for a model that sees nothing, and for pictures that do not stand where `prompt` has the
        image token."""
        if not self._pictures:
            return
        if not isinstance(model, ImageChat):
            raise UsageError("this model sees nothing", remedy="take one that was trained on pictures, such as SmolVLM")
        config, free = model.config, 0
        for picture in self._pictures:
            tokens = prompt[picture.at : picture.end]
            right = len(tokens) == picture.tokens == config.picture_tokens and set(tokens) == {config.image_token}
            if picture.at < free or not right:
                raise UsageError(
                    f"a picture stands at token {picture.at}, where there are not {config.picture_tokens} image tokens "
                    "of its own"
                )
            free = picture.end

    def names(self, ids: Sequence[int], first: int = 0) -> list[int]:
        """ids from place `first` on as they are compared with those of other texts: a picture's are numbers that no
        other picture and no token has."""
        named = list(ids)
        for picture in self._pictures:
            for place in range(max(picture.at, first), min(picture.end, first + len(named))):
                named[place - first] = -1 - (picture.key << 20) - (place - picture.at)
        return named

    def between(self, model: CausalLM, first: int, end: int) -> tuple[Tensor, Tensor] | None:
        """Which of the tokens from `first` to `end` are a picture's, and their vectors [N, width]; None for none."""
        seen_T, parts = torch.zeros(end - first, dtype=torch.bool), []
        for picture in self._pictures:
            start, stop = max(picture.at, first), min(picture.end, end)
            if start < stop:
                seen_T[start - first : stop - first] = True
                parts.append(self._look(model, picture)[start - picture.at : stop - picture.at])
        return (seen_T, torch.cat(parts)) if parts else None

    def _look(self, model: CausalLM, picture: PromptPicture) -> Tensor:
        if picture.at not in self._vectors:
            assert isinstance(model, ImageChat)
            self._vectors[picture.at] = model.see(torch.from_numpy(picture.pixels_CHW)[None])[0]
        return self._vectors[picture.at]


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation. text: before it was tokenised, a picture's tokens written out."""

    ids: list[int]
    pictures: tuple[PromptPicture, ...] = ()
    text: str = ""


class PictureRenderer:
    """From messages with pictures to a prompt, by the checkpoint's own chat template and image processor.

    A picture is a part {"type": "image", "image": a file, a file's bytes, or pixels [H, W, 3]} of a message's content.
    """

    def __init__(self, config: ImageChatConfig, tokenizer: Tokenizer, folder: Path) -> None:
        """folder: of the checkpoint. Raises CheckpointError where its files do not say how pictures are prepared, or
        prepare them for another model."""
        self._tokenizer = tokenizer
        self._pictures = ChatPictures(config, tokenizer, folder)

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> Prompt:
        """The prompt of a conversation, ready for the assistant's answer.

        Raises UsageError for malformed messages, and where the template's places for pictures are not as many as the
        pictures; FileFormatError for what is no picture; TemplateError as `craton.modalities.text.render` does.
        """
        seen = opened(messages, _read)
        template = self._pictures.template(with_tools=bool(tools))
        rendered = template.render(seen, self._tokenizer, tools=tools, add_generation_prompt=True, **variables)
        tiles = [tile for pixels in pictures_of(seen) for tile in self._pictures.prepare(pixels)]
        places = self._pictures.places(rendered.ids, len(tiles))
        pictures = (PromptPicture(at, self._pictures.tokens, tile) for at, tile in zip(places, tiles, strict=True))
        return Prompt(rendered.ids, tuple(pictures), rendered.text)


def has_pictures(messages: Any) -> bool:
    """Whether some part of some message is a picture."""
    return bool(pictures_of(messages, key="type"))


def _read(source: Any) -> NDArray[np.uint8]:
    if isinstance(source, np.ndarray):
        return check_pixels(source)
    if not isinstance(source, str | Path | bytes):
        raise UsageError(
            f"a picture is a file, a file's bytes or pixels, not {type(source).__name__}", where="messages"
        )
    return read_image(source)
