"""SAT LoRAs are converted so that the usual loaders give SAT's output, and back."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib.convert.lora import convert_lora
from lib.convert.models import to_diffusers
from lib.errors import UserError
from lib.lora.keys import read_lora
from lib.models.specs import SPECS
from lib.serving.registry import PROJECT
from tests import convert_factory as factory
from tests.convert_factory import silent
from tests.lora_factory import LAYOUTS, as_kohya
from tests.unit.convert.test_models import SAT_EPS, denoise

lora_to_diffusers = partial(convert_lora, direction="to_diffusers")
lora_to_sat = partial(convert_lora, direction="to_sat")
ORACLES = {"lora-t2v-2b": 4, "lora-t2v-5b": 8, "lora-t2v-1.5-5b": 4}
"""Name -> rank; SAT's alpha was 1."""


def converted(path, tmp_path, **options):
    """lora.safetensors of a SAT file."""
    target = tmp_path / f"lora-{len(list(tmp_path.iterdir()))}"
    lora_to_diffusers(path, target=target, report=silent, **options)
    return target / "lora.safetensors"


def metadata(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def refusal(function, path, tmp_path, **options) -> str:
    with pytest.raises(UserError) as caught:
        function(path, target=tmp_path / "out", report=silent, **options)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize("name, rank", ORACLES.items())
def test_every_matrix_is_the_expected_one_with_alpha_over_rank_in_b(name, rank, tmp_path):
    found, wanted = load_file(converted(factory.source(name), tmp_path)), factory.expected(name)
    assert found.keys() == wanted.keys()
    for key, matrix in wanted.items():
        assert torch.equal(found[key], matrix / rank if ".lora_B." in key else matrix), key


def test_the_base_in_a_lora_checkpoint_is_bit_equal_and_the_lora_reported(tmp_path):
    result = to_diffusers(transformer=factory.source("lora-t2v-2b"), target=tmp_path / "base",
                          dtype="float32", report=silent)  # fmt: skip
    found, wanted = factory.stored(tmp_path / "base" / "transformer"), factory.expected("lora-t2v-2b-base")
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in found)
    assert result.parts[0].dropped["*.matrix_*"] == "16 tensors: of a LoRA, which is converted separately"
    assert result.notes == [
        "lora-t2v-2b.pt contains a LoRA in addition to the transformer, which is not in the result. Convert "
        "it separately."
    ]


def test_at_strength_1_the_real_loader_gives_what_sat_gave(tmp_path):
    to_diffusers(transformer=factory.source("lora-t2v-2b"), target=tmp_path / "base", dtype="float32",
                 options=factory.options("t2v-2b"), report=silent)  # fmt: skip
    file = converted(factory.source("lora-t2v-2b"), tmp_path)
    model = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "base" / "transformer")
    pipeline = CogVideoXPipeline.from_pretrained(
        tmp_path / "base", transformer=model, vae=None, text_encoder=None, tokenizer=None
    )
    given = factory.inputs_and_outputs("lora-t2v-2b")
    without = denoise(model, given)
    pipeline.load_lora_weights(file)
    assert (denoise(model, given) - given["sat_out"]).abs().max() < 1e-4
    model.norm_final.eps = model.norm_out.norm.eps = SAT_EPS
    assert (denoise(model, given) - given["sat_out"]).abs().max() < 1e-5
    assert (without - given["sat_out"]).abs().max() > 0.1


@pytest.mark.parametrize("layers, rank, keys", [(42, 3, 336), (30, 128, 240), (1, 1, 8)])
def test_loras_of_any_depth_and_rank_survive_a_round_trip(layers, rank, keys, tmp_path):
    state = factory.sat_lora(layers=layers, rank=rank)
    path = factory.save_sat(tmp_path / "lora.pt", state)
    result = lora_to_diffusers(path, target=tmp_path / "there", alpha=rank / 2, report=silent)
    assert (result.parts[0].tensors, result.settings) == (keys, {"rank": rank, "alpha": rank / 2})
    lora_to_sat(tmp_path / "there" / "lora.safetensors", target=tmp_path / "back", report=silent)
    back = factory.states(tmp_path / "back")
    assert len(back) == keys
    assert all(torch.equal(back[f"model.diffusion_model.{key}"], state[key]) for key in state)


@pytest.mark.parametrize("alpha, rank", [(1, 3), (64, 100), (0.7, 5)])
def test_a_round_trip_loses_at_most_one_unit_in_the_last_place(alpha, rank, tmp_path):
    state = factory.sat_lora(layers=2, rank=rank, width=64)
    file = converted(factory.save_sat(tmp_path / "lora.pt", state), tmp_path, alpha=alpha)
    lora_to_sat(file, target=tmp_path / "back", report=silent)
    for key, matrix in factory.states(tmp_path / "back").items():
        original = state[key.removeprefix("model.diffusion_model.")]
        ulp = torch.nextafter(original.abs(), torch.tensor(torch.inf)) - original.abs()
        assert ((matrix - original).abs() <= ulp).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_lora_becomes_float32_and_comes_back_bit_equal(dtype, tmp_path):
    state = factory.sat_lora(layers=1, rank=48, dtype=dtype)
    file = converted(factory.save_sat(tmp_path / "lora.pt", state), tmp_path)
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}
    lora_to_sat(file, target=tmp_path / "back", report=silent)
    for key, matrix in factory.states(tmp_path / "back").items():
        original = state[key.removeprefix("model.diffusion_model.")]
        assert matrix.dtype == dtype and torch.equal(matrix, original)


