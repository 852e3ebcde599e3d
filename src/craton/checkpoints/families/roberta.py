"""RoBERTa and XLM-RoBERTa: roberta-base, xlm-roberta-base, multilingual E5, BGE-M3, paraphrase-multilingual.

BERT but for the position table: its first two rows belong to no token (positions begin behind the padding id, which is
1), so the longest text is two shorter than the table. They are cut off on loading and written as zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from craton.checkpoints.families import bert
from craton.checkpoints.families.family import Family, Keys
from craton.checkpoints.names import Entry
from craton.models import EncoderConfig, ModelConfig

UNUSED_POSITIONS = 2


def read_config(keys: Keys) -> EncoderConfig:
    """config.json -> ours."""
    keys.refuse("pad_token_id", UNUSED_POSITIONS - 1)
    return bert.read_config(keys, unused_positions=UNUSED_POSITIONS)


def write_config(config: ModelConfig, class_name: str, model_type: str) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, EncoderConfig)
    return bert.write_config(config) | {
        "architectures": [f"{class_name}Model"],
        "model_type": model_type,
        "max_position_embeddings": config.context + UNUSED_POSITIONS,
        "pad_token_id": UNUSED_POSITIONS - 1,
    }


def _cut(tables: Sequence[Tensor]) -> Sequence[Tensor]:
    return [tables[0][UNUSED_POSITIONS:]]


def _extend(tables: Sequence[Tensor]) -> Sequence[Tensor]:
    return [torch.cat((tables[0].new_zeros(UNUSED_POSITIONS, tables[0].shape[1]), tables[0]))]


POSITIONS = Entry(bert.POSITIONS.theirs, bert.POSITIONS.ours, _cut, _extend)


def _family(name: str, class_name: str, model_type: str) -> Family:
    return Family(
        name=name,
        architectures=(f"{class_name}Model", f"{class_name}ForMaskedLM"),
        read_config=read_config,
        write_config=partial(write_config, class_name=class_name, model_type=model_type),
        entries=partial(bert.entries, positions=POSITIONS),
        ignored=(r"embeddings\.position_ids", r"lm_head\..*"),
        renames=((r"^roberta\.", ""),),
    )


ROBERTA = _family("roberta", "Roberta", "roberta")
XLM_ROBERTA = _family("xlm_roberta", "XLMRoberta", "xlm-roberta")
