"""SAT's real files are converted bit-equally, with equal configs and outputs, and back."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from lib.convert.models import to_diffusers, to_sat
from lib.errors import UserError
from tests import convert_factory as factory
from tests.convert_factory import VARIANTS, silent

SAT_EPS = 1e-6
"""Of SAT's last norms; diffusers' is 1e-5, and released checkpoints say so in their configurations."""


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """Every oracle converted once, in float32, the transformer in several shards."""
    root = tmp_path_factory.mktemp("converted")
    for name in VARIANTS:
        to_diffusers(
            transformer=factory.source(name),
            vae=factory.VAE_FILE,
            target=root / name,
            dtype="float32",
            vae_dtype="float16",
            options=factory.options(name),
            report=silent,
            shard_bytes=100_000,
        )
    return root


def rotary(model: CogVideoXTransformer3DModel, frames: int):
    """Return rotary embeddings as the pipelines compute them for a complete clip."""
    config = model.config
    if not config.use_rotary_positional_embeddings:
        return None
    grid = (config.sample_height // 2, config.sample_width // 2)
    if config.patch_size_t is None:
        return get_3d_rotary_pos_embed(config.attention_head_dim, ((0, 0), grid), grid, frames)
    return get_3d_rotary_pos_embed(
        config.attention_head_dim, None, grid, (frames + 1) // 2, grid_type="slice", max_size=grid
    )


def denoise(model: CogVideoXTransformer3DModel, given: factory.State) -> torch.Tensor:
    latents = given["x"]
    if "image" in given:
        latents = torch.cat([latents, given["image"]], dim=2)
    with torch.no_grad():
        return model(
            hidden_states=latents,
            encoder_hidden_states=given["ctx"],
            timestep=given["timesteps"],
            ofs=torch.full((1,), 2.0) if model.config.ofs_embed_dim else None,
            image_rotary_emb=rotary(model, given["x"].shape[1]),
        ).sample


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_is_bit_equal_to_the_expected_one(converted, name):
    found, wanted = factory.stored(converted / name / "transformer"), factory.expected(name)
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert found[key].dtype == wanted[key].dtype and torch.equal(found[key], wanted[key]), key


@pytest.mark.parametrize("name", VARIANTS)
def test_the_configuration_is_the_expected_one(converted, name):
    assert factory.config(converted / name / "transformer") == factory.expected_config(name)


def test_the_vae_is_bit_equal_and_its_configuration_is_the_5b_familys(converted):
    folder, wanted = converted / "t2v-5b" / "vae", factory.expected("vae")
    found = factory.stored(folder)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert factory.config(folder) == factory.expected_config("vae")


@pytest.mark.parametrize(
    "name, scaling, inverted, shift",
    [("t2v-2b", 1.15258426, False, 3.0), ("i2v-5b", 0.7, False, 1.0), ("i2v-1.5-5b", 0.7, True, 1.0)],
)
def test_scaling_and_schedule_are_the_familys(converted, name, scaling, inverted, shift):
    vae = factory.config(converted / name / "vae")
    assert (vae["scaling_factor"], vae["invert_scale_latents"]) == (scaling, inverted)
    scheduler = json.loads((converted / name / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["snr_shift_scale"] == shift


@pytest.mark.parametrize("name", VARIANTS)
def test_diffusers_computes_what_sat_computed(converted, name):
    model = CogVideoXTransformer3DModel.from_pretrained(converted / name / "transformer")
    given = factory.inputs_and_outputs(name)
    assert (denoise(model, given) - given["sat_out"]).abs().max() < 1e-4
    model.norm_final.eps = model.norm_out.norm.eps = SAT_EPS
    assert (denoise(model, given) - given["sat_out"]).abs().max() < 1e-5


def test_the_vae_encodes_and_decodes_as_sats_does(converted):
    vae = AutoencoderKLCogVideoX.from_pretrained(converted / "t2v-5b" / "vae", torch_dtype=torch.float32)
    given = factory.inputs_and_outputs("vae")
    with torch.no_grad():
        encoded = vae.encode(given["x"]).latent_dist.parameters
        decoded = vae.decode(given["z"]).sample
    assert (encoded - given["sat_enc"]).abs().max() < 1e-4
    assert (decoded - given["sat_dec"]).abs().max() < 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_converting_back_is_bit_equal_and_dropped_tensors_were_reported(converted, name, tmp_path):
    result = to_sat(transformer=converted / name, target=tmp_path / "sat", report=silent)
    found = factory.states(tmp_path / "sat")
    original = torch.load(factory.source(name), weights_only=False)["module"]
    assert all(torch.equal(found[key], original[key]) for key in found)
    gone = {key for key in original if key.startswith("model.diffusion_model.")} - set(found)
    report = json.loads((converted / name / "report.json").read_text())
    dropped = report["parts"][0]["dropped"]
    assert gone == {f"model.diffusion_model.{key}" for key in dropped if key.startswith(("mixins", "tran"))}
    assert [part.name for part in result.parts] == ["transformer", "vae"]


def test_the_vae_comes_back_bit_equal_without_its_loss(converted, tmp_path):
    to_sat(vae=converted / "t2v-2b" / "vae", target=tmp_path / "sat", report=silent)
    found = torch.load(tmp_path / "sat" / "3d-vae.pt", weights_only=True)["state_dict"]
    original = torch.load(factory.VAE_FILE, weights_only=True)["state_dict"]
    assert all(torch.equal(found[key], original[key]) for key in found)
    assert {key.split(".")[0] for key in set(original) - set(found)} == {"loss"}


def test_a_result_in_sats_layout_converts_again_to_the_same(converted, tmp_path):
    to_sat(transformer=converted / "i2v-5b", target=tmp_path / "sat", report=silent)
    result = to_diffusers(
        transformer=tmp_path / "sat", target=tmp_path / "again", dtype="float32",
        options=factory.options("i2v-5b"), report=silent,
    )  # fmt: skip
    assert result.notes == ["The VAE is 3d-vae.pt, which is in the same folder."]
    for part in ("transformer", "vae"):
        first, again = (factory.stored(root / part) for root in (converted / "i2v-5b", tmp_path / "again"))
        assert factory.same_states(again, first)


def test_a_given_vae_takes_precedence_over_the_one_in_the_folder(converted, tmp_path):
    to_sat(transformer=converted / "i2v-5b" / "transformer", target=tmp_path / "sat", report=silent)
    (tmp_path / "sat" / "3d-vae.pt").write_bytes(b"of no use")
    given = {"options": factory.options("i2v-5b"), "report": silent}
    folder, file = tmp_path / "sat", tmp_path / "sat" / "1" / "mp_rank_00_model_states.pt"
    result = to_diffusers(transformer=folder, vae=factory.VAE_FILE, target=tmp_path / "both", **given)
    assert [part.name for part in result.parts] == ["transformer", "vae"] and result.notes == []
    result = to_diffusers(transformer=file, target=tmp_path / "alone", **given)
    assert [part.name for part in result.parts] == ["transformer"]
    with pytest.raises(UserError, match=r"^3d-vae\.pt "):
        to_diffusers(transformer=folder, target=tmp_path / "neither", **given)


def test_the_vae_in_a_fine_tuned_file_is_converted(tmp_path):
    result = to_diffusers(
        transformer=factory.source("t2v-2b-finetuned"), target=tmp_path / "model", vae_dtype="float16",
        options=factory.options("t2v-2b-finetuned"), report=silent,
    )  # fmt: skip
    assert result.notes == ["The VAE is the one inside t2v-2b-finetuned.pt."]
    found, wanted = factory.stored(tmp_path / "model" / "vae"), torch.load(
        factory.source("t2v-2b-finetuned"), weights_only=False
    )["module"]  # fmt: skip
    key = "encoder.conv_in.conv.weight"
    assert torch.equal(found[key], wanted[f"first_stage_model.{key}"])
    assert result.parts[0].dropped["conditioner.*"].startswith("4 tensors: the text encoder")
    assert "mixins.pos_embed.pos_embedding" in result.parts[0].dropped


def test_dropped_entries_are_grouped_by_reason_with_training_states_last(tmp_path):
    result = to_diffusers(
        transformer=factory.source("t2v-2b-finetuned"), target=tmp_path / "model",
        options=factory.options("t2v-2b-finetuned"), report=silent,
    )  # fmt: skip
    line = next(line for line in result.lines() if line.startswith("transformer: dropped"))
    assert line.startswith(
        "transformer: dropped conditioner.*, mixins.pos_embed.pos_embedding, buffer_names, "
    )
    assert line.endswith(" ...")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "- transformer: `conditioner.*`: 4 tensors: the text encoder; the released T5 is the same" in card
    states = next(line for line in card.splitlines() if "part of the training state, not a weight" in line)
    assert states.startswith("- transformer: `buffer_names`, `optimizer`, ")
    assert states.endswith(" and 11 more, listed in report.json: part of the training state, not a weight")
