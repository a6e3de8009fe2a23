"""Write and upload a run's results: LoRA, model card, captions, loss curve and clips."""

import itertools
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lib.errors import UserError
from lib.network.upload import claim
from lib.progress import Report
from lib.storage.disk import replacing
from training import checkpoints
from training.autocaption import as_lines
from training.checkpoints import State
from training.config import TrainingConfig
from training.groups import PublishingConfig
from training.losses import write_losses
from training.plan import Plan, captioner_name, label
from training.prepare import Data

RESULT = "result"
TRAINING_STATE = "training_state"


def facts(config: TrainingConfig, plan: Plan, state: State, steps: int) -> dict[str, Any]:
    """Return the metadata of the LoRA's file: base, trigger word, steps, settings. No paths, no secrets."""
    return {
        "base": plan.base,
        "task": plan.spec.task,
        "trigger_word": config.data.trigger_word,
        "rank": config.adapter.rank,
        "alpha": config.adapter.alpha,
        "steps": state.step,
        "of_steps": steps,
        "seed": plan.seed,
        "width": plan.sampling.width,
        "height": plan.sampling.height,
        "frames": plan.sampling.max_frames,
        "fps": plan.sampling.fps,
        "settings": config.public(),
    }


def write_result(
    run: Path, config: TrainingConfig, plan: Plan, data: Data, state: State,
    save_lora: Callable[[Path, torch.dtype], None],
) -> Path:  # fmt: skip
    """Write run/result in one step and return it.

    The LoRA is stored in the base's type, in which it serves; checkpoints keep float32.
    """
    tracker_name = config.publishing.tracker_name
    final = run / RESULT
    with replacing(final) as partial:
        partial.mkdir(parents=True)
        save_lora(partial / checkpoints.LORA, plan.dtype)
        write_losses(partial / "loss.csv", state.losses)
        draw_losses(partial / "loss.png", state.losses)
        rows = [
            {"clip": section.clip, "caption": section.caption, "frames": section.frames}
            for section in data.sections
        ]
        _write_lines(partial / "captions.jsonl", rows)
        if data.captions:
            (partial / checkpoints.CAPTIONS).write_text(as_lines(data.captions), encoding="utf-8")
        left_out = [{"clip": each.name, "reason": each.reason} for each in data.left_out]
        if left_out:
            _write_lines(partial / "left_out.jsonl", left_out)
        if (run / "validation").is_dir():
            shutil.copytree(run / "validation", partial / "validation")
        if "tensorboard" in config.publishing.trackers and (run / tracker_name).is_dir():
            shutil.copytree(run / tracker_name, partial / tracker_name)
        newest = checkpoints.latest(run)
        if config.checkpoints.save_training_state and newest:
            shutil.copytree(newest, partial / TRAINING_STATE)
        (partial / "README.md").write_text(model_card(config, plan, data, state), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
    return final


def steps_of_result(run: Path) -> int:
    """Return how many steps a run's result was trained for; 0 where there is no result."""
    try:
        return len((run / RESULT / "loss.csv").read_text().splitlines()) - 1
    except OSError:
        return 0


def draw_losses(path: Path, losses: list[float]) -> None:
    """Draw the loss of every step and its running mean as a PNG."""
    figure = Figure(figsize=(8, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
    window = max(1, len(losses) // 30)
    sums = [0.0, *itertools.accumulate(losses)]
    means = [(sums[step] - sums[max(0, step - window)]) / min(step, window) for step in steps]
    axes.plot(steps, means, color="tab:blue", label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss (velocity, mean squared error)", ylim=(0, None))
    axes.legend()
    figure.savefig(path, format="png")


def model_card(config: TrainingConfig, plan: Plan, data: Data, state: State) -> str:
    """Return README.md: what the LoRA is, how to use it, how it was made."""
    spec, sampling, adapter = plan.spec, plan.sampling, config.adapter
    trigger_word, prompts = config.data.trigger_word, config.validation.prompts
    task = {"i2v": "image-to-video", "t2v": "text-to-video"}[spec.task]
    trigger = f"Put `{trigger_word}` into the prompt.\n\n" if trigger_word else ""
    repository, _, revision = (spec.repository or plan.base).partition("@")
    # The Hub refuses a card whose base is not a repository.
    base_model = f"base_model: {repository}\n" if "/" in repository else ""
    source = json.dumps(repository) + (f", revision={json.dumps(revision)}" if revision else "")
    example = prompts[0] if prompts else data.sections[0].caption
    imports = "from diffusers.utils import export_to_video" + (", load_image" if spec.task == "i2v" else "")
    image = 'image=load_image("photo.jpg"), ' if spec.task == "i2v" else ""
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in config.public().items())
    return f"""---
{base_model}library_name: diffusers
pipeline_tag: {task}
tags: [cogvideox, lora, {task}]
---

# LoRA for {plan.base}

{trigger}Trained for {state.step} steps on {len(data.sections)} samples of at most \
{sampling.max_frames} frames, {sampling.width}x{sampling.height} pixels, {sampling.fps:g} fps. \
Rank {adapter.rank}, alpha {adapter.alpha:g}.

## Use it

With this service, from the folder of this file or with the URL of the tar in its place:

```
{_command(plan, example)}
```

With diffusers:

```python
import torch
from diffusers import {spec.pipeline_class}
{imports}

pipe = {spec.pipeline_class}.from_pretrained({source}, torch_dtype=torch.{spec.dtype}).to("cuda")
pipe.load_lora_weights("lora.safetensors")
frames = pipe(
    {image}prompt={json.dumps(example, ensure_ascii=False)},
    num_frames={spec.frames}, width={sampling.width}, height={sampling.height}, \
max_sequence_length={spec.text_tokens},
).frames[0]
export_to_video(frames, "video.mp4", fps={sampling.fps:g})
```

Rank and alpha are in the file: do not scale by alpha / rank a second time.

## How it was made

Captions are in `captions.jsonl`, the loss of every step in `loss.csv` and `loss.png`. Seed {plan.seed}.\
{_made_captions(config, plan, data)}

| setting | value |
|---|---|
{rows}

The base's licence applies to what is made with it.
"""


class Publisher:
    """Uploads a run to hub_model_id; without one, or unless `active`, it does nothing.

    Raises UserError when the token may not write there, before anything is trained.
    """

    def __init__(self, config: PublishingConfig, report: Report, *, active: bool) -> None:
        name = config.hub_model_id if active else ""
        self.repository = claim(name, config.hub_token, setting="hub_model_id") if name else None
        self.push_checkpoints = config.push_checkpoints
        self.report = report

    def checkpoint(self, folder: Path) -> None:
        """Upload a checkpoint. A failure is reported and does not stop the training."""
        if self.push_checkpoints:
            self._upload(folder, f"checkpoints/{folder.name}", f"Checkpoint {folder.name}")

    def result(self, folder: Path) -> None:
        """Upload the results. A failure is reported; the results stay on this machine."""
        self._upload(folder, ".", "LoRA, model card and loss curve")

    def _upload(self, folder: Path, place: str, message: str) -> None:
        if self.repository is None:
            return
        try:
            self.repository.upload(folder, place=place, message=message)
            if place == ".":
                self.report(f"uploaded to {self.repository.address}")
        except UserError as error:
            self.report(str(error))


def _made_captions(config: TrainingConfig, plan: Plan, data: Data) -> str:
    made = sum(row.status == "captioned" for row in data.captions)
    captioner = label(captioner_name(config.data, plan.base))
    return f" Of {len(data.captions)} clips {made} were captioned by {captioner}." if made else ""


def _command(plan: Plan, prompt: str) -> str:
    """Return the command that makes a clip with the LoRA at the size it was trained in."""
    spec, size = plan.spec, (plan.sampling.width, plan.sampling.height)
    variables, inputs = [f"COGVIDEOX_MODEL={shlex.quote(plan.base)}"], [f"prompt={prompt}"]
    if spec.task == "i2v":
        inputs.append("image=@photo.jpg")
    if size != (spec.width, spec.height):
        inputs += [f"width={size[0]}", f"height={size[1]}"]
        if spec.nearest_size(*size) != size:
            variables.append("COGVIDEOX_ANY_SIZE=1")
    given = " ".join(f"-i {shlex.quote(each)}" for each in [*inputs, "lora_scale=1"])
    return f'{" ".join(variables)} script/predict {spec.task} {given} -i lora_weights="$PWD/lora.safetensors"'


def _cell(value: object) -> str:
    """Format a value for a Markdown table, which line breaks and bars would break."""
    return " ".join(str(value).replace("|", "\\|").split())


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
