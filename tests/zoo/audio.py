"""Models of transformers that read sound, time series or trajectories."""

from __future__ import annotations

from typing import Any

from tests.zoo.multimodal import LLAMA
from tests.zoo.table import of_transformers
from tests.zoo.text import SEQ2SEQ, SPECIAL, TEXT

SMALL = {k: v for k, v in TEXT.items() if k != "vocab_size"}
WAVES = {
    **SMALL, "conv_dim": [8, 8], "conv_kernel": [8, 4], "conv_stride": [4, 2], "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "vocab_size": 32, "layerdrop": 0.0, "mask_time_prob": 0.0,
    "apply_spec_augment": False,
}  # fmt: skip
XVECTOR = {"tdnn_dim": [16, 16, 24], "tdnn_kernel": [3, 3, 1], "tdnn_dilation": [1, 2, 1], "xvector_output_dim": 12}
SERIES = {
    "prediction_length": 3, "context_length": 6, "lags_sequence": [1, 2], "num_time_features": 2, "d_model": 16,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "layerdrop": 0.0,
    "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
}  # fmt: skip
PATCHES = {"num_input_channels": 3, "context_length": 16, "patch_length": 4, "patch_stride": 4, "d_model": 16}
WHISPER = {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 12, "decoder_start_token_id": 3}

SOUNDS: dict[str, dict[str, Any]] = {
    "ASTForAudioClassification": {**SMALL, "max_length": 32, "num_mel_bins": 16, "patch_size": 8, "time_stride": 8,
                                  "frequency_stride": 8},
    "ClapModel": {
        "text_config": {**TEXT, "num_hidden_layers": 1, "pad_token_id": 1, "projection_dim": 12},
        "audio_config": {
            "window_size": 4, "num_mel_bins": 16, "spec_size": 64, "patch_size": 4, "patch_stride": [4, 4],
            "hidden_size": 16, "projection_dim": 12, "depths": [1, 1], "num_attention_heads": [2, 2],
            "patch_embeds_hidden_size": 8, "num_hidden_layers": 2,
        },
        "projection_dim": 12,
    },
    "Data2VecAudioForCTC": {**WAVES, "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 3},
    "HubertForSequenceClassification": {**WAVES, "classifier_proj_size": 12},
    "MoonshineForConditionalGeneration": {
        "hidden_size": 16, "intermediate_size": 24, "vocab_size": 99, "encoder_num_hidden_layers": 1,
        "decoder_num_hidden_layers": 1, "encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2, **SPECIAL,
        "decoder_start_token_id": 1,
    },
    "Qwen2AudioForConditionalGeneration": {
        "audio_config": {"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24,
                         "d_model": 16, "max_source_positions": 12},
        "text_config": {**LLAMA, "model_type": "qwen2"}, "audio_token_index": 90,
    },
    "SEWForCTC": {**WAVES, "squeeze_factor": 2},
    "SEWDForCTC": {**WAVES, "squeeze_factor": 2, "max_position_embeddings": 64, "position_buckets": 8},
    "Speech2TextForConditionalGeneration": {
        **{k: v for k, v in SEQ2SEQ.items() if k[:6] != "forced"}, "input_feat_per_channel": 8, "conv_channels": 12,
        "num_conv_layers": 2, "conv_kernel_sizes": [5, 5], "max_source_positions": 64,
    },
    "SpeechT5ForSpeechToText": {
        **{k: v for k, v in WAVES.items() if k not in ("layerdrop", "num_hidden_layers", "num_attention_heads")},
        "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
        "num_mel_bins": 8,
    },
    "UniSpeechForCTC": WAVES,
    "VoxtralForConditionalGeneration": {
        "audio_config": {"num_mel_bins": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
                         "hidden_size": 16, "max_source_positions": 12},
        "text_config": LLAMA, "audio_token_id": 90,
    },
    "Wav2Vec2ForCTC": WAVES,
    "Wav2Vec2ForXVector": {**WAVES, **XVECTOR},
    "Wav2Vec2BertForCTC": {
        **SMALL, "vocab_size": 32, "feature_projection_input_dim": 8, "layerdrop": 0.0, "apply_spec_augment": False,
        "conv_depthwise_kernel_size": 3,
    },
    "Wav2Vec2ConformerForCTC": {**WAVES, "conv_depthwise_kernel_size": 3},
    "WavLMForCTC": WAVES,
    "WhisperForConditionalGeneration": WHISPER,
    "WhisperForAudioClassification": {**WHISPER, "classifier_proj_size": 12},
}  # fmt: skip

NUMBERS: dict[str, dict[str, Any]] = {
    "AutoformerForPrediction": {**SERIES, "moving_average": 3, "label_length": 2},
    "DecisionTransformerModel": {"state_dim": 5, "act_dim": 3, "hidden_size": 16, "n_layer": 1, "n_head": 2,
                                 "max_ep_len": 32},
    "InformerForPrediction": {**SERIES, "attention_type": "full", "distil": False},
    "PatchTSMixerForPrediction": {**PATCHES, "num_layers": 1, "prediction_length": 4},
    "PatchTSTForPrediction": {**PATCHES, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 24,
                              "prediction_length": 4, "norm_type": "layernorm"},
    "TimeSeriesTransformerForPrediction": SERIES,
}  # fmt: skip

ARCHITECTURES = [
    *of_transformers("Sound", SOUNDS),
    *of_transformers("Time series and trajectories", NUMBERS),
]
