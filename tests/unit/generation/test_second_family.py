"""CogVideoX1.5's layout (temporal patches, ofs, inverted scaling) at tiny size, with random weights."""

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from PIL import Image

from lib.generation.request import build_request
from tiny.evaluate import DEFAULTS, load_generator
from tiny.networks import SCHEDULER, build_text_encoder, build_vae
from tiny.tokenizer import build_tokenizer

KINDS = {"t2v": CogVideoXPipeline, "i2v": CogVideoXImageToVideoPipeline}


def save_pipeline(folder, task: str) -> None:
    torch.manual_seed(0)
    tokenizer, vae = build_tokenizer(), build_vae(0.7)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=16 if task == "i2v" else 8,
        out_channels=8,
        num_layers=2,
        time_embed_dim=32,
        text_embed_dim=64,
        max_text_seq_length=20,
        sample_height=12,
        sample_width=16,
        sample_frames=17,
        patch_size=2,
        patch_size_t=2,
        patch_bias=False,
        ofs_embed_dim=32 if task == "i2v" else None,
        use_rotary_positional_embeddings=True,
    )
    vae.register_to_config(invert_scale_latents=task == "i2v")
    KINDS[task](
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(len(tokenizer)),
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(**SCHEDULER),
    ).save_pretrained(folder)


@pytest.mark.parametrize("num_frames", [17, 33])
@pytest.mark.parametrize("task", KINDS)
def test_frames_of_the_second_family_are_plain_diffusers_frames(tmp_path, task, num_frames):
    save_pipeline(tmp_path / "second", task)
    generator = load_generator(tmp_path / "second")
    image = Image.effect_noise((64, 48), 60).convert("RGB") if task == "i2v" else None
    settings = {"prompt": "a red circle", "seed": 3, "num_inference_steps": 2, "num_frames": num_frames}
    request = build_request(generator.spec, **DEFAULTS | settings | {"image": image})
    assert generator.spec.frame_step == 16
    plain = KINDS[task].from_pretrained(tmp_path / "second", dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    video = plain(
        prompt=request.prompt,
        num_inference_steps=2,
        guidance_scale=6.0,
        num_frames=num_frames,
        width=64,
        height=48,
        generator=torch.Generator().manual_seed(3),
        max_sequence_length=20,
        **({"image": image} if image else {}),
    ).frames[0]
    frames = generator.frames(request)
    assert frames.shape == (num_frames, 48, 64, 3)
    assert np.array_equal(frames, np.stack([np.asarray(frame) for frame in video]))
