"""The transformer's inputs in training equal those of diffusers' pipelines, and the loss its formula."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import CogVideoXDDIMScheduler
from PIL import Image

from tests.training_factory import CHANNELS, TEXT_WIDTH, is_i2v, pipeline, transformer, vae
from tiny.networks import SCHEDULER
from training import objective
from training.adapter import add_adapter
from training.batches import Batch, Feeder, ImageCondition
from training.trainer import Trainer

ALPHAS = CogVideoXDDIMScheduler(**SCHEDULER).alphas_cumprod.float()


class Captured(Exception):
    """Raised once the transformer's inputs are known."""


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(count: int, width: int, height: int) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count)]


def batch(layout: str, frames: int, width: int, height: int, *, size: int = 1, step: int = 999) -> Batch:
    """What batches.py hands over for clips of these sizes, without noise on the image."""
    shape = (size, (frames - 1) // 4 + 1, CHANNELS, height // 8, width // 8)
    temporal_patch = 2 if layout.startswith("1.5") else None
    latents = objective.padded_in_front(noise(*shape, seed=1), temporal_patch)
    made = {
        "latents": latents,
        "noise": noise(*latents.shape, seed=2),
        "timesteps": torch.full((size,), step),
        "text": noise(size, 224 if layout.startswith("1.5") else 226, TEXT_WIDTH, seed=4),
        "condition": None,
        "prior": False,
    }  # fmt: skip
    if is_i2v(layout):
        pixels = np.stack([np.asarray(image) for image in images(size, width, height)])
        first = torch.from_numpy(pixels).permute(0, 3, 1, 2)[:, :, None]
        made["condition"] = ImageCondition(
            images=first,
            image_noise=noise(*first.shape, seed=5),
            image_deviation=torch.zeros(size),
            latent_noise=drawn_by_the_pipeline(size, height, width),
            image_kept=torch.ones(size, dtype=torch.bool),
        )
    return Batch(**made)


def drawn_by_the_pipeline(size: int, height: int, width: int) -> torch.Tensor:
    """The noise with which a pipeline with this seed samples its images' latents, one after the other."""
    generator = torch.Generator().manual_seed(11)
    shape = (1, CHANNELS, 1, height // 8, width // 8)
    drawn = [torch.randn(shape, generator=generator) for _ in range(size)]
    return torch.cat(drawn).transpose(1, 2)


def fed_by_the_pipeline(pipe, given: Batch, frames: int, noisy: torch.Tensor, *, step: int = 0) -> dict:
    """The transformer's inputs at a step of a real call that has these noisy latents there."""
    height, width = (8 * side for side in given.latents.shape[-2:])
    calls = []

    def capture(module, arguments, options):
        calls.append(options)
        if len(calls) > step:
            raise Captured

    def replace_latents(pipe, index, timestep, tensors):
        return {"latents": noisy}

    hook = pipe.transformer.register_forward_pre_hook(capture, with_kwargs=True)
    image = {} if given.condition is None else {"image": images(len(given.latents), width, height)}
    with pytest.raises(Captured), torch.no_grad():
        pipe(
            **image,
            prompt_embeds=given.text,
            num_inference_steps=3,
            guidance_scale=1.0,
            num_frames=frames,
            width=width,
            height=height,
            latents=noisy,
            generator=torch.Generator().manual_seed(11),
            callback_on_step_end=replace_latents,
            max_sequence_length=given.text.shape[1],
        )
    hook.remove()
    return calls[step]


def feeder(pipe, *given: Batch, dtype: torch.dtype = torch.float32) -> Feeder:
    """What the trainer feeds its transformer with, for batches that are given."""
    return Feeder(
        SimpleNamespace(batches=lambda step, indices: given),
        transformer_config=pipe.transformer.config,
        alphas_cumprod=ALPHAS,
        vae=pipe.vae,
        batch_size=len(given[0].latents),
        micro_batches=1,
        process=0,
        processes=1,
        device=torch.device("cpu"),
        dtype=dtype,
    )


def fed_by_the_trainer(pipe, given: Batch, *, dtype: torch.dtype = torch.float32) -> dict:
    (inputs,) = feeder(pipe, given, dtype=dtype).micro_batch(0)
    return inputs.arguments


def assert_same_inputs(ours: dict, theirs: dict) -> None:
    mine, other = ours["hidden_states"], theirs["hidden_states"]
    assert mine.dtype == other.dtype and torch.equal(mine[:, :, :CHANNELS], other[:, :, :CHANNELS])
    if len(mine) == 1:
        assert torch.equal(mine, other)
    else:  # the pipeline encodes several images one by one
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])
    assert torch.equal(ours["timestep"], theirs["timestep"])
    assert ours["timestep"].dtype == theirs["timestep"].dtype
    for name in ("ofs", "image_rotary_emb"):
        mine, other = ours[name], theirs.get(name)
        assert (mine is None) == (other is None), name
        pairs = zip(mine, other, strict=True) if isinstance(mine, tuple) else [(mine, other)]
        for a, b in pairs:
            assert a is b is None or (torch.equal(a, b) and a.dtype == b.dtype), name


