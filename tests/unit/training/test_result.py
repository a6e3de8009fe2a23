"""A run's result: a tar that its owner can read, use, publish and resume from."""

import ast
import csv
import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from lib.caption.journal import Row
from lib.datasets.clips import LeftOut, find_clips
from lib.errors import UserError
from lib.lora.file import read_header
from lib.lora.keys import recorded_facts
from lib.models.specs import SPECS
from lib.storage.packing import pack
from tests.training_factory import config_and_plan, data, sampling, transformer
from training import checkpoints
from training.adapter import add_adapter, save_adapter
from training.checkpoints import State
from training.latents import Section
from training.result import draw_losses, facts, model_card, write_result

CAPTION = 'a "magenta" star — it\'s moving'


def section(name: str = "a.mp4", caption: str = CAPTION, frames: int = 9) -> Section:
    return Section(name, caption, frames, ((Path("/secret/cache/x.safetensors"),),))


def state(losses: list[float] | None = None) -> State:
    losses = [0.5, 0.25] if losses is None else losses
    return State(
        step=len(losses), seed=7, base="tiny-i2v", fits={}, data="d", global_batch=1, losses=losses
    )  # fmt: skip


def save_lora(path: Path, dtype: torch.dtype) -> None:
    path.write_bytes(str(dtype).encode())


