"""What kinds of engine there are, as records: which fields each takes, what it can't do, how it is
asked how it fares, how a partial answer is carried on.

One record per kind; intake.py, adapter.py, telemetry.py, the relay and docs/adapters.md read it.
Where each fact was looked up: docs/adapters.md.
"""

from typing import Final, Literal

import msgspec


class Gauges(msgspec.Struct, frozen=True, kw_only=True):
    """Where an engine tells its load, and under which names; the first name found counts.

    Names are written with underscores: a colon in a metric's name is taken for one.
    """

    paths: tuple[str, ...] = ()  # tried in order
    running: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    kv: tuple[str, ...] = ()  # the share of the KV cache in use, 0 to 1
    # Whether the first of these counts the second too.
    running_has_waiting: bool = False
    # JSON with a record for each slot (llama.cpp), where the metrics don't tell the cache's use.
    slots: str = ""


class Priority(msgspec.Struct, frozen=True, kw_only=True):
    """How a request says how urgent it is."""

    field: str  # a dot leads into an object
    low_first: bool
    is_share: bool = False  # a number from 0 to 1, and not an integer
    needs: str  # what the engine must be started with; without it the field is an error or ignored


class Continuation(msgspec.Struct, frozen=True, kw_only=True):
    """How a chat answer is carried on: its text so far goes last, as the assistant's message."""

    # Whether continue_final_message is sent, so that the message is left open.
    by_flag: bool = False
    # Whether any assistant's message at the end is left open, asked or not.
    always: bool = False


class Traits(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What the gateway must know of an engine before it hands a request over.

    A record equals itself only, so that what is worked out from it can be kept by it.
    """

    kind: str  # as the fleet file says it
    title: str  # as a person says it
    # Sampling fields beyond OpenAI's that the engine honours; the engine judges their values.
    extra_fields: frozenset[str] = frozenset()
    # Whether it answers 400 to a field it doesn't know, also where that is null.
    is_strict: bool = False
    # Content parts it understands; None: any.
    parts: frozenset[str] | None = None
    # Fields of OpenAI's API it would ignore, and why: refused, unless null or false. With a route
    # before its name, a field of that route only.
    refused: dict[str, str] = {}
    # Fields that are taken off the request with a warning: the answer is the same without them.
    # "a.b" is b in the object a, "a[].b" is b in each record of the list a.
    dropped: frozenset[str] = frozenset()
    # The most a field may be, or the most entries its list may have.
    at_most: dict[str, int] = {}
    # Whether its chat template knows tools; if not, calls are made to hold by a JSON schema.
    native_tools: bool = True
    # Whether it stops working for a client that has left only when it next writes to it: then it is
    # always asked for a stream, and to write while it reads the prompt (llama.cpp).
    stops_streams_only: bool = False
    # Whether it reports usage for each choice or prompt, and not their sum.
    usage_per_choice: bool = False
    # Whether its /v1/completions answers logprobs in the chat API's form.
    chat_logprobs: bool = False
    # Whether a role "developer" must be told to it as "system".
    developer_is_system: bool = False
    # Routes it does not have, and why.
    absent: dict[str, str] = {}
    # Whether a connection may be kept for the next request.
    reuse_connections: bool = True
    # Where to ask whether it is well: the first path it has. With its key where it has one.
    health: tuple[str, ...] = ("/v1/models",)
    gauges: Gauges = Gauges()
    priority: Priority | None = None
    # Its service_tier for each of our classes; empty: it knows no tiers and is sent none.
    tiers: dict[str, str] = {}
    # None: a chat answer can't be carried on.
    continuation: Continuation | None = None
    # Tokens /v1/completions makes where max_tokens is left out; None: as many as there is room for.
    completion_tokens: int | None = None
    # How the KV cache of a request is taken to another engine of this kind, so that greedy text
    # goes on as if it had not moved: by /slots/N?action=save and restore, or by the request's
    # field kv_transfer_params; "": not at all.
    kv_handover: Literal["", "slots", "kv_transfer_params"] = ""
    # Whether the same request always gets the same answer, however it is sampled.
    repeats: bool = False

    def for_model(self, *, native_tools: bool, is_embedder: bool) -> "Traits":
        """These traits with what depends on the model."""
        if is_embedder:
            reason = "the model makes vectors, not text"
            absent = dict.fromkeys(("chat/completions", "completions", "responses"), reason)
        else:
            absent = {
                "embeddings": "the model writes text; for vectors start the gateway with an "
                "embedding model (tokenworks up --model EMBEDDER.gguf)"
            }
        return msgspec.structs.replace(self, native_tools=native_tools, absent=absent)

    def carried_on_like(self, other: "Traits") -> "Traits":
        """These traits with another kind's way to go on (a pool's `continuation`)."""
        return msgspec.structs.replace(self, continuation=other.continuation)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LLAMA_FIELDS: Final = _words("""
    add_generation_prompt cache_prompt chat_template_kwargs continue_final_message
    dry_allowed_length dry_base dry_multiplier dry_penalty_last_n dry_sequence_breakers
    dynatemp_exponent dynatemp_range grammar ignore_eos min_keep min_p mirostat mirostat_eta
    mirostat_tau n_probs reasoning_format repeat_last_n repeat_penalty samplers t_max_predict_ms
    timings_per_token top_k top_n_sigma typical_p xtc_probability xtc_threshold