# The released sizes and others: only one frame is encoded, and the transformer itself does not run.
RELEASED = [
    ("2b", 49, 720, 480),
    ("2b", 17, 640, 352),
    ("5b", 49, 720, 480),
    ("5b", 9, 480, 720),
    ("5b", 25, 512, 512),
    ("5b-i2v", 49, 720, 480),
    ("5b-i2v", 17, 720, 480),
    ("1.5-5b", 81, 1360, 768),
    ("1.5-5b", 17, 768, 768),
    ("1.5-5b-i2v", 81, 1360, 768),
    ("1.5-5b-i2v", 81, 384, 672),
    ("1.5-5b-i2v", 161, 512, 384),
    ("1.5-5b-i2v", 17, 384, 384),
]


@pytest.mark.parametrize(("layout", "frames", "width", "height"), RELEASED)
def test_the_transformer_is_fed_what_the_pipeline_feeds_it(layout, frames, width, height):
    pipe = pipeline(layout, attention_head_dim=64, num_attention_heads=1)
    given = batch(layout, frames, width, height)
    noisy = objective.noised(given.latents, given.noise, ALPHAS[given.timesteps])
    ours = fed_by_the_trainer(pipe, given)
    assert_same_inputs(ours, fed_by_the_pipeline(pipe, given, frames, noisy))
    padded = {13: 13, 21: 22, 41: 42, 5: 6 if pipe.transformer.config.patch_size_t else 5}
    latent_frames = (frames - 1) // 4 + 1
    assert ours["hidden_states"].shape[1] == padded.get(latent_frames, latent_frames)
    assert ours["hidden_states"].shape[2] == CHANNELS * (2 if is_i2v(layout) else 1)
    assert (ours["ofs"] is None) == (layout != "1.5-5b-i2v")
    assert (ours["image_rotary_emb"] is None) == (layout == "2b")


@pytest.mark.parametrize("layout", ["5b", "5b-i2v", "1.5-5b-i2v"])
def test_several_samples_are_fed_as_the_pipeline_feeds_them_at_a_later_step(layout):
    size = {"sample_height": 4, "sample_width": 6} if layout == "5b-i2v" else {}
    pipe = pipeline(layout, **size)
    pipe.scheduler.set_timesteps(3)
    step = int(pipe.scheduler.timesteps[2])
    given = batch(layout, 17, 48, 32, size=2, step=step)
    noisy = objective.noised(given.latents, given.noise, ALPHAS[given.timesteps])
    theirs = fed_by_the_pipeline(pipe, given, 17, noisy, step=2)
    assert 0 < step < 999
    assert_same_inputs(fed_by_the_trainer(pipe, given), theirs)


