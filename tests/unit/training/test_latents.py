"""Latents and embeddings are encoded once, cached by content, and encoded again when damaged."""

import itertools
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file

from lib.cancellation import Stopped
from lib.datasets.clips import Clip, LeftOut
from lib.errors import UserError
from lib.video.writer import write_video
from tests.training_factory import sampling, transformer, vae
from tiny.networks import build_text_encoder
from tiny.tokenizer import build_tokenizer
from training import latents as module
from training.latents import Encodings, LatentCache, Section, encode_clip, encode_prompts, model_digest

TOKENS = 20


def frames(count: int, *, seed: int = 0, width: int = 64, height: int = 48) -> np.ndarray:
    """A smooth scene that moves, which the encoder of a video keeps nearly as it is."""
    phase = np.linspace(0, 6, width)[None, None, :, None] + seed
    time = np.linspace(0, 2, count)[:, None, None, None]
    colours = np.arange(3)[None, None, None, :]
    rows = np.linspace(0, 2, height)[None, :, None, None]
    return (127 + 100 * np.sin(phase + time + colours + rows)).astype(np.uint8)


def clip(path: Path, count: int = 9, *, caption: str = "a wave", **look) -> Clip:
    write_video(frames(count, **look), path, fps=8, format="mp4", metadata={})
    return Clip(path=path, name=path.name, caption=caption)


class CountingVae:
    """Loads the VAE when asked and counts its work."""

    def __init__(self, model=None) -> None:
        self.model, self.loads, self.shapes = model or vae(), 0, []
        encode = self.model.encode
        self.model.encode = lambda video: (self.shapes.append(tuple(video.shape)), encode(video))[1]

    def __call__(self):
        self.loads += 1
        return self.model


@pytest.fixture
def cache(tmp_path) -> LatentCache:
    return LatentCache(tmp_path / "cache")


def encoded(given: Clip, cache: LatentCache, *, model=None, stop=None, **changes):
    options = {"vae_key": "vae", "images": True} | {
        name: changes.pop(name) for name in ("vae_key", "images") if name in changes
    }
    return encode_clip(given, sampling(**changes), cache, vae=model or CountingVae(), stop=stop, **options)


def files(sections: list[Section]) -> list[Path]:
    return [path for section in sections for side in section.files for path in side]


# Clips


def test_a_clip_is_the_posterior_of_its_frames_with_the_first_one(tmp_path, cache):
    model = CountingVae()
    given = clip(tmp_path / "a.mp4")
    (section,) = encoded(given, cache, model=model)
    assert (section.clip, section.caption, section.frames) == ("a.mp4", "a wave", 9)
    stored = Encodings(cache, text_key="t").sample(section, flipped=False, crop=0)
    assert stored["mean"].shape == stored["std"].shape == (3, 4, 6, 8)
    (sample,) = module.clip_samples(given.path, sampling())
    video = torch.from_numpy(sample.frames).permute(3, 0, 1, 2)
    with torch.no_grad():
        posterior = model.model.encode(video[None].float() / 127.5 - 1).latent_dist
    assert torch.equal(stored["mean"], posterior.mean[0].transpose(0, 1))
    assert torch.equal(stored["std"], posterior.std[0].transpose(0, 1))
    assert stored["image"].dtype == torch.uint8 and torch.equal(stored["image"], video[:, :1])


def test_cached_latents_decode_to_the_clip(tmp_path, cache):
    from lib.models.derive import read_config
    from tiny.networks import build_vae

    weights = Path(__file__).resolve().parents[3] / "weights" / "tiny-i2v" / "vae"
    factor = read_config(weights / "config.json", "scaling_factor")["scaling_factor"]
    trained = type(build_vae(factor)).from_pretrained(weights, local_files_only=True)
    (section,) = encoded(clip(tmp_path / "a.mp4"), cache, model=CountingVae(trained))
    stored = Encodings(cache, text_key="t").sample(section, flipped=False, crop=0)
    noise = torch.randn(stored["std"].shape, generator=torch.Generator().manual_seed(0))
    drawn = stored["mean"] + stored["std"] * noise
    with torch.no_grad():
        video = trained.decode(drawn.transpose(0, 1)[None]).sample[0].permute(1, 2, 3, 0)
    pixels = ((video + 1) * 127.5).clamp(0, 255).numpy()
    error = np.abs(pixels - frames(9)).mean()
    other = np.abs(pixels - frames(9, seed=2)).mean()
    assert error < other / 4  # the embedded decoder knows another world than waves


