"""What `craton compare` may be told."""

from __future__ import annotations

from typing import Final

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from craton.config import Settings

WAYS: Final = ("zero-shot", "prompt", "retrieval", "lora", "lora+retrieval")
ZERO_SHOT, PROMPT, RETRIEVAL, LORA, LORA_RETRIEVAL = WAYS


class CompareSettings(Settings):
    """A comparison."""

    models: tuple[str, ...] = Field(default=("smollm2-135m-instruct",), description="the models to adapt")
    encoder: str = Field(default="minilm-l6-v2", description="the model that texts are compared by in a search")
    docs: tuple[str, ...] = Field(
        default=(), description="documents to retrieve from (none: the task's; without any, training examples)"
    )
    ways: tuple[str, ...] = Field(default=WAYS, description=f"the ways to compare, of {', '.join(WAYS)}")
    seeds: PositiveInt = Field(default=3, le=20, description="fine-tune so often, each time from another start")
    trials: PositiveInt = Field(default=8, description="candidates that each way may try on the development items")
    minutes: PositiveFloat = Field(default=10.0, description="time that each way may take to be set up, all seeds")
    queries: PositiveFloat = Field(default=10_000.0, description="questions to plan for, where ways tie")
    updates: NonNegativeFloat = Field(default=0.0, description="times that the facts change in that life")
    passages: tuple[PositiveInt, ...] = Field(default=(1, 2, 4), description="numbers of passages to try")
    examples: tuple[PositiveInt, ...] = Field(
        default=(2, 6, 12), description="numbers of retrieved examples to try, where there are no documents"
    )
    learning_rate: PositiveFloat = Field(default=1e-3, description="of the adapters")
    epochs: PositiveFloat = Field(default=3.0, description="passes of the adapters over the training items, at most")
    rank: PositiveInt = Field(default=16, description="of the adapters")
    price_per_hour: PositiveFloat | None = Field(
        default=None, description="what an hour of this machine costs, to show money beside seconds"
    )
    seed: NonNegativeInt = Field(default=0, description="of everything that is drawn")
    threads: PositiveInt | None = Field(default=None, description="CPU threads (none: what this process may use)")
    name: str | None = Field(default=None, description="name of the run and of what --apply publishes (none: the task)")

    @field_validator("models", "docs", "ways", "passages", "examples", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        # On the command line: --models a,b
        if isinstance(value, (list, tuple)):
            return tuple(part for one in value for part in (one.split(",") if isinstance(one, str) else [one]))
        return tuple(value.split(",")) if isinstance(value, str) else value

    @field_validator("ways")
    @classmethod
    def _known(cls, ways: tuple[str, ...]) -> tuple[str, ...]:
        for way in ways:
            if way not in WAYS:
                raise ValueError(f"{way!r} is no way; there are {', '.join(WAYS)}")
        return tuple(dict.fromkeys(ways))
