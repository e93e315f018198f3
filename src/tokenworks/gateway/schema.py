"""The requests of the OpenAI API as types: which fields there are, what each may hold.

The decoder is generated from these types, so a field is stated once. Unknown fields are refused
rather than dropped: a setting that silently does nothing is worse than an error. Bounds are those
of OpenAI's API reference; a field whose content only the engine can judge is `Any`.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Name = Annotated[str, Meta(min_length=1, max_length=512)]
Tokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Choices = Annotated[int, Meta(ge=1, le=128)]
Bias = dict[str, Annotated[float, Meta(ge=-100, le=100)]]
StopText = Annotated[str, Meta(min_length=1)]
Stop = StopText | Annotated[list[StopText], Meta(max_length=16)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Meta(min_length=1)]
Prompt = str | Annotated[list[str | TokenIds | TokenId], Meta(min_length=1)]
# OpenAI's tiers and Groq's; intake.py says which class each stands for.
Tier = Literal["auto", "default", "on_demand", "flex", "performance", "priority", "scale"]


class _Strict(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A record of the API in which an unknown field is an error. It holds no cycles."""


class StreamOptions(_Strict):
    """`stream_options`: what a stream carries besides its text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class FunctionCall(_Strict):
    """What the model called: a name and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(_Strict):
    """One call in an assistant's message of the history."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | None = None


class Part(_Strict):
    """One part of a multi-part content; `type` says which of the others it has."""

    type: Annotated[str, Meta(min_length=1)]
    text: str | None = None
    refusal: str | None = None
    image_url: Any = None
    input_audio: Any = None
    video_url: Any = None
    audio_url: Any = None
    file: Any = None
    cache_control: Any = None


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # What clients send back unchanged from an earlier answer.
    refusal: str | None = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    reasoning: Any = None
    reasoning_content: Any = None


class Function(_Strict):
    """A function the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    """One entry of `tools`."""

    type: Literal["function"]
    function: Function


class _NamedFunction(_Strict):
    name: str


class NamedTool(_Strict):
    """A `tool_choice` that names the function to call."""

    type: Literal["function"]
    function: _NamedFunction


class JsonSchema(_Strict, rename={"schema_": "schema"}):
    """The schema of a structured answer."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    schema_: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Strict):
    """`response_format`; `json_schema` goes with the type of that name."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class _Sampling(_Strict, kw_only=True):
    """What all text generation has in common."""

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    n: Choices | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Bias | None = None
    user: str | None = None


class ChatRequest(_Sampling, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    service_tier: Tier | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: Any = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None


class CompletionRequest(_Sampling, kw_only=True):
    """POST /v1/completions."""

    prompt: Prompt
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Choices | None = None
    service_tier: Tier | None = None


class EmbeddingRequest(_Strict, kw_only=True):
    """POST /v1/embeddings."""

    model: Name
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Tokens | None = None
    user: str | None = None


class ResponsesRequest(_Strict, kw_only=True):
    """POST /v1/responses. The engine judges the items; the gateway only what it must know."""

    model: Name
    input: str | Annotated[list[dict[str, Any]], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: Any = None
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Tokens | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Tier | None = None
    store: bool | None = None
    background: bool | None = None
    conversation: Any = None
    previous_response_id: str | None = None
    prompt: Any = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    user: str | None = None


Request = ChatRequest | CompletionRequest | EmbeddingRequest | ResponsesRequest
