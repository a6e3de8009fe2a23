"""Settings are explained, bounded, refused with the reason, and the inputs of Cog's form."""

import pytest

from lib.errors import UserError
from lib.serving.inputs import describe_inputs, input_properties, parse_inputs
from lib.serving.registry import PROJECT
from lib.serving.schema import input_document
from lib.serving.signature import read_signature
from tests.training_factory import config
from training import train as cog_entry
from training.config import TrainingConfig, all_settings, digest
from training.groups import MAX_SEED
from training.signature import TARGET, field_docstrings, train_source

TRAIN = PROJECT / "training" / "train.py"
INPUTS = {item.name: item for item in read_signature(TRAIN, "train").inputs}
SETTINGS = {each.name: each for _, each in all_settings()}
GROUP_OF = {each.name: group for group, each in all_settings()}
SECRETS = ("hub_token", "wandb_api_key")
FILES = ("input_videos", "validation_images")


def refusal(**settings) -> str:
    with pytest.raises(UserError) as caught:
        config(**settings)
    return str(caught.value)


def value(made: TrainingConfig, name: str):
    return getattr(getattr(made, GROUP_OF[name]), name)


# The two places where settings are written


def test_train_py_is_what_the_command_writes():
    assert TARGET.read_text() == train_source(), "run python -m training.signature"


def test_every_setting_is_an_input_of_cogs_form_and_nothing_else_is():
    assert set(INPUTS) == set(SETTINGS) and len(INPUTS) == len(all_settings())


@pytest.mark.parametrize("name", SETTINGS)
def test_an_input_has_its_settings_type_default_bounds_choices_and_description(name):
    given, each = INPUTS[name], SETTINGS[name]
    kind = {"file": "Path", "secret": "Secret"}.get(each.role, each.type.__name__)
    assert given.type == kind and given.repeated == (each.type is tuple)
    uploaded = each.role in ("file", "secret")
    assert given.optional == (each.optional or uploaded)
    assert given.default == (None if uploaded else each.default)
    assert type(given.default) is type(None if uploaded else each.default)
    assert (given.options.get("ge"), given.options.get("le")) == (each.ge, each.le)
    assert given.options.get("choices") == (list(each.choices) if each.choices else None)
    assert given.options["description"] == field_docstrings()[name] and len(field_docstrings()[name]) > 5


def test_train_passes_every_input_on_under_its_name(monkeypatch):
    passed = {}
    monkeypatch.setattr(cog_entry.TRAINER, "train", lambda **inputs: passed.update(inputs) or "weights.tar")
    values = {name: object() for name in INPUTS}
    assert cog_entry.train(**values).weights == "weights.tar"
    assert passed == values


def test_defaults_are_accepted_and_of_their_types():
    made = config()
    for name, each in SETTINGS.items():
        assert value(made, name) is None or type(value(made, name)) is each.type, name


def test_an_unknown_setting_is_an_error_of_the_program():
    with pytest.raises(TypeError, match="unknown settings: rnak"):
        config(rnak=8)


# What is refused


@pytest.mark.parametrize("name", [name for name, each in SETTINGS.items() if each.ge is not None])
def test_numbers_out_of_range_are_refused_with_the_nearest(name):
    low, high = SETTINGS[name].ge, SETTINGS[name].le
    for bound in (low, high):
        assert value(config(**{name: bound}), name) == bound
    for given, nearest in ((low - 1, low), (high * 2, high)):
        message = f"{name}={given} is out of range: use {low} to {high} (nearest: {nearest})."
        assert refusal(**{name: given}) == message


@pytest.mark.parametrize("given", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["learning_rate", "rank", "lora_alpha", "seed"])
def test_numbers_that_are_not_finite_are_refused(name, given):
    assert refusal(**{name: given}).startswith(f"{name}={given} is ")


