"""A model's kind and sizes are detected from its tensors, and files that do not fit are refused."""

import json

import pytest
import torch

from lib.convert import detect
from lib.convert.configs import FAMILIES, transformer_config
from lib.convert.keymap import SINCOS_TRANSFORMER, TRANSFORMER, VAE, plan_to_diffusers, plan_to_sat
from lib.convert.models import to_diffusers, to_sat
from lib.errors import UserError
from lib.models.specs import SPECS
from tests import convert_factory as factory
from tests.convert_factory import silent

FULL = {"head_dim": 64, "time_embed_dim": 512, "text_embed_dim": 4096, "out_channels": 16}
RELEASED = {
    "cogvideox-2b": {"heads": 30, "layers": 30, "in_channels": 16},
    "cogvideox-5b": {"heads": 48, "layers": 42, "in_channels": 16, "rotary": True},
    "cogvideox-5b-i2v": {"heads": 48, "layers": 42, "in_channels": 32, "rotary": True, "positions": 17776},
    "cogvideox1.5-5b": {"heads": 48, "layers": 42, "in_channels": 16, "rotary": True, "patch_size_t": 2},
    "cogvideox1.5-5b-i2v": {"heads": 48, "layers": 42, "in_channels": 32, "rotary": True, "patch_size_t": 2,
                            "ofs_embed_dim": 512},
}  # fmt: skip
KEYS = {"cogvideox-2b": 556, "cogvideox-5b": 772, "cogvideox-5b-i2v": 773, "cogvideox1.5-5b": 772,
        "cogvideox1.5-5b-i2v": 776}  # fmt: skip
"""Of the released files, without the buffers that are dropped."""


def refusal(**given) -> str:
    with pytest.raises(UserError) as caught:
        to_diffusers(report=silent, **given)
    assert not given["target"].exists() and not given["target"].with_suffix(".partial").exists()
    return str(caught.value)


def tiny(path, change=None, **options):
    state = factory.sat_transformer()
    if change:
        change(state)
    return factory.save_sat(path, state, **options)


@pytest.mark.parametrize("family", RELEASED)
def test_a_released_model_is_known_by_its_tensors(family):
    state = factory.sat_transformer(family=family, device="meta", **FULL | RELEASED[family])
    assert len(state) == KEYS[family]
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = detect.transformer_sizes(shapes, name="file.pt")
    assert detect.variant(found, detect.family_of(found)) == family
    config = transformer_config(found, FAMILIES[family], {})
    spec = SPECS[family]
    assert config["num_attention_heads"] * config["attention_head_dim"] == spec.attention_width
    assert (config["sample_frames"], config["max_text_seq_length"]) == (spec.frames, spec.text_tokens)
    assert config["sample_height"] == (300 if "1.5" in family else 60)


def test_the_released_vae_has_its_436_tensors():
    state = factory.sat_vae()
    assert len(state) == 436
    found = detect.vae_sizes({name: tuple(each.shape) for name, each in state.items()}, name="vae.pt")
    assert (found.channels, found.layers_per_block, found.latent_channels) == ((128, 256, 256, 512), 3, 16)


@pytest.mark.parametrize("table, levels", [(TRANSFORMER, 0), (VAE, 4)])
def test_the_table_read_back_is_its_own_inverse(table, levels):
    names = list(factory.sat_transformer() if table is TRANSFORMER else factory.sat_vae())
    there = plan_to_diffusers(names, table, levels=levels)
    back = plan_to_sat(list(there.outputs), table, levels=levels)
    assert not (there.unknown or there.dropped or back.unknown or back.missing)
    assert set(back.outputs) == set(names)


def test_sincos_positions_are_dropped_and_learned_ones_kept():
    name = "mixins.pos_embed.pos_embedding"
    assert list(plan_to_diffusers([name], SINCOS_TRANSFORMER).dropped) == [name]
    assert list(plan_to_diffusers([name], TRANSFORMER).outputs) == ["patch_embed.pos_embedding"]


def test_another_number_of_layers_is_a_model_of_the_same_family(tmp_path):
    path = factory.save_sat(tmp_path / "model.pt", factory.sat_transformer(layers=5))
    result = to_diffusers(transformer=path, target=tmp_path / "out", report=silent)
    assert result.variant == "a CogVideoX of 5 layers and width 32, of the cogvideox-2b family"


def test_family_decides_where_no_tensor_does(tmp_path):
    path = tiny(tmp_path / "model.pt")
    result = to_diffusers(transformer=path, target=tmp_path / "out", family="cogvideox-5b", report=silent)
    config = factory.config(tmp_path / "out" / "transformer")
    assert result.family == "cogvideox-5b" and config["use_rotary_positional_embeddings"]
    assert result.parts[0].dtype == "bfloat16"


