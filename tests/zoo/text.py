"""Models of transformers that read text alone."""

from __future__ import annotations

from typing import Any

from tests.zoo.table import of_transformers

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 99,
    **SPECIAL,
}
GROUPED = {**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 99, **SPECIAL}
SEQ2SEQ = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": 99,
    **SPECIAL,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "vocab_size": 99,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
XLM = {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 99, "pad_token_id": 2, "bos_token_id": 0}

ENCODERS: dict[str, dict[str, Any]] = {
    "AlbertForMaskedLM": {**TEXT, "embedding_size": 8},
    "BertForSequenceClassification": TEXT,
    "BertForMultipleChoice": TEXT,
    "BigBirdForMaskedLM": TEXT,
    "CanineForSequenceClassification": {
        k: v for k, v in {**TEXT, "local_transformer_stride": 8, "num_hash_buckets": 32}.items() if k != "vocab_size"
    },
    "ConvBertForMaskedLM": {**TEXT, "embedding_size": 16},
    "DebertaForMaskedLM": {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
    "DebertaV2ForSequenceClassification": {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DistilBertForSequenceClassification": {
        "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": 99, "pad_token_id": 0,
    },
    "ElectraForSequenceClassification": {**TEXT, "embedding_size": 8},
    "ErnieForSequenceClassification": TEXT,
    "EsmForMaskedLM": {**TEXT, "mask_token_id": 3, "position_embedding_type": "rotary"},
    "FlaubertForSequenceClassification": XLM,
    "FNetForSequenceClassification": TEXT,
    "FunnelForSequenceClassification": {
        "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24, "block_sizes": [1, 1], "vocab_size": 99,
        "pad_token_id": 0, "num_decoder_layers": 1,
    },
    "LayoutLMForTokenClassification": TEXT,
    "LiltForTokenClassification": {**TEXT, "hidden_size": 24, "channel_shrink_ratio": 2, "pad_token_id": 1},
    "LongformerForSequenceClassification": {**TEXT, "attention_window": 4, "pad_token_id": 1, "sep_token_id": 3},
    "MegatronBertForSequenceClassification": TEXT,
    "MobileBertForSequenceClassification": {
        **TEXT, "embedding_size": 8, "intra_bottleneck_size": 8, "num_feedforward_networks": 2,
    },
    "ModernBertForSequenceClassification": {**TEXT, "cls_token_id": 1, "sep_token_id": 2},
    "MPNetForSequenceClassification": {**TEXT, "pad_token_id": 1},
    "NystromformerForSequenceClassification": {**TEXT, "num_landmarks": 2, "segment_means_seq_len": 6},
    "PerceiverForMaskedLM": {
        "num_latents": 4, "d_latents": 16, "d_model": 16, "num_self_attends_per_block": 1, "vocab_size": 99,
        "num_self_attention_heads": 2, "num_cross_attention_heads": 2, "max_position_embeddings": 6,
        "qk_channels": 16, "v_channels": 16,
    },
    "ReformerModelWithLMHead": {
        "attention_head_size": 8, "hidden_size": 16, "feed_forward_size": 24, "num_attention_heads": 2,
        "axial_pos_embds": False, "attn_layers": ["local"], "local_attn_chunk_length": 3, "vocab_size": 99,
        "is_decoder": True, "max_position_embeddings": 64, **SPECIAL,
    },
    "RemBertForSequenceClassification": {**TEXT, "input_embedding_size": 8},
    "RobertaForSequenceClassification": {**TEXT, "pad_token_id": 1, "bos_token_id": 0},
    "RobertaPreLayerNormForMaskedLM": {**TEXT, "pad_token_id": 1, "bos_token_id": 0},
    "RoFormerForSequenceClassification": TEXT,
    "SqueezeBertForSequenceClassification": {**TEXT, "embedding_size": 16, "q_groups": 2, "k_groups": 2,
                                             "v_groups": 2, "intermediate_groups": 2},
    "TapasForQuestionAnswering": TEXT,
    "XLMForSequenceClassification": XLM,
    "XLMRobertaForSequenceClassification": {**TEXT, "pad_token_id": 1, "bos_token_id": 0},
    "XLMRobertaXLForSequenceClassification": {**TEXT, "pad_token_id": 1, "bos_token_id": 0},
    "XLNetForSequenceClassification": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "vocab_size": 99},
    "XmodForSequenceClassification": {**TEXT, "default_language": "en_XX", "languages": ["en_XX"], "pad_token_id": 1},
    "YosoForSequenceClassification": {**TEXT, "pad_token_id": 1},
}  # fmt: skip