def test_a_sample_is_predicted_as_the_pipeline_predicts_it():
    pipe = pipeline("1.5-5b-i2v")
    given = batch("1.5-5b-i2v", 17, 48, 32)
    noisy = objective.noised(given.latents, given.noise, ALPHAS[given.timesteps])
    ours, theirs = fed_by_the_trainer(pipe, given), fed_by_the_pipeline(pipe, given, 17, noisy)
    theirs.pop("return_dict")
    with torch.no_grad():
        mine, other = (pipe.transformer(**fed, return_dict=False)[0] for fed in (ours, theirs))
    assert torch.equal(mine, other) and mine.abs().mean() > 0.01


def test_noisy_latents_are_rounded_once_to_the_bases_type():
    pipe, given = pipeline("5b-i2v"), batch("5b-i2v", 9, 48, 32, step=1)
    exact = fed_by_the_trainer(pipe, given)
    rounded = fed_by_the_trainer(pipe, given, dtype=torch.bfloat16)
    for name in ("hidden_states", "encoder_hidden_states"):
        assert exact[name].dtype == torch.float32
        assert torch.equal(rounded[name], exact[name].bfloat16())
    assert all(table.dtype == torch.float32 for table in rounded["image_rotary_emb"])


def test_padding_repeats_the_first_frame_in_front_and_is_what_the_pipeline_drops():
    latents = noise(2, 21, CHANNELS, 4, 6)
    padded = objective.padded_in_front(latents, 2)
    assert padded.shape[1] == 22
    assert torch.equal(padded[:, 1:], latents) and torch.equal(padded[:, :1], latents[:, :1])
    assert torch.equal(objective.padded_in_front(latents, None), latents)
    assert torch.equal(objective.padded_in_front(latents[:, :20], 2), latents[:, :20])
    assert objective.padded_in_front(latents, 4).shape[1] == 24


def test_the_image_condition_is_at_index_zero_after_the_noisy_channels():
    noisy, image = noise(2, 5, CHANNELS, 4, 6), noise(2, 1, CHANNELS, 4, 6, seed=1)
    made = objective.model_input(noisy, image)
    assert torch.equal(made[:, :, :CHANNELS], noisy)
    assert torch.equal(made[:, :1, CHANNELS:], image)
    assert not made[:, 1:, CHANNELS:].any()
    assert torch.equal(objective.model_input(noisy, None), noisy)


# The first frame


@pytest.mark.parametrize("inverted", [False, True])
def test_image_latents_are_scaled_as_at_prediction(inverted):
    model = vae(scaling_factor=0.7, inverted=inverted)
    clips = batch("5b-i2v", 9, 48, 32, size=2)
    given = clips.condition
    given.latent_noise = torch.zeros_like(given.latent_noise)
    pipe = pipeline("5b-i2v")
    pipe.vae = model
    with torch.no_grad():
        mean = model.encode(given.images.float() / 255 * 2 - 1).latent_dist.mean.transpose(1, 2)
    made = feeder(pipe, clips).image_latents(given)
    assert torch.equal(made, mean * (1 / 0.7 if inverted else 0.7))
    given.image_kept = torch.tensor([True, False])
    dropped = feeder(pipe, clips).image_latents(given)
    assert torch.equal(dropped[0], made[0]) and not dropped[1].any()


def test_noise_is_added_to_the_image_and_does_not_replace_it():
    image = torch.full((2, 3, 1, 32, 48), 0.5)
    drawn = noise(*image.shape)
    noisy = objective.noisy_image(image, torch.tensor([0.0, 0.05]), drawn)
    assert torch.equal(noisy[0], image[0])
    assert torch.allclose(noisy[1], image[1] + 0.05 * drawn[1])
    assert abs(noisy[1].mean() - 0.5) < 0.01


# The loss