def test_a_family_that_contradicts_the_tensors_is_refused(tmp_path):
    message = refusal(transformer=factory.source("t2v-5b"), family="cogvideox-2b", target=tmp_path / "out")
    assert message == (
        "family=cogvideox-2b was given, but its tensors show a CogVideoX of 2 layers and width 32, of the "
        "cogvideox-5b family. Leave family out: it is needed only for a VAE alone."
    )


def test_a_vae_alone_needs_its_family(tmp_path):
    message = refusal(vae=factory.VAE_FILE, target=tmp_path / "out")
    assert message.startswith(
        "family is needed for a VAE alone, because its scaling cannot be read from the weights. Allowed are "
    )
    to_diffusers(vae=factory.VAE_FILE, target=tmp_path / "out", family="cogvideox-2b", report=silent,
                 options={"norm_num_groups": 2})  # fmt: skip
    assert factory.config(tmp_path / "out" / "vae")["scaling_factor"] == 1.15258426
    assert not (tmp_path / "out" / "model_index.json").exists()


def test_files_of_other_kinds_are_named_and_refused(tmp_path):
    for key, what in (
        ("model.diffusion_model.input_blocks.0.0.weight", "a UNet, such as Stable Diffusion's"),
        ("down_blocks.0.attentions.0.norm.weight", "a UNet, such as Stable Diffusion's"),
        ("encoder.down.0.block.0.conv1.weight", "an image VAE, such as Stable Diffusion's"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 text encoder"),
        ("blocks.0.self_attn.q.weight", "a transformer of another family (Wan)"),
        ("fc.weight", "not a known model (its tensors are fc.weight ...)"),
    ):
        path = factory.save_sat(tmp_path / "file.pt", {key: torch.ones(2, 2)}, prefix="")
        message = refusal(transformer=path, target=tmp_path / "out")
        assert message == f"file.pt is {what}; a CogVideoX transformer was expected."


def test_a_vae_given_as_transformer_and_swapped_files_are_refused(tmp_path):
    vae, model = factory.VAE_FILE, factory.source("t2v-2b")
    target = tmp_path / "out"
    assert refusal(transformer=vae, target=target) == (
        "vae.pt is a SAT video VAE; a CogVideoX transformer was expected."
    )
    assert refusal(vae=model, target=target) == (
        "t2v-2b.pt is a SAT CogVideoX transformer; a CogVideoX VAE was expected."
    )
    assert refusal(transformer=vae, vae=model, target=target) == (
        "The two files are swapped: vae.pt, given as the transformer, is a SAT video VAE, and "
        "t2v-2b.pt, given "
        "as the VAE, is a SAT CogVideoX transformer."
    )


def test_a_converted_folder_is_not_converted_again(tmp_path):
    to_diffusers(transformer=factory.source("t2v-2b"), target=tmp_path / "model", report=silent)
    message = refusal(transformer=tmp_path / "model" / "transformer", target=tmp_path / "out")
    assert message == (
        "transformer is a diffusers CogVideoX transformer: it is already in the diffusers layout. The SAT "
        "layout is needed here; to convert back, choose the other direction."
    )
    assert refusal(transformer=tmp_path / "model", target=tmp_path / "out") == (
        "model is already a complete model in the diffusers layout; direction=to_sat converts it back. "
        "A single file or folder of weights is needed here."
    )
    with pytest.raises(UserError, match=r"^t2v-2b.pt is a SAT .*: it is already in the SAT layout"):
        to_sat(transformer=factory.source("t2v-2b"), target=tmp_path / "sat", report=silent)


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path):
    layer = "transformer.layers.1.attention.query_key_value"
    what = "a CogVideoX of 2 layers and width 32, of the cogvideox-2b family"
    for change, message in (
        (
            lambda state: state.pop(f"{layer}.bias"),
            f"file.pt is not a complete model ({what}): {layer}.bias is missing.",
        ),
        (
            lambda state: state.update({"mixins.extra.weight": torch.ones(2)}),
            f"file.pt has 1 tensor that no {what[2:]} has: mixins.extra.weight. It is another model, or "
            "was trained "
            "with additions that diffusers does not support.",
        ),
        (
            lambda state: state.update({f"{layer}.bias": torch.ones(90)}),
            f"file.pt ({what}): {layer}.bias has the shape [90], which does not fit its other tensors: "
            "transformer_blocks.1.attn1.to_q.bias would be [32], not [30].",
        ),
        (
            lambda state: state.update({f"{layer}.bias": torch.ones(91)}),
            f"file.pt: {layer}.bias has the shape [91], whose rows cannot be split or joined as needed.",
        ),
        (
            lambda state: state.pop("time_embed.0.weight"),
            "file.pt is not a complete transformer: time_embed.0.weight is missing.",
        ),
        (
            lambda state: state.update({"time_embed.0.bias": torch.ones(16, dtype=torch.int8)}),
            "file.pt cannot be converted: time_embed.0.bias is stored as int8; weights are float16, "
            "bfloat16, "
            "float32, float64.",
        ),
    ):
        assert refusal(transformer=tiny(tmp_path / "file.pt", change), target=tmp_path / "out") == message