def test_text_to_video_caches_no_first_frame(tmp_path, cache):
    (section,) = encoded(clip(tmp_path / "a.mp4"), cache, images=False)
    assert set(load_file(section.files[0][0])) == {"mean", "std"}


def test_a_second_run_encodes_nothing_and_loads_no_model(tmp_path, cache):
    given = clip(tmp_path / "a.mp4", 40)
    first = CountingVae()
    before = encoded(given, cache, model=first, flip=True)
    assert len(first.shapes) == 2 * len(before) and len(before) > 1
    second = CountingVae()
    assert encoded(given, cache, model=second, flip=True) == before
    assert second.loads == 0 and second.shapes == []


def test_the_caption_and_the_name_do_not_change_what_is_encoded(tmp_path, cache):
    given = clip(tmp_path / "a.mp4")
    (before,) = encoded(given, cache)
    model = CountingVae()
    renamed = Clip(path=given.path.rename(tmp_path / "b.mp4"), name="b.mp4", caption="another")
    (after,) = encoded(renamed, cache, model=model)
    assert model.loads == 0 and after.files == before.files
    assert (after.clip, after.caption) == ("b.mp4", "another")


@pytest.mark.parametrize(
    "change",
    [
        {"vae_key": "another vae"}, {"images": False}, {"fps": 4}, {"max_frames": 17}, {"width": 48},
        {"height": 32}, {"fit": "none"}, {"flip": True}, {"skip_frames_start": 1}, {"skip_frames_end": 1},
        {"long_clips": "cut"}, {"fit": "random", "random_crops": 2}, {"seed": 1}, {"frame_step": 4},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_that_changes_the_latents_encodes_again(tmp_path, cache, change):
    given = clip(tmp_path / "a.mp4", 18)
    before, model = encoded(given, cache), CountingVae()
    after = encoded(given, cache, model=model, **change)
    assert model.shapes and not set(files(before)) & set(files(after))


def test_another_video_of_the_same_name_is_encoded_again(tmp_path, cache):
    before = encoded(clip(tmp_path / "a.mp4"), cache)
    model = CountingVae()
    after = encoded(clip(tmp_path / "a.mp4", seed=1), cache, model=model)
    assert model.shapes and not set(files(before)) & set(files(after))


def test_sides_and_crops_are_cached_separately(tmp_path, cache):
    given = clip(tmp_path / "a.mp4", 26, width=96)
    sections = encoded(given, cache, flip=True, fit="random", random_crops=3)
    assert len(sections) == 3 and [section.frames for section in sections] == [9, 9, 9]
    assert all([len(side) for side in section.files] == [3, 3] for section in sections)
    assert len(set(files(sections))) == 18
    encodings = Encodings(cache, text_key="t")
    for section in sections:
        crops = [encodings.sample(section, flipped=False, crop=crop) for crop in range(3)]
        mirrored = encodings.sample(section, flipped=True, crop=1)
        assert torch.equal(mirrored["image"], crops[1]["image"].flip(-1))
        assert not torch.equal(mirrored["image"], crops[1]["image"])
        assert len({crop["image"].numpy().tobytes() for crop in crops}) > 1


def test_unusable_clips_are_reported_and_not_cached(tmp_path, cache):
    short = encoded(clip(tmp_path / "short.mp4", 3), cache)
    assert isinstance(short, LeftOut) and short.name == "short.mp4" and "too short" in short.reason
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    outcome = encoded(Clip(path=broken, name="in/broken.mp4", caption="x"), cache)
    assert isinstance(outcome, LeftOut) and outcome.name == "in/broken.mp4"
    assert list(cache.folder.glob("*.json")) == []


def test_a_full_disk_is_an_error_and_does_not_leave_the_clip_out(tmp_path, cache, monkeypatch):
    given = clip(tmp_path / "a.mp4")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="The disk is full"):
        encoded(given, cache)
    assert list(cache.folder.iterdir()) == []


def test_stopping_leaves_complete_files_and_an_incomplete_clip(tmp_path, cache):
    given = clip(tmp_path / "a.mp4", 40)
    asked = itertools.count(1)
    at_the_third_sample = SimpleNamespace(is_set=lambda: next(asked) == 4)  # the first asks while hashing
    with pytest.raises(Stopped):
        encoded(given, cache, stop=at_the_third_sample)
    left = list(cache.folder.iterdir())
    assert len(left) == 2 and all(path.suffix == ".safetensors" and load_file(path) for path in left)
    model = CountingVae()
    sections = encoded(given, cache, model=model)
    assert len(model.shapes) == len(sections) == 5


@pytest.mark.parametrize("damage", ["sample gone", "index cut", "index empty"])
def test_incomplete_clips_are_encoded_again(tmp_path, cache, damage):
    given = clip(tmp_path / "a.mp4", 18)
    sections = encoded(given, cache)
    (index,) = cache.folder.glob("*.json")
    if damage == "sample gone":
        files(sections)[0].unlink()
    else:
        index.write_text({"index cut": index.read_text()[:-3], "index empty": ""}[damage])
    model = CountingVae()
    assert encoded(given, cache, model=model) == sections
    assert len(model.shapes) == len(sections)


def test_a_truncated_file_is_encoded_again(tmp_path, cache):
    """A disk that filled up, or a machine that lost power, may leave one under its final name."""
    given = clip(tmp_path / "a.mp4", 18)
    sections = encoded(given, cache)
    path = files(sections)[1]
    content = path.read_bytes()
    path.write_bytes(content[:-7])
    model = CountingVae()
    assert encoded(given, cache, model=model) == sections
    assert model.shapes and path.read_bytes() == content


def test_sections_are_encoded_one_at_a_time(tmp_path, cache, monkeypatch):
    """However long a clip is, the next section is not decoded before the last one is on the disk."""
    given = clip(tmp_path / "a.mp4", 49)
    events, model = [], CountingVae()
    samples, write = module.clip_samples, cache.write

    def noting_samples(*arguments, **options):
        for sample in samples(*arguments, **options):
            events.append("decoded")
            yield sample

    def noting_write(path, tensors):
        events.append("written")
        write(path, tensors)

    monkeypatch.setattr(module, "clip_samples", noting_samples)
    monkeypatch.setattr(cache, "write", noting_write)
    sections = encoded(given, cache, model=model)
    assert len(sections) == 6 and events == ["decoded", "written"] * 6
    assert set(model.shapes) == {(1, 3, 9, 48, 64)}


def test_each_clip_has_its_own_crops_which_are_the_same_in_every_run(tmp_path, cache, monkeypatch):
    seeds, samples = [], module.clip_samples

    def noting_samples(path, given, **options):
        seeds.append(given.seed)
        return samples(path, given, **options)

    monkeypatch.setattr(module, "clip_samples", noting_samples)
    clips = [clip(tmp_path / f"{name}.mp4", frames) for name, frames in (("a", 9), ("b", 10))]
    for folder in ("one", "two"):
        for each in clips:
            encoded(each, LatentCache(tmp_path / folder), fit="random", random_crops=2)
    assert seeds[0] != seeds[1] and seeds[:2] == seeds[2:]


# The cache


def test_a_cache_path_distinguishes_all_its_parts(cache):
    paths = {
        cache.path("ab", "c"), cache.path("a", "bc"), cache.path("abc"), cache.path("abc", 1),
        cache.path("abc", "1"), cache.path("abc", True), cache.path(["abc"], 1),
    }  # fmt: skip
    assert len(paths) == 7
    assert cache.path("abc", suffix=".json").suffix == ".json"
    assert cache.path("abc").parent == cache.folder


def test_files_are_written_in_one_step(cache, monkeypatch):
    path = cache.path("x")
    seen = []
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: (seen.append((path.exists(), load_file(a))), replace(a, b))[1]
    )
    cache.write(path, {"x": torch.arange(6).view(2, 3).t()})
    assert not seen[0][0] and torch.equal(seen[0][1]["x"], torch.arange(6).view(2, 3).t())
    assert [each.name for each in cache.folder.iterdir()] == [path.name]