def test_floats_without_a_fraction_are_integers_and_others_are_not():
    made = config(max_num_frames=9.0, rank=8.0, learning_rate=1, lora_alpha=4)
    found = [value(made, name) for name in ("max_num_frames", "rank", "learning_rate", "lora_alpha")]
    assert found == [9, 8, 1.0, 4.0]
    assert [type(each) for each in found] == [int, int, float, float]
    assert refusal(rank=8.5) == "rank=8.5 is not a whole number."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": "8"}, "rank='8' is not a whole number."),
        ({"rank": True}, "rank=True is not a whole number."),
        ({"rank": None}, "rank=None is not a whole number."),
        ({"learning_rate": "fast"}, "learning_rate='fast' is not a number."),
        ({"scale_lr": 1}, "scale_lr=1 is not true or false."),
        ({"gradient_checkpointing": "yes"}, "gradient_checkpointing='yes' is not true or false."),
        ({"trigger_word": 7}, "trigger_word=7 is not text."),
        ({"input_videos": 7}, "input_videos=7 is not text."),
        ({"validation_images": "a.png"}, "validation_images='a.png' is not a list."),
        (
            {"optimizer": "sgd"},
            "optimizer='sgd' is not one of adam, adamw, adam_8bit, adamw_8bit, prodigy.",
        ),
        ({"mixed_precision": "fp32"}, "mixed_precision='fp32' is not one of auto, no, fp16, bf16."),
        ({"long_clips": ""}, "long_clips='' is not one of split, cut."),
        ({"target_modules": " , "}, "target_modules is empty; the default is to_q,to_k,to_v,to_out.0."),
        ({"validation_prompt_separator": ""}, "validation_prompt_separator is empty."),
        ({"validation_images": ("a.png",)}, "validation_images need a validation_prompt each."),
        (
            {"push_checkpoints": True},
            "push_checkpoints needs hub_model_id, the repository that receives them.",
        ),
        ({"hub_model_id": "star"}, "hub_model_id='star' is not owner/name."),
        ({"hub_model_id": "a/b/c"}, "hub_model_id='a/b/c' is not owner/name."),
        ({"hub_model_id": "/star"}, "hub_model_id='/star' is not owner/name."),
        (
            {"autocaption_prompt": "What is it?"},
            "autocaption_prompt and autocaption_model need autocaption=true.",
        ),
        (
            {"autocaption_model": "tiny-caption"},
            "autocaption_prompt and autocaption_model need autocaption=true.",
        ),
        (
            {"max_train_steps": 5, "num_train_epochs": 2},
            "max_train_steps=5 and num_train_epochs=2 exclude each other; give one.",
        ),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_with_what_is_allowed(settings, message):
    assert refusal(**settings) == message


@pytest.mark.parametrize("given", [{}, {"input_videos": "a.zip", "dataset_name": "o/n"}])
def test_clips_come_from_exactly_one_place(given):
    with pytest.raises(UserError) as caught:
        TrainingConfig.from_inputs(**given)
    assert str(caught.value) == (
        "give the clips with input_videos (an archive or folder) or dataset_name, one of the two."
    )
    assert TrainingConfig.from_inputs(dataset_name="owner/name").data.input_videos is None


def test_zero_and_the_largest_seed_are_accepted():
    assert config(seed=0).compute.seed == 0
    assert config(seed=MAX_SEED).compute.seed == MAX_SEED
    assert "(nearest: 0)." in refusal(seed=-1)


# What follows from them


def test_alpha_is_the_rank_unless_given():
    assert config(rank=16).adapter.alpha == 16.0
    assert config(rank=16, lora_alpha=4).adapter.alpha == 4.0


def test_lists_are_split_and_stripped():
    made = config(
        target_modules="to_q, to_v ,,", validation_prompt=" one ||two|| ", validation_prompt_separator="||"
    )
    assert made.adapter.targets == ["to_q", "to_v"]
    assert made.validation.prompts == ["one", "two"]
    assert config().validation.prompts == []
    assert config().adapter.targets == ["to_q", "to_k", "to_v", "to_out.0"]