def write(run: Path, *, sections=None, left_out=(), losses=None, **settings) -> Path:
    given = data([section()] if sections is None else sections, left_out=list(left_out))
    return write_result(run, *config_and_plan(**settings), given, state(losses), save_lora)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def python_block(card: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)\n```", card, flags=re.S)
    return block


# The folder


def test_the_folder_holds_everything_about_the_run(tmp_path):
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "step-000002-1.mp4").write_bytes(b"clip")
    folder = write(
        tmp_path,
        sections=[section(), section("b/c.mp4", "a red\nstar", 17)],
        left_out=[LeftOut(name="d.mp4", reason="too short: 1 frame")],
    )
    assert folder == tmp_path / "result"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "README.md", "captions.jsonl", "left_out.jsonl", "lora.safetensors", "loss.csv", "loss.png",
        "validation/step-000002-1.mp4",
    ]  # fmt: skip
    assert lines(folder / "captions.jsonl") == [
        {"clip": "a.mp4", "caption": CAPTION, "frames": 9},
        {"clip": "b/c.mp4", "caption": "a red\nstar", "frames": 17},
    ]
    assert lines(folder / "left_out.jsonl") == [{"clip": "d.mp4", "reason": "too short: 1 frame"}]
    with (folder / "loss.csv").open() as file:
        assert list(csv.reader(file)) == [["step", "loss"], ["1", "0.5"], ["2", "0.25"]]
    assert (folder / "validation" / "step-000002-1.mp4").read_bytes() == b"clip"


def test_generated_captions_can_be_used_as_a_data_sets_table(tmp_path):
    rows = [
        Row(file_name="a.mp4", status="kept", caption="a star"),
        Row(file_name="b.mp4", status="captioned", caption="a ball", fingerprint="0123"),
        Row(file_name="c.mp4", status="failed", error="no video"),
    ]
    given = data([section(caption="TOK a star"), section("b.mp4", "TOK a ball")], captions=rows)
    made = config_and_plan(autocaption=True, trigger_word="TOK")
    folder = write_result(tmp_path / "run", *made, given, state(), save_lora)
    card = (folder / "README.md").read_text()
    assert "in `loss.csv` and `loss.png`. Seed 7. Of 3 clips 1 were captioned by tiny-caption.\n\n|" in card
    assert [row["caption"] for row in lines(folder / "captions.jsonl")] == ["TOK a star", "TOK a ball"]
    clips = tmp_path / "clips"
    clips.mkdir()
    for row in rows:
        (clips / row.file_name).write_bytes(b"video")
    (clips / "metadata.jsonl").write_bytes((folder / "autocaptions.jsonl").read_bytes())
    found, left_out = find_clips(clips)
    assert {clip.name: clip.caption for clip in found} == {"a.mp4": "a star", "b.mp4": "a ball"}
    assert [each.name for each in left_out] == ["c.mp4"]


def test_the_lora_is_stored_in_the_type_that_it_serves_in(tmp_path):
    assert (write(tmp_path) / "lora.safetensors").read_bytes() == b"torch.float32"
    folder = write(tmp_path, device="cuda", precision="bf16")
    assert (folder / "lora.safetensors").read_bytes() == b"torch.bfloat16"


def test_the_training_state_is_included_only_on_request(tmp_path):
    for step in (1, 2):
        saved = state([0.5] * step)
        tensors = {"optimizer": {}, "schedule": {}, "scaler": {}, "random": torch.get_rng_state()}
        checkpoints.save(
            checkpoints.checkpoint_folder(tmp_path, step),
            saved,
            tensors,
            lambda path: path.write_bytes(b"f32"),
        )
    assert not (write(tmp_path) / "training_state").exists()
    kept = write(tmp_path, save_training_state=True) / "training_state"
    assert checkpoints.is_checkpoint(kept) and checkpoints.read_state(kept).step == 2
    assert (kept / "lora.safetensors").read_bytes() == b"f32"


def test_a_second_result_replaces_the_first(tmp_path):
    write(tmp_path, left_out=[LeftOut(name="d.mp4", reason="x")])
    folder = write(tmp_path, losses=[0.1])
    assert not (folder / "left_out.jsonl").exists()
    assert (folder / "loss.csv").read_text() == "step,loss\n1,0.1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_failure_leaves_no_partial_result(tmp_path):
    def full(path: Path, dtype: torch.dtype) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="The disk is full"):
        write_result(tmp_path, *config_and_plan(), data([section()]), state(), full)
    assert list(tmp_path.iterdir()) == []


# The tar


def test_the_tar_holds_the_folders_content_at_its_top(tmp_path):
    folder = write(tmp_path, save_training_state=True)
    (folder / "validation").mkdir()
    (folder / "validation" / "a.mp4").write_bytes(b"clip")
    tar = pack(folder, tmp_path / "trained_model.tar")
    assert tar == tmp_path / "trained_model.tar"
    with tarfile.open(tar, "r:") as archive:
        found = {m.name: archive.extractfile(m).read() for m in archive.getmembers() if m.isfile()}
    assert found == {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    assert {"lora.safetensors", "README.md", "validation/a.mp4"} <= set(found)


def test_the_file_in_the_tar_is_a_lora_with_its_facts(tmp_path):
    settings = {"rank": 4, "lora_alpha": 2, "trigger_word": "STAR", "hub_token": "hf_secret"}
    made = config_and_plan("cogvideox-5b-i2v", input_videos="/home/me/clips", **settings)
    model = transformer("5b-i2v", sample_height=4, sample_width=6, sample_frames=9)
    add_adapter(model, rank=4, alpha=2, targets=["to_q"])

    def save(path: Path, dtype: torch.dtype) -> None:
        save_adapter(model, path, facts(*made, state(), 2), dtype=dtype)

    folder = write_result(tmp_path, *made, data([section()]), state(), save)
    with safe_open(folder / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    recorded = recorded_facts(metadata)
    assert (recorded["base"], recorded["task"], recorded["trigger_word"]) == (
        "cogvideox-5b-i2v",
        "i2v",
        "STAR",
    )
    assert (
        recorded["rank"],
        recorded["alpha"],
        recorded["steps"],
        recorded["of_steps"],
        recorded["seed"],
    ) == (4, 2.0, 2, 2, 7)
    assert (recorded["width"], recorded["height"], recorded["frames"], recorded["fps"]) == (64, 48, 9, 8)
    assert recorded["settings"]["learning_rate"] == 1e-4
    assert not any(secret in str(metadata) for secret in ("hf_secret", "/home/me", str(tmp_path)))
    assert read_header(folder / "lora.safetensors", name="lora").metadata == metadata


# The model card


@pytest.mark.parametrize("base", ["cogvideox-5b-i2v", "cogvideox-2b", "cogvideox1.5-5b-i2v", "tiny-t2v"])
@pytest.mark.parametrize("caption", [CAPTION, "two\nlines\\", "```\n# '''\"\"\" $(rm) `x` {0}", "größer 🌟"])
def test_the_cards_python_is_valid_and_uses_the_trained_values(base, caption):
    spec = SPECS[base]
    size = sampling(width=spec.width, height=spec.height, fps=spec.fps)
    card = model_card(
        *config_and_plan(base, spec=spec, sampling=size), data([section(caption=caption)]), state()
    )
    block = python_block(card)
    compile(block, "card", "exec")
    calls = {
        ast.unparse(call.func): call for call in ast.walk(ast.parse(block)) if isinstance(call, ast.Call)
    }
    kind = "CogVideoXImageToVideoPipeline" if spec.task == "i2v" else "CogVideoXPipeline"
    loaded = calls[f"{kind}.from_pretrained"]
    assert ast.literal_eval(loaded.args[0]) == (spec.repository or base)
    arguments = {keyword.arg: keyword.value for keyword in calls["pipe"].keywords}
    assert ast.literal_eval(arguments["prompt"]) == caption
    for name, value in {
        "num_frames": spec.frames, "width": spec.width, "height": spec.height,
        "max_sequence_length": spec.text_tokens,
    }.items():  # fmt: skip
        assert ast.literal_eval(arguments[name]) == value, name
    assert ("image" in arguments) == ("load_image" in calls) == (spec.task == "i2v")
    assert "pipe.load_lora_weights" in calls
    imported = {
        n.name for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom) for n in node.names
    }
    assert {kind, "export_to_video"} <= imported