def test_a_failed_write_leaves_no_file(cache, monkeypatch):
    def broken(*arguments, **options):
        Path(arguments[1]).write_bytes(b"half")
        raise RuntimeError("killed")

    monkeypatch.setattr(module, "save_tensors", broken)
    with pytest.raises(RuntimeError):
        cache.write(cache.path("x"), {"x": torch.zeros(1)})
    assert list(cache.folder.iterdir()) == []


def aged(cache: LatentCache, number: int, *, age: float, size: int = 1000) -> Path:
    path = cache.folder / f"{number}.safetensors"
    path.write_bytes(bytes(size))
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_trimming_removes_the_least_recently_used_files_and_keeps_those_in_use(cache):
    oldest, middle, newest, needed = (
        aged(cache, number, age=age) for number, age in enumerate((300, 200, 100, 400))
    )
    cache.max_bytes = 4000
    cache.trim(set())
    assert all(path.exists() for path in (oldest, middle, newest, needed))
    cache.max_bytes = 2500
    cache.trim({needed})
    assert not oldest.exists() and not middle.exists()
    assert newest.exists() and needed.exists()
    cache.max_bytes = 0
    cache.trim({needed})
    assert list(cache.folder.iterdir()) == [needed]


def test_a_clip_that_is_found_counts_as_used(tmp_path, cache):
    used, unused = clip(tmp_path / "a.mp4"), clip(tmp_path / "b.mp4", seed=1)
    first, second = encoded(used, cache), encoded(unused, cache)
    for path in cache.folder.iterdir():
        os.utime(path, (1e9, 1e9))
    encoded(used, cache)
    cache.max_bytes = sum(path.stat().st_size for path in cache.folder.iterdir()) - 1
    cache.trim(set())
    assert all(path.exists() for path in files(first))
    cache.max_bytes = files(first)[0].stat().st_size + 1000
    cache.trim(set())
    assert files(first)[0].exists() and not files(second)[0].exists()