DECODERS: dict[str, dict[str, Any]] = {
    "ArceeForCausalLM": GROUPED,
    "BioGptForCausalLM": {**TEXT, "pad_token_id": 1, "bos_token_id": 0},
    "BloomForCausalLM": {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 99, **SPECIAL},
    "CodeGenForCausalLM": {**GPT, "n_head": 4, "rotary_dim": 4},
    "CohereForCausalLM": GROUPED,
    "CTRLLMHeadModel": {"n_embd": 16, "n_layer": 2, "n_head": 2, "dff": 24, "vocab_size": 99},
    "DeepseekV2ForCausalLM": {
        **TEXT, "num_key_value_heads": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 12, "first_k_dense_replace": 1,
    },
    "FalconForCausalLM": {**TEXT, "num_attention_heads": 2},
    "FalconMambaForCausalLM": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 99, **SPECIAL},
    "GemmaForCausalLM": {**GROUPED, "head_dim": 8},
    "Gemma2ForCausalLM": {**GROUPED, "head_dim": 8},
    "Gemma3ForCausalLM": {**GROUPED, "head_dim": 8},
    "GlmForCausalLM": {**GROUPED, "head_dim": 8},
    "GPT2LMHeadModel": GPT,
    "GPTBigCodeForCausalLM": GPT,
    "GPTNeoForCausalLM": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 99, **SPECIAL,
                          "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "GPTNeoXForCausalLM": TEXT,
    "GPTJForCausalLM": {**GPT, "rotary_dim": 4},
    "GptOssForCausalLM": {**GROUPED, **EXPERTS, "head_dim": 8},
    "GraniteForCausalLM": GROUPED,
    "GraniteMoeForCausalLM": {**GROUPED, **EXPERTS},
    "HeliumForCausalLM": {**GROUPED, "head_dim": 4},
    "JambaForCausalLM": {
        **GROUPED, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
        "use_mamba_kernels": False, "mamba_d_state": 4,
    },
    "LlamaForCausalLM": GROUPED,
    "LlamaForSequenceClassification": GROUPED,
    "MambaForCausalLM": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 99, **SPECIAL},
    "Mamba2ForCausalLM": {
        "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 99, "num_heads": 4, "head_dim": 8,
        "n_groups": 1, "chunk_size": 4, **SPECIAL,
    },
    "MistralForCausalLM": GROUPED,
    "MixtralForCausalLM": {**GROUPED, **EXPERTS},
    "MptForCausalLM": {"d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 99, "max_seq_len": 32},
    "NemotronForCausalLM": GROUPED,
    "OlmoForCausalLM": GROUPED,
    "Olmo2ForCausalLM": GROUPED,
    "OlmoeForCausalLM": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "OPTForCausalLM": {k: v for k, v in {**TEXT, "ffn_dim": 24, "pad_token_id": 1}.items() if k != "intermediate_size"},
    "PersimmonForCausalLM": TEXT,
    "PhiForCausalLM": GROUPED,
    "Phi3ForCausalLM": GROUPED,
    "PhimoeForCausalLM": {**GROUPED, **EXPERTS},
    "Qwen2ForCausalLM": GROUPED,
    "Qwen2MoeForCausalLM": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
                            "shared_expert_intermediate_size": 20},
    "Qwen3ForCausalLM": {**GROUPED, "head_dim": 8},
    "Qwen3MoeForCausalLM": {**GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                            "moe_intermediate_size": 12},
    "Qwen3NextForCausalLM": {
        **GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 12, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "RecurrentGemmaForCausalLM": {**TEXT, "lru_width": 16, "attention_window_size": 8,
                                  "block_types": ["recurrent", "attention"]},
    "RwkvForCausalLM": {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 99, "intermediate_size": 24,
                        "context_length": 32, **SPECIAL},
    "SmolLM3ForCausalLM": GROUPED,
    "StableLmForCausalLM": GROUPED,
    "Starcoder2ForCausalLM": GROUPED,
    "XGLMForCausalLM": {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2, "vocab_size": 99,
                        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
}  # fmt: skip

TRANSLATORS: dict[str, dict[str, Any]] = {
    "BartForConditionalGeneration": SEQ2SEQ,
    "BartForSequenceClassification": SEQ2SEQ,
    "BlenderbotForConditionalGeneration": SEQ2SEQ,
    "LEDForConditionalGeneration": {**SEQ2SEQ, "attention_window": 4, "max_encoder_position_embeddings": 64},
    "LongT5ForConditionalGeneration": {**T5, "local_radius": 3},
    "M2M100ForConditionalGeneration": SEQ2SEQ,
    "MarianMTModel": {**SEQ2SEQ, "decoder_vocab_size": 99},
    "MBartForConditionalGeneration": SEQ2SEQ,
    "MT5ForConditionalGeneration": T5,
    "MvpForConditionalGeneration": SEQ2SEQ,
    "PegasusForConditionalGeneration": SEQ2SEQ,
    "PLBartForConditionalGeneration": SEQ2SEQ,
    "ProphetNetForConditionalGeneration": {
        "hidden_size": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_encoder_layers": 1,
        "num_decoder_layers": 1, "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2, "vocab_size": 99,
        **SPECIAL,
    },
    "SwitchTransformersForConditionalGeneration": {
        **T5, "num_experts": 2, "num_decoder_layers": 1, "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
    "T5ForConditionalGeneration": T5,
    "T5ForSequenceClassification": T5,
    "UMT5ForConditionalGeneration": T5,
}  # fmt: skip

ARCHITECTURES = [
    *of_transformers("Text encoders", ENCODERS),
    *of_transformers("Text decoders", DECODERS),
    *of_transformers("Text encoder-decoders", TRANSLATORS),
]
