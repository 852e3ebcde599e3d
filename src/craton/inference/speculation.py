"""Speculative decoding: several tokens of an answer checked in one pass of the model, for the same text.

Guessed tokens go through the model behind the last chosen one. From each row's logits the answer's own sampler then
chooses as it always does, with its own random state, penalties and form; while its choice is the guessed token, the
next row is right as well, and at the first difference the rest is dropped. So each token comes from the model's own
distribution given those before it, and a seed gives the text that it gives without speculation. For a guess without a
distribution of its own, Leviathan's rule (arXiv 2211.17192) accepts with the same probability.
"""

from __future__ import annotations

# The longest guess. Its rows cost a quarter of a pass each, so that three right of nine pay.
MOST = 8

# What one more row costs beside the first, in passes over one row (docs/log.md).
ROW_PRICE = 0.25

# Wrong guesses may cost an answer so much of its time, and this many steps on top (the first guess must be paid).
SHARE_AT_RISK, STEPS_AT_RISK = 0.03, 1.0

# What right guesses have earned is kept up to here: text that stops repeating itself soon stops being guessed at.
MOST_EARNED = 3.0


class Pace:
    """How many tokens of one answer to guess at. Keeps an account in steps of the model: a guessed token costs the row
    that checks it, an accepted one earns the step that it saves, and each step pays a small share in. What is not in
    the account is not spent, so text without repeats is hardly slower for it. Counts alone decide, never the clock."""

    def __init__(self) -> None:
        self._account, self._length, self._price = STEPS_AT_RISK, MOST // 2, ROW_PRICE

    def length(self, writing: int, price: float) -> int:
        """How many tokens to guess now. writing: of how many answers the pass takes a token. price: of a guess."""
        # A pass over many answers costs more, and each of them has its part of it: a row is dear where rows are many.
        self._price = price + ROW_PRICE * writing / (1 + ROW_PRICE * (writing - 1))
        return max(0, min(self._length, int(self._account / self._price)))

    def settle(self, drafted: int, accepted: int) -> None:
        """Account for a step in which so many tokens were guessed, and so many rightly."""
        self._account = min(self._account + SHARE_AT_RISK + accepted - drafted * self._price, MOST_EARNED)
        if drafted:
            self._length = min(MOST, 2 * drafted) if accepted == drafted else max(2, accepted + 1)
