"""Prompts with pictures: from a conversation to token ids and the pictures whose tokens stand among them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from craton.errors import CheckpointError, TemplateError, UsageError
from craton.modalities.image import check_pixels, read_image, read_preprocessing
from craton.modalities.image.preprocessing import processor_kind, processor_values
from craton.modalities.image.splitting import IMAGE, TYPES, read_splitting
from craton.modalities.text import Tokenizer
from craton.modalities.text.chat import ChatTemplate
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
        self._config, self._tokenizer = config, tokenizer
        marker = tokenizer.backend.id_to_token(config.image_token)
        kind = processor_kind(processor_values(folder)[0])
        self._splitting = read_splitting(folder) if kind in TYPES else None
        self._preprocessing = read_preprocessing(folder) if self._splitting is None else self._splitting.whole
        given, seen = self._preprocessing.crop or self._preprocessing.size, config.vision.image
        if given != seen:
            raise CheckpointError(
                f"pictures come out at {given[0]} x {given[1]} pixels, and the model sees {seen[0]} x {seen[1]}",
                where=str(folder),
                remedy="its preprocessor_config.json belongs to another model",
            )
        if marker is None or (self._splitting is not None and marker != IMAGE):
            raise CheckpointError(
                f"the image token {config.image_token} is {marker!r} to the tokenizer", where=str(folder)
            )
        self.marker = marker

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> Prompt:
        """The prompt of a conversation, ready for the assistant's answer.

        Raises UsageError for malformed messages, and where the template's places for pictures are not as many as the
        pictures; FileFormatError for what is no picture; TemplateError as `craton.modalities.text.render` does.
        """
        template = _SeeingTemplate.of(self._tokenizer, with_tools=bool(tools))
        text = template.render_text(messages, tools=tools, add_generation_prompt=True, **variables)
        given = [part["image"] for message in messages for part in _image_parts(message.get("content"))]
        before, *rest = text.split(self.marker)
        if len(rest) != len(given):
            raise UsageError(
                f"the conversation has {len(rest)} places for {len(given)} pictures",
                where="messages",
                remedy=f"write no {self.marker!r} in a text; give pictures as parts of a user's message",
            )
        tiles: list[NDArray[np.float32]] = []
        for source, after in zip(given, rest, strict=True):
            written, more = self._prepare(_read(source))
            before += written + after
            tiles += more
        ids, _ = self._tokenizer.encode_with_offsets(before)
        tokenizer = self._tokenizer
        if tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2:
            raise TemplateError("the rendered conversation begins with two BOS tokens", where="chat template")
        return Prompt(ids, tuple(self._placed(ids, tiles)), before)

    def _prepare(self, pixels: NDArray[np.uint8]) -> tuple[str, list[NDArray[np.float32]]]:
        """What is written in a picture's place, and what the model sees of it."""
        tokens = self._config.picture_tokens
        if self._splitting is None:
            return self.marker * tokens, [self._preprocessing.prepare(pixels)]
        return self._splitting.grid(*pixels.shape[:2]).text(tokens), list(self._splitting.prepare(pixels))

    def _placed(self, ids: Sequence[int], tiles: Sequence[NDArray[np.float32]]) -> Iterable[PromptPicture]:
        # All image tokens of the ids are tiles', one tile after the other.
        places = [place for place, token in enumerate(ids) if token == self._config.image_token]
        tokens = self._config.picture_tokens
        if len(places) != tokens * len(tiles):
            raise CheckpointError(
                f"{self.marker!r} is not one token: {tokens * len(tiles)} became {len(places)}",
                where="tokenizer",
                remedy="the tokenizer belongs to another model",
            )
        for number, tile in enumerate(tiles):
            yield PromptPicture(places[number * tokens], tokens, tile)


class _SeeingTemplate(ChatTemplate):
    """The model's template over messages with pictures. The checks of messages know text alone, so pictures are taken
    out before and put back, as parts without pixels, after them."""

    def _chat(self, messages: Sequence[Message], *rest: Any) -> Any:
        pictured = isinstance(messages, Sequence) and not isinstance(messages, str)
        given = list(messages) if pictured and all(isinstance(message, Mapping) for message in messages) else []
        places = [_places(message.get("content")) for message in given]
        if any(places) and not self._compiled.takes_parts:
            raise UsageError(
                "this model's chat template has no place for pictures", remedy="use a template made for them"
            )
        bare = [
            {**message, "content": [part for part in message["content"] if not _is_image(part)]}
            if places[i]
            else message
            for i, message in enumerate(given)
        ]
        chat = super()._chat(bare if given else messages, *rest)
        if self._compiled.takes_parts:
            for message, at in zip(chat.messages, places, strict=True):
                if isinstance(message.get("content"), str):
                    # Such a template would pass over a text that is no part of a list.
                    message["content"] = [{"type": "text", "text": message["content"]}]
                for place in at:
                    message["content"].insert(place, {"type": "image"})
        return chat


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"


def _places(content: Any) -> list[int]:
    """The numbers of the parts of a message's content that are pictures."""
    if not isinstance(content, list | tuple):
        return []
    for part in content:
        if _is_image(part) and "image" not in part:
            raise UsageError(
                "a picture's part has no picture", where="messages", remedy='{"type": "image", "image": "cat.png"}'
            )
    return [number for number, part in enumerate(content) if _is_image(part)]


def _image_parts(content: Any) -> list[Any]:
    return [content[number] for number in _places(content)]


def has_pictures(messages: Any) -> bool:
    """Whether some part of some message is a picture."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        return False
    return any(isinstance(message, Mapping) and _places(message.get("content")) for message in messages)


def _read(source: Any) -> NDArray[np.uint8]:
    if isinstance(source, np.ndarray):
        return check_pixels(source)
    if not isinstance(source, str | Path | bytes):
        raise UsageError(
            f"a picture is a file, a file's bytes or pixels, not {type(source).__name__}", where="messages"
        )
    return read_image(source)
