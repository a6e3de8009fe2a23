"""Only the LoRA is trained, in float32, and the file has the trained matrices."""

import json

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib.errors import UserError
from tests.training_factory import TEXT_WIDTH, config, pipeline, transformer
from training import objective
from training.adapter import adapter_weights, add_adapter, check_adapter, load_adapter, save_adapter
from training.optimization import build_optimizer, build_schedule
from training.validation import as_served

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
SIZE = {"sample_height": 4, "sample_width": 6, "sample_frames": 9}


def model(layout: str = "5b-i2v", **changes):
    size = SIZE if layout == "5b-i2v" else {}
    return transformer(layout, **size | changes)


def adapted(*, rank=4, alpha=2.0, targets=TARGETS, seed=0, random=True, dtype=torch.float32, **changes):
    """A transformer with a LoRA whose matrices are large enough to be seen."""
    made = model(**changes).to(dtype)
    torch.manual_seed(seed)
    parameters = add_adapter(made, rank=rank, alpha=alpha, targets=targets)
    if random:
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.3)
    return made, parameters


def answer(made, dtype=torch.float32, *, seed=5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    channels = made.config.in_channels
    hidden = torch.randn(1, 4, channels, 4, 6, generator=generator).to(dtype)
    text = torch.randn(1, made.config.max_text_seq_length, TEXT_WIDTH, generator=generator).to(dtype)
    return made(
        hidden_states=hidden if made.config.patch_size_t else hidden[:, :3],
        encoder_hidden_states=text,
        timestep=torch.tensor([400]),
        ofs=objective.offset(made.config, hidden),
        image_rotary_emb=objective.rotary_tables(
            made.config, hidden.shape if made.config.patch_size_t else hidden[:, :3].shape, "cpu"
        ),
        return_dict=False,
    )[0]


# Training


@pytest.mark.parametrize("layout", ["2b", "5b-i2v", "1.5-5b-i2v"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_lora_matrices_and_nothing_else(layout, checkpointing):
    made, parameters = adapted(random=False, layout=layout)
    if checkpointing:
        made.enable_gradient_checkpointing()
    made.train()
    answer(made).pow(2).mean().backward()
    touched = {name for name, parameter in made.named_parameters() if parameter.grad is not None}
    assert touched == {name for name, _ in made.named_parameters() if "lora_" in name}
    assert len(touched) == len(parameters) == 2 * len(TARGETS) * made.config.num_layers
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            assert parameter.grad.any(), name
        elif "lora_A" in name:
            assert not parameter.grad.any(), f"{name}: B is zero, so A learns from the second step on"


@pytest.mark.parametrize(("base", "autocast"), [("bfloat16", True), ("float32", True), ("float32", False)])
def test_matrices_and_gradients_are_float32_whatever_the_base_computes_in(base, autocast):
    dtype = getattr(torch, base)
    made, parameters = adapted(random=False, dtype=dtype)
    if base == "float32":
        objective.project_in_float32(made.patch_embed.proj)  # as on a CPU
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        predicted = answer(made, dtype)
    predicted.float().pow(2).mean().backward()
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert {parameter.grad.dtype for parameter in parameters} == {torch.float32}
    assert all(parameter.grad.any() for name, parameter in made.named_parameters() if "lora_B" in name)
    assert {p.dtype for p in made.parameters() if not p.requires_grad} == {dtype}


def test_training_starts_from_the_base_and_a_seed_determines_the_matrices():
    base = answer(model())
    made, _ = adapted(random=False, seed=3)
    again, _ = adapted(random=False, seed=3)
    other, _ = adapted(random=False, seed=4)
    assert torch.equal(answer(made), base)
    first, second, third = (adapter_weights(each) for each in (made, again, other))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not all(torch.equal(value, third[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (["to_q"], {"transformer_blocks.0.attn1.to_q"}),
        (["attn1.to_v", "ff.net.2"], {"transformer_blocks.0.attn1.to_v", "transformer_blocks.0.ff.net.2"}),
        (["ff.net.0.proj"], {"transformer_blocks.0.ff.net.0.proj"}),
        (["norm1.linear", "proj_out"], {"transformer_blocks.0.norm1.linear", "proj_out"}),
    ],
)
def test_target_layers_are_matched_by_the_end_of_their_names(targets, modules):
    made, _ = adapted(targets=targets)
    names = {name.removeprefix("transformer.").partition(".lora_")[0] for name in adapter_weights(made)}
    assert names == modules


@pytest.mark.parametrize("target", ["to_qq", "q", "to_out", "attn1", "patch_embed.proj", "o_q"])
def test_an_unknown_target_is_refused_with_the_names_that_exist(target):
    with pytest.raises(UserError) as caught:
        add_adapter(model(), rank=4, alpha=4, targets=["to_q", target])
    message = str(caught.value)
    assert message.startswith(f"target_modules: no linear layer is called {target!r}; there are ")
    named = message.partition("there are ")[2].rstrip(".").split(", ")
    assert {"to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"} <= set(named)
    for name in named:
        assert add_adapter(model(), rank=1, alpha=1, targets=[name]), name


# Writing


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 1.5), (2, 16.0)])
def test_a_saved_file_in_plain_diffusers_is_the_trained_transformer(tmp_path, rank, alpha):
    made, _ = adapted(rank=rank, alpha=alpha)
    trained = answer(made)
    save_adapter(made, tmp_path / "lora.safetensors", {"base": "x"}, dtype=torch.float32)
    pipe = pipeline("5b-i2v", **SIZE)
    base = answer(pipe.transformer)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    assert isinstance(pipe, CogVideoXImageToVideoPipeline)
    assert pipe.get_list_adapters() == {"transformer": ["default_0"]}
    assert torch.equal(answer(pipe.transformer), trained)
    assert not torch.allclose(trained, base, atol=1e-3)


@pytest.mark.parametrize("alpha", [4.0, 1.5])
def test_rounded_matrices_serve_as_they_do_in_validation(tmp_path, alpha):
    made, parameters = adapted(alpha=alpha, dtype=torch.bfloat16)
    before = [parameter.detach().clone() for parameter in parameters]
    made.train()
    with as_served(made, torch.bfloat16), torch.no_grad():
        assert not made.training
        assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
        shown = answer(made, torch.bfloat16)
    assert made.training and all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    save_adapter(made, tmp_path / "lora.safetensors", {}, dtype=torch.bfloat16)
    pipe = pipeline("5b-i2v", **SIZE)
    pipe.transformer.to(torch.bfloat16)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    with torch.no_grad():
        assert torch.equal(answer(pipe.transformer, torch.bfloat16), shown)


def test_a_failure_while_serving_restores_the_exact_matrices():
    made, parameters = adapted()
    before = [parameter.detach().clone() for parameter in parameters]
    with pytest.raises(RuntimeError), as_served(made, torch.float16):
        raise RuntimeError
    assert made.training and all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert {p.dtype for p in parameters} == {torch.float32}


def test_the_file_has_diffusers_names_and_the_metadata(tmp_path):
    path = tmp_path / "lora.safetensors"
    made, _ = adapted(rank=4, alpha=1.5)
    save_adapter(made, path, {"base": "tiny-i2v", "steps": 5, "settings": {"rank": 4}}, dtype=torch.float16)
    with safe_open(path, "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
        kinds = {file.get_tensor(name).dtype for name in names}
    layers = [f"transformer.transformer_blocks.0.attn1.{target}" for target in TARGETS]
    assert names == {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    assert kinds == {torch.float16}
    stored = json.loads(metadata["lora_adapter_metadata"])
    assert stored["transformer.r"] == 4 and stored["transformer.lora_alpha"] == 1.5
    assert sorted(stored["transformer.target_modules"]) == sorted(TARGETS)
    assert json.loads(metadata["cogvideox"]) == {"base": "tiny-i2v", "steps": 5, "settings": {"rank": 4}}
    assert str(tmp_path) not in json.dumps(metadata)


def test_the_same_lora_gives_the_same_bytes_and_only_what_older_peft_knows(tmp_path):
    made, _ = adapted(alpha=1.5)
    files = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for path in files:
        save_adapter(made, path, {"trigger_word": "naïve \U0001f98a\n\t\x01"}, dtype=torch.float16)
    assert len({path.read_bytes() for path in files}) == 1
    with safe_open(files[0], "pt") as file:
        metadata = file.metadata()
    assert list(json.loads(metadata["cogvideox"])) == ["trigger_word"]
    assert {key.removeprefix("transformer.") for key in json.loads(metadata["lora_adapter_metadata"])} == {
        *("peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora"),
        *("use_dora", "bias", "lora_dropout", "init_lora_weights"),
    }
    weights = load_file(files[0])
    assert all(torch.equal(weights[name], value.half()) for name, value in adapter_weights(made).items())


def test_a_failed_write_keeps_the_earlier_file(tmp_path):
    made, _ = adapted()
    path = tmp_path / "lora.safetensors"
    save_adapter(made, path, {}, dtype=torch.float32)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"missing.*lora\.safetensors could not be written"):
        save_adapter(made, tmp_path / "missing" / "lora.safetensors", {}, dtype=torch.float32)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# Reading


def test_a_checkpoints_lora_is_restored_bit_for_bit(tmp_path):
    made, _ = adapted(rank=3, alpha=5.0)
    save_adapter(made, tmp_path / "lora.safetensors", {}, dtype=torch.float32)
    other, parameters = adapted(rank=3, alpha=5.0, seed=9)
    load_adapter(other, tmp_path / "lora.safetensors")
    here, there = adapter_weights(made), adapter_weights(other)
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
    assert torch.equal(answer(made), answer(other))
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in parameters)


def test_loading_fills_the_parameters_that_the_optimizer_knows(tmp_path):
    made, _ = adapted()
    save_adapter(made, tmp_path / "lora.safetensors", {}, dtype=torch.float32)
    other, parameters = adapted(seed=9)
    load_adapter(other, tmp_path / "lora.safetensors")
    optimizer = build_optimizer(config(learning_rate=0.1).optimizer, parameters, global_batch=1)
    before = answer(other).detach()
    answer(other).pow(2).mean().backward()
    optimizer.step()
    assert not torch.equal(answer(other), before)


@pytest.mark.parametrize("other", [{"rank": 8}, {"targets": ["to_q"]}, {"num_layers": 2}])
def test_the_lora_of_another_run_is_refused(tmp_path, other):
    made, _ = adapted()
    save_adapter(made, tmp_path / "lora.safetensors", {}, dtype=torch.float32)
    with pytest.raises(UserError, match=r"has another LoRA .* use the base, rank and target_modules that it"):
        load_adapter(adapted(**other)[0], tmp_path / "lora.safetensors")


def test_a_damaged_file_is_refused(tmp_path):
    made, parameters = adapted()
    path = tmp_path / "lora.safetensors"
    save_adapter(made, path, {}, dtype=torch.float32)
    for content in (path.read_bytes()[:-10], b"no tensors", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"lora\.safetensors of the checkpoint cannot be read"):
            load_adapter(made, path)
    path.unlink()
    with pytest.raises(UserError, match=r"lora\.safetensors of the checkpoint cannot be read"):
        load_adapter(made, path)
    assert parameters


def test_a_file_without_our_prefix_is_another_lora(tmp_path):
    made, _ = adapted()
    path = tmp_path / "lora.safetensors"
    save_adapter(made, path, {}, dtype=torch.float32)
    renamed = {name.replace("transformer.", "base_model.model.", 1): v for name, v in load_file(path).items()}
    save_file(renamed, path)
    with pytest.raises(UserError, match="has another LoRA"):
        load_adapter(made, path)


# Optimizers and schedules


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_optimizers_get_their_settings_and_adam_decays_through_the_gradient(name, kind):
    settings = config(
        optimizer=name,
        learning_rate=0.1,
        adam_beta1=0.8,
        adam_beta2=0.9,
        adam_weight_decay=0.01,
        adam_epsilon=1e-6,
    ).optimizer
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(settings, [parameter], global_batch=4)
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.1, (0.8, 0.9), 0.01, 1e-6)
    parameter.grad = torch.zeros(3)
    optimizer.step()
    # Decoupled decay scales weights by 1 - lr * decay; through the gradient Adam makes it a full step.
    expected = 1 - 0.1 * 0.01 if name == "adamw" else 1 - 0.1
    assert torch.allclose(parameter.detach(), torch.full((3,), expected), atol=1e-4)


