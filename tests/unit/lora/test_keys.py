"""All layouts give the same pairs and scaling; unsupported keys and other bases are refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lib.errors import UserError
from lib.lora.keys import LoraFile, read_lora
from lib.models.specs import SPECS
from tests.lora_factory import LAYOUTS, as_kohya, lora_state, prefixed, renamed, transformer_config

WIDTH, LAYERS = 192, transformer_config()["num_layers"]
RANK, ALPHA = 4, 10.0


def linear_shapes(width: int = WIDTH, layers: int = LAYERS) -> dict[str, tuple[int, int]]:
    attention = {
        f"transformer_blocks.{layer}.attn1.{name}": (width, width)
        for layer in range(layers)
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    }
    return attention | {"proj_out": (128, width), "time_embedding.linear_1": (128, width)}


@pytest.fixture(scope="module")
def state():
    return lora_state(rank=RANK)[0]


def read(tmp_path, tensors, metadata=None, config=None, shapes=None, spec="tiny-t2v", alpha=None) -> LoraFile:
    path = tmp_path / "lora.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)
    return read_lora(
        path,
        name="it",
        shapes=shapes or linear_shapes(),
        spec=SPECS[spec],
        adapter_config=config,
        alpha=alpha,
    )


def complaint(tmp_path, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(tmp_path, *arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_modules_and_matrices(tmp_path, state, name):
    tensors = LAYOUTS[name](state)
    file = read(tmp_path, tensors)
    assert set(file.pairs) == set(linear_shapes()) - {"proj_out", "time_embedding.linear_1"}
    for module, pair in file.pairs.items():
        assert torch.equal(tensors[pair.down], state[f"{module}.lora_A.weight"])
        assert torch.equal(tensors[pair.up], state[f"{module}.lora_B.weight"])
        assert pair.rank == RANK
    assert file.layout in name
    assert file.elements == sum(value.numel() for value in state.values())


def diffusers_metadata(**config) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": v for key, v in config.items()})}


@pytest.mark.parametrize(
    ("metadata", "config", "kohya"),
    [
        (diffusers_metadata(r=RANK, lora_alpha=ALPHA), None, None),
        ({"lora_adapter_metadata": json.dumps({"r": RANK, "lora_alpha": ALPHA})}, None, None),
        ({"lora_config": json.dumps({"r": RANK, "lora_alpha": ALPHA})}, None, None),
        (None, {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}, None),
        (None, None, ALPHA),
        (None, {"alpha": ALPHA}, None),
        (diffusers_metadata(r=RANK, lora_alpha=ALPHA), {"lora_alpha": str(ALPHA)}, None),
    ],
)
def test_alpha_is_found_wherever_a_trainer_stores_it(tmp_path, state, metadata, config, kohya):
    tensors = as_kohya(state, kohya) if kohya else prefixed(state, "transformer.")
    file = read(tmp_path, tensors, metadata, config)
    assert file.scaling.alphas == dict.fromkeys(file.pairs, ALPHA)
    with pytest.raises(UserError, match="lora_alpha=3 was given, but it stores its own alpha, 10; leave"):
        read(tmp_path, tensors, metadata, config, alpha=3.0)


@pytest.mark.parametrize(
    "metadata",
    [
        {"lora_alpha": "10", "rank": "4"},
        {"network_alpha": "10.0", "network_dim": "4"},
        {"ss_network_alpha": "10.0", "ss_network_dim": "Dynamic"},
        {"alpha": " 10 ", "r": "4"},
        {"transformer.lora_alpha": "1e1", "transformer.r": "4", "conv_alpha": "None"},
        {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": "10"})},
        {"lora_config": json.dumps({"r": "4", "lora_alpha": 10.0}), "lora_alpha": "10"},
    ],
)
def test_alpha_is_found_under_any_key_in_use_also_as_text(tmp_path, state, metadata):
    assert set(read(tmp_path, state, metadata).scaling.alphas.values()) == {ALPHA}
    assert "leave lora_alpha out" in complaint(tmp_path, state, metadata, alpha=3)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"my_alpha": "3"}, "its metadata has 'my_alpha' = '3', an alpha that is not understood"),
        ({"lora_alpha": "ten"}, "it stores ten as an alpha; it has to be a number above 0"),
        ({"network_alpha": "inf"}, "it stores inf as an alpha"),
        ({"alpha": "1e30"}, "it stores 1e30 as an alpha"),
        ({"alpha": "8", "lora_alpha": "4"}, "two different alphas in its metadata: 8.0 and 4"),
    ],
)
def test_an_alpha_that_is_not_understood_is_an_error(tmp_path, state, metadata, message):
    assert message in complaint(tmp_path, state, metadata)


@pytest.mark.parametrize("adapter", ["default", "cogvideox-lora", "v1.0", "my lora", "ずー"])
def test_the_adapters_name_in_the_keys_may_be_anything(tmp_path, state, adapter):
    named = renamed(state, (".weight", f".{adapter}.weight"))
    assert read(tmp_path, named).pairs.keys() == read(tmp_path, state).pairs.keys()


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "transformer._orig_mod.", "module.base_model.model._orig_mod."]
)
def test_what_wrappers_add_to_names_is_removed(tmp_path, state, prefix):
    assert read(tmp_path, prefixed(state, prefix)).pairs.keys() == read(tmp_path, state).pairs.keys()


def test_comfyuis_own_names_of_modules_are_known(tmp_path, state):
    pairs = ("transformer_blocks.", "blocks."), ("attn1.to_out.0", "attn_out"), ("attn1.to_", "")
    core = renamed(prefixed(state, "diffusion_model."), *pairs)
    assert "diffusion_model.blocks.0.attn_out.lora_A.weight" in core
    assert read(tmp_path, core).pairs.keys() == read(tmp_path, state).pairs.keys()


def test_without_a_stored_alpha_it_is_the_input_and_else_the_rank(tmp_path, state):
    tensors = prefixed(state, "transformer.")
    assert set(read(tmp_path, tensors).scaling.alphas.values()) == {float(RANK)}
    assert set(read(tmp_path, tensors, alpha=64.0).scaling.alphas.values()) == {64.0}


def test_our_trainers_record_is_not_read_as_alpha(tmp_path, state):
    recorded = {"base": "tiny-t2v", "task": "t2v", "alpha": 99, "trigger_word": "TOK"}
    file = read(tmp_path, state, {"cogvideox": json.dumps(recorded)})
    assert set(file.scaling.alphas.values()) == {float(RANK)} and file.trigger_word == "TOK"


def test_ranks_and_alphas_may_differ_between_modules(tmp_path):
    patterns = {
        "rank_pattern": {"attn1.to_k": 2, "to_v": 6},
        "alpha_pattern": {"^transformer_blocks.0.attn1.to_q": 1},
    }
    tensors, _ = lora_state(rank=RANK, alpha=ALPHA, rank_pattern={"to_k": 2, "to_v": 6})
    file = read(tmp_path, tensors, diffusers_metadata(r=RANK, lora_alpha=ALPHA, **patterns))
    assert file.pairs["transformer_blocks.3.attn1.to_k"].rank == 2
    assert file.pairs["transformer_blocks.3.attn1.to_v"].rank == 6
    alphas = file.scaling.alphas
    assert alphas["transformer_blocks.0.attn1.to_q"] == 1
    assert alphas["transformer_blocks.1.attn1.to_q"] == ALPHA
    assert file.rank_summary() == "2 to 6" and file.scaling.summary() == "1 to 10"


KEY = "transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({f"{KEY}.dora_scale": torch.ones(1)}, "DoRA"),
        ({f"{KEY}.lora_magnitude_vector": torch.ones(1)}, "DoRA"),
        ({f"{KEY}.lokr_w1": torch.ones(1)}, "LoKr"),
        ({f"{KEY}.hada_w1_a": torch.ones(1)}, "LoHa"),
        ({f"{KEY}.lora_mid.weight": torch.ones(1)}, "LoCon"),
        ({"text_encoder.encoder.q.lora_A.weight": torch.ones(4, 4)}, "trains the text encoder"),
        ({"lora_te_encoder_q.lora_down.weight": torch.ones(4, 4)}, "trains the text encoder"),
        ({f"{KEY}.weight": torch.ones(1)}, "1 of its 49 tensors are not LoRA matrices: '" + KEY),
        ({f"{KEY}.lora_B.bias": torch.ones(1)}, "trains biases"),
        ({f"{KEY}.diff": torch.ones(1)}, "full weight differences"),
        ({"proj_out.lora_A.weight": torch.ones(4, WIDTH)}, "without its other half"),
        ({f"transformer.{KEY}.lora_A.weight": torch.ones(4, WIDTH)}, "two tensors for one matrix"),
        ({"proj_out.alpha": torch.tensor(1.0)}, "an alpha for 'proj_out' but no matrices"),
    ],
)
def test_an_unsupported_key_is_refused_by_name(tmp_path, state, extra, message):
    assert message in complaint(tmp_path, state | extra)


def test_a_sat_lora_is_refused_with_the_command_that_converts_it(tmp_path, state):
    key = "model.diffusion_model.transformer.layers.0.attention.dense.matrix_A.0"
    assert complaint(tmp_path, state | {key: torch.ones(1)}) == (
        "it cannot be loaded: it is a LoRA in SAT's layout; convert it with script/export-lora or the "
        f"predictor predict_export_lora ('{key}')."
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: (a[:3], b), "do not fit each other: [3, 192] and [192, 4]"),
        (lambda a, b: (a[:0], b[:, :0]), "do not fit each other"),
        (lambda a, b: (a[:, :, None, None], b[:, :, None, None]), "has 4 dimensions"),
        (lambda a, b: (a.to(torch.int32), b), "stored as I32"),
        (lambda a, b: (a.to(torch.float8_e4m3fn), b), "stored as F8_E4M3"),
    ],
)
def test_invalid_matrices_are_refused(tmp_path, state, change, message):
    down, up = change(state[f"{KEY}.lora_A.weight"], state[f"{KEY}.lora_B.weight"])
    assert message in complaint(tmp_path, state | {f"{KEY}.lora_A.weight": down, f"{KEY}.lora_B.weight": up})


def test_a_file_without_tensors_is_refused(tmp_path):
    assert "holds no tensors" in complaint(tmp_path, {})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (diffusers_metadata(r=8, lora_alpha=8), "rank 8 for"),
        (diffusers_metadata(r=RANK, lora_alpha=-1), "has to be a number above 0"),
        (diffusers_metadata(r=RANK, lora_alpha="eight"), "has to be a number above 0"),
        (diffusers_metadata(r=RANK, lora_alpha=8, use_dora=True), "DoRA"),
        (diffusers_metadata(r=RANK, lora_alpha=8, peft_type="LOKR"), "LOKR"),
        (diffusers_metadata(r=RANK, lora_alpha=8, alpha_pattern={"(a+)+$": 1}), "only names of modules"),
        (diffusers_metadata(r=RANK, lora_alpha=8, rank_pattern=[]), None),
        (diffusers_metadata(r=RANK, lora_alpha=8, rank_pattern=[1]), "is not a JSON object"),
        ({"lora_adapter_metadata": "{"}, "is not a JSON object"),
    ],
)
def test_metadata_that_contradicts_the_matrices_or_asks_for_more_is_refused(
    tmp_path, state, metadata, message
):
    if message is None:
        assert read(tmp_path, state, metadata).scaling is not None
    else:
        assert message in complaint(tmp_path, state, metadata)


def test_alphas_that_contradict_each_other_or_miss_a_module_are_refused(tmp_path, state):
    tensors = as_kohya(state, 8.0)
    assert "stores two different alphas: 2 in its metadata and 8 as tensors" in complaint(
        tmp_path, tensors, diffusers_metadata(r=RANK, lora_alpha=2)
    )
    del tensors[next(key for key in tensors if key.endswith(".alpha"))]
    assert "but none for" in complaint(tmp_path, tensors)


def test_a_lora_of_another_shape_is_refused_with_both_bases(tmp_path, state):
    message = complaint(tmp_path, state, shapes=linear_shapes(width=3072), spec="cogvideox-5b-i2v")
    assert "it was made for another base: tiny-t2v or tiny-i2v. This model is cogvideox-5b-i2v" in message
    assert "maps 3072 to 3072, the LoRA's 192 to 192" in message


@pytest.mark.parametrize(
    ("width", "base"), [(1920, "cogvideox-2b"), (3072, "cogvideox-5b or "), (512, "of width 512")]
)
def test_the_base_is_guessed_from_the_attention_width(tmp_path, width, base):
    tensors = {f"{KEY}.lora_A.weight": torch.ones(2, width), f"{KEY}.lora_B.weight": torch.ones(width, 2)}
    message = complaint(tmp_path, tensors)
    assert "made for another base" in message and base in message and "This model is tiny-t2v" in message


def test_a_lora_with_more_blocks_than_the_model_is_refused(tmp_path):
    state, _ = lora_state(model={"num_layers": LAYERS + 2})
    for tensors in (state, as_kohya(state, 1.0)):
        message = complaint(tmp_path, tensors)
        assert "made for another base" in message and "This model is tiny-t2v (which has no module" in message


def test_a_lora_for_another_family_is_refused(tmp_path):
    key = "blocks.3.self_attn.q"
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 8), f"{key}.lora_B.weight": torch.ones(8, 2)}
    assert "a model with modules like 'blocks.3.self_attn.q'" in complaint(tmp_path, tensors)


@pytest.mark.parametrize(
    ("recorded", "spec", "named"),
    [
        ({"base": "tiny-i2v", "task": "i2v"}, "tiny-t2v", "another base: tiny-i2v. This model is tiny-t2v"),
        ({"base": "tiny-t2v"}, "tiny-i2v", "another base: tiny-t2v. This model is tiny-i2v"),
        ({"base": "THUDM/CogVideoX-5b"}, "tiny-i2v", "base: THUDM/CogVideoX-5b. This model is tiny-i2v"),
        ({"base": "my-own", "task": "i2v"}, "tiny-t2v", "another base: my-own. This model is tiny-t2v"),
    ],
)
def test_bases_with_equal_shapes_are_distinguished_by_the_trainers_record(
    tmp_path, state, recorded, spec, named
):
    assert named in complaint(tmp_path, state, {"cogvideox": json.dumps(recorded)}, spec=spec)


@pytest.mark.parametrize("text", ["{", "[]", '{"base": "tiny-t2v", "task": "t2v"}', '{"base": 3}'])
def test_a_matching_or_unreadable_record_is_accepted(tmp_path, state, text):
    assert read(tmp_path, state, {"cogvideox": text}).pairs


def test_several_adapters_in_one_file_are_named(tmp_path, state):
    first = renamed(prefixed(state, "base_model.model."), (".weight", ".fox.weight"))
    second = {key.replace(".fox.", ".owl."): value.clone() for key, value in first.items()}
    assert "it holds several adapters: 'fox', 'owl'. Save the one to use" in complaint(
        tmp_path, first | second
    )
    on_other_modules = {key: value for key, value in first.items() if ".to_q." in key}
    on_other_modules |= {key: value for key, value in second.items() if ".to_k." in key}
    assert "several adapters: 'fox', 'owl'" in complaint(tmp_path, on_other_modules)


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"peft_type": "LOHA"}, {"layer_replication": [[0, 2]]}]
)
@pytest.mark.parametrize("place", ["metadata", "adapter_config.json"])
def test_another_method_is_refused_also_where_no_alpha_is_said(tmp_path, state, config, place):
    options = {"config": config} if place != "metadata" else {"metadata": diffusers_metadata(**config)}
    assert "cannot be loaded" in complaint(tmp_path, prefixed(state, "transformer."), **options)


@pytest.mark.parametrize(
    ("metadata", "alpha"),
    [
        ({"training_args": json.dumps({"network_alpha": "10", "alphabet": 3})}, 10),
        ({"ss_network_args": json.dumps({"lora_alpha": 10.0})}, 10),
        ({"Network_Alpha": " 10 "}, 10),
        ({"notes": json.dumps({"inner": [{"lora_alpha": 7}]}, indent=1)}, 7),
        ({"notes": " " + json.dumps([{"lora_alpha": 7}])}, 7),
        ({"use_alpha_channel": "False", "ss_noise_offset_alpha": "0.1"}, 4),
        ({"notes": "{not json"}, 4),
    ],
)
def test_an_alpha_in_json_metadata_counts(tmp_path, state, metadata, alpha):
    assert set(read(tmp_path, prefixed(state, "transformer."), metadata).scaling.alphas.values()) == {alpha}


def test_two_places_that_say_different_alphas_are_refused(tmp_path, state):
    metadata = {"config": json.dumps({"lora_alpha": 8})} | diffusers_metadata(r=RANK, lora_alpha=10)
    assert "two different alphas" in complaint(tmp_path, prefixed(state, "transformer."), metadata)


def test_an_adapter_config_that_says_another_alpha_is_refused(tmp_path, state):
    message = complaint(tmp_path, state, diffusers_metadata(r=RANK, lora_alpha=10), {"lora_alpha": 99})
    assert "two different alphas: 10 in its metadata and 99 in adapter_config.json" in message


def test_a_lora_of_the_same_kind_with_another_module_is_not_called_another_base(tmp_path, state):
    strange = {"transformer_blocks.0.attn1.to_z.lora_A.weight": torch.ones(RANK, WIDTH)}
    strange["transformer_blocks.0.attn1.to_z.lora_B.weight"] = torch.ones(WIDTH, RANK)
    assert complaint(tmp_path, state | strange) == (
        "it does not fit tiny-t2v, which has no module 'transformer_blocks.0.attn1.to_z'."
    )


@pytest.mark.parametrize(
    "base", ["tiny-t2v", "TINY-T2V", "", "/models/fine-tuned", "someone/merged-5b", "tiny-t2v@main"]
)
def test_a_recorded_base_of_the_same_kind_is_accepted(tmp_path, state, base):
    recorded = {"cogvideox": json.dumps({"base": base, "task": "t2v"})}
    assert len(read(tmp_path, prefixed(state, "transformer."), recorded).pairs) == 4 * LAYERS


def test_a_long_name_is_refused_before_it_is_matched(tmp_path, state):
    message = complaint(tmp_path, state | {"x" + ".lora_A." * 50_000 + "Z\n": torch.ones(2, 2)})
    assert "has 400,003 characters; names of tensors may have 500" in message and len(message) < 400


@pytest.mark.parametrize(
    ("written", "alpha_over_rank"), [("false", 10 / 4), ("True", 5.0), (1, 5.0), (None, 2.5)]
)
def test_rslora_may_be_written_as_text(tmp_path, state, written, alpha_over_rank):
    metadata = diffusers_metadata(r=RANK, lora_alpha=10, use_rslora=written)
    scaling = read(tmp_path, prefixed(state, "transformer."), metadata).scaling
    factor = 10 / (RANK**0.5 if scaling.rslora else RANK)
    assert factor == alpha_over_rank
