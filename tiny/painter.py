"""tiny-painter: the components of a Flux2KleinPipeline at tiny size, and the frames that it learns."""

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from tiny import ideas, world
from tiny.world import Attributes
from tiny.writer import build_writer_tokenizer

TEXT_TOKENS = 48
LATENT_CHANNELS = 8
PATCH = 2
TEXT_LAYERS = (1, 2, 3)
"""The layers whose hidden states the transformer sees: the quarter points, as 9, 18 and 27 of klein's 36."""
SHIFT = 3.0
FORMS = (
    "a {colour} {shape} on a {ground} background",
    "{colour} {shape} on {ground}",
    "a {colour} {shape} in front of {ground}",
    "{colour} {shape}, {ground} background",
    "a {shape} that is {colour}, on a {ground} background",
    "on {ground} there is a {colour} {shape}",
    "the picture shows a {colour} {shape} against {ground}",
    "a single {colour} {shape} {place}",
    "{place}, a {colour} {shape}",
)


def build_painter_tokenizer() -> Qwen2Tokenizer:
    """Return the writer's tokenizer with the length of the painter's texts."""
    tokenizer = build_writer_tokenizer()
    tokenizer.model_max_length = TEXT_TOKENS
    return tokenizer


def build_text_encoder(vocabulary: int) -> Qwen3ForCausalLM:
    """Return an untrained text encoder of 0.4 million parameters."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def build_painter_vae() -> AutoencoderKLFlux2:
    """Return an untrained VAE, 4x in space, of 0.5 million parameters."""
    torch.manual_seed(0)
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=1024,
    )


def build_painter_transformer() -> Flux2Transformer2DModel:
    """Return an untrained transformer of 3 million parameters."""
    torch.manual_seed(0)
    return Flux2Transformer2DModel(
        in_channels=LATENT_CHANNELS * PATCH**2,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=64 * len(TEXT_LAYERS),
        timestep_guidance_channels=128,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )


def build_painter_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def sample_frame(scene: Attributes, rng: np.random.Generator) -> np.ndarray:
    """Render a first frame [height, width, 3] as image-to-video takes it: no hint of where the shape goes."""
    return world.render(world.sample_scene(scene, rng, from_start=True, frames=1))[0]


def sample_image_prompt(scene: Attributes, rng: np.random.Generator, variety: float) -> str:
    """Sample a description of a first frame; with probability `variety` in other words."""
    if rng.random() >= variety:
        return ideas.image_caption(scene)
    loose = rng.random() < 0.5
    colour, shape, ground = scene.colour, scene.shape, scene.background
    place = f"on a {ground} background"
    if loose:
        colour, shape = ideas.word(rng, ideas.COLOUR_WORDS[colour]), ideas.word(rng, ideas.SHAPE_WORDS[shape])
        place = ideas.ground_phrase(rng, ground)
    if rng.random() < 0.3:
        ground = ground.replace("gray", "grey")
    text = FORMS[int(rng.integers(len(FORMS)))].format(colour=colour, shape=shape, ground=ground, place=place)
    text = text[:1].upper() + text[1:] if rng.random() < 0.3 else text
    return f"{text}." if rng.random() < 0.3 else text
