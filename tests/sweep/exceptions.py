"""What the small models of the sweep are made of: generic sizes, and what single classes need beside them."""

from __future__ import annotations

from typing import Any, Final

ANYWHERE: Final = object()
"""The default of a field that differs from layer to layer."""

VOCABULARY, CONTEXT, WINDOW, CHUNK, PADDING = 97, 320, 7, 9, 0

SIZES: dict[str, Any] = {
    # the stream
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_layers": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_chunk_size": CHUNK,
    "window_size": WINDOW,
    "local_attention": 2 * WINDOW,
    "type_vocab_size": 2,
    "embedding_size": 64,
    "word_embed_proj_dim": 48,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "pad_token_id": PADDING,
    "bos_token_id": 1,
    "eos_token_id": None,
    "sep_token_id": 2,
    "cls_token_id": 1,
    "mask_token_id": 3,
    # encoders and decoders in one configuration
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "ffn_dim": 80,
    "d_ff": 80,
    "d_kv": 16,
    "num_heads": 4,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "ffn_hidden_size": 80,
    "expert_ffn_hidden_size": 48,
    # latent attention
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    # what would do nothing at its default size
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 16,
    # states of recurrent layers
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "state_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    # pictures and sounds
    "image_size": 32,
    "patch_size": 4,
    "num_channels": 3,
    "projection_dim": 56,
    "num_mel_bins": 16,
    "max_source_positions": 40,
    "depths": 1,
    "depth": 2,
    "hidden_sizes": 16,
    "embed_dims": 16,
    "neck_hidden_sizes": 16,
    "encoder_hidden_sizes": 16,
    "embed_dim": 24,
    "num_frames": 4,
    "tubelet_size": 2,
    "frames_per_clip": 4,
    "spatial_shape": 32,
    "max_target_positions": CONTEXT,
}
"""Field -> its size; no two axes can be taken for each other where that can be helped."""


class Nested(dict[str, Any]):
    """Settings of a part of a configuration (``text_config`` ...)."""


