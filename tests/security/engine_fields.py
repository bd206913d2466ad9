"""Every field of the requests of vLLM and SGLang, and what becomes of it when a client sends it.

Read from vLLM 0.32.0 (`entrypoints/openai/{chat_completion,completion}/protocol.py`, `entrypoints/pooling`) and SGLang
0.5.23 (`srt/entrypoints/openai/protocol.py`): a new version's new fields have to be put into one of these before the
test passes that compares them with what is installed.
"""

from __future__ import annotations

RESERVED = {
    "vllm": "kv_transfer_params ec_transfer_params vllm_xargs request_id stream_interval",
    "sglang": "bootstrap_host bootstrap_port bootstrap_room routed_dp_rank data_parallel_rank disagg_prefill_dp_rank "
    "session_params session_id custom_logit_processor custom_params custom_labels",
}
"""Steers the engine itself: refused, always."""
RISKY = {
    "vllm": "chat_template prompt_embeds media_io_kwargs mm_processor_kwargs guided_decoding_backend mm_payload "
    "return_mm_kwargs",
    "sglang": "chat_template stop_regex input_ids embed_overrides mm_processor_kwargs images_config video_config "
    "return_hidden_states return_routed_experts return_sampling_mask",
}
"""Code, or has stopped engines: refused unless the operator allows it."""
CAPPED = {
    "vllm": "n best_of logprobs top_logprobs prompt_logprobs logit_bias stop stop_token_ids bad_words "
    "allowed_token_ids logprob_token_ids response_format structured_outputs "
    "frequency_penalty presence_penalty repetition_penalty "
    "length_penalty chat_template_kwargs",
    "sglang": "n best_of logprobs top_logprobs logit_bias stop stop_token_ids response_format json_schema regex ebnf "
    "frequency_penalty presence_penalty repetition_penalty chat_template_kwargs",
}
"""Passes up to `caps`."""
READ = {
    "vllm": "model messages prompt input stream stream_options max_tokens max_completion_tokens user priority "
    "cache_salt",
    "sglang": "model messages prompt input stream stream_options max_tokens max_completion_tokens user priority rid "
    "lora_path cache_salt extra_key",
}
"""The gateway reads it, and sets or bounds it: the model, the stream and its usage, output, class, ids, caches."""
PASSED = {
    "vllm": "seed temperature top_p top_k min_p tools tool_choice parallel_tool_calls reasoning_effort "
    "include_reasoning thinking_token_budget use_beam_search watermarking "
    "include_stop_str_in_output ignore_eos min_tokens echo suffix "
    "skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side add_generation_prompt "
    "continue_final_message add_special_tokens documents session_id return_tokens_as_token_ids return_token_ids "
    "routed_experts_prompt_start return_token_offsets return_prompt_text repetition_detection dimensions "
    "encoding_format embed_dtype endianness use_activation padding",
    "sglang": "seed temperature top_p top_k min_p min_tokens tools tool_choice parallel_tool_calls reasoning_effort "
    "thinking task echo suffix no_stop_trim ignore_eos continue_final_message skip_special_tokens separate_reasoning "
    "stream_reasoning max_dynamic_patch min_dynamic_patch use_audio_in_video watermark routed_experts_start_len "
    "return_cached_tokens_details return_spec_tokens_details return_prompt_token_ids return_token_ids return_meta_info "
    "return_input_ids_in_sglext return_output_ids_in_sglext sampling_logprobs_mode encoding_format dimensions "
    "return_flat_raw_output_top_logprobs return_flat_raw_top_logprobs_b64 embed_override_token_id",
}
"""Bounded by what the request may generate and by the size of its body."""
