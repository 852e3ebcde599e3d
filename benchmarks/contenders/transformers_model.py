"""`transformers` as a contender: the model's forward pass in a loop, without what `generate` adds around it."""

from __future__ import annotations

from typing import Any

from contenders.worker import serve


class TransformersModel:
    """A folder in Hugging Face's layout, in fp32 or bf16, with sdpa attention and the default cache."""

    def __init__(self, path: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        self._model = model.eval()
        self.facts: dict[str, Any] = {"setting": {"float32": "fp32", "bfloat16": "bf16"}[dtype]}

    def use_threads(self, threads: int) -> None:
        self._torch.set_num_threads(threads)

    def read(self, prompts: list[list[int]]) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)
        self._length = len(prompts[0])
        self._first = self._next = self._run(self._torch.tensor(prompts))

    def rewind(self) -> None:
        self._cache.crop(self._length - self._cache.get_seq_length())
        self._next = self._first

    def step(self) -> None:
        self._next = self._run(self._next)

    def _run(self, ids: Any) -> Any:
        with self._torch.inference_mode():
            out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1:].argmax(-1)


if __name__ == "__main__":
    serve(TransformersModel)