def test_records_hold_no_secrets_and_no_paths():
    secret = config(
        input_videos="/home/me/clips.zip", hub_token="hf_secret", wandb_api_key="wandb-secret",
        hub_model_id="me/star", resume_from="/home/me/old.tar", validation_prompt="a star",
        validation_images=("/home/me/first.png",), autocaption=True, autocaption_model="/home/me/captioner",
    )  # fmt: skip
    public = secret.public()
    assert not {"input_videos", "hub_token", "wandb_api_key", "resume_from", "validation_images"} & set(
        public
    )
    assert not any(word in str(public) for word in ("secret", "/home/me"))
    assert set(public) == set(SETTINGS) - {*FILES, *SECRETS, "resume_from", "autocaption_model"}
    assert public["hub_model_id"] == "me/star" and public["rank"] == 128


def test_a_saved_state_fits_runs_with_the_same_matrices_and_optimizer_alone():
    same = config(rank=8, lora_alpha=8, target_modules="to_k,to_q", learning_rate=1)
    assert same.fixed() == config(rank=8, target_modules="to_q, to_k", max_train_steps=9).fixed()
    for other in ({"rank": 4}, {"lora_alpha": 3}, {"target_modules": "to_q"}, {"optimizer": "adamw"}):
        assert config(**{"rank": 8, "target_modules": "to_q,to_k"} | other).fixed() != same.fixed(), other


def test_digests_tell_contents_apart_and_not_the_order_of_keys():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert len({digest(c) for c in ([], [[]], [1], ["1"], ["ab", "c"], ["a", "bc"], {"a": 1.5})}) == 7


# The command line


def test_the_command_lines_inputs_are_the_forms():
    document = input_document(TRAIN)
    assert list(input_properties(document)) == list(INPUTS)
    assert "required" not in document["components"]["schemas"]["Input"]
    help_text = describe_inputs(document)
    assert "rank  (" in help_text and "1..1024" in help_text
    assert "constant | constant_with_warmup | linear" in help_text


def test_a_command_line_becomes_settings_with_files_as_paths():
    pairs = [
        "input_videos=clips", "rank=8", "learning_rate=1e-3", "scale_lr=yes", "validation_prompt=a=b:::c",
        "validation_images=@one.png", "validation_images=two.png", "seed=", "video_reshape_mode=none",
        "wandb_api_key=key", "trigger_word=",
    ]  # fmt: skip
    values = parse_inputs(pairs, input_document(TRAIN), send_files=False)
    assert values == {
        "input_videos": "clips", "rank": 8, "learning_rate": 1e-3, "scale_lr": True,
        "validation_prompt": "a=b:::c", "validation_images": ["one.png", "two.png"],
        "video_reshape_mode": "none", "wandb_api_key": "key", "trigger_word": "",
    }  # fmt: skip
    made = TrainingConfig.from_inputs(**values)
    assert made.validation.validation_images == ("one.png", "two.png") and made.validation.prompts == [
        "a=b",
        "c",
    ]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("rnak=8", "rank"),
        ("rank=0", "rank"),
        ("rank=eight", "rank"),
        ("optimizer=sgd", "adamw"),
        ("scale_lr=perhaps", "scale_lr: perhaps is not true or false"),
        ("rank", "write name=value"),
    ],
)
def test_a_wrong_command_line_is_refused_before_torch_is_loaded(pair, message):
    with pytest.raises(UserError, match=message):
        parse_inputs([pair], input_document(TRAIN), send_files=False)


def test_files_of_a_request_are_still_sent(tmp_path):
    (tmp_path / "clips.zip").write_bytes(b"PK")
    pairs = [f"input_videos=@{tmp_path / 'clips.zip'}"]
    sent = parse_inputs(pairs, input_document(TRAIN))["input_videos"]
    assert sent.startswith("data:application/") and sent.endswith("base64,UEs=")
    kept = parse_inputs(pairs, input_document(TRAIN), send_files=False)["input_videos"]
    assert kept == str(tmp_path / "clips.zip")


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "..", "a/b", ""])
def test_a_trackers_name_cannot_lead_out_of_the_runs_folder(name):
    with pytest.raises(UserError, match="tracker_name="):
        TrainingConfig.from_inputs(input_videos="clips", tracker_name=name)
