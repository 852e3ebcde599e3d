"""Forms of answers, compiled beside the engine: a monstrous schema delays only those who also ask for a form."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from craton.inference.constraints import make_constraint
from craton.inference.settings import SamplingSettings
from craton.modalities.text import Tokenizer
from craton.serving.errors import ApiError

# A form too slow by itself is refused sooner (see `grammar_check`): this is also the wait for those before it.
SECONDS = 15.0


class Forms:
    """Compiles one form at a time in a thread of its own. What is compiled stays in the engine's own store of forms."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="craton-forms")

    async def compile(self, settings: SamplingSettings, tokenizer: Tokenizer) -> None:
        """Compile the form that `settings` ask for, if any. Raises UsageError for one that cannot be followed, ApiError
        for one that takes too long."""
        if settings.json_schema is None and settings.regex is None and not settings.choices and not settings.grammar:
            return
        compiling = asyncio.get_running_loop().run_in_executor(self._thread, make_constraint, settings, tokenizer)
        done, _ = await asyncio.wait([compiling], timeout=SECONDS)
        if not done:
            compiling.cancel()
            raise ApiError(400, "the form of the answer is too complex to be compiled in time", code="form_too_complex")
        compiling.result()

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)
