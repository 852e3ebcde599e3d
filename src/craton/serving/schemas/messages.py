"""`/v1/messages`: https://docs.anthropic.com/en/api/messages"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from craton.serving.schemas.chat import FunctionName
from craton.serving.schemas.common import Body, Count, JsonObject, Name, Stop, TopP


class CacheControl(Body):
    """A mark where a prompt may be cached. Every beginning that prompts share is, with it or without."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Body):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: None = None


class ImageBytes(Body):
    """A picture's file in base64."""

    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: Annotated[str, Field(min_length=1)]


class ImageAddress(Body):
    """Where a picture is, for servers that fetch them."""

    type: Literal["url"]
    url: Annotated[str, Field(min_length=1)]


class ImageBlock(Body):
    """A picture."""

    type: Literal["image"]
    source: Annotated[ImageBytes | ImageAddress, Field(discriminator="type")]
    cache_control: CacheControl | None = None


class ThinkingBlock(Body):
    """Reasoning that the model wrote before."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class ToolUseBlock(Body):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: Annotated[str, Field(max_length=256)]
    name: FunctionName
    input: JsonObject
    cache_control: CacheControl | None = None


class ToolResultBlock(Body):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(max_length=256)]
    content: str | list[TextBlock] = ""
    is_error: bool | None = None
    cache_control: CacheControl | None = None


UserBlock = Annotated[TextBlock | ImageBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]


class UserTurn(Body):
    """What the user says, and what called functions gave."""

    role: Literal["user"]
    content: str | Annotated[list[UserBlock], Field(min_length=1)]


class AssistantTurn(Body):
    """What the model said."""

    role: Literal["assistant"]
    content: str | list[AssistantBlock]


Turn = Annotated[UserTurn | AssistantTurn, Field(discriminator="role")]


class ToolDefinition(Body):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    input_schema: JsonObject
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None


class AutoChoice(Body):
    """The model decides."""

    type: Literal["auto"]
    disable_parallel_tool_use: bool | None = None


class AnyChoice(Body):
    """Some function must be called."""

    type: Literal["any"]
    disable_parallel_tool_use: bool | None = None


class ToolChoice(Body):
    """This function must be called."""

    type: Literal["tool"]
    name: FunctionName
    disable_parallel_tool_use: bool | None = None


class NoChoice(Body):
    """No function may be called."""

    type: Literal["none"]


class JsonSchemaOutput(Body):
    """JSON by a schema."""

    type: Literal["json_schema"]
    schema_: JsonObject = Field(alias="schema")


class OutputConfig(Body):
    """The form of the answer."""

    format: JsonSchemaOutput | None = None


class Thinking(Body):
    """Whether the model reasons before it answers, where its template can tell it."""

    type: Literal["adaptive", "disabled"]


class Metadata(Body):
    """Who asks, in the client's words."""

    user_id: Annotated[str, Field(max_length=256)] | None = None


class ConversationFields(Body):
    """What a conversation is made of."""

    model: Name
    messages: Annotated[list[Turn], Field(min_length=1, max_length=4096)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[ToolDefinition], Field(max_length=128)] | None = None
    tool_choice: Annotated[AutoChoice | AnyChoice | ToolChoice | NoChoice, Field(discriminator="type")] | None = None
    thinking: Thinking | None = None


class MessagesRequest(ConversationFields):
    """A conversation to be continued."""

    max_tokens: Count
    stream: bool | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    top_p: TopP | None = None
    output_config: OutputConfig | None = None
    metadata: Metadata | None = None


class CountTokensRequest(ConversationFields):
    """A conversation whose tokens are counted."""
