"""Pictures in conversations: what is written in their places, and what a model sees of them.

The one path from messages with pictures to tokens: training reads its records by it, and a prompt is made by it.
A picture is a part {"type": "image", "image": ...} of a message's content.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from craton.errors import CheckpointError, UsageError
from craton.modalities.image import Pixels, read_preprocessing
from craton.modalities.image.preprocessing import processor_kind, processor_values
from craton.modalities.image.splitting import IMAGE, TYPES, read_splitting
from craton.modalities.text import ChatTemplate, Tokenizer
from craton.modalities.text.chat import _Chat

if TYPE_CHECKING:  # no torch is needed to read messages
    from craton.models import ImageChatConfig

Message = Mapping[str, Any]


class ChatPictures:
    """How one model is shown pictures. marker: what its template writes for one. token: the id of the marker. tokens:
    how many of them a tile of a picture becomes."""

    def __init__(self, config: ImageChatConfig, tokenizer: Tokenizer, folder: Path) -> None:
        """folder: of the checkpoint. Raises CheckpointError where its files do not say how pictures are prepared, or
        prepare them for another model."""
        self.token, self.tokens = config.image_token, config.picture_tokens
        self._tokenizer = tokenizer
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

    def template(self, *, with_tools: bool = False) -> ChatTemplate:
        """The model's own template for messages whose pictures are pixels (see `opened`): it writes each of them out as
        its tokens. Raises TemplateError for a model without a template."""
        template = _SeeingTemplate.of(self._tokenizer, with_tools=with_tools)
        assert isinstance(template, _SeeingTemplate)
        template.pictures = self
        return template

    def written(self, pixels: Pixels) -> str:
        """What stands in a picture's place."""
        if self._splitting is None:
            return self.marker * self.tokens
        return self._splitting.grid(*pixels.shape[:2]).text(self.tokens)

    def prepare(self, pixels: Pixels) -> NDArray[np.float32]:
        """What the model sees of a picture [H, W, 3], uint8: fp32 [tiles, channels, height, width]."""
        if self._splitting is None:
            return self._preprocessing.prepare(pixels)[None]
        return self._splitting.prepare(pixels)

    def places(self, ids: Sequence[int], tiles: int) -> list[int]:
        """Where in `ids` the tokens of each tile begin: all image tokens are tiles', one tile after the other.

        Raises CheckpointError where there are more or fewer of them than the tiles have.
        """
        found = [place for place, token in enumerate(ids) if token == self.token]
        if len(found) != self.tokens * tiles:
            raise CheckpointError(
                f"{self.marker!r} is not one token: {self.tokens * tiles} became {len(found)}",
                where="tokenizer",
                remedy="the tokenizer belongs to another model",
            )
        return found[:: self.tokens]


class _SeeingTemplate(ChatTemplate):
    """The model's template over messages with pictures. The checks of messages know text alone, so pictures are taken
    out before and put back, as parts without pixels, after them."""

    pictures: ChatPictures

    def _chat(self, messages: Sequence[Message], *rest: Any) -> Any:
        pictured = isinstance(messages, Sequence) and not isinstance(messages, str)
        given = list(messages) if pictured and all(isinstance(message, Mapping) for message in messages) else []
        places = [_places(message.get("content")) for message in given]
        if any(places) and not self._compiled.takes_parts:
            raise UsageError(
                "this model's chat template has no place for pictures", remedy="use a template made for them"
            )
        bare = [
            {**message, "content": [part for part in message["content"] if not _is_picture(part)]}
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
        written = [self.pictures.written(pixels) for pixels in pictures_of(given)]
        return _PicturedChat(chat, self.pictures.marker, written)


class _PicturedChat(_Chat):
    """A conversation whose marks are written out, also where only its beginning is rendered."""

    def __init__(self, chat: _Chat, marker: str, written: Sequence[str]) -> None:
        super().__init__(chat._template, chat.messages, chat._variables)
        self._marker, self._written = marker, written

    def text(self, messages: Any, add_generation_prompt: bool, marks: tuple[str, str] | None = None) -> str:
        before, *rest = super().text(messages, add_generation_prompt, marks).split(self._marker)
        shown = len(pictures_of(messages, key="type"))
        if len(rest) != shown:
            raise UsageError(
                f"the conversation has {len(rest)} places for {shown} pictures",
                where="messages",
                remedy=f"write no {self._marker!r} in a text; give pictures as parts of a user's message",
            )
        return before + "".join(w + after for w, after in zip(self._written[:shown], rest, strict=True))


def opened(messages: Any, read: Callable[[Any], Pixels]) -> Any:
    """`messages` in which what `read` makes of each picture stands in its place; malformed ones as they are.

    Raises UsageError for a picture's part without a picture.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        return messages
    return [
        {
            **message,
            "content": [{**p, "image": read(p["image"])} if _is_picture(p) else p for p in message["content"]],
        }
        if isinstance(message, Mapping) and _places(message.get("content"))
        else message
        for message in messages
    ]


def pictures_of(messages: Any, key: str = "image") -> list[Any]:
    """What stands under `key` in each picture's part of `messages`, in order."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        return []
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    return [
        part[key]
        for content in contents
        for part in (content if isinstance(content, list | tuple) else ())
        if _is_picture(part)
    ]


def _is_picture(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"


def _places(content: Any) -> list[int]:
    """The numbers of the parts of a message's content that are pictures."""
    if not isinstance(content, list | tuple):
        return []
    for part in content:
        if _is_picture(part) and "image" not in part:
            raise UsageError(
                "a picture's part has no picture", where="messages", remedy='{"type": "image", "image": "cat.png"}'
            )
    return [number for number, part in enumerate(content) if _is_picture(part)]
