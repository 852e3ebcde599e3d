"""The models that the training benchmarks start from, written once for all contenders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from craton.checkpoints.families.llama import LLAMA
from craton.checkpoints.save import save_checkpoint
from craton.models import CausalLM, CausalLMConfig
from craton.models.initialisation import initialise
from craton.pretraining.architecture import causal_config
from craton.pretraining.sizing import Shape, SizePlan
from craton.training.flops import token_flops

SEED = 0  # of the weights and of the order of the data


@dataclass(frozen=True)
class Job:
    """Pretraining steps: a Llama with a tied head, and what one step reads."""

    shape: Shape
    vocab: int
    batch: int  # windows a step
    length: int  # tokens of a window

    @property
    def step_tokens(self) -> int:
        """Tokens that a step reads."""
        return self.batch * self.length

    @property
    def config(self) -> CausalLMConfig:
        """The model as `craton pretrain` makes one of this shape."""
        parameters = self.shape.parameters(self.vocab)
        plan = SizePlan(
            **self.shape.model_dump(),
            dial=parameters,
            parameters=parameters,
            tokens=self.step_tokens,
            batch_tokens=self.step_tokens,
            learning_rate=1e-4,
            decisions=(),
        )
        return causal_config(plan, self.vocab, self.length)

    @property
    def flops(self) -> float:
        """FLOPs of training on one token."""
        with torch.device("meta"):
            return token_flops(CausalLM(self.config), self.length).training


def write_fresh(config: CausalLMConfig, folder: Path) -> Path:
    """A fresh model in Hugging Face's layout, in fp32."""
    model = CausalLM(config)
    initialise(model, SEED)
    return save_checkpoint(model, LLAMA, folder)
