"""Token ids to text as they come, ending at the first stop string."""

from __future__ import annotations

from craton.modalities.text import Tokenizer


class TextOutput:
    """Decodes a growing answer. Text that might be the beginning of a stop string is held back until that is known."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self._decoder = tokenizer.stream()
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token completes."""
        return self._release(self._decoder.push(token), last=False)

    def finish(self) -> str:
        """What is left when no token follows."""
        return self._release(self._decoder.finish(), last=True)

    def _release(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    # The longest end of `text` that is a beginning of `stop`.
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
