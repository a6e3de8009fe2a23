"""The memory model's formulas against the code they describe, run without values on the meta device."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from peft import LoraConfig
from transformers import T5Config, T5EncoderModel

from lib.memory import stages, vae
from lib.memory.live import Kernels
from lib.memory.model import MemoryModel
from lib.memory.shapes import (
    ModelShape,
    TextEncoderShape,
    TransformerShape,
    VaeShape,
    released_transformer,
)
from lib.memory.stages import Clip
from lib.models.specs import RELEASED_TEXT_ENCODER, RELEASED_VAE, SPECS
from lib.pipelines import attention
from tests.live_bytes import LiveBytes

NARROW_VAE = RELEASED_VAE | {
    "block_out_channels": (8, 16, 16, 32),
    "norm_num_groups": 4,
    "sample_height": 96,  # tiles are half of this
    "sample_width": 128,
}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
VIDEO = [name for name, spec in SPECS.items() if spec.layers and spec.task != "caption"]


class NoScratch(Kernels):
    """Tensors alone: what kernels take beside them is not to be seen from outside."""

    def convolution(self, *_):
        return 0


def kernels(dtype):
    return NoScratch(device="cuda", itemsize=dtype.itemsize)


@pytest.mark.parametrize("name", VIDEO)
def test_a_released_checkpoint_has_as_many_weights_as_its_model_without_a_file_of_it(name):
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(**released_transformer(SPECS[name])).float()
        encoder = T5EncoderModel(T5Config(**RELEASED_TEXT_ENCODER))
        autoencoder = AutoencoderKLCogVideoX(**RELEASED_VAE)
    model = MemoryModel(
        name=name, shape=ModelShape.from_spec(SPECS[name]), device="cpu", dtype="float32", image=False
    )
    assert model.part_bytes() == {
        "transformer": loaded_bytes(transformer),
        "text_encoder": loaded_bytes(encoder),
        "vae": loaded_bytes(autoencoder),
    }


def loaded_bytes(module):
    return sum(p.nbytes for p in module.parameters()) + sum(b.nbytes for b in module.buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("frames", "width", "height", "tiled"),
    [(1, 64, 48, False), (9, 96, 64, False), (13, 96, 64, False), (25, 64, 96, False), (9, 112, 80, True)],
)
def test_decoding_takes_what_the_decoder_holds_at_once(dtype, frames, width, height, tiled, monkeypatch):
    monkeypatch.setattr(vae, "_finishing", lambda *_: 0)  # of the pipeline, after the decoder
    vae.decoding.cache_clear()
    model, shape = meta_vae(dtype)
    if tiled:
        model.enable_tiling()
    latents = torch.empty(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, dtype=dtype, device="meta")
    with torch.inference_mode(), LiveBytes() as live:
        denoised = latents.clone()
        model.decode(1 / 0.7 * denoised)
    size = {"frames": frames, "height": height, "width": width}
    predicted = vae.decoding(shape, kernels(dtype), **size, tiled=tiled)
    vae.decoding.cache_clear()
    assert predicted == pytest.approx(live.peak, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoding_an_image_takes_what_the_encoder_holds_at_once(dtype):
    model, shape = meta_vae(dtype)
    image = torch.empty(1, 3, 1, 96, 128, dtype=dtype, device="meta")
    with torch.inference_mode(), LiveBytes() as live:
        model.encode(image.clone())
    assert vae.encoding(shape, kernels(dtype), height=96, width=128) == pytest.approx(live.peak, rel=0.01)


def meta_vae(dtype):
    with torch.device("meta"):
        model = AutoencoderKLCogVideoX(**NARROW_VAE).to(dtype).eval()
    return model, VaeShape.from_config(dict(model.config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("guided", "lora", "config"),
    [
        (True, [], {}),
        (False, [], {}),
        (True, ATTENTION, {}),
        (True, [*ATTENTION, "ff.net.0.proj", "ff.net.2"], {}),
        (True, [], {"patch_size_t": 2, "patch_bias": False}),
        (True, [], {"use_rotary_positional_embeddings": False}),
    ],
)
def test_a_step_takes_what_a_block_holds_at_once(dtype, guided, lora, config, monkeypatch):
    monkeypatch.setattr(stages, "_around", lambda *_: 0)  # of the pipeline, around the transformer
    config = {"num_attention_heads": 4, "num_layers": 2, "use_rotary_positional_embeddings": True} | config
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(**config).eval()
        if lora:
            transformer.add_adapter(LoraConfig(r=2, target_modules=lora))
        transformer.to(dtype)
    attention.install(transformer)
    adapted = "everything" if len(lora) > 4 else "attention" if lora else "none"
    clip = Clip(width=320, height=240, frames=25, guided=guided, adapted=adapted)
    shape = ModelShape(
        transformer=TransformerShape.from_config(dict(transformer.config)),
        text_encoder=TextEncoderShape.from_config({}),
        vae=VaeShape.from_config(RELEASED_VAE),
    )
    live = step(transformer, shape, clip, dtype)
    predicted = stages.denoising(shape, kernels(dtype), clip)
    assert predicted == pytest.approx(live.peak, rel=0.02)


def step(transformer, shape, clip, dtype):
    """One call of the transformer, counted."""
    config, batch = transformer.config, 2 if clip.guided else 1
    span = config.patch_size_t or 1
    frames = -(-stages.latent_frames(shape, clip) // span) * span
    with torch.device("meta"):
        latents = torch.empty(batch, frames, 16, clip.height // 8, clip.width // 8, dtype=dtype)
        text = torch.empty(batch, 226, 4096, dtype=dtype)
        timestep = torch.empty(batch, dtype=torch.long)
        positions = torch.empty(stages.video_tokens(shape, clip), config.attention_head_dim)
    rotary = (positions, positions) if config.use_rotary_positional_embeddings else None
    with torch.inference_mode(), LiveBytes() as live:
        transformer(latents, text, timestep, image_rotary_emb=rotary, return_dict=False)
    return live


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoding_a_prompt_takes_what_the_text_encoder_holds_at_once(dtype):
    config = RELEASED_TEXT_ENCODER | {"num_layers": 2}
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**config)).to(dtype).eval()
        tokens = torch.empty(1, 226, dtype=torch.long)
    with torch.inference_mode(), LiveBytes() as live:
        encoder(tokens)
    shape = replace(
        ModelShape.from_spec(SPECS["cogvideox-5b"]), text_encoder=TextEncoderShape.from_config(config)
    )
    assert stages.text_encoding(shape, kernels(dtype)) == pytest.approx(live.peak, rel=0.02)
