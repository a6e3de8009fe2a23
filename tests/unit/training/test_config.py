"""The trainer's settings: explained, bounded, the same in its two places, and refused with the reason."""

import ast
import dataclasses
import inspect
import itertools
from types import SimpleNamespace
from typing import get_args, get_origin, get_type_hints

import pytest

from lib.errors import UserError
from lib.serving.inputs import describe_inputs, input_properties, parse_inputs
from lib.serving.registry import PROJECT
from lib.serving.schema import training_inputs
from lib.serving.signature import read_signature
from tests.training_factory import config
from training import config as module
from training.config import MAX_SEED, TrainingConfig, digest

TRAIN = PROJECT / "training" / "train.py"
INPUTS = {item.name: item for item in read_signature(TRAIN, "train").inputs}
FIELDS = {field.name: field for field in dataclasses.fields(TrainingConfig)}
KINDS = get_type_hints(TrainingConfig)
SECRETS = ("hub_token", "wandb_api_key")
FILES = ("input_videos", "validation_images")


def refusal(**settings) -> str:
    with pytest.raises(UserError) as caught:
        config(**settings)
    return str(caught.value)


# The two places where settings are written


def test_every_setting_is_an_input_of_cogs_form_in_the_same_order():
    assert list(INPUTS) == list(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_an_input_has_its_settings_default_bounds_and_choices(name):
    given, limits = INPUTS[name], FIELDS[name].metadata
    empty = (name in SECRETS + FILES) and given.default is None
    assert empty or given.default == FIELDS[name].default
    assert empty or type(given.default) is type(FIELDS[name].default)
    assert given.options.get("ge") == limits["ge"]
    assert given.options.get("le") == limits["le"]
    assert given.options.get("choices") == (list(limits["choices"]) if limits["choices"] else None)
    assert given.options["description"]


@pytest.mark.parametrize("name", FIELDS)
def test_an_input_has_its_settings_type(name):
    kind = KINDS[name]
    optional = type(None) in get_args(kind)
    if optional:
        kind = next(part for part in get_args(kind) if part is not type(None))
    if name in SECRETS:
        expected, optional = "Secret", True
    elif name in FILES:
        expected, optional = "Path", True
    else:
        expected = "str" if get_origin(kind) is not None else kind.__name__
    assert (INPUTS[name].type, INPUTS[name].optional) == (expected, optional)
    assert INPUTS[name].repeated == (name == "validation_images")


def test_choices_are_those_of_the_settings_type():
    for name, kind in KINDS.items():
        literals = [part for part in (kind, *get_args(kind)) if str(get_origin(part)) == "typing.Literal"]
        for literal in literals:
            assert get_args(literal) == FIELDS[name].metadata["choices"], name


def test_train_passes_every_input_on_under_its_name(monkeypatch):
    class Trainer:
        def __init__(self):
            self.given = None

        def train(self, **inputs):
            self.given = inputs
            return "weights.tar"

    trainer = Trainer()
    tree = ast.parse(TRAIN.read_text())
    body = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    body.args.defaults, body.returns = [], None
    for argument in body.args.args:
        argument.annotation = None
    space = {"TRAINER": trainer, "TrainingOutput": lambda **fields: SimpleNamespace(**fields)}
    exec(compile(ast.Module([body], []), "train.py", "exec"), space)
    values = {name: object() for name in INPUTS}
    assert space["train"](**values).weights == "weights.tar"
    assert trainer.given == values


def test_every_setting_is_explained_below_its_name():
    tree = ast.parse(inspect.getsource(module))
    (found,) = (node for node in tree.body if getattr(node, "name", "") == "TrainingConfig")
    for node, after in itertools.pairwise(found.body):
        if isinstance(node, ast.AnnAssign):
            explained = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert explained and len(after.value.value) > 5, node.target.id


def test_defaults_are_accepted_and_are_their_own_types():
    made = config()
    for name, kind in KINDS.items():
        value = getattr(made, name)
        kinds = [get_origin(part) or part for part in (get_args(kind) or (kind,))]
        if get_origin(kind) is tuple or str(get_origin(kind)) == "typing.Literal":
            kinds = [type(value)]
        assert type(value) in kinds, name


# What is refused


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if f.metadata["ge"] is not None])
def test_numbers_out_of_range_are_refused_with_the_nearest(name):
    low, high = (FIELDS[name].metadata[side] for side in ("ge", "le"))
    for bound in (low, high):
        assert getattr(config(**{name: bound}), name) == bound
    for value, nearest in ((low - 1, low), (high * 2, high)):
        message = f"{name}={value} is out of range: {low} to {high}. The nearest is {nearest}."
        assert refusal(**{name: value}) == message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["learning_rate", "rank", "lora_alpha", "seed"])
