"""Functions that a model may call: whether its template shows them, and the grammar of a call that must be made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from craton.inference.constraints import JSON_STYLE
from craton.modalities.text import Tokenizer
from craton.serving.errors import ApiError
from craton.serving.parsing import CALL, CALL_END

# More calls at once than an agent can want; without a limit a model may repeat itself until its room ends.
MOST_CALLS = 16


def template_source(tokenizer: Tokenizer, *, tools: bool) -> str:
    """The chat template that would be used; "" where there is none."""
    plain = tokenizer.chat_template or ""
    return tokenizer.chat_templates.get("tool_use", plain) if tools else plain


def check_shown(tokenizer: Tokenizer, model: str) -> None:
    """Raises ApiError for a model whose template leaves tools out: it would never hear of them."""
    if "tools" not in template_source(tokenizer, tools=True):
        raise ApiError(400, f"the chat template of {model} does not show tools to the model", param="tools")


def writes_tags(tokenizer: Tokenizer) -> bool:
    """Whether the model's own format of a call is Qwen's and Hermes'. As a special token the tag would not be seen."""
    special = {tokenizer.backend.id_to_token(i) for i in tokenizer.special_ids}
    return CALL in template_source(tokenizer, tools=True) and CALL not in special


def call_grammar(tools: Sequence[Mapping[str, Any]], *, tags: bool, several: bool) -> str:
    """llguidance's grammar of calls of these functions (OpenAI's form); without tags, of one call."""
    rules, names = [], []
    for number, tool in enumerate(tools):
        function = tool["function"]
        schema = {"type": "object", **(function.get("parameters") or {}), "x-guidance": JSON_STYLE}
        head = json.dumps(f'{{"name": {json.dumps(function["name"])}, "arguments": ')
        rules.append(f'call_{number}: {head} arguments_{number} "}}"')
        rules.append(f"arguments_{number}: %json {json.dumps(schema)}")
        names.append(f"call_{number}")
    one = f"({' | '.join(names)})"
    if not tags:
        return "\n".join([f"start: {one}", *rules])
    more = f' ("\\n" call){{0,{MOST_CALLS - 1}}}' if several else ""
    tagged = f"call: {json.dumps(CALL + chr(10))} {one} {json.dumps(chr(10) + CALL_END)}"
    return "\n".join([f"start: call{more}", tagged, *rules])
