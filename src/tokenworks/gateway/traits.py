"""What kinds of engine there are, as records: which fields each takes, what it can't do.

One record per kind; intake.py, the relay and the documentation read it.
"""

import msgspec


class Traits(msgspec.Struct, frozen=True, kw_only=True):
    """What the gateway must know of an engine before it hands a request over."""

    kind: str
    # Sampling fields beyond OpenAI's that the engine honours; the engine judges their values.
    extra_fields: frozenset[str] = frozenset()
    # Content parts it understands; None: any.
    parts: frozenset[str] | None = None
    # Fields of OpenAI's API it would ignore, and why: refused, unless null or false. With a route
    # before its name, a field of that route only.
    refused: dict[str, str] = {}
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


_LLAMA_FIELDS = frozenset(
    {
        "add_generation_prompt",
        "cache_prompt",
        "chat_template_kwargs",
        "continue_final_message",
        "dry_allowed_length",
        "dry_base",
        "dry_multiplier",
        "dry_penalty_last_n",
        "dry_sequence_breakers",
        "dynatemp_exponent",
        "dynatemp_range",
        "grammar",
        "ignore_eos",
        "min_keep",
        "min_p",
        "mirostat",
        "mirostat_eta",
        "mirostat_tau",
        "n_probs",
        "reasoning_format",
        "repeat_last_n",
        "repeat_penalty",
        "samplers",
        "t_max_predict_ms",
        "timings_per_token",
        "top_k",
        "top_n_sigma",
        "typical_p",
        "xtc_probability",
        "xtc_threshold",
    }
)

# vLLM's and SGLang's extensions, as their API references list them.
_SERVER_FIELDS = frozenset(
    {
        "add_special_tokens",
        "allowed_token_ids",
        "bad_words",
        "cache_salt",
        "custom_logit_processor",
        "documents",
        "ebnf",
        "guided_choice",
        "guided_decoding_backend",
        "guided_grammar",
        "guided_json",
        "guided_regex",
        "guided_whitespace_pattern",
        "include_reasoning",
        "include_stop_str_in_output",
        "kv_transfer_params",
        "length_penalty",
        "logits_processors",
        "lora_path",
        "min_tokens",
        "mm_processor_kwargs",
        "no_stop_trim",
        "priority",
        "prompt_embeds",
        "prompt_logprobs",
        "regex",
        "repetition_penalty",
        "request_id",
        "return_hidden_states",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "separate_reasoning",
        "session_params",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop_token_ids",
        "stream_reasoning",
        "structural_tag",
        "structured_outputs",
        "truncate_prompt_tokens",
        "use_beam_search",
        "vllm_xargs",
    }
)

_KEEPS_NOTHING = "this gateway keeps no answers; leave it out or set it to false"
_TEXT_ONLY = "the engine reads and writes text only"

EMBEDDED = Traits(
    kind="embedded llama.cpp",
    extra_fields=_LLAMA_FIELDS,
    parts=frozenset({"text", "refusal"}),
    refused={
        "audio": _TEXT_ONLY,
        "background": "the engine answers in the foreground only",
        "best_of": "the engine does not rank candidates; use n",
        "conversation": _KEEPS_NOTHING,
        "dimensions": "the engine returns its vectors whole",
        "max_tool_calls": "the engine calls no built-in tools",
        "previous_response_id": _KEEPS_NOTHING,
        "responses.prompt": "the gateway keeps no prompt templates",
        "reasoning_effort": "the model does not reason in a channel of its own",
        "store": _KEEPS_NOTHING,
        "suffix": "the engine writes on from a prompt only",
        "verbosity": "the model has no such setting; say it in the prompt",
        "web_search_options": "the engine cannot search",
    },
    stops_streams_only=True,
    usage_per_choice=True,
    chat_logprobs=True,
    developer_is_system=True,
    # llama.cpp's HTTP server gives each open connection a thread, so an idle one would hold a
    # place that a request needs.
    reuse_connections=False,
)

REMOTE = Traits(kind="OpenAI-compatible", extra_fields=_LLAMA_FIELDS | _SERVER_FIELDS)