def test_a_transformer_without_its_key_projection_is_not_converted_back(tmp_path):
    to_diffusers(transformer=factory.source("t2v-2b"), target=tmp_path / "model", report=silent)
    state = factory.stored(tmp_path / "model" / "transformer")
    state.pop("transformer_blocks.0.attn1.to_k.weight")
    from safetensors.torch import save_file

    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(UserError) as caught:
        to_sat(transformer=tmp_path / "part.safetensors", target=tmp_path / "sat", report=silent)
    assert str(caught.value) == (
        "part.safetensors is not a complete CogVideoX transformer: transformer_blocks.0.attn1.to_k.weight "
        "is missing."
    )


def test_types_are_the_familys_unless_another_is_given(tmp_path):
    for name, given, wanted in (
        ("t2v-2b", None, torch.float16),
        ("t2v-5b", None, torch.bfloat16),
        ("t2v-5b", "float32", torch.float32),
    ):
        target = tmp_path / f"{name}-{given}"
        to_diffusers(transformer=factory.source(name), vae=factory.VAE_FILE, target=target, dtype=given,
                     options=factory.options(name), report=silent)  # fmt: skip
        for part, dtype in (("transformer", wanted), ("vae", torch.float32)):
            assert {each.dtype for each in factory.stored(target / part).values()} == {dtype}


def test_a_value_beyond_float16_is_refused_not_made_infinite(tmp_path):
    path = tiny(tmp_path / "file.pt", lambda state: state["time_embed.0.bias"].fill_(70000))
    assert refusal(transformer=path, target=tmp_path / "out") == (
        "file.pt: time_embedding.linear_1.bias contains 70000, but float16 ends at 65504. Choose dtype "
        "bfloat16 or float32."
    )
    to_diffusers(transformer=path, target=tmp_path / "out", dtype="bfloat16", report=silent)


def test_a_value_beyond_float16_is_found_among_infinite_ones(tmp_path):
    state = factory.sat_transformer()
    state["time_embed.0.bias"][:2] = torch.tensor([torch.inf, -70000.0])
    path = factory.save_sat(tmp_path / "model.pt", state)
    assert "linear_1.bias contains 70000, but float16 ends at 65504" in refusal(
        transformer=path, target=tmp_path / "out"
    )


def test_options_that_contradict_the_tensors_are_refused(tmp_path):
    given = {"transformer": factory.source("i2v-5b"), "target": tmp_path / "out"}
    assert refusal(**given) == (
        "The transformer has 42 learned positions, but a clip of this size has 17776: sample_height=60, "
        "sample_width=90, sample_frames=49, max_text_seq_length=226. Give the values it was trained with "
        "(height and width in latents of 8 pixels)."
    )
    assert refusal(vae=factory.VAE_FILE, family="cogvideox-5b", target=tmp_path / "out") == (
        "norm_num_groups=32 does not divide the VAE's 4 channels; give the number that it was trained with: "
        "overrides=norm_num_groups=NUMBER."
    )


def test_an_existing_target_is_refused(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError) as caught:
        to_diffusers(transformer=factory.source("t2v-2b"), target=tmp_path / "there", report=silent)
    assert str(caught.value) == (
        f"{tmp_path / 'there'} already exists and is not overwritten. Choose another folder."
    )


def test_configurations_are_written_as_diffusers_writes_them(tmp_path):
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

    to_diffusers(transformer=factory.source("i2v-5b"), vae=factory.VAE_FILE, target=tmp_path / "out",
                 options=factory.options("i2v-5b"), report=silent)  # fmt: skip
    for place, kind, name in (
        ("transformer", CogVideoXTransformer3DModel, "config.json"),
        ("vae", AutoencoderKLCogVideoX, "config.json"),
        ("scheduler", CogVideoXDDIMScheduler, "scheduler_config.json"),
    ):
        file = tmp_path / "out" / place / name
        loaded = kind.from_config(json.loads(file.read_text()))
        loaded.save_config(tmp_path / place)
        assert file.read_text() == (tmp_path / place / name).read_text()
