import tomllib
from pathlib import Path

import pytest

from lib.errors import UserError
from lib.models.specs import SPECS, check_task, names_for
from lib.serving.schema import openapi_schema

ROOT = Path(__file__).resolve().parents[3]
WEIGHTS = ROOT / "weights"


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_accepts_every_frame_count_of_the_rule_and_no_other(spec):
    valid = set(range(spec.frame_step + 1, spec.max_frames + 1, spec.frame_step))
    assert spec.frames in valid
    for frames in range(-3, spec.max_frames + 40):
        if frames in valid:
            spec.check_frames(frames)
        else:
            with pytest.raises(UserError):
                spec.check_frames(frames)


@pytest.mark.parametrize(
    ("name", "frames", "nearest"),
    [
        ("cogvideox-2b", 48, 49),
        ("cogvideox-5b", 20, 17),
        ("cogvideox-5b", 22, 25),
        ("cogvideox-5b-i2v", 500, 49),
        ("cogvideox-5b-i2v", -7, 9),
        ("cogvideox1.5-5b", 80, 81),
        ("cogvideox1.5-5b-i2v", 49, 49),
        ("cogvideox1.5-5b-i2v", 41, 33),
        ("cogvideox1.5-5b-i2v", 1000, 161),
        ("tiny-t2v", 8, 9),
        ("tiny-i2v", 0, 9),
    ],
)
def test_rejects_frame_count_between_valid_values_and_names_the_nearest(name, frames, nearest):
    spec = SPECS[name]
    if frames == nearest:
        spec.check_frames(frames)
        return
    with pytest.raises(UserError, match=rf"num_frames={frames} .*nearest: {nearest}"):
        spec.check_frames(frames)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_accepts_its_own_size_and_names_the_nearest_for_another(spec):
    spec.check_size(spec.width, spec.height)
    with pytest.raises(UserError, match=f"width={spec.width + 8}, height={spec.height}.*nearest: "):
        spec.check_size(spec.width + 8, spec.height)
    nearest = spec.nearest_size(spec.width + 8, spec.height + 8)
    spec.check_size(*nearest)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((1360, 768), None),
        ((768, 1360), None),
        ((768, 768), None),
        ((1024, 768), None),
        ((768, 1040), None),
        ((1030, 768), (1024, 768)),
        ((1376, 768), (1360, 768)),
        ((1000, 1000), (768, 768)),
        ((720, 480), (1152, 768)),
        ((480, 720), (768, 1152)),
        ((3000, 100), (1360, 768)),
        ((16, 16), (768, 768)),
    ],
)
def test_image_to_video_of_1_5_fixes_the_short_side_only(size, nearest):
    spec = SPECS["cogvideox1.5-5b-i2v"]
    if nearest is None:
        spec.check_size(*size)
        return
    message = f"nearest: width={nearest[0]}, height={nearest[1]}"
    with pytest.raises(UserError, match=message):
        spec.check_size(*size)


def test_untrained_sizes_need_the_setting_and_a_model_that_can_compute_them():
    spec = SPECS["cogvideox-5b"]
    with pytest.raises(UserError, match="720x480 only, the size it was trained at"):
        spec.check_size(640, 352)
    spec.check_size(640, 352, any_size=True)
    with pytest.raises(UserError, match=r"multiples of 16.*width=640, height=352"):
        spec.check_size(641, 350, any_size=True)
    with pytest.raises(UserError, match="720x480 only"):
        SPECS["cogvideox-5b-i2v"].check_size(640, 352, any_size=True)


def test_a_model_for_another_task_is_refused_with_the_right_ones():
    with pytest.raises(UserError, match=r"cogvideox-5b is a model for text-to-video.*cogvideox-5b-i2v"):
        check_task("cogvideox-5b", "t2v", "i2v")
    assert names_for("t2v") == ["tiny-t2v", "cogvideox-2b", "cogvideox-5b", "cogvideox1.5-5b"]


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_the_literal_defaults_of_the_signature_match_every_model(task):
    inputs = openapi_schema(ROOT / f"predict_{task}.py")["components"]["schemas"]["Input"]["properties"]
    for name in names_for(task):
        assert inputs["num_inference_steps"]["default"] == SPECS[name].num_inference_steps
        assert inputs["guidance_scale"]["default"] == SPECS[name].guidance_scale
    assert inputs["num_frames"]["default"] is None


def test_specs_and_manifest_have_the_same_checkpoints_and_repositories():
    manifest = tomllib.loads((WEIGHTS / "manifest.toml").read_text())
    of_stories = {"tiny-writer", "tiny-painter", "qwen3-4b-instruct", "flux.2-klein-4b"}
    assert set(manifest) == set(SPECS) | of_stories
    for name in SPECS:
        source = manifest[name]
        home = source.get("repository") or source.get("alternative")
        assert home == SPECS[name].repository, name
