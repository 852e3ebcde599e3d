"""What a model is calibrated with and judged by, whatever it reads: text here, pictures and sounds in other files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from craton.checkpoints.checkpoint import Checkpoint
from craton.compression.blocks import Flow, Source, Stream, Tower, backbone
from craton.compression.calibration import HELD_OUT, read_calibration
from craton.compression.measure import judge
from craton.compression.quantize_settings import CalibrationSettings
from craton.errors import UsageError
from craton.models import AnyModel, CausalLM

LOSS: Final = "loss"
VECTORS: Final = "vectors"
TEXTS: Final = "texts"


class Material(ABC):
    """tensors: what the run keeps of it, to go on with. facts: what it is, for the run's record; where it comes from
    is "text", "pictures" or "sounds" of it."""

    def __init__(self, checkpoint: Checkpoint, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.checkpoint, self.tensors, self.facts = checkpoint, tensors, facts

    @abstractmethod
    def flow(self, source: Source, tower: Tower, *, held_out: bool, done: Mapping[str, Flow]) -> Flow | None:
        """The hidden states before the first block of a tower, of what calibrates or of what judges; None where there
        is nothing to calibrate it with. done: those behind the towers before it, by their names."""

    @abstractmethod
    def judge(self, model: AnyModel) -> dict[str, Tensor]:
        """How good the model is, on what is held out: its `LOSS` in nats a token, or `VECTORS` [M, width] of what it
        sees and `TEXTS` of what it reads, which `compared` compares."""

    @abstractmethod
    def expected(self, model: AnyModel, done: Mapping[str, Flow]) -> list[Tensor]:
        """What the model must give on something held out, from the hidden states behind its last blocks."""

    @abstractmethod
    def given(self, model: AnyModel) -> list[Tensor]:
        """The same from a whole model."""


class TextMaterial(Material):
    """Windows of text."""

    @classmethod
    def read(cls, checkpoint: Checkpoint, settings: CalibrationSettings) -> TextMaterial:
        """Raises UsageError for windows that are too long for the model, DataError for too little text."""
        context = checkpoint.text_config.context
        if settings.window > context:
            raise UsageError(
                f"the model reads {context} tokens at most", where="--window", remedy=f"ask for --window {context}"
            )
        text = read_calibration(
            checkpoint.tokenizer(),
            settings.calibration,
            window=settings.window,
            samples=settings.samples,
            seed=settings.seed,
            held_out=HELD_OUT,
        )
        return cls(checkpoint, {"calibration": text.ids_NT, "held_out": text.heldout_MT}, text.facts)

    def flow(self, source: Source, tower: Tower, *, held_out: bool, done: Mapping[str, Flow]) -> Flow:
        """Of all windows."""
        return Stream(source.backbone, self.tensors["held_out" if held_out else "calibration"])

    def judge(self, model: AnyModel) -> dict[str, Tensor]:
        """The loss of a language model, an encoder's vectors."""
        found = judge(model, self.tensors["held_out"], self.checkpoint.pooling)
        return {LOSS: found.reshape(1)} if found.dim() == 0 else {VECTORS: found}

    def expected(self, model: AnyModel, done: Mapping[str, Flow]) -> list[Tensor]:
        """Logits, or an encoder's hidden states, of the first window."""
        [flow] = done.values()
        norm = backbone(model).trunk.final_norm
        hidden_TD = flow.hidden_TD[: self.tensors["held_out"].shape[1]]
        with torch.inference_mode():
            hidden_TD = hidden_TD if norm is None else norm(hidden_TD)
            return [model.logits(hidden_TD) if isinstance(model, CausalLM) else hidden_TD]

    def given(self, model: AnyModel) -> list[Tensor]:
        """See `expected`."""
        body, ids_T = backbone(model), self.tensors["held_out"][0]
        with torch.inference_mode():
            read = body.hidden if isinstance(body, CausalLM) else body
            hidden_TD: Tensor = read(ids_T, torch.arange(len(ids_T)))
            return [model.logits(hidden_TD) if isinstance(model, CausalLM) else hidden_TD]
