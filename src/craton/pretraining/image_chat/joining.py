"""A CLIP or SigLIP and a language model as one model that chats about pictures (LLaVA, Liu 2023, arXiv 2310.03744)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import tokenizers
import torch

from craton.checkpoints.disk import replace_file
from craton.checkpoints.families.llava import TEXTS, with_pictures
from craton.errors import UsageError
from craton.modalities.text import Tokenizer
from craton.models import CausalLM, CausalLMConfig, DualEncoder, ImageChat, VisionConfig, VisionTransformer
from craton.models.image_chat import Projector
from craton.models.initialisation import initialise
from craton.models.resize import resize_embeddings

IMAGE: Final = "<image>"

# Before a template that knows texts alone: contents that are lists of parts become texts, with a mark and a line's end
# for each picture, as LLaVA's conversations have it.
_PARTS_TO_TEXT: Final = (
    "{%- set chat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is defined and message['content'] is not string -%}"
    "{%- set written = namespace(text='') -%}"
    "{%- for part in message['content'] -%}"
    "{%- set written.text = written.text + ('<image>\\n' if part['type'] == 'image' else part['text']) -%}"
    "{%- endfor -%}"
    "{%- set chat.messages = chat.messages + [dict(message, content=written.text)] -%}"
    "{%- else -%}"
    "{%- set chat.messages = chat.messages + [message] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = chat.messages -%}"
    "{{ '' }}"  # no white space at the beginning of what follows is trimmed
)


def seeing_tokenizer(tokenizer: Tokenizer) -> tuple[Tokenizer, int]:
    """`tokenizer` with a token that stands for pictures, which its chat templates write; and the token's id.

    Every other id stays, and so does each conversation without pictures. Raises UsageError for one without a template.
    """
    if tokenizer.chat_template is None:
        raise UsageError(
            "this language model has no chat template", where="--language", remedy="take one that was made for chat"
        )
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    if backend.token_to_id(IMAGE) is None:
        backend.add_special_tokens([tokenizers.AddedToken(IMAGE, normalized=False, special=True)])
    token = backend.token_to_id(IMAGE)
    assert token is not None
    templates = {name: _PARTS_TO_TEXT + source for name, source in tokenizer.chat_templates.items()}
    seeing = Tokenizer(
        backend, special_tokens=tokenizer.special_tokens, eos_ids=tokenizer.eos_ids, chat_templates=templates
    )
    return seeing, token


def check_language(family: str, config: Any) -> CausalLMConfig:
    """The config of a language model that LLaVA's files can hold. Raises UsageError for any other model."""
    if family not in TEXTS or type(config) is not CausalLMConfig:
        raise UsageError(
            f"a model of the family {family!r} cannot be the language model",
            where="--language",
            remedy=f"published files of this kind hold {' or '.join(TEXTS)}",
        )
    return config


def read_layers(config: VisionConfig) -> VisionConfig:
    """The picture side of a CLIP or SigLIP up to the layer before the last, whose patches LLaVA reads: the last one is
    made for the one vector of a whole picture. Raises UsageError for a tower of one layer."""
    layers = config.trunk.layers[:-1]
    if not layers:
        raise UsageError("the layer before the last is read, and this model has one layer", where="--vision")
    trunk = config.trunk.model_copy(update={"layers": layers, "final_norm": None})
    pooling = "cls" if config.class_token else "mean"
    return config.model_copy(update={"trunk": trunk, "projection": 0, "pooling": pooling})


def join(vision: DualEncoder, language: CausalLM, image_token: int, seed: int) -> ImageChat:
    """A model of the parts of both, whose weights it takes over, and a fresh projector of fp32, which alone is trained.

    The image token has the mean of all tokens as its row, which nothing reads.
    """
    resize_embeddings(language, max(language.config.vocab, image_token + 1))
    config = with_pictures(language.config, vision=read_layers(vision.config.vision), image_token=image_token)
    with torch.device("meta"):
        model = ImageChat(config)
    model.embedding, model.trunk, model.head = language.embedding, language.trunk, language.head
    weights, dtype = vision.vision.state_dict(), vision.vision.patches.weight.dtype
    model.vision = VisionTransformer(config.vision).to(dtype)
    model.vision.load_state_dict({name: weights[name] for name in model.vision.state_dict()})
    model.projector = Projector(config)
    initialise(model.projector, seed)
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    return model


def write_processor(model: ImageChat, tokenizer: Tokenizer, folder: Path) -> None:
    """Write what transformers' processor of pictures and texts is made by, beside the files of its parts."""
    vision = model.config.vision
    values = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": vision.patch,
        "num_additional_image_tokens": vision.extra,
        "vision_feature_select_strategy": "default" if vision.extra > model.config.keep_class else "full",
    }
    replace_file(folder / "processor_config.json", json.dumps(values, indent=2).encode() + b"\n")
    assert tokenizer.chat_template is not None
    replace_file(folder / "chat_template.jinja", tokenizer.chat_template.encode())