def test_trimming_removes_old_partial_files(cache):
    half = cache.folder / "x.safetensors.0123abcd.partial"
    half.write_bytes(bytes(10))
    cache.trim(set())
    assert half.exists()  # another process may be writing it
    os.utime(half, (1e9, 1e9))
    cache.trim(set())
    assert not half.exists()


def test_reading_a_sample_counts_as_use(tmp_path, cache):
    (section,) = encoded(clip(tmp_path / "a.mp4"), cache)
    os.utime(section.files[0][0], (1e9, 1e9))
    Encodings(cache, text_key="t").sample(section, flipped=False, crop=0)
    assert section.files[0][0].stat().st_mtime > 1e9


def test_a_file_removed_during_training_is_an_error(tmp_path, cache):
    (section,) = encoded(clip(tmp_path / "a.mp4"), cache)
    section.files[0][0].unlink()
    with pytest.raises(UserError, match=r"can no longer be read: .*missing files are encoded again"):
        Encodings(cache, text_key="t").sample(section, flipped=False, crop=0)


def test_the_cache_limit_is_read_from_the_environment(tmp_path, monkeypatch):
    assert LatentCache(tmp_path / "a").max_bytes == 200e9
    monkeypatch.setenv("COGVIDEOX_LATENTS_GB", "1.5")
    assert LatentCache(tmp_path / "a").max_bytes == 1.5e9


@pytest.mark.parametrize("value", ["much", "-1", "0", "nan", "inf"])
def test_a_cache_limit_that_is_not_a_size_is_refused(tmp_path, monkeypatch, value):
    monkeypatch.setenv("COGVIDEOX_LATENTS_GB", value)
    with pytest.raises(UserError, match=f"COGVIDEOX_LATENTS_GB={value} is not a size in GB"):
        LatentCache(tmp_path / "a")


# Models by content


def test_a_models_digest_follows_its_files(tmp_path):
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "weights.safetensors").write_bytes(bytes(100))
    before = model_digest(folder)
    assert model_digest(folder) == before
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert model_digest(copy) == before
    (copy / "config.json").write_text("{ }")
    assert model_digest(copy) != before
    (folder / "weights.safetensors").write_bytes(bytes(99) + b"x")
    assert model_digest(folder) != before


