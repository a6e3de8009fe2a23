"""The spec of a model that is not in the table is derived from its folder's configs."""

import json
import shutil
from pathlib import Path

import pytest

from lib.errors import UserError
from lib.models.derive import derive_spec, spec_for
from lib.models.specs import SPECS

WEIGHTS = Path(__file__).resolve().parents[3] / "weights"


@pytest.mark.parametrize("name", ["tiny-t2v", "tiny-i2v"])
def test_the_spec_derived_from_an_embedded_model_is_the_known_one(name):
    derived, known = derive_spec(WEIGHTS / name), SPECS[name]
    for field in ("task", "height", "width", "frames", "frame_step", "max_frames", "fps", "text_tokens"):
        assert getattr(derived, field) == getattr(known, field), field
    assert (derived.dtype, derived.size_rule, derived.size_step) == (
        known.dtype,
        known.size_rule,
        known.size_step,
    )


def write_configs(folder: Path, pipeline: str, transformer: dict) -> Path:
    for part, config in {
        "model_index.json": {"_class_name": pipeline},
        "transformer/config.json": transformer,
        "vae/config.json": {"block_out_channels": [128, 256, 256, 512], "temporal_compression_ratio": 4},
    }.items():
        path = folder / part
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config))
    return folder


RELEASED = {
    "cogvideox-5b": {
        "sample_height": 60, "sample_width": 90, "sample_frames": 49, "patch_size": 2,
        "max_text_seq_length": 226,
    },
    "cogvideox-5b-i2v": {
        "sample_height": 60, "sample_width": 90, "sample_frames": 49, "patch_size": 2,
        "max_text_seq_length": 226, "use_learned_positional_embeddings": True,
    },
    "cogvideox1.5-5b": {
        "sample_height": 96, "sample_width": 170, "sample_frames": 81, "patch_size": 2, "patch_size_t": 2,
        "max_text_seq_length": 224,
    },
    "cogvideox1.5-5b-i2v": {
        "sample_height": 300, "sample_width": 300, "sample_frames": 81, "patch_size": 2, "patch_size_t": 2,
        "max_text_seq_length": 224, "ofs_embed_dim": 512,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_the_spec_derived_from_released_configs_is_the_known_one(name, tmp_path):
    known = SPECS[name]
    pipeline = "CogVideoXImageToVideoPipeline" if known.task == "i2v" else "CogVideoXPipeline"
    derived = spec_for("my-finetune", write_configs(tmp_path / "my-finetune", pipeline, RELEASED[name]))
    assert derived.name == "my-finetune"
    for field in (
        "task", "height", "width", "frames", "frame_step", "max_frames", "fps", "text_tokens", "size_rule",
        "size_step",
    ):  # fmt: skip
        assert getattr(derived, field) == getattr(known, field), field


@pytest.mark.parametrize("name, trained, frames", [
    ("cogvideox1.5-5b", 13, 17), ("cogvideox1.5-5b", 85, 81), ("cogvideox-5b", 13, 9), ("cogvideox-5b", 1, 9),
])  # fmt: skip
def test_the_default_length_is_valid(name, trained, frames, tmp_path):
    configs = RELEASED[name] | {"sample_frames": trained}
    derived = derive_spec(write_configs(tmp_path / "mine", "CogVideoXPipeline", configs))
    assert derived.frames == frames
    derived.check_frames(derived.frames)


def test_a_folder_of_another_pipeline_or_without_configs_is_refused(tmp_path):
    folder = write_configs(tmp_path / "sd", "StableDiffusionPipeline", {})
    with pytest.raises(UserError, match=r"'StableDiffusionPipeline'; allowed are CogVideoXPipeline"):
        derive_spec(folder)
    broken = tmp_path / "broken"
    shutil.copytree(WEIGHTS / "tiny-t2v", broken, ignore=shutil.ignore_patterns("vae"))
    with pytest.raises(UserError, match=r"vae/config\.json is missing"):
        derive_spec(broken)
