"""`/v1/responses`, without state: https://platform.openai.com/docs/api-reference/responses/create"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from craton.serving.schemas.chat import FunctionName, JsonObjectFormat, TextFormat
from craton.serving.schemas.common import Body, Count, JsonObject, Name, Temperature, TopP


class TextItem(Body):
    """A part of a message."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


class ImageItem(Body):
    """A part of a user's message that is a picture. image_url: a data URL, or an address where the server fetches them.
    detail: what is seen of a picture is the model's to say."""

    type: Literal["input_image"]
    image_url: Annotated[str, Field(min_length=1)] | None = None
    file_id: str | None = None
    detail: Literal["auto", "low", "high", "original"] | None = None


class MessageItem(Body):
    """A message, given or written before."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Annotated[TextItem | ImageItem, Field(discriminator="type")]]
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class CallItem(Body):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(max_length=256)]
    name: FunctionName
    arguments: str
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class OutputItem(Body):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(max_length=256)]
    output: str
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


Item = MessageItem | CallItem | OutputItem


class FunctionTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class ChosenFunction(Body):
    """The one function that must be called."""

    type: Literal["function"]
    name: FunctionName


class SchemaFormat(Body):
    """JSON by a schema."""

    type: Literal["json_schema"]
    name: Name
    schema_: JsonObject = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextOptions(Body):
    """The form of the text."""

    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None


class ResponsesRequest(Body):
    """Items to be answered. Nothing is stored: `store` may only be false, and no earlier response can be named."""

    model: Name
    input: str | Annotated[list[Item], Field(min_length=1, max_length=4096)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    stream: bool | None = None
    store: Literal[False] | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