def test_large_weights_are_distinguished_without_reading_them_completely(tmp_path):
    (tmp_path / "vae").mkdir()
    path = tmp_path / "vae" / "weights.safetensors"
    size = 3 * module.PIECES * module.PIECE_BYTES
    with path.open("wb") as file:
        file.truncate(size)
    seen = {model_digest(tmp_path / "vae")}
    for place in (0, size - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        seen.add(model_digest(tmp_path / "vae"))
    with path.open("ab") as file:
        file.write(b"\0")
    seen.add(model_digest(tmp_path / "vae"))
    assert len(seen) == 4


# Prompts


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    return tokenizer, build_text_encoder(len(tokenizer)).eval()


def embed(prompts, encodings, text, *, lines=None, tokens=TOKENS, loads=None):
    def load():
        if loads is not None:
            loads.append(1)
        return text

    report = (lambda line: None) if lines is None else lines.append
    encode_prompts(prompts, encodings, load=load, tokens=tokens, device="cpu", report=report, stop=None)


@pytest.mark.parametrize("prompt", ["a red circle moves up", "", "red " * 40, "a\nsquare,  blue"])
@pytest.mark.parametrize("tokens", [TOKENS, 12])
def test_prompt_embeddings_equal_the_pipelines(cache, text, prompt, tokens):
    encodings = Encodings(cache, text_key="key")
    embed([prompt], encodings, text, tokens=tokens)
    pipe = CogVideoXPipeline(
        tokenizer=text[0], text_encoder=text[1], vae=vae(), transformer=transformer("5b"), scheduler=None
    )
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=tokens, device="cpu"
        )
    made = encodings.prompt(prompt)
    assert made.shape == (tokens, 64) and torch.equal(made[None], expected)


def test_the_negative_prompts_embedding_is_that_of_the_empty_caption(cache, text):
    encodings = Encodings(cache, text_key="key")
    embed([""], encodings, text)
    pipe = CogVideoXPipeline(
        tokenizer=text[0], text_encoder=text[1], vae=vae(), transformer=transformer("5b"), scheduler=None
    )
    with torch.no_grad():
        _, negative = pipe.encode_prompt("a circle", max_sequence_length=TOKENS, device="cpu")
    assert torch.equal(encodings.prompt("")[None], negative)


def test_prompts_are_encoded_once_and_the_model_loaded_only_when_needed(cache, text):
    encodings, loads, lines = Encodings(cache, text_key="key"), [], []
    embed(["one", "two", "one", ""], encodings, text, loads=loads, lines=lines)
    assert len(loads) == 1
    assert lines == [f"progress: encoding captions {done}/3" for done in (1, 2, 3)]
    embed(["", "two"], Encodings(cache, text_key="key"), text, loads=loads)
    assert len(loads) == 1
    embed(["two", "three"], encodings, text, loads=loads, lines=lines)
    assert len(loads) == 2 and lines[-1] == "progress: encoding captions 1/1"


def test_another_text_encoder_or_length_has_its_own_embeddings(cache):
    first, second = (Encodings(cache, text_key=key).prompt_path("a star") for key in ("t5 20", "t5 22"))
    assert first != second
    assert first != Encodings(cache, text_key="t5 20").prompt_path("a Star")


def test_a_truncated_caption_is_reported(cache, text):
    lines = []
    embed(["red " * 40], Encodings(cache, text_key="key"), text, lines=lines)
    assert lines[0].startswith("a caption has 41 tokens, the base reads the first 20: 'red red ")
    lines.clear()
    embed(["red " * 19], Encodings(cache, text_key="key"), text, lines=lines)
    assert lines == ["progress: encoding captions 1/1"]


def test_truncated_embeddings_are_encoded_again(cache, text):
    encodings = Encodings(cache, text_key="key")
    embed(["one"], encodings, text)
    path = encodings.prompt_path("one")
    before = encodings.prompt("one").clone()
    path.write_bytes(path.read_bytes()[:-5])
    embed(["one"], encodings, text)
    assert torch.equal(encodings.prompt("one"), before)


def test_embeddings_that_are_found_count_as_used(cache, text):
    encodings = Encodings(cache, text_key="key")
    embed(["one", "two"], encodings, text)
    for path in cache.folder.iterdir():
        os.utime(path, (1e9, 1e9))
    embed(["one"], encodings, text)
    assert encodings.prompt_path("one").stat().st_mtime > 1e9
    assert encodings.prompt_path("two").stat().st_mtime == 1e9
