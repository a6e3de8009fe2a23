"""What is measured on a few blocks and groups of frames equals what the complete modules hold at once."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from peft import LoraConfig
from torch import nn
from transformers import T5Config, T5EncoderModel

from lib.memory import live, meta
from lib.memory.configs import ModelConfigs, released_transformer
from lib.memory.live import LiveBytes
from lib.memory.model import MemoryModel
from lib.memory.stages import Clip
from lib.models.specs import RELEASED_TEXT_ENCODER, RELEASED_VAE, SPECS
from lib.pipelines import attention

NARROW_VAE = RELEASED_VAE | {
    "block_out_channels": (8, 16, 16, 32),
    "norm_num_groups": 4,
    "sample_height": 96,  # tiles are half of this
    "sample_width": 128,
}
VIDEO = [name for name, spec in SPECS.items() if spec.layers and spec.task != "caption"]
DTYPES = ["float32", "bfloat16"]


@pytest.fixture(autouse=True)
def tensors_alone(monkeypatch):
    """Leave out what kernels allocate, which cannot be seen from outside, and what was measured with it."""
    monkeypatch.setattr(live, "scratch_bytes", lambda *_: 0)
    caches = [each for each in vars(meta).values() if hasattr(each, "cache_clear")]
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def configs(**parts: dict) -> ModelConfigs:
    released = ModelConfigs.from_spec(SPECS["cogvideox-5b"])
    return replace(released, **{name: json.dumps(config) for name, config in parts.items()})


def on_meta(kind: type, config: object, dtype: str) -> nn.Module:
    with torch.device("meta"):
        module = kind(**config) if isinstance(config, dict) else kind(config)
    return nn.Module.to(module.eval(), getattr(torch, dtype))


@pytest.mark.parametrize("name", VIDEO)
def test_a_released_checkpoint_has_as_many_weights_as_its_complete_model(name):
    modules = {
        "transformer": on_meta(CogVideoXTransformer3DModel, released_transformer(SPECS[name]), "float32"),
        "text_encoder": on_meta(T5EncoderModel, T5Config(**RELEASED_TEXT_ENCODER), "float32"),
        "vae": on_meta(AutoencoderKLCogVideoX, RELEASED_VAE, "float32"),
    }
    model = MemoryModel(
        name=name, configs=ModelConfigs.from_spec(SPECS[name]), device="cpu", dtype="float32", image=False
    )
    assert model.part_bytes() == {
        part: sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        for part, module in modules.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("frames", "width", "height", "tiled"),
    [(1, 64, 48, False), (9, 96, 64, False), (13, 96, 64, False), (25, 64, 96, False), (9, 112, 80, True)],
)
def test_decoding_takes_what_the_decoder_holds_at_once(dtype, frames, width, height, tiled):
    model = on_meta(AutoencoderKLCogVideoX, NARROW_VAE, dtype)
    if tiled:
        model.enable_tiling()
    clip = Clip(width=width, height=height, frames=frames)
    shape = (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    latents = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    with torch.inference_mode(), LiveBytes() as held:
        denoised = latents.clone()
        model.decode(1 / 0.7 * denoised)
    predicted = meta.decoding(configs(vae=NARROW_VAE), clip, tiled=tiled, dtype=dtype, device="cuda")
    assert predicted == pytest.approx(held.peak, rel=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("guided", "adapted", "config"),
    [
        (True, "none", {}),
        (False, "none", {}),
        (True, "attention", {}),
        (True, "everything", {}),
        (True, "none", {"patch_size_t": 2, "patch_bias": False}),
        (True, "none", {"use_rotary_positional_embeddings": False}),
    ],
)
def test_a_step_takes_what_a_deep_transformer_holds_at_once(dtype, guided, adapted, config):
    config = {"num_attention_heads": 4, "num_layers": 5, "use_rotary_positional_embeddings": True} | config
    transformer = on_meta(CogVideoXTransformer3DModel, config, dtype)
    attention.install(transformer)
    if adapted != "none":
        layers = [*meta.ATTENTION_LAYERS, *(meta.FEED_FORWARD_LAYERS if adapted == "everything" else ())]
        transformer.add_adapter(LoraConfig(r=64, target_modules=layers))
        nn.Module.to(transformer, getattr(torch, dtype))
    clip = Clip(width=320, height=240, frames=25, guided=guided, adapted=adapted)
    batch, span = 2 if guided else 1, config.get("patch_size_t", 1)
    frames = -(-7 // span) * span
    with torch.device("meta"):
        latents = torch.empty(batch, frames, 16, 30, 40, dtype=getattr(torch, dtype))
        text = torch.empty(batch, 226, 4096, dtype=getattr(torch, dtype))
        timestep = torch.empty(batch, dtype=torch.long)
        positions = torch.empty(frames // span * 15 * 20, 64)
    rotary = (positions, positions) if config["use_rotary_positional_embeddings"] else None
    with torch.inference_mode(), LiveBytes() as held:
        transformer(latents, text, timestep, image_rotary_emb=rotary, return_dict=False)
    predicted = meta.denoising(
        configs(transformer=config, vae=RELEASED_VAE), clip, dtype=dtype, device="cuda"
    )
    around = frames * 30 * 40 * 16 * (latents.itemsize + 12) + (batch + 1) * latents[0].nbytes
    around += 2 * text.nbytes + (2 * positions.nbytes if rotary else 0)
    assert predicted - around == pytest.approx(held.peak, rel=0.01)


@pytest.mark.parametrize("dtype", [*DTYPES, "float16"])
def test_a_prompt_takes_what_a_deep_text_encoder_holds_at_once(dtype):
    config = RELEASED_TEXT_ENCODER | {"num_layers": 4}
    encoder = on_meta(T5EncoderModel, T5Config(**config), dtype)
    if dtype == "float16":
        for block in encoder.encoder.block:
            block.layer[1].DenseReluDense.wo.float()
    tokens = torch.empty(1, 226, dtype=torch.long, device="meta")
    with torch.inference_mode(), LiveBytes() as held:
        encoder(tokens)
    predicted = meta.text_encoding(configs(text_encoder=config), dtype=dtype, device="cuda")
    assert predicted == pytest.approx(held.peak, rel=0.01)


def test_transformers_keeps_the_products_in_float32_that_are_counted_so():
    assert "wo" in (T5EncoderModel._keep_in_fp32_modules or [])
    spec = SPECS["cogvideox-2b"]
    half, single = (
        MemoryModel(
            name=spec.name, configs=ModelConfigs.from_spec(spec), device="cuda", dtype=dtype, image=False
        ).part_bytes()["text_encoder"]
        for dtype in ("float16", "bfloat16")
    )
    assert half - single == 24 * 2 * 4096 * 10240
