"""Why `receptance serve` does not pass tests of llama.cpp that llama-server passes.

The names are those of files, or of functions in files.
"""

from __future__ import annotations

_FORM = "a path or a form of answer that is llama.cpp's own"
_CONTEXT = "there is no length of context that could be exceeded, shifted or told"
_TEMPLATES = "conversations have the templates of RWKV, and others cannot be handed in"
_DURATIONS = "answers tell no durations and no progress; /metrics has distributions of times"
_ORIGINS = "pages of other origins may not ask unless --origins names them"
_SAMPLER = "a sampler or a grammar of llama.cpp"
_IMAGES = "images are refused with 400, as what a client gets wrong, and llama-server says 500"
_PROGRAM = "a function of the program beside the model"

REASONS = {
    "test_mcp_servers": _PROGRAM + ": it starts programs that offer tools",
    "test_tools_builtin": _PROGRAM + ": it reads and writes files and runs commands for a model",
    "test_proxy": _PROGRAM + ": it forwards requests to other servers",
    "test_router": _PROGRAM + ": it starts without a model and manages downloads",
    "test_stream": _PROGRAM + ": it keeps streams that a client has left",
    "test_sleep": _PROGRAM + ": it unloads a model that nobody asks; here that is asked for",
    "test_speculative": "drafts of a second model",
    "test_rerank": "rerankers are models of another kind",
    "test_infill": "no RWKV is trained to fill gaps",
    "test_lora": "adapters are chosen as models, and have no scale",
    "test_slot_save": "states are saved under names at /v1/states, and slots have no numbers",
    "test_template": _TEMPLATES,
    "test_tool_call": _TEMPLATES,
    "test_kv_keep_only_active": "lines of llama-server's log",
    "test_compat_gcp": _FORM,
    "test_ctx_shift": _CONTEXT,
    "test_basic::test_server_multiple_addresses": "a server listens at one address",
    "test_basic::test_server_props": _CONTEXT,
    "test_basic::test_server_slots": _CONTEXT,
    "test_basic::test_no_ui": "the page to chat is always there",
    "test_basic::test_server_model_aliases_and_tags": "a model has one name and no tags",
    "test_chat_completion::test_chat_template": _TEMPLATES,
    "test_chat_completion::test_chat_template_assistant_prefill": _TEMPLATES,
    "test_chat_completion::test_chat_template_continue_final_message_vllm_compat": _TEMPLATES,
    "test_chat_completion::test_chat_template_continue_final_message_mutual_exclusion": _TEMPLATES,
    "test_chat_completion::test_apply_chat_template": _TEMPLATES,
    "test_compat_anthropic::test_anthropic_thinking_history_in_template": _TEMPLATES,
    "test_compat_anthropic::test_anthropic_thinking_history_in_count_tokens": (
        "thoughts of earlier answers are left out of a prompt, as the models were trained"
    ),
    "test_chat_completion::test_completion_with_grammar": _SAMPLER,
    "test_completion::test_n_probs_post_sampling": _SAMPLER,
    "test_completion::test_n_probs_post_backend_sampling": _SAMPLER,
    "test_ignore_eos::test_ignore_eos_populates_logit_bias": (
        "the end of text is passed over where it comes, and not by a bias"
    ),
    "test_chat_completion::test_invalid_chat_completion_req": (
        "one speaker may say two things after one another"
    ),
    "test_chat_completion::test_chat_completion_with_timings_per_token": _DURATIONS,
    "test_compat_oai_responses::test_responses_stream_with_llama_telemetry": _DURATIONS,
    "test_chat_completion::test_return_progress": _DURATIONS,
    "test_metrics": "the metrics have names of their own. " + _DURATIONS,
    "test_chat_completion::test_logprobs": (
        "the space that the template has before an answer is no part of it, but of its first token"
    ),
    "test_chat_completion::test_logprobs_stream": "the same",
    "test_chat_completion::test_context_size_exceeded": _CONTEXT,
    "test_chat_completion::test_context_size_exceeded_stream": _CONTEXT,
    "test_completion::test_nocache_long_input_prompt": _CONTEXT,
    "test_embedding::test_embedding_error_prompt_too_long": _CONTEXT,
    "test_chat_completion::test_verbose_debug": "a prompt is not told back",
    "test_compat_anthropic::test_anthropic_tool_result_with_image": _IMAGES,
    "test_compat_anthropic::test_anthropic_vision_format_accepted": _IMAGES,
    "test_compat_anthropic::test_anthropic_empty_messages": (
        "a conversation without messages is refused, as Anthropic does"
    ),
    "test_embedding::test_embedding_pooling_none": "a vector for each token is not told",
    "test_embedding::test_embedding_pooling_none_oai": "a vector for each token is not told",
    "test_security::test_access_static_assets_without_api_key": "files of llama.cpp's page",
    "test_security::test_cors_options": _ORIGINS,
    "test_security::test_cors_origins_localhost_reflects": _ORIGINS,
    "test_security::test_cors_origins_localhost_rejects": _ORIGINS,
    "test_security::test_cors_origins_defaults_to_localhost_with_tools_enabled": _ORIGINS,
    "test_security::test_cors_proxy_only_forwards_explicit_proxy_headers": _PROGRAM,
}
"""The reason for each file, or for each function of one."""


def reason(test: str) -> str | None:
    """Why a test, as in "file::function[parameters]", is an exception; None if it should pass."""
    file, _, function = test.partition("::")
    return REASONS.get(f"{file}::{function.partition('[')[0]}", REASONS.get(file))
