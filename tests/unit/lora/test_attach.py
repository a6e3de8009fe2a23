"""Frames with LoRAs are bit-equal to plain diffusers', and to the base's once they are off again."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from lib.cancellation import Stopped
from lib.errors import UserError
from lib.generation.generator import Generator
from lib.generation.request import build_request
from lib.lora import attach
from lib.lora.attach import Loras
from lib.lora.source import Choice, parse, take_choices
from lib.models.specs import SPECS
from tests.lora_factory import WEIGHTS, as_kohya, lora_state, save_lora
from tiny.evaluate import DEFAULTS, load_generator


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    monkeypatch.setenv("COGVIDEOX_LOCAL_SOURCES", "1")
    monkeypatch.setenv("COGVIDEOX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def generator():
    return load_generator(WEIGHTS / "tiny-t2v")


@pytest.fixture
def loras(generator):
    """Return the LoRAs of a pipeline without earlier tests' adapters."""
    generator.pipeline.unload_lora_weights()
    return Loras(pipeline=generator.pipeline, spec=generator.spec, report=lambda line: None)


def request_for(name: str = "tiny-t2v", **settings):
    inputs = {"prompt": "a green square moves up", "seed": 7, "num_inference_steps": 1}
    return build_request(SPECS[name], **DEFAULTS | inputs | settings)


def choice(path: Path, scale: float = 1.0, alpha: float | None = None) -> Choice:
    return Choice(address=parse(str(path)), scale=scale, alpha=alpha)


def frames_with(generator, loras, *chosen: Choice) -> np.ndarray:
    with loras.applied(chosen):
        return generator.frames(request_for())


@pytest.fixture(scope="module")
def base_frames(generator):
    generator.pipeline.unload_lora_weights()
    return generator.frames(request_for())


def plain_frames(files: list[Path], scales: list[float]) -> np.ndarray:
    """Generate with the files loaded by diffusers itself."""
    pipeline = CogVideoXPipeline.from_pretrained(WEIGHTS / "tiny-t2v")
    pipeline.set_progress_bar_config(disable=True)
    names = [f"adapter_{index}" for index in range(len(files))]
    for name, file in zip(names, files, strict=True):
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    pipeline.set_adapters(names, scales)
    generator = Generator(spec=SPECS["tiny-t2v"], pipeline=pipeline, report=lambda line: None)
    return generator.frames(request_for())


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"alpha": 8}, 0.7),
        ({"alpha": 2}, -1.3),
        ({"rank": 3, "metadata": False}, 1.0),
        ({"alpha": 6, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_v": 16}}, 1.0),
        ({"alpha": 4, "use_rslora": True}, 0.5),
        ({"alpha": 8, "target_modules": ["to_q", "ff.net.0.proj", "norm1.linear", "proj_out"]}, 0.6),
    ],
)
def test_frames_are_those_of_plain_diffusers(tmp_path, generator, loras, base_frames, options, scale):
    file = save_lora(tmp_path / "lora.safetensors", **options)
    frames = frames_with(generator, loras, choice(file, scale))
    assert np.array_equal(frames, plain_frames([file], [scale]))
    assert not np.array_equal(frames, base_frames)


def test_image_to_video_frames_are_those_of_plain_diffusers(tmp_path):
    config = json.loads((WEIGHTS / "tiny-i2v" / "transformer" / "config.json").read_text())
    file = save_lora(tmp_path / "lora.safetensors", alpha=8, model=config)
    image = Image.effect_noise((64, 48), 60).convert("RGB")
    request = request_for("tiny-i2v", image=image)
    generator = load_generator(WEIGHTS / "tiny-i2v")
    base = generator.frames(request)
    loras = Loras(pipeline=generator.pipeline, spec=generator.spec, report=lambda line: None)
    with loras.applied([choice(file, 0.8)]):
        frames = generator.frames(request)
    plain = CogVideoXImageToVideoPipeline.from_pretrained(WEIGHTS / "tiny-i2v")
    plain.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="plain")
    plain.set_adapters(["plain"], [0.8])
    plain.set_progress_bar_config(disable=True)
    reference = Generator(spec=generator.spec, pipeline=plain, report=lambda line: None).frames(request)
    assert np.array_equal(frames, reference)
    assert np.array_equal(generator.frames(request), base) and not np.array_equal(frames, base)


def test_two_loras_are_combined_as_by_set_adapters(tmp_path, generator, loras):
    files = [
        save_lora(tmp_path / "one.safetensors", alpha=8, seed=1),
        save_lora(tmp_path / "two.safetensors", rank=2, seed=2, target_modules=["to_q", "proj_out"]),
    ]
    scales = [0.6, -0.4]
    frames = frames_with(generator, loras, *map(choice, files, scales))
    assert np.array_equal(frames, plain_frames(files, scales))


