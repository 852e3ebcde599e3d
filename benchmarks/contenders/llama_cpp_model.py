"""llama.cpp through llama-cpp-python as a contender: the C interface's own `llama_decode`, without a sampler."""

from __future__ import annotations

from typing import Any

from contenders.worker import serve

ROOM = 1024  # positions of each sequence
NEXT = 1000  # the token that every step feeds; which one it is does not change the work


class LlamaCppModel:
    """A GGUF file in llama.cpp, with the defaults of its context."""

    def __init__(self, path: str) -> None:
        from llama_cpp import llama_cpp

        self._api = llama_cpp
        self._api.llama_backend_init()
        self._model = self._api.llama_model_load_from_file(path.encode(), self._api.llama_model_default_params())
        if not self._model:
            raise RuntimeError("llama.cpp cannot load the file")
        self._context: Any = None
        self._memory: Any = None
        self._batch: Any = None
        self._sequences = self._threads = 0
        self.facts: dict[str, Any] = {"setting": ""}

    def use_threads(self, threads: int) -> None:
        self._threads = threads
        if self._context:
            self._api.llama_set_n_threads(self._context, threads, threads)

    def read(self, prompts: list[list[int]]) -> None:
        if len(prompts) != self._sequences:
            self._open(len(prompts))
        self._api.llama_memory_clear(self._memory, True)
        self._length = self._written = len(prompts[0])
        self._run([(token, place, s) for s, prompt in enumerate(prompts) for place, token in enumerate(prompt)])

    def rewind(self) -> None:
        for sequence in range(self._sequences):
            self._api.llama_memory_seq_rm(self._memory, sequence, self._length, -1)
        self._written = self._length

    def step(self) -> None:
        self._run([(NEXT, self._written, sequence) for sequence in range(self._sequences)])
        self._written += 1

    def _open(self, sequences: int) -> None:
        if self._context:
            self._api.llama_batch_free(self._batch)
            self._api.llama_free(self._context)
        params = self._api.llama_context_default_params()
        params.n_ctx = params.n_batch = ROOM * sequences
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self._threads
        self._context = self._api.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._sequences = sequences
        self._memory = self._api.llama_get_memory(self._context)
        self._batch = self._api.llama_batch_init(ROOM * sequences, 0, 1)

    def _run(self, rows: list[tuple[int, int, int]]) -> None:
        # rows: (token, position, sequence); logits are asked for the last row of each sequence.
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, place, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, place
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i + 1 == len(rows) or rows[i + 1][2] != sequence
        status = self._api.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode failed with status {status}")
        self._api.llama_get_logits_ith(self._context, -1)  # waits until they are there


if __name__ == "__main__":
    serve(LlamaCppModel)