def test_the_loss_equals_the_formula_in_float64():
    latents, drawn, predicted = (noise(4, 5, CHANNELS, 6, 8, seed=seed) for seed in range(3))
    steps = torch.tensor([0, 1, 500, 999])
    exact = CogVideoXDDIMScheduler(**SCHEDULER).alphas_cumprod.double()[steps].view(-1, 1, 1, 1, 1)
    velocity = exact.sqrt() * drawn.double() - (1 - exact).sqrt() * latents.double()
    expected = (predicted.double() - velocity).pow(2).mean((1, 2, 3, 4))
    made = objective.losses(predicted, latents, drawn, ALPHAS[steps])
    assert made.dtype == torch.float32 and made.shape == (4,)
    assert torch.allclose(made.double(), expected, rtol=1e-5, atol=0)


def test_the_loss_is_the_x0_error_weighted_by_one_over_one_minus_alpha():
    latents, drawn, predicted = (noise(3, 5, CHANNELS, 6, 8, seed=seed).double() for seed in range(3))
    steps = torch.tensor([20, 500, 980])
    alphas = ALPHAS.double()[steps].view(-1, 1, 1, 1, 1)
    noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * drawn
    clean = alphas.sqrt() * noisy - (1 - alphas).sqrt() * predicted
    weighted = ((clean - latents).pow(2) / (1 - alphas)).mean((1, 2, 3, 4))
    made = objective.losses(predicted.float(), latents.float(), drawn.float(), ALPHAS[steps])
    assert torch.allclose(made.double(), weighted, rtol=1e-5)