def test_the_strengths_of_the_same_lora_given_twice_are_added(tmp_path, generator, loras):
    file = save_lora(tmp_path / "lora.safetensors")
    twice = frames_with(generator, loras, choice(file, 0.25), choice(file, 0.5))
    assert np.array_equal(twice, plain_frames([file], [0.75]))


def test_frames_without_a_lora_and_at_scale_0_are_the_bases(tmp_path, generator, loras, base_frames):
    file = save_lora(tmp_path / "lora.safetensors")
    assert not np.array_equal(frames_with(generator, loras, choice(file)), base_frames)
    assert np.array_equal(generator.frames(request_for()), base_frames)
    assert np.array_equal(frames_with(generator, loras), base_frames)
    assert np.array_equal(frames_with(generator, loras, choice(file, 0.0)), base_frames)
    loaded = load_generator(WEIGHTS / "tiny-t2v").pipeline.transformer.state_dict()
    for key, value in generator.pipeline.transformer.state_dict().items():
        assert ".lora_" in key or torch.equal(value, loaded[key.replace(".base_layer", "")])


def test_the_distance_from_the_base_grows_with_the_strength(tmp_path, generator, loras, base_frames):
    file = save_lora(tmp_path / "lora.safetensors", metadata=False)
    frames = [frames_with(generator, loras, choice(file, scale)) for scale in (0.0, 0.1, 0.2, 0.4)]
    distances = [float(abs(clip.astype(int) - base_frames).mean()) for clip in frames]
    assert distances[0] == 0 and distances == sorted(distances) and distances[1] > 0


def test_another_strength_or_switching_back_loads_nothing(tmp_path, generator, loras, monkeypatch):
    one, two = (save_lora(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 2))
    first = frames_with(generator, loras, choice(one, 0.5))
    frames_with(generator, loras, choice(two))

    def forbidden(*arguments):
        raise AssertionError("tensors were loaded again")

    monkeypatch.setattr(attach, "_load_tensors", forbidden)
    stronger = frames_with(generator, loras, choice(one, 1.0))
    assert np.array_equal(frames_with(generator, loras, choice(one, 0.5)), first)
    assert not np.array_equal(stronger, first)


def test_a_replaced_file_is_loaded_again(tmp_path, generator, loras):
    file = save_lora(tmp_path / "lora.safetensors", seed=1)
    frames_with(generator, loras, choice(file))
    save_lora(file, seed=2)
    assert np.array_equal(frames_with(generator, loras, choice(file)), plain_frames([file], [1.0]))


FOREIGN = {
    "peft": (lambda state: {f"base_model.model.{key}": value for key, value in state.items()}, None),
    "plain": (dict, None),
    "wrapper": (lambda state: {f"diffusion_model.{key}": value for key, value in state.items()}, None),
    "kohya": (lambda state: as_kohya(state, 8.0), None),
    "finetrainers": (
        lambda state: {f"transformer.{key}": value for key, value in state.items()},
        {"lora_config": json.dumps({"r": 4, "lora_alpha": 8, "target_modules": ["to_q"]})},
    ),
}


@pytest.mark.parametrize("layout", FOREIGN)
def test_foreign_layouts_give_the_frames_of_the_diffusers_layout(tmp_path, generator, loras, layout):
    rename, metadata = FOREIGN[layout]
    usual = save_lora(tmp_path / "usual.safetensors", rank=4, alpha=8)
    state, _ = lora_state(rank=4, alpha=8)
    save_file(rename(state), tmp_path / "foreign.safetensors", metadata=metadata)
    stored = layout in ("kohya", "finetrainers")
    foreign = choice(tmp_path / "foreign.safetensors", 0.9, None if stored else 8.0)
    frames = frames_with(generator, loras, foreign)
    assert np.array_equal(frames, frames_with(generator, loras, choice(usual, 0.9)))


