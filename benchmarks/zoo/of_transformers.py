"""transformers: networks of text, images and sound, by their configurations."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.entry import Built, Entry, images, less, same

VOCABULARY = 64
Inputs = Callable[[], dict[str, Tensor]]


def ids(length: int = 8, vocabulary: int = VOCABULARY) -> Tensor:
    """Two sequences of tokens that are no special ones."""
    return torch.randint(3, vocabulary, (2, length))


def text() -> dict[str, Tensor]:
    """Eight tokens."""
    return {"input_ids": ids()}


def pairs() -> dict[str, Tensor]:
    """Eight tokens in, six out."""
    return {"input_ids": ids(), "decoder_input_ids": ids(6)}


def picture(size: int = 32) -> dict[str, Tensor]:
    """An image."""
    return {"pixel_values": images(size)}


def sound() -> dict[str, Tensor]:
    """A wave."""
    return {"input_values": torch.randn(2, 400)}


def both() -> dict[str, Tensor]:
    """A text and an image."""
    return {**text(), **picture()}


def trajectory() -> dict[str, Tensor]:
    """Four steps."""
    sizes = {"states": 5, "actions": 3, "rewards": 1, "returns_to_go": 1}
    steps = {"timesteps": torch.arange(4).repeat(2, 1), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    return {**{key: torch.randn(2, 4, size) for key, size in sizes.items()}, **steps}


def logits(value: Any) -> Tensor:
    """Of a model of transformers."""
    return value.logits


def embeddings(value: Any) -> Tensor:
    """Of a pair of towers: the similarities of one example depend on all others."""
    return torch.cat([value.text_embeds, value.image_embeds], -1)


def boxes(value: Any) -> Tensor:
    """Classes and boxes of a detector."""
    return torch.cat([value.logits, value.pred_boxes], -1)


def decisions(value: Any) -> Tensor:
    """Predictions of states, actions and returns."""
    return torch.cat([value.state_preds, value.action_preds, value.return_preds], -1)


TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
STACK = {**COMMON, "intermediate_size": 48, "max_position_embeddings": 32, **TOKENS}
DECODER = {**STACK, "use_cache": False}
GROUPED = {**DECODER, "num_key_value_heads": 2}
LOCAL = {**GROUPED, "head_dim": 8, "sliding_window": 4}
ENCODER = {**STACK, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False}
PATCHES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 10,
}
SHIFTED = {
    "image_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (1, 2),
    "num_heads": (2, 4),
    "drop_path_rate": 0.0,
    "num_labels": 10,
}
DEPTHS = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
    "use_cache": False,
}
TRANSLATION = {**DEPTHS, **TOKENS, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "decoder_start_token_id": 2}
SPEECH = {
    **COMMON,
    "intermediate_size": 48,
    "conv_dim": (16, 16),
    "conv_kernel": (5, 3),
    "conv_stride": (4, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 2,
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0),
    **dict.fromkeys(("final_dropout", "layerdrop", "mask_time_prob"), 0.0),
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "experts_implementation": "eager"}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
RESNET = {"embedding_size": 8, "hidden_sizes": (8, 16), "depths": (1, 1), "layer_type": "basic"}
DISENTANGLED = {
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
}
WITH_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

# name: (class, options, inputs, output)
# fmt: off
CONFIGS: dict[str, tuple[str, dict[str, Any], Inputs, Callable[[Any], Tensor]]] = {
    "Llama": ("LlamaForCausalLM", GROUPED, text, logits),
    "Qwen2": ("Qwen2ForCausalLM", GROUPED, text, logits),
    "Qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}, text, logits),
    "Gemma 2": ("Gemma2ForCausalLM", LOCAL, text, logits),
    "Gemma 3": ("Gemma3ForCausalLM", LOCAL, text, logits),
    "Mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 4}, text, logits),
    "Mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4, "experts_implementation": "eager"}, text,
        logits),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", {**GROUPED, **EXPERTS, "head_dim": 8}, text, logits),
    "Qwen3-MoE, batched": ("Qwen3MoeForCausalLM", {**GROUPED, **EXPERTS, "head_dim": 8,
        "experts_implementation": "batched_mm"}, text, logits),
    "OLMoE": ("OlmoeForCausalLM", {**GROUPED, **EXPERTS}, text, logits),
    "OLMoE, grouped": ("OlmoeForCausalLM", {**GROUPED, **EXPERTS, "experts_implementation": "grouped_mm"}, text,
        logits),
    "GPT-OSS": ("GptOssForCausalLM", {**LOCAL, "num_local_experts": 4, "num_experts_per_tok": 2,
        "experts_implementation": "eager"}, text, logits),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", {**GROUPED, **LATENT, "num_key_value_heads": 4, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 24,
        "first_k_dense_replace": 1, "experts_implementation": "eager"}, text, logits),
    "T5": ("T5ForConditionalGeneration", {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48,
        "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0, "use_cache": False}, pairs,
        logits),
    "BART": ("BartForConditionalGeneration", TRANSLATION, pairs, logits),
    "Pegasus": ("PegasusForConditionalGeneration", TRANSLATION, pairs, logits),
    "mBART": ("MBartForConditionalGeneration", TRANSLATION, pairs, logits),
    "Whisper": ("WhisperForConditionalGeneration", {**less(TRANSLATION, "max_position_embeddings"), "num_mel_bins": 16,
        "max_source_positions": 16, "max_target_positions": 16}, lambda: {"input_features": torch.randn(2, 16, 32),
        "decoder_input_ids": ids(6)}, logits),
    "BERT": ("BertForMaskedLM", ENCODER, text, logits),
    "BERT, classes": ("BertForSequenceClassification", ENCODER, text, logits),
    "RoBERTa": ("RobertaForMaskedLM", ENCODER, text, logits),
    "DeBERTa-v2": ("DebertaV2ForMaskedLM", {**ENCODER, **DISENTANGLED}, text, logits),
    "DistilBERT": ("DistilBertForMaskedLM", {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2,
        "n_heads": 4, "max_position_embeddings": 32, "dropout": 0.0, "attention_dropout": 0.0}, text, logits),
    "ALBERT": ("AlbertForMaskedLM", {**ENCODER, "embedding_size": 16}, text, logits),
    "ELECTRA": ("ElectraForPreTraining", {**ENCODER, "embedding_size": 16}, text, logits),
    "FNet": ("FNetForSequenceClassification", less(ENCODER, "num_attention_heads", "attention_probs_dropout_prob"),
        text, logits),
    "Perceiver": ("PerceiverForMaskedLM", {"vocab_size": VOCABULARY, "max_position_embeddings": 8, "d_model": 32,
        "d_latents": 32, "num_latents": 4, "num_blocks": 1, "num_self_attends_per_block": 1,
        "num_self_attention_heads": 4, "num_cross_attention_heads": 4, "qk_channels": 32, "v_channels": 32,
        "attention_probs_dropout_prob": 0.0}, lambda: {"inputs": ids()}, logits),
    "GPT-2": ("GPT2LMHeadModel", {**GPT, **WITH_DROPOUT, **TOKENS}, text, logits),
    "GPT-NeoX": ("GPTNeoXForCausalLM", DECODER, text, logits),
    "GPT-J": ("GPTJForCausalLM", {**GPT, **WITH_DROPOUT, **TOKENS, "rotary_dim": 4}, text, logits),
    "OPT": ("OPTForCausalLM", {**less(DECODER, "intermediate_size"), "ffn_dim": 48, "word_embed_proj_dim": 32,
        "dropout": 0.0}, text, logits),
    "BLOOM": ("BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4,
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "use_cache": False, **TOKENS}, text, logits),
    "Phi": ("PhiForCausalLM", {**GROUPED, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, text, logits),
    "Falcon": ("FalconForCausalLM", {**COMMON, **TOKENS, "ffn_hidden_size": 48, "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "use_cache": False}, text, logits),
    "Mamba": ("MambaForCausalLM", {**less(COMMON, "num_attention_heads"), **TOKENS, "state_size": 4, "conv_kernel": 4,
        "time_step_rank": 4, "use_cache": False}, text, logits),
    "Mamba-2": ("Mamba2ForCausalLM", {**less(COMMON, "num_attention_heads"), **TOKENS, "num_heads": 4, "head_dim": 16,
        "state_size": 8, "n_groups": 2, "chunk_size": 4, "use_cache": False}, text, logits),
    "RWKV": ("RwkvForCausalLM", {**less(COMMON, "num_attention_heads"), **TOKENS, "attention_hidden_size": 32,
        "intermediate_size": 48, "context_length": 16, "use_cache": False}, text, logits),
    "XLNet": ("XLNetLMHeadModel", {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48,
        "dropout": 0.0, **TOKENS}, lambda: {**text(), "token_type_ids": torch.arange(8).div(4,
        rounding_mode="floor").repeat(2, 1)}, logits),
    "Longformer": ("LongformerForMaskedLM", {**ENCODER, "attention_window": 4, "max_position_embeddings": 40},
        lambda: {**text(), "global_attention_mask": torch.eye(8, dtype=torch.long)[:1].repeat(2, 1)}, logits),
    "ViT": ("ViTForImageClassification", PATCHES, picture, logits),
    "DINOv2": ("Dinov2ForImageClassification", PATCHES, picture, logits),
    "Swin": ("SwinForImageClassification", SHIFTED, picture, logits),
    "ResNet": ("ResNetForImageClassification", {**RESNET, "num_labels": 10}, picture, logits),
    "Segformer": ("SegformerForSemanticSegmentation", {"num_encoder_blocks": 2, "depths": (1, 1), "sr_ratios": (4, 2),
        "hidden_sizes": (16, 32), "patch_sizes": (7, 3), "strides": (4, 2), "num_attention_heads": (1, 2),
        "mlp_ratios": (2, 2), "decoder_hidden_size": 16, "num_labels": 5, "drop_path_rate": 0.0,
        **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob"), 0.0)},
        picture, logits),
    "CLIP": ("CLIPModel", {"text_config": STACK, "vision_config": less(PATCHES, "num_labels"), "projection_dim": 16},
        both, embeddings),
    "SigLIP": ("SiglipModel", {"text_config": {**STACK, "max_position_embeddings": 8}, "vision_config": less(PATCHES,
        "num_labels")}, both, embeddings),
    "DETR": ("DetrForObjectDetection", {**less(DEPTHS, "use_cache"), "use_timm_backbone": False,
        "use_pretrained_backbone": False, "backbone_config": {**RESNET, "out_features": ["stage2"]}, "num_queries": 5,
        "num_labels": 5}, partial(picture, 64), boxes),
    "Wav2Vec2": ("Wav2Vec2ForCTC", {**SPEECH, **TOKENS}, sound, logits),
    "HuBERT": ("HubertForCTC", {**SPEECH, **TOKENS}, sound, logits),
    "AST": ("ASTForAudioClassification", {**less(PATCHES, "image_size"), "max_length": 32, "num_mel_bins": 16,
        "frequency_stride": 8, "time_stride": 8}, lambda: {"input_values": torch.randn(2, 32, 16)}, logits),
    "PatchTST": ("PatchTSTForPrediction", {"num_input_channels": 3, "context_length": 32, "patch_length": 8,
        "patch_stride": 8, "prediction_length": 4, "d_model": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "ffn_dim": 48}, lambda: {"past_values": torch.randn(2, 32, 3)}, lambda value: value.prediction_outputs),
    "Decision Transformer": ("DecisionTransformerModel", {**less(GPT, "vocab_size", "n_embd", "use_cache"),
        **WITH_DROPOUT, "state_dim": 5, "act_dim": 3, "hidden_size": 32, "max_ep_len": 16}, trajectory, decisions),
    "HiFi-GAN": ("SpeechT5HifiGan", {"model_in_dim": 16, "upsample_initial_channel": 16, "upsample_rates": (2, 2),
        "upsample_kernel_sizes": (4, 4), "resblock_kernel_sizes": (3,), "resblock_dilation_sizes": ((1, 3),)},
        lambda: {"spectrogram": torch.randn(2, 8, 16)}, same),
}
# fmt: on
SINGLE = ("OLMoE, grouped",)  # the grouped product of torch has no float64


def build_config(model: str, options: dict[str, Any], inputs: Inputs) -> Built:
    """A class of transformers with a configuration of these options; {"backbone_config": ...} is one of ResNet."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    made = getattr(transformers, model)
    if "backbone_config" in options:
        options = {**options, "backbone_config": transformers.ResNetConfig(**options["backbone_config"])}
    return made(made.config_class(**options)), (), inputs()


def transformers_entries() -> list[Entry]:
    """Networks of text, images and sound."""
    return [
        Entry("transformers", name, partial(build_config, *row[:3]), row[3], single=name in SINGLE)
        for name, row in CONFIGS.items()
    ]
