"""Sizes of weights and tensors, found by running the real modules on the meta device, without values.

Only as much runs as is needed: two blocks of the transformer and of the text encoder, and of the decoder two
groups of frames, after which it repeats itself. Everything is cached by configuration and shape.
"""

import json
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from lib.memory.configs import ModelConfigs
from lib.memory.live import Device, LiveBytes
from lib.memory.stages import Clip
from lib.pipelines import attention
from lib.settings import Dtype

FLOAT = 4
LORA_RANK = 64
ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD_LAYERS = ("ff.net.0.proj", "ff.net.2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Numbers of weights: `linear` of linear layers, which may be quantized, and `other`.

    `rows` are the outputs of the products.
    """

    linear: int
    rows: int
    other: int

    @classmethod
    def of(cls, module: nn.Module) -> "Parts":
        layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        linear = sum(layer.weight.numel() for layer in layers)
        rows = sum(layer.out_features for layer in layers)
        everything = sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
        return cls(linear=linear, rows=rows, other=everything - linear)

    @property
    def numbers(self) -> int:
        return self.linear + self.other


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """A model of equal blocks: the weights of one, how many there are, and weights outside of them."""

    block: Parts
    layers: int
    outside: int
    width: int
    feed_forward: int
    embedding: int = 0
    """Weights of the token embedding."""


@cache
def transformer_stack(config: str) -> Stack:
    """Return the sizes of CogVideoXTransformer3DModel."""
    transformer = _build(CogVideoXTransformer3DModel, config, num_layers=1)
    block, last = Parts.of(transformer.transformer_blocks[0]), transformer.transformer_blocks[0].ff.net[2]
    return Stack(
        block=block,
        layers=json.loads(config).get("num_layers", 30),
        outside=Parts.of(transformer).numbers - block.numbers,
        width=last.out_features,
        feed_forward=last.in_features,
    )


@cache
def text_encoder_stack(config: str, dtype: Dtype) -> Stack:
    """Return the sizes of T5EncoderModel."""
    layers, encoder = T5Config.from_dict(json.loads(config)).num_layers, _text_encoder(config, dtype)
    block = Parts.of(encoder.encoder.block[1])  # the first has the table of relative positions as well
    return Stack(
        block=block,
        layers=layers,
        outside=Parts.of(encoder).numbers - len(encoder.encoder.block) * block.numbers,
        width=encoder.config.d_model,
        feed_forward=encoder.config.d_ff,
        embedding=encoder.shared.weight.numel(),
    )


@cache
def vae_sizes(config: str, dtype: Dtype) -> tuple[int, int]:
    """Return the number of weights of AutoencoderKLCogVideoX, and of its largest layer."""
    vae = _vae(config, dtype)
    return Parts.of(vae).numbers, max(weight.numel() for weight in vae.parameters())


@cache
def text_encoding(configs: ModelConfigs, *, dtype: Dtype, device: Device) -> int:
    """Return the peak bytes of encoding one prompt."""
    encoder = _text_encoder(configs.text_encoder, dtype)
    tokens = json.loads(configs.transformer).get("max_text_seq_length", 226)
    prompt = torch.empty(1, tokens, dtype=torch.long, device="meta")
    with torch.inference_mode(), LiveBytes(device) as live:
        encoder(prompt)
    return live.peak


@cache
def image_encoding(config: str, *, height: int, width: int, dtype: Dtype, device: Device) -> int:
    """Return the peak bytes of encoding one image."""
    image = _empty(1, 3, 1, height, width, dtype=dtype)
    with torch.inference_mode(), LiveBytes(device) as live:
        _vae(config, dtype).encode(image.clone())
    return live.peak


@cache
def denoising(configs: ModelConfigs, clip: Clip, *, dtype: Dtype, device: Device) -> int:
    """Return the peak bytes of one step."""
    frames, rows, columns = _latent_size(_vae(configs.vae, dtype), clip)
    sample = {"sample_frames": clip.frames, "sample_height": rows, "sample_width": columns}
    transformer = _build(CogVideoXTransformer3DModel, configs.transformer, dtype, num_layers=2, **sample)
    settings: Any = transformer.config
    attention.install(transformer)
    if clip.adapted != "none":
        import peft  # a second of imports, which loading the LoRA has paid for already

        layers = [*ATTENTION_LAYERS, *(FEED_FORWARD_LAYERS if clip.adapted == "everything" else ())]
        transformer.add_adapter(peft.LoraConfig(r=LORA_RANK, target_modules=layers))
        nn.Module.to(transformer, getattr(torch, dtype))
    batch, span = 2 if clip.guided else 1, settings.patch_size_t or 1
    frames = -(-frames // span) * span
    latents = _empty(batch, frames, settings.in_channels, rows, columns, dtype=dtype)
    text = _empty(batch, settings.max_text_seq_length, settings.text_embed_dim, dtype=dtype)
    time = torch.empty(batch, dtype=torch.long, device="meta")
    places = frames * rows * columns
    tokens = places // settings.patch_size**2 // span
    table = _empty(tokens, settings.attention_head_dim, dtype="float32")
    rotary = (table, table) if settings.use_rotary_positional_embeddings else None
    ofs = _empty(1, dtype=dtype) if settings.ofs_embed_dim else None
    with torch.inference_mode(), LiveBytes(device) as live:
        transformer(latents, text, time, ofs=ofs, image_rotary_emb=rotary, return_dict=False)
    # Around the transformer: latents, the scheduler's last prediction and the two clean videos that forecast
    # steps look at; the input; embeddings of both prompts, separate and joined; rotary positions.
    around = places * settings.out_channels * (latents.itemsize + 3 * FLOAT)
    around += (batch + 1) * latents.nbytes // batch + 2 * text.nbytes + (2 * table.nbytes if rotary else 0)
    return live.peak + around


def decoding(configs: ModelConfigs, clip: Clip, *, tiled: bool, dtype: Dtype, device: Device) -> int:
    """Return the peak bytes of decoding a clip."""
    vae: Any = _vae(configs.vae, dtype)
    frames, rows, columns = _latent_size(vae, clip)
    item = torch.finfo(getattr(torch, dtype)).bits // 8
    denoised = 2 * vae.config.latent_channels * frames * rows * columns * item  # as denoised, and scaled
    decoded = 3 * clip.frames * clip.height * clip.width * item
    # From -1 to 1 into 0 to 1, frame by frame and then stacked; pixels in float32, stacked, times 255.
    finished = 3 * clip.height * clip.width * (2 * item + 3 * FLOAT)
    tile = vae.tile_latent_min_height, vae.tile_latent_min_width
    if not tiled or (rows <= tile[0] and columns <= tile[1]):
        peak = _tile_decoding(configs.vae, frames, rows, columns, dtype=dtype, device=device)
        group = vae.config.temporal_compression_ratio * (vae.num_latent_frames_batch_size + 1)
        return denoised + max(peak, decoded + group * finished)
    full = min(tile[0], rows), min(tile[1], columns)
    largest = _tile_decoding(configs.vae, frames, *full, dtype=dtype, device=device)
    made = peak = 0
    tops = range(0, rows, int(tile[0] * (1 - vae.tile_overlap_factor_height)))
    lefts = range(0, columns, int(tile[1] * (1 - vae.tile_overlap_factor_width)))
    for top, left in product(tops, lefts):
        area = min(tile[0], rows - top) * min(tile[1], columns - left)
        peak = max(peak, made + largest * area // prod(full))
        made += decoded * area // (rows * columns)
    # At the end there are the tiles, the rows made of them, and the clip made of these.
    return denoised + max(peak, made + 2 * decoded, decoded + clip.frames * finished)


@cache
def _tile_decoding(config: str, frames: int, rows: int, columns: int, *, dtype: Dtype, device: Device) -> int:
    """Return the peak bytes of decoding so many latent frames, a group at a time, without tiles."""
    vae: Any = _vae(config, dtype)
    batch = vae.num_latent_frames_batch_size
    groups = max(frames // batch, 1)
    first = min(batch + frames % batch, frames)
    latents = _empty(1, vae.config.latent_channels, first, rows, columns, dtype=dtype)
    peaks, made, kept = [], [], None
    with torch.inference_mode(), LiveBytes(device) as live:
        for count in (first, batch)[:groups]:
            live.peak = live.now
            part, kept = vae.decoder(latents[:, :, :count], conv_cache=kept)
            made.append(part)
            peaks.append(live.peak)
    # All groups after the first take the same, plus the frames decoded so far.
    later = (groups - 2) * made[-1].nbytes if groups > 2 else 0
    return max(*peaks, peaks[-1] + later, 2 * (sum(part.nbytes for part in made) + later))


def _latent_size(vae: Any, clip: Clip) -> tuple[int, int, int]:
    """Return latent frames, rows and columns of a clip."""
    spatial, temporal = 2 ** (len(vae.config.block_out_channels) - 1), vae.config.temporal_compression_ratio
    return (clip.frames - 1) // temporal + 1, clip.height // spatial, clip.width // spatial


@cache
def _vae(config: str, dtype: Dtype) -> AutoencoderKLCogVideoX:
    return _build(AutoencoderKLCogVideoX, config, dtype)


@cache
def _text_encoder(config: str, dtype: Dtype) -> T5EncoderModel:
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config.from_dict(json.loads(config) | {"num_layers": 2})).eval()
    encoder.to(getattr(torch, dtype))
    if dtype == "float16":  # as transformers loads it
        for name, layer in encoder.named_modules():
            if name.endswith(".wo"):
                layer.float()
    return encoder


def _build(kind: type, config: str, dtype: Dtype = "float32", **changes: int) -> Any:
    with torch.device("meta"):
        module = kind.from_config(json.loads(config) | changes).eval()
    return nn.Module.to(module, getattr(torch, dtype))  # diffusers' own would warn


def _empty(*shape: int, dtype: Dtype) -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
