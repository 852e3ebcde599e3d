"""What a Whisper checkpoint says of how it is to be decoded: `generation_config.json` in Hugging Face's layout,
`config.json` in CTranslate2's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from craton.checkpoints.disk import replace_file
from craton.errors import FileFormatError
from craton.modalities.audio import SpeechTokens
from craton.modalities.audio.log_mel import HOP, RATE, WINDOW
from craton.modalities.text import Tokenizer
from craton.models import Seq2SeqConfig


@dataclass(frozen=True)
class WhisperGeneration:
    """suppressed: tokens that are never written; suppressed_first: those that are not written first (None: not said).
    alignment_heads: the (layer, head) pairs of cross-attention that follow the words (empty: not said)."""

    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] | None = None
    alignment_heads: tuple[tuple[int, int], ...] = ()
    multilingual: bool | None = None

    def tokens(self, tokenizer: Tokenizer, vocab: int) -> SpeechTokens:
        """The control tokens of the model that says this. Raises CheckpointError where one is not there."""
        return SpeechTokens.of(
            tokenizer,
            vocab,
            suppressed=self.suppressed,
            suppressed_first=self.suppressed_first,
            multilingual=self.multilingual,
        )


def read_generation(folder: Path) -> WhisperGeneration:
    """Read them from a model's folder; what is not there is not said.

    Raises FileFormatError for a file that is not JSON, or lists that hold something else than ids.
    """
    values: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, ValueError, RecursionError) as error:
            raise FileFormatError(f"{name} cannot be read: {error}", where=str(path)) from None
        values |= found if isinstance(found, dict) else {}
    where = str(folder)
    first = _ids(values, ("begin_suppress_tokens", "suppress_ids_begin"), where)
    multilingual = values.get("is_multilingual")
    return WhisperGeneration(
        suppressed=_ids(values, ("suppress_tokens", "suppress_ids"), where) or (),
        suppressed_first=first,
        alignment_heads=_pairs(values.get("alignment_heads"), where),
        multilingual=multilingual if isinstance(multilingual, bool) else None,
    )


def write_generation(
    folder: Path, config: Seq2SeqConfig, tokens: SpeechTokens, heads: tuple[tuple[int, int], ...]
) -> None:
    """Write what transformers needs beside the weights: `generation_config.json` and `preprocessor_config.json`.

    heads: see `WhisperGeneration.alignment_heads`. Raises StoreError if the folder cannot be written.
    """
    generation: dict[str, Any] = {
        "decoder_start_token_id": tokens.start,
        "bos_token_id": tokens.end,
        "eos_token_id": tokens.end,
        "pad_token_id": tokens.end,
        "prev_sot_token_id": tokens.previous,
        "no_timestamps_token_id": tokens.no_times,
        "suppress_tokens": list(tokens.suppressed),
        "begin_suppress_tokens": list(tokens.suppressed_first),
        "max_initial_timestamp_index": 50,
        "max_length": config.context,
        "is_multilingual": bool(tokens.languages),
    }
    if heads:
        generation["alignment_heads"] = [list(pair) for pair in heads]
    if tokens.languages:
        generation["lang_to_id"] = {f"<|{code}|>": i for code, i in tokens.languages.items()}
        generation["task_to_id"] = {"transcribe": tokens.transcribe, "translate": tokens.translate}
    samples = 2 * config.frames * HOP
    features = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": config.mels,
        "sampling_rate": RATE,
        "n_fft": WINDOW,
        "hop_length": HOP,
        "chunk_length": samples // RATE,
        "n_samples": samples,
        "nb_max_frames": 2 * config.frames,
        "padding_value": 0.0,
        "return_attention_mask": False,
    }
    for name, values in (("generation_config.json", generation), ("preprocessor_config.json", features)):
        replace_file(folder / name, json.dumps(values, indent=2).encode() + b"\n")


def _ids(values: dict[str, Any], keys: tuple[str, ...], where: str) -> tuple[int, ...] | None:
    for key in keys:
        found = values.get(key)
        if found is None:
            continue
        if not isinstance(found, list) or not all(type(i) is int and i >= -1 for i in found):
            raise FileFormatError(f"{key!r} must be a list of token ids", where=where)
        return tuple(i for i in found if i >= 0)
    return None


def _pairs(found: Any, where: str) -> tuple[tuple[int, int], ...]:
    if found is None:
        return ()
    plain = isinstance(found, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(i) is int and i >= 0 for i in pair) for pair in found
    )
    if not plain:
        raise FileFormatError("'alignment_heads' must be a list of [layer, head] pairs", where=where)
    return tuple((layer, head) for layer, head in found)