def test_the_original_values_are_recorded_where_no_loader_scales_by_them(tmp_path):
    found = metadata(converted(factory.source("lora-t2v-5b"), tmp_path, alpha=4))
    assert found == {
        "format": "pt",
        "alpha_over_rank_applied": "yes",
        "source_rank": "8",
        "source_alpha": "4",
        "source_dtype": "float32",
        "cogvideox": json.dumps({"task": "t2v"}),
    }


def test_an_export_gives_the_same_bytes_in_every_process(tmp_path):
    program = (
        "import sys; from pathlib import Path; from lib.convert.lora import convert_lora; "
        'convert_lora(Path(sys.argv[1]), target=Path(sys.argv[2]), direction="to_diffusers", alpha=4)'
    )
    source = factory.source("lora-t2v-5b")
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # another order of sets than here
    subprocess.run(
        [sys.executable, "-c", program, source, tmp_path / "other"],
        cwd=PROJECT, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True,
    )  # fmt: skip
    here, other = converted(source, tmp_path, alpha=4), tmp_path / "other" / "lora.safetensors"
    assert here.read_bytes() == other.read_bytes()


def test_the_service_does_not_scale_a_converted_lora_again(tmp_path):
    file = converted(factory.source("lora-t2v-5b"), tmp_path, alpha=4)
    modules = ("to_q", "to_k", "to_v", "to_out.0")
    shapes = {f"transformer_blocks.{layer}.attn1.{each}": (32, 32) for layer in (0, 1) for each in modules}
    found = read_lora(file, name="lora.safetensors", shapes=shapes, spec=SPECS["tiny-t2v"])
    assert set(found.scaling.alphas.values()) == {8.0}  # the rank: a factor of 1
    with pytest.raises(
        UserError, match=r"^lora_alpha=4 was given, but lora\.safetensors stores its own alpha, 8;"
    ):
        read_lora(file, name="lora.safetensors", shapes=shapes, spec=SPECS["tiny-t2v"], alpha=4)


def test_an_assumed_alpha_is_noted(tmp_path):
    note = (
        "alpha was not given: SAT stores none, and its default of 1 was used. CogVideo's own fine-tunes use "
        "64 at rank 128."
    )
    for alpha, notes in ((None, [note]), (1, [])):
        target = tmp_path / str(alpha)
        result = lora_to_diffusers(factory.source("lora-t2v-2b"), target=target, alpha=alpha, report=silent)
        assert result.notes == notes


def test_alpha_changes_b_alone_and_in_proportion(tmp_path):
    one, four = (
        load_file(converted(factory.source("lora-t2v-2b"), tmp_path, alpha=alpha)) for alpha in (1, 4)
    )
    for key in one:
        assert torch.equal(four[key], one[key] * 4 if ".lora_B." in key else one[key])


def test_a_lora_that_diffusers_wrote_keeps_its_strength_in_sat(tmp_path):
    model = CogVideoXTransformer3DModel.from_config(factory.expected_config("t2v-2b"))
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(r=4, lora_alpha=10, init_lora_weights=False, target_modules=targets)
    model.add_adapter(config)
    state = get_peft_model_state_dict(model)
    CogVideoXPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=state,
                                        transformer_lora_adapter_metadata=config.to_dict())  # fmt: skip
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    lora_to_sat(file, target=tmp_path / "sat", alpha=2, report=silent)
    back = factory.states(tmp_path / "sat")
    place = "model.diffusion_model.transformer.layers.1.attention.query_key_value.matrix_"
    module = "transformer_blocks.1.attn1.to_k.lora_"
    ours = state[f"{module}B.weight"] @ state[f"{module}A.weight"] * 10 / 4
    theirs = back[f"{place}B.1"] @ back[f"{place}A.1"] * 2 / 4
    assert torch.allclose(ours, theirs, rtol=1e-5)


def test_incomplete_and_misshapen_loras_are_refused_by_their_matrices(tmp_path):
    query = "transformer.layers.1.attention.query_key_value.matrix_A.0"
    dense = "transformer.layers.0.attention.dense.matrix_"
    for change, message in (
        (lambda state: state.pop(query), f"lora.pt is not a complete SAT LoRA: {query} is missing."),
        (
            lambda state: state.update({f"{dense}A.0": torch.ones(5, 8)}),
            f"lora.pt: {dense}A.0 and its other half are [5, 8] and [8, 4]; in a SAT LoRA of rank 4 and "
            "width 8 "
            "they are [4, 8] and [8, 4].",
        ),
        (
            lambda state: state.update(
                {"transformer.layers.0.mlp.dense_h_to_4h.matrix_A.0": torch.ones(4, 8)}
            ),
            "lora.pt has unsupported LoRA matrices: transformer.layers.0.mlp.dense_h_to_4h.matrix_A.0. Only "
            "attention's, which CogVideo's own training creates, can be converted.",
        ),
    ):
        state = factory.sat_lora(layers=2, rank=4)
        change(state)
        path = factory.save_sat(tmp_path / "lora.pt", state)
        assert refusal(lora_to_diffusers, path, tmp_path) == message