RATES = {
    "constant": [1, 1, 1, 1, 1, 1],
    "constant_with_warmup": [0, 0.5, 1, 1, 1, 1],
    "linear": [0, 0.5, 1, 0.75, 0.5, 0.25],
    "polynomial": [0, 0.5, 1, 0.75**2, 0.5**2, 0.25**2],
    "cosine": [0, 0.5, 1, 0.853553, 0.5, 0.146447],
    "cosine_with_restarts": [0, 0.5, 1, 0.5, 1, 0.5],
}


@pytest.mark.parametrize("name", RATES)
def test_schedules_have_their_shape_over_the_steps(name):
    settings = config(
        lr_scheduler=name, lr_warmup_steps=2, lr_num_cycles=1 if name == "cosine" else 2, lr_power=2,
        learning_rate=1,
    ).optimizer  # fmt: skip
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = build_optimizer(settings, [parameter], global_batch=1)
    schedule = build_schedule(settings, optimizer, 6)
    seen = []
    for _ in range(6):
        seen.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx(RATES[name], abs=1e-5)


def test_warm_up_is_a_tenth_of_the_steps_unless_given():
    parameter = torch.nn.Parameter(torch.ones(1))
    for steps, warm in ((100, 10), (9, 0), (20_000, 500)):
        settings = config(lr_scheduler="constant_with_warmup").optimizer
        schedule = build_schedule(settings, build_optimizer(settings, [parameter], global_batch=1), steps)
        assert [schedule.lr_lambdas[0](step) for step in (warm // 2, warm, warm + 1)] == pytest.approx(
            [0.5 if warm else 1, 1, 1]
        )


def test_resuming_from_a_lora_of_another_base_rank_or_alpha_is_refused(tmp_path):
    path = tmp_path / "lora.safetensors"
    recorded = {"cogvideox": json.dumps({"base": "tiny-i2v", "rank": 4, "alpha": 4.0})}
    save_file({"x": torch.zeros(1)}, path, metadata=recorded)
    check_adapter(path, base="tiny-i2v", rank=4, alpha=4.0)
    with pytest.raises(UserError) as caught:
        check_adapter(path, base="tiny-t2v", rank=8, alpha=4.0)
    assert str(caught.value) == (
        "lora.safetensors to resume from does not fit: base (it has tiny-i2v, this run tiny-t2v), "
        "rank (it has 4, this run 8)."
    )
    save_file({"x": torch.zeros(1)}, path)
    check_adapter(path, base="tiny-t2v", rank=8, alpha=4.0)  # without metadata the shapes decide