""")

# Beyond OpenAI's: what all servers of open models take.
_COMMON: Final = _words("""
    cache_salt chat_template_kwargs ignore_eos min_p min_tokens repetition_penalty
    skip_special_tokens stop_token_ids top_k
""")

_VLLM_FIELDS: Final = _COMMON | _words("""
    add_generation_prompt add_special_tokens allowed_token_ids bad_words continue_final_message
    documents include_reasoning include_stop_str_in_output length_penalty
    mm_processor_kwargs prompt_embeds prompt_logprobs request_id return_token_ids
    return_tokens_as_token_ids spaces_between_special_tokens structured_outputs
    truncate_prompt_tokens use_beam_search vllm_xargs
""")

# add_generation_prompt: it has no such field, but does what continue_final_message implies.
_SGLANG_FIELDS: Final = _COMMON | _words("""
    add_generation_prompt continue_final_message custom_logit_processor ebnf lora_path no_stop_trim
    regex return_hidden_states return_token_ids separate_reasoning session_params stream_reasoning
""")

_TRTLLM_FIELDS: Final = _COMMON | _words("""
    add_generation_prompt add_special_tokens documents include_stop_str_in_output length_penalty
    mm_processor_kwargs spaces_between_special_tokens truncate_prompt_tokens use_beam_search
""")

_DYNAMO_FIELDS: Final = _COMMON | _words("""
    add_generation_prompt allowed_token_ids continue_final_message guided_choice
    guided_decoding_backend guided_grammar guided_json guided_regex guided_whitespace_pattern
    include_stop_str_in_output
