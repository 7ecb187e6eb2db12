"""Tiny diffusers pipelines of every family, their LoRA files, and folders of pictures, for tests with real files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 70, 220), "grey": (128, 128, 128)}
"""What the pictures show, and their captions say."""

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def _clip_tokenizer() -> CLIPTokenizer:
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=16)


def _t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -2.0) for letter in LETTERS)]
    return T5Tokenizer(pieces, extra_ids=0, model_max_length=16)


def _clip(width: int = 16, projected: bool = False) -> Any:
    # The position of the largest id is what is pooled unless the end's own id is told.
    config = CLIPTextConfig(
        vocab_size=80,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=80, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))


def _vae(channels: int, **config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **config,
    )


def _unet(**config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        **config,
    )


def sd() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=_vae(4),
        text_encoder=_clip(),
        tokenizer=_clip_tokenizer(),
        unet=_unet(cross_attention_dim=16),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    return StableDiffusionXLPipeline(
        vae=_vae(4),
        text_encoder=_clip(),
        text_encoder_2=_clip(projected=True),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        unet=_unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )


def sd3() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    return StableDiffusion3Pipeline(
        vae=_vae(4, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(8, projected=True),
        text_encoder_2=_clip(8, projected=True),
        text_encoder_3=_t5(),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        tokenizer_3=_t5_tokenizer(),
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=16,
            pooled_projection_dim=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux() -> FluxPipeline:
    torch.manual_seed(0)
    return FluxPipeline(
        vae=_vae(1, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(),
        text_encoder_2=_t5(),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def ddpm(classes: int | None = None) -> DDPMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        num_class_embeds=classes,
    )
    return DDPMPipeline(unet, DDPMScheduler())


FAMILIES: Mapping[str, Callable[[], Any]] = {"sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux}
"""The pipelines that read a prompt."""

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def denoiser(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def save(pipe: Any, folder: Path) -> str:
    pipe.save_pretrained(folder)
    return str(folder)


def add_lora(model: Any, targets: Any = TARGETS, rank: int = 2, seed: int = 1) -> Any:
    """A LoRA whose B is not zero, so that A's gradient is not zero either."""
    model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets)))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def layers_of(model: Any) -> dict[str, Any]:
    """A LoRA as `save_lora_weights` takes it."""
    layers: dict[str, Any] = get_peft_model_state_dict(model)
    if all(".attentions." in name for name in layers):  # else diffusers' own converter would mix two formats
        layers = convert_state_dict_to_diffusers(layers)
    return layers


def save_lora(pipe: Any, folder: Path, **options: Any) -> str:
    """As diffusers' training scripts save it."""
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    pipe.save_lora_weights(folder, **{f"{part}_lora_layers": layers_of(add_lora(denoiser(pipe), **options))})
    return str(folder)


def save_kohya(pipe: Any, file: Path, **options: Any) -> str:
    """One .safetensors file with kohya's names and alphas."""
    layers = get_peft_model_state_dict(add_lora(denoiser(pipe), **options))
    kohya = convert_state_dict_to_kohya({f"unet.{name}": value.contiguous() for name, value in layers.items()})
    save_file(kohya, file)
    return str(file)


def picture(i: int, size: int = 24) -> Image.Image:
    """A square of the i-th colour on noise."""
    draw = np.random.default_rng(i)
    pixels = draw.integers(0, 90, (size, size, 3), dtype=np.uint8)
    top, left = draw.integers(0, size // 2, 2)
    pixels[top : top + size // 2, left : left + size // 2] = list(COLOURS.values())[i % len(COLOURS)]
    return Image.fromarray(pixels)


def caption(i: int) -> str:
    return f"a {list(COLOURS)[i % len(COLOURS)]} square"


def save_pictures(folder: Path, n: int = 12, size: int = 24) -> str:
    """An image folder as `datasets` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(n):
        name = f"{i:03}.png"
        picture(i, size).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption(i)}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return str(folder)
