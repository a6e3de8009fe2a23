"""What docs/ says about training holds: settings, defaults, commands and requests."""

import json
import re
import shlex
from itertools import pairwise

import pytest

from lib.serving.inputs import input_properties, parse_inputs
from lib.serving.registry import PROJECT, find_predictor
from lib.serving.schema import input_document, openapi_schema
from training.config import TrainingConfig, all_settings
from training.plan import validate

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("[a-z]*.md"))]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in PAGES}
TRAINING = TEXTS["training.md"]
SETTINGS = input_document(PROJECT / "training" / "train.py")
DEFAULTS = {each.name: each.default for _, each in all_settings()}
COGVIDEO_ARGUMENTS = """
    pretrained_model_name_or_path revision variant cache_dir dataset_name dataset_config_name
    instance_data_root video_column caption_column id_token dataloader_num_workers validation_prompt
    validation_images validation_prompt_separator num_validation_videos validation_epochs guidance_scale
    use_dynamic_cfg seed rank lora_alpha mixed_precision output_dir height width video_reshape_mode fps
    max_num_frames skip_frames_start skip_frames_end random_flip train_batch_size num_train_epochs
    max_train_steps checkpointing_steps checkpoints_total_limit resume_from_checkpoint
    gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps
    lr_num_cycles lr_power enable_slicing enable_tiling noised_image_dropout optimizer use_8bit_adam
    adam_beta1 adam_beta2 prodigy_beta3 prodigy_decouple adam_weight_decay adam_epsilon max_grad_norm
    prodigy_use_bias_correction prodigy_safeguard_warmup tracker_name push_to_hub hub_token hub_model_id
    logging_dir allow_tf32 report_to nccl_timeout
"""


def section(title):
    """The lines of a section of training.md."""
    return TRAINING.split(f"\n## {title}\n")[1].split("\n## ")[0].splitlines()


def argument_rows():
    """The cells of each row of the table of arguments."""
    rows = [line for line in section("The arguments of CogVideo's trainer") if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def code_blocks(text):
    return re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(program):
    """Of all pages: page, variables set before the command, and the words after it."""
    found = []
    for page, text in TEXTS.items():
        for line in "\n".join(code_blocks(text)).replace("\\\n", " ").splitlines():
            before, here, after = line.partition(f"{program} ")
            if here and not before.startswith(("again:", "accelerate")):
                variables = dict(re.findall(r"(\w+)=(\S+)", before))
                found.append((page, variables, shlex.split(after)))
    return found


def default_text(value):
    if value is None or value == "" or value == ():
        return "empty"
    if isinstance(value, float) and value == int(value) and value > 1:
        return str(int(value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_every_setting_is_explained():
    explained = TRAINING + TEXTS["training-data.md"]
    blocks = code_blocks(explained)
    for block in blocks:
        explained = explained.replace(block, "")
    words = set(re.findall(r"\w+", " ".join([*blocks, *re.findall(r"`([^`\n]+)`", explained)])))
    assert [name for name in DEFAULTS if name not in words] == []


def test_every_argument_of_cogvideos_trainer_has_one_row():
    rows = argument_rows()
    assert [row[0] for row in rows] == [f"`{name}`" for name in COGVIDEO_ARGUMENTS.split()]
    assert [row for row in rows if len(row) != 5] == []
    assert [row[0] for row in rows if not row[2] and not row[4]] == []


def test_the_table_has_the_actual_defaults():
    stated = {
        row[2].strip("`"): row[3].strip("`") for row in argument_rows() if row[2].strip("`") in DEFAULTS
    }
    assert len(stated) > 50
    assert stated == {name: default_text(DEFAULTS[name]) for name in stated}


def test_a_default_that_differs_from_cogvideos_has_a_reason():
    same = {"none": "empty", "off": "false", "1e-4": "0.0001", "1e-8": "1e-08"}
    silent = [
        row[0]
        for row in argument_rows()
        if same.get(row[1].strip("`"), row[1].strip("`")) != row[3].strip("`") and not row[4]
    ]
    assert silent == []


@pytest.mark.parametrize(("page", "variables", "words"), commands("script/train") + commands("-m training"))
def test_every_training_command_is_valid(page, variables, words):
    pairs = [word for word in words if not word.startswith("output_dir=")]
    config = TrainingConfig.from_inputs(**parse_inputs(pairs, SETTINGS, send_files=False))
    validate(config, variables.get("COGVIDEOX_MODEL", "tiny-i2v"), "cpu")
    assert page in ("training.md", "training-data.md", "captions.md", "README.md")


def test_there_are_commands_of_every_kind():
    assert len(commands("script/train")) >= 8
    assert len(commands("-m training")) == 1
    assert len(commands("script/predict")) >= 5


@pytest.mark.parametrize(("page", "variables", "words"), commands("script/predict"))
def test_every_prediction_command_names_inputs_that_exist(page, variables, words):
    config = find_predictor(words[0])
    known = input_properties(openapi_schema(config.predictor, name=config.class_name))
    given = [value for flag, value in pairwise(words) if flag == "-i"]
    assert [pair for pair in given if pair.partition("=")[0] not in known] == []


def test_every_setting_given_in_a_sentence_is_allowed():
    pairs = re.findall(r"`([a-z][a-z0-9_]*=[^`\s…]+)", TRAINING + TEXTS["training-data.md"])
    settings = [pair for pair in pairs if pair.partition("=")[0] in DEFAULTS]
    for pair in settings:
        parse_inputs([pair], SETTINGS, send_files=False)
    assert len(settings) > 25
    assert {pair.partition("=")[0] for pair in pairs} - DEFAULTS.keys() <= {"lora_scale", "lora_alpha"}


def test_every_request_for_a_training_names_settings_that_exist():
    bodies = []
    for page in ("training.md", "serving.md"):
        for block in code_blocks(TEXTS[page]):
            if "trainings" in block:
                bodies += re.findall(r'"?input"?[:=] ?(\{[^{}]*\})', block)
    settings = [json.loads(body) for body in bodies]
    assert len(settings) == 4
    for given in settings:
        fetched = {"input_videos": "clips.zip"} if "input_videos" in given else {}  # as Cog fetches it
        TrainingConfig.from_inputs(**given | fetched)