""")

# Of earlier versions, or of engines nobody has named: for an engine we know nothing of.
# kv_transfer_params name another engine's address: where several serve, the gateway's to send.
_OTHER_FIELDS: Final = frozenset(
    {"kv_transfer_params", "logits_processors", "priority", "structural_tag"}
)

_KEEPS_NOTHING: Final = "this gateway keeps no answers; leave it out or set it to false"
_TEXT_ONLY: Final = "the engine reads and writes text only"
_NO_SEARCH: Final = "the engine cannot search"
_NO_VERBOSITY: Final = "the model has no such setting; say it in the prompt"
_WRITES_ON: Final = "the engine writes on from a prompt only"

_REFUSED: Final = {
    "conversation": _KEEPS_NOTHING,
    "previous_response_id": _KEEPS_NOTHING,
    "store": _KEEPS_NOTHING,
    "verbosity": _NO_VERBOSITY,
    "web_search_options": _NO_SEARCH,
}
# Labels and hints of OpenAI's: they change when or for whom an answer is made, not the answer.
_LABELS: Final = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "stream_options.include_obfuscation",
    }
)

_LLAMA_REFUSED: Final = _REFUSED | {
    "background": "the engine answers in the foreground only",
    "best_of": "the engine does not rank candidates; use n",
    "dimensions": "the engine returns its vectors whole",
    "echo": "the engine does not repeat the prompt",
    "max_tool_calls": "the engine calls no built-in tools",
    "responses.prompt": "the gateway keeps no prompt templates",
    "suffix": _WRITES_ON,
}
_LLAMA_GAUGES: Final = Gauges(
    paths=("/metrics",),
    running=("llamacpp_requests_processing",),
    waiting=("llamacpp_requests_deferred",),
    kv=("llamacpp_kv_cache_usage_ratio",),  # gone from newer versions: /slots tells it
    slots="/slots",
)

LLAMACPP: Final = Traits(
    kind="llamacpp",
    title="llama.cpp server",
    extra_fields=_LLAMA_FIELDS,
    refused=_LLAMA_REFUSED,
    dropped=_LABELS,
    stops_streams_only=True,
    usage_per_choice=True,
    chat_logprobs=True,
    developer_is_system=True,
    # llama.cpp's HTTP server gives each open connection a thread, so an idle one would hold a
    # place that a request needs.
    reuse_connections=False,
    health=("/health",),
    gauges=_LLAMA_GAUGES,
    continuation=Continuation(by_flag=True, always=True),
    kv_handover="slots",
)

EMBEDDED: Final = msgspec.structs.replace(
    LLAMACPP,
    kind="embedded",
    title="embedded llama.cpp",
    parts=frozenset({"text", "refusal"}),
    refused=_LLAMA_REFUSED
    | {
        "audio": _TEXT_ONLY,
        "reasoning_effort": "the model does not reason in a channel of its own",
    },
)

VLLM: Final = Traits(
    kind="vllm",
    title="vLLM",
    extra_fields=_VLLM_FIELDS,
    refused=_REFUSED | {"suffix": _WRITES_ON},
    dropped=_LABELS,
    at_most={"best_of": 1},
    health=("/health", "/v1/health/ready"),  # the second is NIM's, whose newer ones run vLLM
    gauges=Gauges(
        paths=("/metrics", "/v1/metrics"),
        running=("vllm_num_requests_running",),
        waiting=("vllm_num_requests_waiting",),
        kv=("vllm_kv_cache_usage_perc", "vllm_gpu_cache_usage_perc"),
    ),
    priority=Priority(field="priority", low_first=True, needs="--scheduling-policy priority"),
    continuation=Continuation(by_flag=True),
    completion_tokens=16,
    kv_handover="kv_transfer_params",
)

# Our own machine: what it says is the likeliest token, one conversation at a time.
LPU: Final = Traits(
    kind="lpu",
    title="deterministic machine",
    extra_fields=frozenset({"add_generation_prompt", "continue_final_message"}),
    parts=frozenset({"text"}),
    refused=_REFUSED
    | {
        "audio": _TEXT_ONLY,
        "best_of": "the machine says the likeliest token",
        "echo": "the machine does not repeat the prompt",
        "logit_bias": "the machine says the likeliest token",
        "logprobs": "the machine tells tokens only",
        "response_format": "the machine says the likeliest token",
        "suffix": _WRITES_ON,
        "tools": "the machine writes text only",
    },
    dropped=_LABELS
    | {"temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "user"},
    at_most={"n": 1},
    stops_streams_only=True,
    developer_is_system=True,
    absent=dict.fromkeys(("embeddings", "responses"), "the machine answers prompts only"),
    reuse_connections=False,
    continuation=Continuation(by_flag=True),
)

# Our own emulated engine stands in for a vLLM, but has words only, and its own end of an answer.
EMULATED: Final = msgspec.structs.replace(
    VLLM,
    kind="emulated",
    title="emulated engine",
    refused=VLLM.refused
    | {
        "logprobs": "an emulated engine knows no probabilities",
        "response_format": "an emulated engine says words only",
    },
    at_most={"n": 1, "best_of": 1},
    absent=dict.fromkeys(("embeddings", "responses"), "an emulated engine answers prompts only"),
    completion_tokens=None,
    repeats=True,
)

SGLANG: Final = Traits(
    kind="sglang",
    title="SGLang",
    extra_fields=_SGLANG_FIELDS,
    refused=_REFUSED,
    dropped=_LABELS,
    health=("/health",),
    gauges=Gauges(
        paths=("/metrics",),
        running=("sglang_num_running_reqs",),
        waiting=("sglang_num_queue_reqs",),
        kv=("sglang_token_usage",),
    ),
    priority=Priority(field="priority", low_first=False, needs="--enable-priority-scheduling"),
    continuation=Continuation(by_flag=True),
    completion_tokens=16,
)

TRTLLM: Final = Traits(
    kind="trtllm",
    title="TensorRT-LLM, NIM",
    extra_fields=_TRTLLM_FIELDS,
    is_strict=True,
    refused=_REFUSED | {"audio": _TEXT_ONLY, "suffix": _WRITES_ON},
    dropped=_LABELS | {"modalities"},
    health=("/health", "/v1/health/ready"),
    gauges=Gauges(
        paths=("/prometheus/metrics", "/metrics", "/v1/metrics"),
        running=("trtllm_num_requests_running",),
        waiting=("trtllm_num_requests_waiting",),
        kv=("trtllm_kv_cache_utilization",),
    ),
    priority=Priority(
        field="priority",
        low_first=False,
        is_share=True,
        needs="scheduler_config.waiting_queue_policy: priority",
    ),
)

GROQ: Final = Traits(
    kind="groq",
    title="Groq's cloud",
    extra_fields=frozenset({"include_reasoning", "reasoning_format"}),
    is_strict=True,
    refused=_REFUSED
    | {
        "audio": _TEXT_ONLY,
        "background": "Groq answers in the foreground only",
        "frequency_penalty": "no model of Groq's honours it",
        "logit_bias": "no model of Groq's honours it",
        "logprobs": "no model of Groq's reports them",
        "presence_penalty": "no model of Groq's honours it",
        "top_logprobs": "no model of Groq's reports them",
    },
    dropped=_LABELS
    | {
        "messages[].annotations",
        "messages[].audio",
        "messages[].name",
        "messages[].reasoning_content",
        "messages[].refusal",
        "modalities",
        "stream_options.continuous_usage_stats",
    },
    at_most={"n": 1, "stop": 4},
    absent={"completions": "Groq has the chat API only; use /v1/chat/completions"},
    tiers={
        "realtime": "performance",
        "standard": "on_demand",
        "flex": "flex",
        "batch": "flex",
    },
    continuation=Continuation(always=True),
)

DYNAMO: Final = Traits(
    kind="dynamo",
    title="NVIDIA Dynamo",
    extra_fields=_DYNAMO_FIELDS,
    is_strict=True,
    refused=_REFUSED | {"audio": _TEXT_ONLY},
    dropped=_LABELS,
    health=("/health",),
    gauges=Gauges(
        paths=("/metrics",),
        running=("dynamo_frontend_inflight_requests",),
        waiting=("dynamo_frontend_queued_requests",),
        running_has_waiting=True,
    ),
    priority=Priority(
        field="nvext.agent_hints.priority",
        low_first=False,
        needs="a router queue, and its backend's own priority scheduling",
    ),
    continuation=Continuation(by_flag=True),
)

OPENAI: Final = Traits(
    kind="openai",
    title="OpenAI-compatible",
    extra_fields=(
        _LLAMA_FIELDS
        | _VLLM_FIELDS
        | _SGLANG_FIELDS
        | _TRTLLM_FIELDS
        | _DYNAMO_FIELDS
        | _OTHER_FIELDS
    ),
)
REMOTE: Final = OPENAI

KINDS: Final[dict[str, Traits]] = {
    traits.kind: traits
    for traits in (
        VLLM,
        SGLANG,
        TRTLLM,
        LLAMACPP,
        GROQ,
        DYNAMO,
        OPENAI,
        EMBEDDED,
        EMULATED,
        LPU,
    )
}