def test_what_is_no_finite_number_is_refused(name, value):
    assert refusal(**{name: value}).startswith(f"{name}={value} is ")


def test_whole_floats_are_whole_numbers_and_others_are_not():
    made = config(max_num_frames=9.0, rank=8.0, learning_rate=1, lora_alpha=4)
    assert (made.max_num_frames, made.rank, made.learning_rate, made.lora_alpha) == (9, 8, 1.0, 4.0)
    assert [type(v) for v in (made.max_num_frames, made.rank, made.learning_rate)] == [int, int, float]
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
        TrainingConfig(**given)
    assert str(caught.value) == (
        "give the clips with input_videos (an archive or folder) or dataset_name, one of the two."
    )
    assert TrainingConfig(dataset_name="owner/name").input_videos is None


def test_seed_zero_and_the_largest_are_seeds():
    assert config(seed=0).seed == 0
    assert config(seed=MAX_SEED).seed == MAX_SEED
    assert "The nearest is 0." in refusal(seed=-1)


# What follows from them


def test_alpha_is_the_rank_unless_given():
    assert config(rank=16).alpha == 16.0
    assert config(rank=16, lora_alpha=4).alpha == 4.0


def test_lists_are_split_and_stripped():
    made = config(
        target_modules="to_q, to_v ,,", validation_prompt=" one ||two|| ", validation_prompt_separator="||"
    )
    assert made.targets == ["to_q", "to_v"]
    assert made.validation_prompts == ["one", "two"]
    assert config().validation_prompts == []
    assert config().targets == ["to_q", "to_k", "to_v", "to_out.0"]


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
    assert set(public) == set(FIELDS) - {*FILES, *SECRETS, "resume_from", "autocaption_model"}
    assert public["hub_model_id"] == "me/star" and public["rank"] == 128


def test_a_saved_state_fits_runs_with_the_same_matrices_and_optimizer_alone():
    same = config(rank=8, lora_alpha=8, target_modules="to_k,to_q", learning_rate=1)
    assert same.fits() == config(rank=8, target_modules="to_q, to_k", max_train_steps=9).fits()
    for other in ({"rank": 4}, {"lora_alpha": 3}, {"target_modules": "to_q"}, {"optimizer": "adamw"}):
        assert config(**{"rank": 8, "target_modules": "to_q,to_k"} | other).fits() != same.fits(), other


def test_digests_tell_contents_apart_and_not_the_order_of_keys():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert len({digest(c) for c in ([], [[]], [1], ["1"], ["ab", "c"], ["a", "bc"], {"a": 1.5})}) == 7


# The command line


def test_the_command_lines_inputs_are_the_forms():
    document = training_inputs(TRAIN)
    assert list(input_properties(document)) == list(FIELDS)
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
    values = parse_inputs(pairs, training_inputs(TRAIN), send_files=False)
    assert values == {
        "input_videos": "clips", "rank": 8, "learning_rate": 1e-3, "scale_lr": True,
        "validation_prompt": "a=b:::c", "validation_images": ["one.png", "two.png"],
        "video_reshape_mode": "none", "wandb_api_key": "key", "trigger_word": "",
    }  # fmt: skip
    made = TrainingConfig(**values)
    assert made.validation_images == ("one.png", "two.png") and made.validation_prompts == ["a=b", "c"]


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
        parse_inputs([pair], training_inputs(TRAIN), send_files=False)


def test_files_of_a_request_are_still_sent(tmp_path):
    (tmp_path / "clips.zip").write_bytes(b"PK")
    pairs = [f"input_videos=@{tmp_path / 'clips.zip'}"]
    sent = parse_inputs(pairs, training_inputs(TRAIN))["input_videos"]
    assert sent.startswith("data:application/") and sent.endswith("base64,UEs=")
    kept = parse_inputs(pairs, training_inputs(TRAIN), send_files=False)["input_videos"]
    assert kept == str(tmp_path / "clips.zip")


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "..", "a/b", ""])
def test_a_trackers_name_cannot_lead_out_of_the_runs_folder(name):
    with pytest.raises(UserError, match="tracker_name="):
        TrainingConfig(input_videos="clips", tracker_name=name)
