"""Tokens and their log-probabilities as OpenAI writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from craton.inference.engine import Token
from craton.modalities.text import Tokenizer


def chat_logprobs(tokens: Sequence[Token], tokenizer: Tokenizer, top: int) -> dict[str, Any]:
    """The `logprobs` of a chat's choice: for each token its log-probability and the `top` likeliest."""
    content = [
        {**_entry(token.id, token.logprob or 0.0, tokenizer), "top_logprobs": _top(token, tokenizer, top)}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def token_name(token: int, tokenizer: Tokenizer) -> str:
    """A token as text; one that is only a part of a character is named by its bytes, so no two share a name."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def named_logprobs(pairs: Sequence[tuple[int, float]], tokenizer: Tokenizer) -> dict[str, float]:
    """{token: log-probability}; where two tokens have one text, the likelier one stands for it."""
    named: dict[str, float] = {}
    for token, logprob in pairs:
        name = token_name(token, tokenizer)
        named[name] = max(logprob, named.get(name, logprob))
    return named


def _top(token: Token, tokenizer: Tokenizer, top: int) -> list[dict[str, Any]]:
    return [_entry(i, logprob, tokenizer) for i, logprob in (token.top_logprobs or [])[:top]]


def _entry(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    # JSON has no infinity; a masked token's is written as the lowest number that clients print.
    name = token_name(token, tokenizer)
    return {"token": name, "logprob": max(logprob, -9999.0), "bytes": list(tokenizer.token_bytes(token))}
