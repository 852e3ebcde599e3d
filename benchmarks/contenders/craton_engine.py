"""Craton as a contender: its Python API and its engine, as a user has them, the choice of tokens and text included."""

from __future__ import annotations

from typing import Any

from contenders.worker import serve

MOST_SEQUENCES = 16  # of a batch; the engine of `craton.load` runs fewer at once


class CratonEngine:
    """A GGUF file in Craton's engine."""

    def __init__(self, path: str, threads: int) -> None:
        from craton.checkpoints.gguf import GGUFFile

        self._path = path
        self._load(threads)
        attentions = [layer.attention for layer in self._model.module.config.trunk.layers]
        sizes = [a.kv_heads * (a.head_size + (a.value_size or a.head_size)) for a in attentions]
        with GGUFFile.open(path) as file:
            weight_bytes = sum(tensor.nbytes for tensor in file.tensors.values())
        self.facts: dict[str, Any] = {
            "setting": self._model.plan.kernel,
            "weight_bytes": weight_bytes,
            "cache_bytes_per_token": sum(sizes) * self._model.engine.cache.keys[0].dtype.itemsize,
        }

    def _load(self, threads: int) -> None:
        import craton

        self._threads = threads
        self._generations: list[Any] = []
        # A step is a token: what guessing ahead gains is benchmarks/speculation.py's to say.
        self._model = craton.load(self._path, threads=threads, speculate="off", slots=MOST_SEQUENCES)
        self._model.tokenizer.eos_ids = ()  # no answer ends before it is told to

    def use_threads(self, threads: int) -> None:
        if threads != self._threads:
            del self._model
            self._load(threads)

    def read(self, prompts: list[list[int]]) -> None:
        self._prompts = prompts
        self.rewind()

    def rewind(self) -> None:
        # The engine finds a prompt that it has read before in its cache; a new one is read in whole.
        from craton.inference.engine import Request

        for generation in self._generations:
            generation.cancel()
        self._generations = [self._model.engine.submit(Request(prompt)) for prompt in self._prompts]
        while not all(generation.tokens for generation in self._generations):
            self._model.engine.step()

    def step(self) -> None:
        self._model.engine.step()


if __name__ == "__main__":
    serve(CratonEngine)
