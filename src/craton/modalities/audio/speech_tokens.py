"""The tokens by which Whisper is told what to do and says when: languages, tasks, times (Radford 2022, figure 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from craton.errors import CheckpointError
from craton.modalities.text import Tokenizer

SECONDS_PER_TIME: Final = 0.02  # between one time token and the next
ENGLISH_VOCABULARY: Final = 51_864  # of the English-only models; one token more is multilingual


@dataclass(frozen=True)
class SpeechTokens:
    """Ids of a speech model's control tokens.

    languages: code -> id, empty for a model of English alone. first_time: the token of 0.00 s; the ones after it go
    on in steps of 0.02 s. suppressed: never written; suppressed_first: not written first.
    """

    start: int
    end: int
    previous: int
    no_speech: int
    no_times: int
    transcribe: int
    translate: int
    languages: Mapping[str, int]
    suppressed: tuple[int, ...]
    suppressed_first: tuple[int, ...]

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        vocab: int,
        *,
        suppressed: Sequence[int] = (),
        suppressed_first: Sequence[int] | None = None,
        multilingual: bool | None = None,
    ) -> SpeechTokens:
        """Find them in a model's tokeniser. Raises CheckpointError where one is not there."""

        def find(*names: str) -> int:
            for name in names:
                found = tokenizer.backend.token_to_id(name)
                if found is not None and found < vocab:
                    return found
            raise CheckpointError(
                f"the tokeniser has no token {names[0]}", remedy="take the tokenizer.json of this very model"
            )

        start, end, translate = find("<|startoftranscript|>"), find("<|endoftext|>"), find("<|translate|>")
        if multilingual is None:
            multilingual = vocab > ENGLISH_VOCABULARY
        # The codes stand between the start of a transcript and the tasks.
        codes = {i: tokenizer.backend.id_to_token(i) for i in range(start + 1, translate)}
        languages = {code[2:-2]: i for i, code in codes.items() if multilingual and code and code.startswith("<|")}
        space = tokenizer.encode(" ", add_special_tokens=False)
        no_times = find("<|notimestamps|>")
        # Control tokens are never text. Those before the first time, without the end.
        control = set(range(min(end + 1, start), no_times)) - {end}
        return cls(
            start=start,
            end=end,
            previous=find("<|startofprev|>"),
            no_speech=find("<|nospeech|>", "<|nocaptions|>"),
            no_times=no_times,
            transcribe=find("<|transcribe|>"),
            translate=translate,
            languages=languages,
            suppressed=tuple(sorted({*suppressed, *control} - {end, no_times})),
            suppressed_first=tuple(suppressed_first) if suppressed_first is not None else (*space, end),
        )

    @property
    def first_time(self) -> int:
        """The token of 0.00 s."""
        return self.no_times + 1

    @cached_property
    def language_of(self) -> Mapping[int, str]:
        """Id -> code."""
        return {i: code for code, i in self.languages.items()}

    def seconds(self, token: int) -> float:
        """The time that a time token says, from the beginning of its window."""
        return (token - self.first_time) * SECONDS_PER_TIME
