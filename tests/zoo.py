"""Tiny models of many architectures: how each is built, and what it is called with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

WORDS, WIDTH, LENGTH = 320, 32, 12
IMAGE = 32

TEXT: dict[str, Any] = dict(
    vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64
)
LLAMA: dict[str, Any] = TEXT | dict(
    intermediate_size=64, num_key_value_heads=1, head_dim=16, bos_token_id=1, eos_token_id=2, pad_token_id=0
)
EXPERTS: dict[str, Any] = dict(num_experts_per_tok=2, moe_intermediate_size=32)
VISION: dict[str, Any] = dict(
    hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=IMAGE, patch_size=8
)
SEQ2SEQ: dict[str, Any] = dict(
    vocab_size=WORDS, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
DETECTOR: dict[str, Any] = {
    key: value for key, value in SEQ2SEQ.items() if key.endswith(("model", "layers", "heads", "dim"))
}
PAIR: dict[str, Any] = dict(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
Batch = dict[str, Any]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(batch: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(3, WORDS, (batch, length), generator=torch.Generator().manual_seed(seed))


def text(seed: int) -> Batch:
    return {"input_ids": ids(seed=seed)}


def image(seed: int) -> Batch:
    return {"pixel_values": random(2, 3, IMAGE, IMAGE, seed=seed)}


def text_and_image(seed: int) -> Batch:
    return text(seed) | image(seed)


def translated(seed: int) -> Batch:
    return {"input_ids": ids(seed=seed), "decoder_input_ids": ids(length=6, seed=seed + 100)}


def spoken(seed: int) -> Batch:
    return {"input_features": random(2, 16, 80, seed=seed), "decoder_input_ids": ids(length=6, seed=seed)}


def wave(seed: int) -> Batch:
    return {"input_values": random(2, 800, seed=seed)}


def seen_and_read(seed: int) -> Batch:
    """An image of 16 patches stands in the text under the token 5."""
    tokens = ids(length=24, seed=seed)
    tokens[tokens == 5] = 6
    tokens[:, 2:18] = 5
    return {"input_ids": tokens} | image(seed)


@dataclass(frozen=True)
class Row:
    """A model: its class, how its config is made, its batches. `chain`: the path of its blocks, or None where it is run whole."""

    model: str
    config: Callable[[], Any]
    batch: Callable[[int], Batch] = text
    chain: str | None = None

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: nn.Module = getattr(hf, self.model)._from_config(self.config(), dtype=torch.float32)
        return model.eval()

    def batches(self) -> list[Batch]:
        return [self.batch(seed) for seed in range(2)]


def causal(family: str, chain: str | None = "model.layers", **sizes: Any) -> Row:
    return Row(f"{family}ForCausalLM", lambda: getattr(hf, f"{family}Config")(**sizes), text, chain)


NO_HEAD_SIZE: dict[str, Any] = {key: value for key, value in LLAMA.items() if key != "head_dim"}
TWO_HEADS: dict[str, Any] = NO_HEAD_SIZE | dict(num_key_value_heads=2)
WORDS_ONLY: dict[str, Any] = dict(vocab_size=WORDS, hidden_size=WIDTH)
GPT: dict[str, Any] = dict(vocab_size=WORDS, n_positions=64, n_layer=2)
READER: dict[str, Any] = PAIR | dict(vocab_size=WORDS, max_position_embeddings=32)
VIEWER: dict[str, Any] = PAIR | dict(image_size=IMAGE, patch_size=8)
RESNET: dict[str, Any] = dict(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], out_features=["stage2"])

LANGUAGE: dict[str, Row] = {
    "llama": causal("Llama", **LLAMA),
    "one-layer": causal("Llama", **LLAMA | dict(num_hidden_layers=1)),
    "mistral": causal("Mistral", **LLAMA, sliding_window=8),
    "qwen2": causal("Qwen2", **NO_HEAD_SIZE),
    "qwen3": causal("Qwen3", **LLAMA),
    "qwen3-moe": causal("Qwen3Moe", **LLAMA, **EXPERTS, num_experts=4),
    "mixtral": causal("Mixtral", **LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "gemma2": causal("Gemma2", **LLAMA, sliding_window=8),
    "gemma3": Row("Gemma3ForCausalLM", lambda: hf.Gemma3TextConfig(**LLAMA, sliding_window=8), text, "model.layers"),
    "gpt2": Row("GPT2LMHeadModel", lambda: hf.GPT2Config(**GPT, n_embd=WIDTH, n_head=2), text, "transformer.h"),
    "gpt-neox": causal("GPTNeoX", "gpt_neox.layers", **TEXT, intermediate_size=64),
    "opt": causal("OPT", "model.decoder.layers", **TEXT, ffn_dim=64, word_embed_proj_dim=16),
    "bloom": causal("Bloom", "transformer.h", **WORDS_ONLY, n_layer=2, n_head=2),
    "falcon": causal("Falcon", "transformer.h", **WORDS_ONLY, num_hidden_layers=2, num_attention_heads=2),
    "phi": causal("Phi", **TEXT, intermediate_size=64),
    "phi3": causal("Phi3", **TEXT, intermediate_size=64, pad_token_id=0),
    "stablelm": causal("StableLm", **TEXT, intermediate_size=64, num_key_value_heads=1),
    "cohere": causal("Cohere", **TEXT, intermediate_size=64, num_key_value_heads=1),
    "olmo2": causal("Olmo2", **TEXT, intermediate_size=64, num_key_value_heads=1),
    "granite": causal("Granite", **TEXT, intermediate_size=64, num_key_value_heads=1),
    "starcoder2": causal("Starcoder2", **TEXT, intermediate_size=64, num_key_value_heads=1),
    "mpt": causal("Mpt", "transformer.blocks", d_model=WIDTH, n_heads=2, n_layers=2, vocab_size=WORDS, max_seq_len=64, expansion_ratio=2),
    "codegen": causal("CodeGen", "transformer.h", **GPT, n_embd=64, n_head=4, rotary_dim=8),
    "gptj": causal("GPTJ", "transformer.h", **GPT, n_embd=WIDTH, n_head=2, rotary_dim=8),
    "mamba": causal("Mamba", "backbone.layers", **WORDS_ONLY, num_hidden_layers=2, state_size=8),
    "mamba2": causal(
        "Mamba2", "backbone.layers", **WORDS_ONLY, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8
    ),
    "jamba": causal(
        "Jamba", **LLAMA, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=2,
        mamba_d_state=8, mamba_dt_rank=4,
    ),
    "recurrent-gemma": causal("RecurrentGemma", **LLAMA, lru_width=WIDTH, attention_window_size=16, block_types=("recurrent", "attention")),
    "lfm2": causal("Lfm2", **LLAMA, layer_types=["conv", "full_attention"]),
    "deepseek-v3": causal(
        "DeepseekV3", **TWO_HEADS, **EXPERTS, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    ),
    "llama4-text": Row(
        "Llama4ForCausalLM",
        lambda: hf.Llama4TextConfig(**LLAMA, intermediate_size_mlp=64, num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=2),
        text, "model.layers",
    ),
    "gpt-oss": causal("GptOss", **LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "gemma3n": Row(
        "Gemma3nForCausalLM",
        lambda: hf.Gemma3nTextConfig(
            **LLAMA | dict(intermediate_size=[64, 64]), vocab_size_per_layer_input=WORDS, hidden_size_per_layer_input=16, num_kv_shared_layers=1,
            laurel_rank=8, sliding_window=8, layer_types=["full_attention", "full_attention"], activation_sparsity_pattern=[0.0, 0.0],
        ),
    ),
}  # fmt: skip
"""Models that write text: compressed in memory and as directories, with text of their own."""

OTHERS: dict[str, Row] = {
    "albert": Row("AlbertForMaskedLM", lambda: hf.AlbertConfig(**TEXT, embedding_size=16, intermediate_size=64)),
    "bert": Row("BertForMaskedLM", lambda: hf.BertConfig(**TEXT, intermediate_size=64), text, "bert.encoder.layer"),
    "roberta": Row("RobertaForSequenceClassification", lambda: hf.RobertaConfig(**TEXT, intermediate_size=64), text, "roberta.encoder.layer"),
    "distilbert": Row(
        "DistilBertModel", lambda: hf.DistilBertConfig(vocab_size=WORDS, dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=64), text, "transformer.layer"
    ),
    "deberta-v2": Row(
        "DebertaV2Model", lambda: hf.DebertaV2Config(**TEXT, intermediate_size=64, relative_attention=True, pos_att_type=["p2c", "c2p"])
    ),
    "t5": Row(
        "T5ForConditionalGeneration",
        lambda: hf.T5Config(vocab_size=WORDS, d_model=WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0), translated,
    ),
    "bart": Row("BartForConditionalGeneration", lambda: hf.BartConfig(**SEQ2SEQ, max_position_embeddings=64), translated),
    "vit": Row("ViTForImageClassification", lambda: hf.ViTConfig(**VISION), image, "vit.layers"),
    "dinov2": Row("Dinov2Model", lambda: hf.Dinov2Config(**VIEWER, mlp_ratio=2), image, "encoder.layer"),
    "swin": Row(
        "SwinForImageClassification",
        lambda: hf.SwinConfig(image_size=IMAGE, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4), image,
    ),
    "convnext": Row(
        "ConvNextForImageClassification",
        lambda: hf.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, image_size=IMAGE, patch_size=4), image,
    ),
    "detr": Row(
        "DetrForObjectDetection",
        lambda: hf.DetrConfig(
            **DETECTOR, num_queries=4, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
            backbone_config=hf.ResNetConfig(**RESNET),
        ), image,
    ),
    "segformer": Row(
        "SegformerForSemanticSegmentation",
        lambda: hf.SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2],
            num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=32,
        ), image,
    ),
    "dpt": Row(
        "DPTForDepthEstimation",
        lambda: hf.DPTConfig(
            **VISION, backbone_out_indices=[0, 1], neck_hidden_sizes=[8, 8], fusion_hidden_size=8, reassemble_factors=[2, 1], is_hybrid=False
        ), image,
    ),
    "clip": Row(
        "CLIPModel", lambda: hf.CLIPConfig(text_config=READER | dict(eos_token_id=2), vision_config=VIEWER, projection_dim=16), text_and_image
    ),
    "siglip": Row("SiglipModel", lambda: hf.SiglipConfig(text_config=READER | dict(projection_size=WIDTH), vision_config=VIEWER), text_and_image),
    "whisper": Row(
        "WhisperForConditionalGeneration",
        lambda: hf.WhisperConfig(**SEQ2SEQ, num_mel_bins=16, max_source_positions=40, max_target_positions=32), spoken,
    ),
    "wav2vec2": Row(
        "Wav2Vec2ForCTC",
        lambda: hf.Wav2Vec2Config(
            **PAIR, vocab_size=WORDS, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
        ), wave, "wav2vec2.encoder.layers",
    ),
    "llava": Row(
        "LlavaForConditionalGeneration",
        lambda: hf.LlavaConfig(
            text_config=hf.LlamaConfig(**LLAMA), vision_config=hf.CLIPVisionConfig(**VISION), image_token_index=5, vision_feature_layer=-1
        ), seen_and_read,
    ),
}  # fmt: skip
"""Encoders, pairs of encoder and decoder, vision, sound, and several of these in one."""

ZOO = LANGUAGE | OTHERS