def test_other_files_are_refused(tmp_path):
    assert refusal(lora_to_diffusers, factory.source("t2v-2b"), tmp_path) == (
        "t2v-2b.pt is a SAT CogVideoX transformer; a LoRA was expected."
    )
    file = converted(factory.source("lora-t2v-2b"), tmp_path)
    assert refusal(lora_to_diffusers, file, tmp_path).startswith(
        "lora.safetensors is a diffusers LoRA: it is already in the diffusers layout."
    )
    path = factory.save_sat(tmp_path / "only.pt", factory.sat_lora(layers=2, rank=4))
    with pytest.raises(UserError) as caught:
        to_diffusers(transformer=path, target=tmp_path / "out", report=silent)
    assert str(caught.value) == (
        "only.pt is a SAT LoRA without its base; a transformer was expected. Convert LoRAs with "
        "script/export-lora or predict_export_lora."
    )


def test_a_lora_on_other_layers_cannot_be_converted_to_sat(tmp_path):
    key = "transformer.transformer_blocks.0.ff.net.0.proj.lora_A.weight"
    save_file({key: torch.ones(4, 8)}, tmp_path / "lora.safetensors")
    assert refusal(lora_to_sat, tmp_path / "lora.safetensors", tmp_path) == (
        "lora.safetensors cannot be converted to a SAT LoRA: it has "
        "transformer_blocks.0.ff.net.0.proj.lora_A.weight, and SAT supports only attention's matrices "
        "(to_q, to_k, to_v, to_out.0)."
    )


def test_the_report_names_rank_alpha_and_what_was_left_out(tmp_path):
    lines: list[str] = []
    lora_to_diffusers(factory.source("lora-t2v-2b"), target=tmp_path / "out", alpha=2, report=lines.append)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"] == {"rank": 4, "alpha": 2.0}
    assert report["parts"][0]["dropped"] == {
        "conditioner.*": "1 tensor: the text encoder; the released T5 is the same",
        "the base's weights": "52 tensors: of the model that the LoRA was trained on",
    }
    assert "of the cogvideox-2b family" in report["variant"] and report["family"] == "cogvideox-2b"
    assert "lora: dropped conditioner.*, the base's weights" in lines
    readme = (tmp_path / "out" / "README.md").read_text()
    assert (
        "At strength 1 it has the effect it had in SAT with alpha 2: alpha / rank, 2 / 4, is multiplied"
        in readme
    )


@pytest.mark.parametrize("adapter", ["", ".my-lora"])
def test_the_alpha_in_adapter_config_counts_as_the_one_in_the_metadata(tmp_path, adapter):
    source = load_file(converted(factory.source("lora-t2v-2b"), tmp_path))
    plain = {key.removeprefix("transformer."): value for key, value in source.items()}
    save_file(plain, tmp_path / "file.safetensors",
              metadata={"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 8})})  # fmt: skip
    folder = tmp_path / "peft"
    folder.mkdir()
    named = {f"base_model.model.{key.removesuffix('.weight')}{adapter}.weight": value
             for key, value in plain.items()}  # fmt: skip
    save_file(named, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    states = []
    for place in (tmp_path / "file.safetensors", folder):
        target = tmp_path / f"sat-{place.name}"
        lora_to_sat(place, target=target, report=silent)
        (saved,) = target.rglob("*.pt")
        states.append(torch.load(saved, weights_only=True)["module"])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A LoRA's matrices by plain names, and the SAT states that it makes at alpha 8."""
    folder = tmp_path_factory.mktemp("plain")
    state = {
        key.removeprefix("transformer."): value
        for key, value in load_file(converted(factory.source("lora-t2v-2b"), folder)).items()
    }
    return state, sat_states(state, folder, {"lora_config": json.dumps({"r": 4, "lora_alpha": 8})})


def sat_states(tensors, folder, metadata):
    """The SAT states of a LoRA that is written with these keys and this metadata."""
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, folder / "it.safetensors", metadata
    )
    lora_to_sat(folder / "it.safetensors", target=folder / "sat", report=silent)
    return factory.states(folder / "sat")


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_reads_every_layout_that_predictions_read(layout, plain, tmp_path):
    state, wanted = plain
    found = sat_states(LAYOUTS[layout](state), tmp_path, {"network_alpha": "8"})
    assert same(found, wanted)


def test_alphas_that_are_tensors_count_in_an_export(plain, tmp_path):
    state, wanted = plain
    assert same(sat_states(as_kohya(state, 8), tmp_path, None), wanted)


def test_a_lora_that_no_prediction_loads_is_not_exported_either(plain, tmp_path):
    state, _ = plain
    dora = {"lora_config": json.dumps({"use_dora": True})}
    with pytest.raises(UserError, match="calls it a DoRA"):
        sat_states(state, tmp_path, dora)