@pytest.mark.parametrize("caption", [CAPTION, "two\nlines", "$(touch x) `y` \\ !z", "a=b"])
def test_the_cards_command_is_quoted_for_a_shell(caption):
    card = model_card(*config_and_plan("cogvideox-5b-i2v"), data([section(caption=caption)]), state())
    command = card.partition("```\n")[2].partition("\n```")[0]
    variable, script, task, *inputs = shlex.split(command.replace("COGVIDEOX_ANY_SIZE=1 ", ""))
    assert (variable, script, task) == ("COGVIDEOX_MODEL=cogvideox-5b-i2v", "script/predict", "i2v")
    assert inputs[::2] == ["-i"] * len(inputs[::2])
    given = {f"prompt={caption}", "image=@photo.jpg", "lora_weights=$PWD/lora.safetensors", "lora_scale=1"}
    assert given <= set(inputs[1::2])


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((720, 480), []),
        ((480, 720), ["width=480", "height=720"]),
    ],
)
def test_the_card_names_a_size_that_is_not_the_bases(size, expected):
    made = config_and_plan("cogvideox-5b", sampling=sampling(width=size[0], height=size[1]))
    card = model_card(*made, data([section()]), state())
    assert all((f"-i {each}" in card) for each in expected)
    assert ("-i width" in card) == ("COGVIDEOX_ANY_SIZE=1 script" in card) == bool(expected)
    assert f"width={size[0]}, height={size[1]}" in python_block(card)


@pytest.mark.parametrize(
    ("base", "model", "source"),
    [
        ("cogvideox-5b-i2v", "zai-org/CogVideoX-5b-I2V", '"zai-org/CogVideoX-5b-I2V"'),
        ("tiny-i2v", None, '"tiny-i2v"'),
        ("owner/star", "owner/star", '"owner/star"'),
        ("owner/star@v1", "owner/star", '"owner/star", revision="v1"'),
    ],
)
def test_the_cards_front_matter_is_valid_for_the_hub(base, model, source):
    spec = SPECS.get(base, SPECS["tiny-i2v"])
    card = model_card(*config_and_plan(base, spec=spec), data([section()]), state())
    _, head, text = card.split("---\n", 2)
    stated = yaml.safe_load(head)
    assert stated.get("base_model") == model
    assert stated["library_name"] == "diffusers" and stated["pipeline_tag"] == "image-to-video"
    assert stated["tags"] == ["cogvideox", "lora", "image-to-video"]
    assert f".from_pretrained({source}, torch_dtype=" in text
    assert f"# LoRA for {base}" in text


def test_the_card_names_trigger_steps_and_settings_without_secrets():
    made = config_and_plan(
        trigger_word="STAR", rank=8, lora_alpha=4, validation_prompt="a STAR | b", hub_token="hf_secret",
        wandb_api_key="key-secret", input_videos="/home/me/clips", caption_suffix="one\ntwo",
    )  # fmt: skip
    card = model_card(*made, data([section(), section("b.mp4")]), state([0.5] * 12))
    assert "Put `STAR` into the prompt." in card
    assert (
        "Trained for 12 steps on 2 samples of at most 9 frames, 64x48 pixels, 8 fps. Rank 8, alpha 4." in card
    )
    assert "Seed 7." in card
    assert "secret" not in card and "/home/me" not in card and "/secret" not in card
    table = card.partition("| setting | value |\n|---|---|\n")[2].partition("\n\n")[0].splitlines()
    assert len(table) == len(made[0].public())
    assert all(re.fullmatch(r"\| \w+ \|.*\|", row) for row in table)
    assert "| validation_prompt | a STAR \\| b |" in table and "| caption_suffix | one two |" in table
    assert "Put `" not in model_card(*config_and_plan(), data([section()]), state())
    assert 'prompt="a STAR | b"' in python_block(card)


# The curve


def curve(losses: list[float]) -> np.ndarray:
    file = io.BytesIO()
    draw_losses(file, losses)
    file.seek(0)
    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def heights(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns with the curve's own blue, and its mean row in each; the legend is left out."""
    blue = (np.abs(pixels - np.array([31, 119, 180])).sum(-1) < 30)[80:]
    columns = np.flatnonzero(blue.any(0))
    return columns, np.array([np.flatnonzero(blue[:, column]).mean() for column in columns])


@pytest.mark.parametrize("count", [2, 50, 2000])
def test_the_picture_shows_the_losses_fall(count):
    pixels = curve(np.linspace(0.8, 0.1, count).tolist())
    assert pixels.shape == (400, 800, 3)
    columns, rows = heights(pixels)
    assert len(columns) > 400 and columns.max() - columns.min() > 400
    assert rows[-1] - rows[0] > 100  # rows count from the top
    assert np.all(np.diff(rows) > -3)


def test_a_noisy_curve_has_a_smoother_mean():
    rng = np.random.default_rng(0)
    columns, rows = heights(curve((0.4 + 0.1 * rng.standard_normal(900)).clip(0.05).tolist()))
    assert len(columns) > 500 and np.std(rows) < 30


@pytest.mark.parametrize("losses", [[0.5], [0.0, 0.0, 0.0], [1e-12, 5e3]])
def test_every_curve_can_be_drawn(losses):
    assert curve(losses).shape == (400, 800, 3)