_ALPHA = {"rope_theta": 10000.0, "rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0}

_CAUSAL = (
    "BertLMHeadModel",
    "BertGenerationDecoder",
    "BigBirdForCausalLM",
    "CamembertForCausalLM",
    "Data2VecTextForCausalLM",
    "ElectraForCausalLM",
    "ErnieForCausalLM",
    "MegatronBertForCausalLM",
    "RemBertForCausalLM",
    "RobertaForCausalLM",
    "RobertaPreLayerNormForCausalLM",
    "RoCBertForCausalLM",
    "RoFormerForCausalLM",
    "XLMRobertaForCausalLM",
    "XLMRobertaXLForCausalLM",
)
"""Encoders that read from left to right only when they are told."""

_HIERA: dict[str, Any] = {
    "hidden_size": 16,
    "embed_dim_per_stage": [16, 32, 48, 64],
    "num_attention_heads_per_stage": [1, 2, 2, 2],
    "blocks_per_stage": [1, 2, 1, 1],
    "window_size_per_stage": [8, 4, 2, 2],
    "global_attention_blocks": [2],
}

_LCNET = Nested(
    out_features=["stage1", "stage2", "stage3", "stage4"],
    stem_channels=[3, 8, 16],
    block_configs=[
        [[3, 16, 16, 1, True]],
        [[3, 16, 24, 2, False]],
        [[3, 24, 32, 2, True], [3, 32, 32, 1, False]],
        [[3, 32, 48, 2, False]],
    ],
)
"""A backbone of PP-OCR whose stages halve both sides of a picture."""

_INTRACLASS = {
    "reduce_channel": [1, 1, 0],
    "return_channel": [1, 1, 0],
    **{
        f"{name}_{ratio}ratio": [
            [size if axis in axes else 1 for axis in "vh"],
            [1, 1],
            [size // 2 if axis in axes else 0 for axis in "vh"],
        ]
        for name, axes in (
            ("vertical_long_to_small_conv", "v"),
            ("horizontal_small_to_long_conv", "h"),
            ("symmetric_conv_long", "vh"),
        )
        for ratio, size in (("long", 7), ("mid", 5), ("short", 3))
    },
}
"""Kernel, stride and padding of the convolutions of a block (PP-OCR)."""

SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for name in _CAUSAL},
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "BloomForCausalLM": {"n_layer": 3},
    "CodeGenForCausalLM": {"rotary_dim": 8},
    "CohereForCausalLM": {"logit_scale": 1.0},
    "CohereCompassForCausalLM": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "CpmAntForCausalLM": {"dim_ff": 80, "dim_head": 16, "prompt_length": 4},
    "DbrxForCausalLM": {
        "max_seq_len": CONTEXT,
        "attn_config": Nested(rope_theta=10000.0, kv_n_heads=2, clip_qkv=8.0),
        "ffn_config": Nested(ffn_hidden_size=80, hidden_size=64, moe_top_k=2),
    },
    "DeepseekV2ForCausalLM": {
        "num_experts_per_tok": 2,
        "topk_method": "group_limited_greedy",
        "n_group": 2,
        "topk_group": 1,
    },
    "Dots1ForCausalLM": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "Dots3NoteForCausalLM": {"num_key_value_heads": 4},
    "Emu3ForCausalLM": {"pad_token_id": 0},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 128},
    "Gemma3nForCausalLM": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "laurel_rank": 8,
    },
    "GPTJForCausalLM": {"rotary_dim": 8},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"]},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 16},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 16},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "LongcatFlashForCausalLM": {"head_dim": 8, "zero_expert_num": 2},
    "Mamba2ForCausalLM": {"num_heads": 8, "n_groups": 2},
    "MinistralForCausalLM": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "NemotronForCausalLM": {"head_dim": 16, "num_key_value_heads": 2},
    "MusicgenForCausalLM": {"num_codebooks": 1},
    "MusicgenMelodyForCausalLM": {"num_codebooks": 1},
    "OPTForCausalLM": {"hidden_size": 64},
    "ReformerModelWithLMHead": {
        "is_decoder": True,
        "axial_pos_embds_dim": (16, 48),
        "axial_pos_shape": (16, 20),
    },
    "RoCBertForCausalLM": {"is_decoder": True, "pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "XmodForCausalLM": {"is_decoder": True, "default_language": "en_XX"},
    **{name: {"window_size": 4} for name in ("Swinv2Model", "MaskFormerSwinModel")},
    "Swin2SRModel": {"window_size": 4, "patch_size": 1},
    "BitModel": {"num_groups": 4},
    **{name: {"num_stages": 4} for name in ("ConvNextModel", "ConvNextV2Model")},
    **{
        name: {"depths": (2, 1, 1, 1), "image_size": 128, "window_size": 4}
        for name in ("DonutSwinModel", "SwinModel")
    },
    "EfficientLoFTRModel": {
        "out_features": [16, 16, 32, 64],
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "HieraModel": {"image_size": [64, 64], "patch_size": [7, 7]},
    "LevitModel": {"image_size": 128, "patch_size": 16},
    "LwDetrModel": {
        "backbone_config": Nested(image_size=32, num_windows=4),
        "num_queries": 10,
        "projector_scale_factors": [1.0],
    },
    "Mask2FormerModel": {"backbone_config": Nested(out_features=["stage1", "stage2", "stage3", "stage4"])},
    "RfDetrModel": {"num_queries": 10},  # of hundreds two are nearly as good, and change places
    "TextNetModel": {"stem_out_channels": 16},
    **{name: {"upsample_groups": 64} for name in ("MimiModel", "PocketTTSAudioTokenizerModel")},
    "GraniteSpeech5Encoder": {"num_key_value_heads": 4, "context_size": 8},
    "MuseSparkAudioModel": {"num_hidden_layers": 4},
    **{
        name: {"quantization_dim": 128, "num_key_value_heads": 4}
        for name in ("NeuCodecModel", "Xcodec2Model")
    },
    "Sam2HieraDetModel": _HIERA,
    "Sam2VisionModel": {
        "backbone_config": Nested(_HIERA),
        "backbone_channel_list": [64, 48, 32, 16],
        "backbone_feature_sizes": [[8, 8], [4, 4], [2, 2]],
        "fpn_hidden_size": 32,
    },
    "UVDocModel": {"backbone_config": Nested(out_features=[f"stage{i}" for i in range(1, 7)])},
    "PPOCRV6SmallDetModel": {"backbone_config": _LCNET, "layer_list_out_channels": (16, 24, 32, 48)},
    "PPOCRV6MediumDetModel": {
        "backbone_config": _LCNET,
        "intraclass_block_config": _INTRACLASS,
        "scale_factor_list": [1, 2, 4, 8],
        "kernel_list": [3, 2, 2],
    },
    "SegGptModel": {
        "image_size": (64, 32),
        "pretrain_image_size": 32,
        "merge_index": 0,
        "intermediate_hidden_state_indices": (0, 1),
    },
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "BltForCausalLM": {"num_hidden_layers": 2},
    "Gemma4AssistantForCausalLM": {"text_config": Nested(hidden_size_per_layer_input=0)},
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "xLSTMForCausalLM": {"qk_dim_factor": 1.0},
    "ZambaForCausalLM": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "CLIPTextModel": {"eos_token_id": 2},
    "EsmModel": {"vocab_size": VOCABULARY, "pad_token_id": PADDING},
    "EsmcModel": {"num_key_value_heads": 4},
    **{
        name: {"num_key_value_heads": 4}
        for name in ("Nemotron3DiarizationAudioModel", "Nemotron3_5TranscribeAsrAudioModel")
    },
    "LukeModel": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "ReformerModel": {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (16, 20)},
    "RoCBertModel": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "UniSpeechSatModel": {"eos_token_id": 2},
    "XmodModel": {"default_language": "en_XX"},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}
"""Class -> what its configuration needs beside :data:`SIZES`."""

_PATCHES, _COLOURS = 16, 48
"""Patches of a picture, and the colours of a patch."""

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "EfficientLoFTRModel": {"pixel_values": (2, 1, 64, 64)},
    "LightGlueForKeypointMatching": {"pixel_values": (2, 3, 64, 64)},
    "SegGptModel": dict.fromkeys(("pixel_values", "prompt_pixel_values", "prompt_masks"), (3, 32, 32)),
    "VibeVoiceAcousticTokenizerDecoderModel": {"hidden_states": (64, 5)},
    "VibeVoiceAcousticTokenizerEncoderModel": {"hidden_states": (1, 6400)},
    "GraniteSpeech5Encoder": {"input_features": (96, 64)},
    "Gemma4AudioModel": {"input_features": (96, 128)},
    **{
        name: {"input_values": (1, 6400), "input_features": (20, 160)}
        for name in ("NeuCodecModel", "Xcodec2Model")
    },
    **{
        name: {"pixel_values": (_PATCHES, _COLOURS)}
        for name in (
            "Cosmos3EdgeVisionModel",
            "GlmImageVisionModel",
            "HunYuanVLVisionTransformer",
            "VideoLlama3VisionModel",
        )
    },
    "Inkling2VisionModel": {"pixel_values": (_PATCHES, 8, 8, 3)},
    **{
        name: {"pixel_values": (1, 3, 4, 4 * _PATCHES)}
        for name in ("MiniCPMOcrVisionModel", "MiniCPMV4_7VisionModel")
    },
    **{
        name: {"pixel_values": (_PATCHES, 2 * _COLOURS)}
        for name in ("MuseGlimmerVisionModel", "MuseSparkVisionModel")
    },
    "Siglip2VisionModel": {"pixel_values": (1, _PATCHES, _COLOURS)},
}
"""Class -> shapes of its inputs, of one row where it reads rows, where no configuration says them."""

_GRID = [[1, 4, 4]]

HELD: dict[str, dict[str, Any]] = {
    **{
        name: {"grid_thw": _GRID}
        for name in (
            "Cosmos3EdgeVisionModel",
            "GlmImageVisionModel",
            "HunYuanVLVisionTransformer",
            "MuseGlimmerVisionModel",
            "MuseSparkVisionModel",
        )
    },
    "Inkling2VisionModel": {"image_grid_thw": _GRID},
    "VideoLlama3VisionModel": {"grid_thw": _GRID, "merge_sizes": [2]},
    **{name: {"target_sizes": [[4, 4]]} for name in ("MiniCPMOcrVisionModel", "MiniCPMV4_7VisionModel")},
    "Siglip2VisionModel": {"pixel_attention_mask": [[1] * _PATCHES], "spatial_shapes": [[4, 4]]},
}
"""Class -> inputs that are the sizes of its pictures."""

UNLIMITED = ("BloomForCausalLM",)
"""Classes whose configuration gives no context length."""