def test_alpha_is_read_from_a_peft_folder(tmp_path, generator, loras):
    state, config = lora_state(rank=4, alpha=8)
    folder = tmp_path / "adapter"
    folder.mkdir()
    renamed = {f"base_model.model.{key}": value for key, value in state.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    usual = save_lora(tmp_path / "usual.safetensors", rank=4, alpha=8)
    assert np.array_equal(
        frames_with(generator, loras, choice(folder)), frames_with(generator, loras, choice(usual))
    )


def test_a_given_alpha_scales_a_file_that_stores_none_and_is_refused_otherwise(tmp_path, generator, loras):
    silent = save_lora(tmp_path / "silent.safetensors", rank=4, metadata=False)
    usual = save_lora(tmp_path / "usual.safetensors", rank=4, alpha=2)
    given = frames_with(generator, loras, choice(silent, alpha=2))
    assert np.array_equal(given, frames_with(generator, loras, choice(usual)))
    assert not np.array_equal(given, frames_with(generator, loras, choice(silent)))
    with pytest.raises(UserError, match=r"lora_alpha=3 was given, but .* stores its own alpha, 2"):
        frames_with(generator, loras, choice(usual, alpha=3))


def adapters(generator) -> list[str]:
    return generator.pipeline.get_list_adapters().get("transformer", [])


def test_a_lora_with_nan_leaves_attached_ones_unchanged(tmp_path, generator, loras, base_frames):
    good = save_lora(tmp_path / "good.safetensors", seed=1)
    frames = frames_with(generator, loras, choice(good))
    before = adapters(generator)
    state, _ = lora_state(seed=2)
    state["transformer_blocks.5.attn1.to_v.lora_B.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=r"lora_B\.weight' contains NaN or infinity"):
        frames_with(generator, loras, choice(good), choice(tmp_path / "nan.safetensors"))
    assert adapters(generator) == before
    assert np.array_equal(generator.frames(request_for()), base_frames)
    assert np.array_equal(frames_with(generator, loras, choice(good)), frames)


def test_a_weight_that_the_dtype_cannot_hold_is_named_with_its_size():
    stored = torch.tensor([1.0, -70_000.0])
    message = r"a\.safetensors holds 7e\+04, more than float16 can represent \(6\.55e\+04\)"
    with pytest.raises(UserError, match=message):
        attach._check_finite(stored, stored.to(torch.float16), "a.safetensors")
    attach._check_finite(stored, stored.to(torch.bfloat16), "a.safetensors")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("first", [True, False])
def test_a_failed_attach_leaves_nothing(tmp_path, generator, loras, base_frames, monkeypatch, error, first):
    good, bad = (save_lora(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 2))
    if not first:
        frames_with(generator, loras, choice(good))
    before = adapters(generator)

    def breaks(*arguments, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("peft.set_peft_model_state_dict", breaks)
        with pytest.raises(error):
            frames_with(generator, loras, choice(bad))
    assert adapters(generator) == before
    left = {key.split(".")[-2] for key in generator.pipeline.transformer.state_dict() if ".lora_" in key}
    assert left == set(before)
    assert np.array_equal(generator.frames(request_for()), base_frames)
    assert np.array_equal(frames_with(generator, loras, choice(bad)), plain_frames([bad], [1.0]))


def test_a_partly_attached_adapter_is_an_error(tmp_path, generator, loras, monkeypatch):
    file = save_lora(tmp_path / "lora.safetensors")
    monkeypatch.setattr(generator.pipeline, "load_lora_into_transformer", lambda *a, **k: None, raising=False)
    with pytest.raises(RuntimeError, match="only partly loaded: 0 of 24 modules"):
        frames_with(generator, loras, choice(file))
    assert adapters(generator) == []


def test_a_stop_before_loading_attaches_nothing(tmp_path, generator, loras):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped), loras.applied([choice(save_lora(tmp_path / "a.safetensors"))], stop=stop):
        raise AssertionError("the LoRA was applied")
    assert adapters(generator) == []


def test_the_least_recently_used_are_detached_first(tmp_path, generator, loras, monkeypatch):
    files = [save_lora(tmp_path / f"{seed}.safetensors", seed=seed) for seed in range(3)]
    frames = [frames_with(generator, loras, choice(file)) for file in files[:2]]
    size = sum(adapter.bytes for adapter in loras._attached.values()) // 2
    monkeypatch.setattr(attach, "MAX_ATTACHED_BYTES", 2 * size)
    frames_with(generator, loras, choice(files[0]))
    frames_with(generator, loras, choice(files[2]))
    assert len(adapters(generator)) == 2
    loaded = []
    monkeypatch.setattr(loras, "report", loaded.append)
    assert np.array_equal(frames_with(generator, loras, choice(files[0])), frames[0])
    assert loaded == []
    assert np.array_equal(frames_with(generator, loras, choice(files[1])), frames[1])
    assert len(loaded) == 1


def test_two_loras_of_one_request_are_both_kept_beyond_the_limit(tmp_path, generator, loras, monkeypatch):
    monkeypatch.setattr(attach, "MAX_ATTACHED_BYTES", 1)
    files = [save_lora(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 2)]
    frames = frames_with(generator, loras, *map(choice, files))
    assert np.array_equal(frames, plain_frames(files, [1.0, 1.0]))


def test_an_adapter_takes_the_transformers_dtype(tmp_path):
    generator = load_generator(WEIGHTS / "tiny-t2v")
    generator.pipeline.to(torch.bfloat16)
    loras = Loras(pipeline=generator.pipeline, spec=generator.spec, report=lambda line: None)
    loras.load(choice(save_lora(tmp_path / "lora.safetensors")))
    kinds = {p.dtype for key, p in generator.pipeline.transformer.named_parameters() if "lora_" in key}
    assert kinds == {torch.bfloat16}


def offloaded(monkeypatch, plan: str) -> tuple[Generator, Loras]:
    """Return a generator with the offload hooks of a GPU, whose device is the CPU."""
    name = f"enable_{plan}_cpu_offload"
    offload = getattr(DiffusionPipeline, name)
    monkeypatch.setattr(
        DiffusionPipeline, name, lambda self, **named: offload(self, **{"device": "cpu"} | named)
    )
    generator = load_generator(WEIGHTS / "tiny-t2v")
    getattr(generator.pipeline, name)()
    loras = Loras(pipeline=generator.pipeline, spec=generator.spec, offload=plan, report=lambda line: None)
    return generator, loras


def breaks(*arguments, **options):
    raise RuntimeError("no memory")


def test_frames_of_offloaded_weights_are_equal(tmp_path, base_frames, monkeypatch):
    generator, loras = offloaded(monkeypatch, "model")
    file = save_lora(tmp_path / "lora.safetensors")
    assert np.array_equal(frames_with(generator, loras, choice(file, 0.5)), plain_frames([file], [0.5]))
    assert np.array_equal(generator.frames(request_for()), base_frames)


@pytest.mark.parametrize("plan", ["model", "sequential"])
def test_weights_stay_offloaded_after_attaching_detaching_and_failing(tmp_path, monkeypatch, plan):
    monkeypatch.setattr(attach, "MAX_ATTACHED", 1)
    generator, loras = offloaded(monkeypatch, plan)
    first, second = (save_lora(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 2))
    transformer = generator.pipeline.transformer
    for file in (first, second):
        loras.load(choice(file))
        assert len(adapters(generator)) == 1 and hasattr(transformer, "_hf_hook")
    with monkeypatch.context() as patch:
        patch.setattr("peft.set_peft_model_state_dict", breaks)
        with pytest.raises(RuntimeError, match="no memory"):
            loras.load(choice(first))
    assert adapters(generator) == [] and hasattr(transformer, "_hf_hook")
    loras.load(choice(first))
    assert len(adapters(generator)) == 1 and hasattr(generator.pipeline.vae, "_hf_hook")


def test_the_trigger_word_is_logged_once_and_in_the_metrics_every_time(tmp_path, loras, monkeypatch):
    recorded = {"base": "tiny-t2v", "task": "t2v", "trigger_word": "TOK"}
    file = save_lora(tmp_path / "lora.safetensors", recorded=recorded)
    lines = []
    monkeypatch.setattr(loras, "report", lines.append)
    for _ in range(2):
        with loras.applied([choice(file, 0.5)]) as facts:
            assert facts == {"lora": "lora.safetensors", "lora_scale": 0.5, "trigger_word": "TOK"}
    assert len(lines) == 1 and "trigger word 'TOK'" in lines[0]


def chosen(**inputs) -> list[Choice]:
    default = inputs.pop("default", None)
    empty = {"lora_weights": "", "lora_scale": 1.0, "lora_alpha": None}
    empty |= {"extra_lora": "", "extra_lora_scale": 1.0, "extra_lora_alpha": None}
    given = empty | inputs
    choices = take_choices(given, default=default)
    assert not given, "inputs of LoRAs are left for the request"
    return choices


def test_inputs_become_choices_in_order():
    assert chosen() == []
    second = {"extra_lora": "c/d", "extra_lora_scale": -1.0, "extra_lora_alpha": 2.0}
    both = chosen(lora_weights="a/b", lora_scale=0.5, **second)
    assert [(c.address.label, c.scale, c.alpha, c.slot) for c in both] == [
        ("a/b", 0.5, None, "lora"),
        ("c/d", -1.0, 2.0, "extra_lora"),
    ]


def test_the_default_is_used_unless_another_is_named():
    default = parse("the/default", trusted=True)
    assert [c.address.label for c in chosen(default=default, extra_lora="c/d")] == ["the/default", "c/d"]
    assert [c.address.label for c in chosen(default=default, lora_weights="a/b")] == ["a/b"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"lora_alpha": 4.0}, "lora_alpha=4 was given without lora_weights"),
        ({"extra_lora_alpha": 4.0}, "extra_lora_alpha=4 was given without extra_lora"),
        ({"lora_weights": "a/b", "lora_alpha": 0.0}, "lora_alpha=0 is out of range: it has to be above 0"),
        ({"lora_weights": "nothing"}, "'nothing' does not name a LoRA"),
    ],
)
def test_contradictory_inputs_are_refused(inputs, message):
    with pytest.raises(UserError, match=message):
        chosen(**inputs)
