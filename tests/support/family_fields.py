"""What a configuration needs beyond the sizes of `family_sizes`, by the model type of the part.

`PARTS` are fields of one part wherever it stands; `WITHIN` are fields of a part within one whole.
"""

from typing import Any

from family_sizes import EXPERTS, HEAD, LAYERS, TOP_K, WIDTH

SLIDING = ["sliding_attention", "full_attention"] * 2
ONE_DENSE = ["dense", "sparse", "sparse", "sparse"]
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
BLOCK_INDEXED = {
    "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
    "mlp_layer_types": ONE_DENSE,
    "index_n_heads": 2,
    "index_block_size": 2,
    "index_topk_blocks": 2,
}
GEMMA = {
    "enable_moe_block": True,
    "attention_k_eq_v": True,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "layer_types": SLIDING,
}
DOTS3_NOTE = {
    **HEADS,
    "head_dim": HEAD,
    "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
QWEN4_EXP = {
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
    "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0, "mrope_section": [3, 3, 2]},
    "indexer_n_heads": 8,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
    "ple_layer_ids": [1],
    "ple_embed_dim": 32,
    "ngram_vocab_size_base": 500,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 1,
}
NEMOTRON_H = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    "moe_latent_size": 32,
}

PARTS: dict[str, dict[str, Any]] = {
    "axk2": {"gated_norm_rank": 8},
    "dbrx": {"d_model": WIDTH, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 512},
    "deepseek_ocr2_text": {
        **HEADS,
        "mlp_layer_types": ONE_DENSE,
        "topk_method": "group_limited_greedy",
    },
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
        "o_lora_rank": 16,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
    },
    "cohere2_moe": {"logit_scale": 1.0},
    # Its experts are rows of an embedding, picked by a product of two keys: a square number.
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},
    "dots1": {"layer_types": SLIDING},
    "dots3_note_text": DOTS3_NOTE,
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse"]},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 32],
        "rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]},
    },
    "exaone_moe": {"layer_types": SLIDING},
    "gemma4_text": GEMMA,
    "glm4v_moe_text": {
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
    },
    "glm5_next_text": {"index_kpool": 2, "qk_rope_head_dim": 0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_moe": {"rope_parameters": ROPE},
    "hy_v4": {"indexer_types": ["full", "shared", "full", "shared"]},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
    },
    "laguna": {"layer_types": SLIDING, "num_attention_heads_per_layer": [4, 8, 4, 8]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_vision_model": {
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "vision_output_dim": 32,
    },
    "longcat_flash": {
        "num_layers": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "zero_expert_num": 2,
    },
    "mellum": {"layer_types": SLIDING},
    "minimax_m3_vl_text": BLOCK_INDEXED,
    "mistral_large4_text": {
        "indexer_types": ["full", "full", "shared", "full"],
        "kv_source_layers": [0, 1, 1, 3],
    },
    "muse_spark_audio": {
        "num_hidden_layers": 1,
        "patch_sizes": [4],
        "hidden_sizes": [16],
        "depths": [1],
    },
    "muse_spark_text": {"moe_hidden_size": 32, "output_multiplier": 1.0},
    "nemotron_h": NEMOTRON_H,
    "qwen2_moe": {"use_sliding_window": True, "layer_types": SLIDING},
    # With a window, stock's cache forgets what its mask still shows.
    "qwen3_omni_moe_text": {"sliding_window": None},
    "qwen3_vl_moe_text": {"sliding_window": None},
    "qwen4_exp_text": QWEN4_EXP,
    "radio": {"video_temporal_patch_size": 2},
    "step3p5": {
        "layer_types": SLIDING,
        "mlp_layer_types": ONE_DENSE,
        "share_expert_dim": 32,
        "num_sliding_attention_heads": 8,
    },
    # It sees its whole prompt, and that many of the tokens that come after.
    "unlimited_ocr_text": {**HEADS, "sliding_window": 8},
    "zaya": {
        "num_experts_per_tok": 1,  # the only number that it takes
        "layer_types": ["hybrid", "hybrid_sliding"] * 2,
        "router_hidden_size": 16,
    },
}

WITHIN: dict[str, dict[str, Any]] = {
    "dbrx:attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
    "dbrx:ffn_config": {
        "hidden_size": WIDTH,
        "ffn_hidden_size": 32,
        "moe_num_experts": EXPERTS,
        "moe_top_k": TOP_K,
    },
    # Fewer layers would need scipy; its widths follow from the patch alone.
    "inkling_mm_model:vision_config": {"n_layers": 3, "patch_size": 2},
}