def test_the_loss_of_an_exact_answer_is_zero_and_of_zeros_the_velocitys_variance():
    latents, drawn = noise(2, 5, CHANNELS, 16, 16), noise(2, 5, CHANNELS, 16, 16, seed=1)
    alphas = ALPHAS[torch.tensor([100, 900])]
    velocity = objective.velocity(latents, drawn, alphas)
    assert objective.losses(velocity, latents, drawn, alphas).tolist() == [0, 0]
    zeros = objective.losses(torch.zeros_like(latents), latents, drawn, alphas)
    assert torch.allclose(zeros, torch.ones(2), atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_is_float32_for_16_bit_predictions_and_float64_alphas(dtype):
    latents, drawn, predicted = (noise(2, 3, CHANNELS, 4, 4, seed=seed) for seed in range(3))
    alphas = ALPHAS[torch.tensor([1, 700])]
    made = objective.losses(predicted.to(dtype), latents, drawn, alphas.double())
    exact = objective.losses(predicted.to(dtype).float(), latents, drawn, alphas)
    assert made.dtype == torch.float32 and torch.equal(made, exact)


@pytest.mark.parametrize("step", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_timesteps_keep_their_noise(step, dtype):
    """In bf16 alone it would be rounded away."""
    latents, drawn = noise(1, 5, CHANNELS, 32, 32).to(dtype), noise(1, 5, CHANNELS, 32, 32, seed=1).to(dtype)
    alphas = ALPHAS[[step]]
    noisy = objective.noised(latents, drawn, alphas)
    exact = alphas.double()
    signal, deviation = exact.sqrt().item(), (1 - exact).sqrt().item()
    assert noisy.dtype == torch.float32
    left = (noisy.double() - signal * latents.double()) / deviation
    assert torch.allclose(left, drawn.double(), atol=1e-3)
    assert deviation > 0.02


def test_the_last_timestep_is_pure_noise():
    latents, drawn = noise(1, 3, CHANNELS, 4, 4), noise(1, 3, CHANNELS, 4, 4, seed=1)
    assert torch.equal(objective.noised(latents, drawn, ALPHAS[[999]]), drawn)
    assert torch.equal(objective.velocity(latents, drawn, ALPHAS[[999]]), -latents)


def test_each_sample_of_a_batch_has_its_own_timestep():
    latents, drawn = noise(3, 5, CHANNELS, 4, 4), noise(3, 5, CHANNELS, 4, 4, seed=1)
    alphas = ALPHAS[torch.tensor([3, 400, 900])]
    together = objective.noised(latents, drawn, alphas)
    for index in range(3):
        alone = objective.noised(latents[[index]], drawn[[index]], alphas[[index]])
        assert torch.equal(together[[index]], alone)


def losses_of(denoiser, pipe, given: Batch, model=None) -> torch.Tensor:
    trainer = Trainer.__new__(Trainer)
    trainer.transformer, trainer.denoiser, trainer.accelerator = model, denoiser, Accelerator(cpu=True)
    (inputs,) = feeder(pipe, given).micro_batch(0)
    return trainer.losses(inputs)


def test_the_trainers_loss_compares_with_the_velocity_of_padded_latents():
    pipe, given = pipeline("1.5-5b-i2v"), batch("1.5-5b-i2v", 17, 48, 32, size=2, step=300)
    exact = objective.velocity(given.latents, given.noise, ALPHAS[given.timesteps])
    assert losses_of(lambda inputs: exact, pipe, given).tolist() == [0, 0]
    assert losses_of(lambda inputs: exact + 0.5, pipe, given).tolist() == pytest.approx([0.25, 0.25])


def test_the_target_of_prior_samples_is_the_bases_answer():
    pipe, given = pipeline("1.5-5b-i2v"), batch("1.5-5b-i2v", 17, 48, 32, size=2, step=300)
    given.prior = True
    model = pipe.transformer
    parameters = add_adapter(model, rank=2, alpha=2, targets=["to_q", "to_v"])

    def denoiser(inputs):
        return model(**inputs.arguments, return_dict=False)[0]

    assert losses_of(denoiser, pipe, given, model).tolist() == [0, 0]  # the LoRA starts as the base
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.5)
    (inputs,) = feeder(pipe, given).micro_batch(0)
    with torch.no_grad():
        answer = denoiser(inputs)
        model.disable_adapters()
        base = denoiser(inputs)
        model.enable_adapters()
    made = losses_of(denoiser, pipe, given, model)
    assert torch.allclose(made, (answer - base).pow(2).mean((1, 2, 3, 4))) and made.min() > 1e-4
    made.sum().backward()
    assert all(parameter.requires_grad and parameter.grad.any() for parameter in parameters)
    with torch.no_grad():
        assert torch.equal(denoiser(inputs), answer)


def test_each_shape_is_fed_separately_with_its_own_tables():
    pipe = pipeline("5b")
    first, second = batch("5b", 9, 48, 32), batch("5b", 17, 48, 32)
    made = feeder(pipe, first, second).micro_batch(0)
    assert [inputs.latents.shape[1] for inputs in made] == [3, 5]
    for inputs, given in zip(made, (first, second), strict=True):
        assert torch.equal(
            inputs.arguments["image_rotary_emb"][0], fed_by_the_trainer(pipe, given)["image_rotary_emb"][0]
        )
        assert len(inputs.arguments["image_rotary_emb"][0]) == given.latents.shape[1] * 2 * 3


@pytest.mark.parametrize("processes", [1, 3])
def test_processes_and_micro_batches_share_a_step_without_overlap(processes):
    asked = []
    for process in range(processes):
        made = feeder(pipeline("5b"), batch("5b", 9, 48, 32))
        made.sampler = SimpleNamespace(batches=lambda step, indices: asked.append((step, *indices)) or [])
        made.process, made.processes, made.batch_size, made.micro_batches = process, processes, 2, 2
        for number in range(4):
            made.micro_batch(number)
    for step in (0, 1):
        indices = [index for at, *share in asked if at == step for index in share]
        assert sorted(indices) == list(range(4 * processes))


def test_a_projection_in_float32_ignores_autocast():
    model = transformer("5b-i2v", sample_height=4, sample_width=6)
    latents = noise(2, 2 * CHANNELS, 4, 6)
    with torch.no_grad():
        exact = model.patch_embed.proj(latents)
        objective.project_in_float32(model.patch_embed.proj)
        with torch.autocast("cpu", torch.bfloat16):
            kept = model.patch_embed.proj(latents)
    assert kept.dtype == torch.float32 and torch.equal(kept, exact)
