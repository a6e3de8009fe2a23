"""The report in every result's folder: report.json for programs, README.md for people."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lib.convert.locate import SAT_VAE
from lib.models.specs import ModelSpec
from lib.progress import Report
from lib.storage.disk import size_text

REPORT, README = "report.json", "README.md"
SHOWN = 12
"""How many dropped entries the log lists, and the README per reason."""
NO_TEXT_ENCODER = (
    "The text encoder and the tokenizer are not in this folder: all released CogVideoX models share them, "
    "9.5 GB in 16 bits."
)
VAE_USAGE = (
    "```python\nfrom diffusers import AutoencoderKLCogVideoX\n\n"
    'vae = AutoencoderKLCogVideoX.from_pretrained("vae")\n```'
)


@dataclass(kw_only=True)
class WrittenFile:
    """One finished file."""

    bytes: int
    sha256: str
    not_finite: dict[str, int] = field(default_factory=dict)
    """How many values are NaN or infinite, by the tensor's name, where there are any."""


@dataclass(kw_only=True)
class Part:
    """One converted model."""

    name: str
    """transformer, vae or lora."""
    source: str
    variant: str
    tensors: int
    """How many tensors were written."""
    dtype: str
    files: dict[str, WrittenFile] = field(default_factory=dict)
    """Files by their paths in the folder."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Name in the source, or a prefix and an asterisk -> why it is not in the result."""
    checked: str = ""
    """Result of the comparison after writing."""

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    def dropped_by_reason(self) -> list[tuple[str, list[str]]]:
        """Return reasons and names, the shortest list first: a training's many states come last."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.dropped.items():
            reasons.setdefault(reason, []).append(name)
        return sorted(reasons.items(), key=lambda item: len(item[1]))


@dataclass(kw_only=True)
class ConversionReport:
    """What was found, written, left out and checked."""

    direction: str
    """to diffusers or to SAT."""
    variant: str
    family: str | None = None
    parts: list[Part] = field(default_factory=list)
    included: list[str] = field(default_factory=list)
    """Components copied from another model."""
    missing: list[str] = field(default_factory=list)
    """Components of the pipeline that are not in the folder."""
    notes: list[str] = field(default_factory=list)
    settings: dict[str, float | int | bool | str] = field(default_factory=dict)
    """Values used that cannot be read from the weights: scaling factor, alpha and so on."""

    def lines(self) -> list[str]:
        """Return the report in a few lines, for a terminal or a log."""
        lines = []
        for part in self.parts:
            files = f"{len(part.files)} file{'s' * (len(part.files) > 1)}"
            lines.append(
                f"{part.name}: {part.variant}, {part.tensors} tensors in {part.dtype}, "
                f"{size_text(part.bytes)} in {files}; {part.checked}"
            )
            if part.dropped:
                names = [name for _, names in part.dropped_by_reason() for name in names]
                lines.append(
                    f"{part.name}: dropped {', '.join(names[:SHOWN])}" + " ..." * (len(names) > SHOWN)
                )
        return lines + self.notes

    def metrics(self) -> dict[str, object]:
        """Return the prediction's metrics."""
        family = {"family": self.family} if self.family else {}
        return {
            "variant": self.variant,
            **family,
            "tensors": sum(part.tensors for part in self.parts),
            "dropped": sum(len(part.dropped) for part in self.parts),
            **{name: value for name, value in self.settings.items() if name in ("rank", "alpha")},
        }


def write_report(report: ConversionReport, folder: Path, usage: str) -> None:
    """Write report.json and README.md; `usage` is the README's section on how to use the result.

    NaN and infinite values that were counted while writing become notes of the report first.
    """
    report.notes += [note for part in report.parts if (note := _about_values(part))]
    text = json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n"
    for name, content in ((REPORT, text), (README, _readme(report, usage))):
        (folder / name).write_text(content, encoding="utf-8")
        (folder / name).chmod(0o644)


def announce(result: ConversionReport, target: Path, report: Report) -> None:
    """Report what was converted and where the result is."""
    for line in result.lines():
        report(line)
    report(f"Done: {target}")


def pipeline_usage(report: ConversionReport, family: ModelSpec, dtype: str) -> str:
    """Return the call that loads the folder, with missing components from the released model."""
    imports = ["import torch", f"from diffusers import {family.pipeline_class}"]
    arguments: list[str] = []
    loads: list[str] = []
    home = family.repository
    if "vae" in report.missing:
        imports[1] = f"from diffusers import AutoencoderKLCogVideoX, {family.pipeline_class}"
        loads.append(
            f'vae = AutoencoderKLCogVideoX.from_pretrained(\n    "{home}", subfolder="vae", '
            f"torch_dtype=torch.{dtype}\n)"
        )
        arguments.append("vae=vae")
    if "text_encoder" in report.missing:
        imports.append("from transformers import T5EncoderModel, T5Tokenizer")
        loads.append(
            f'text_encoder = T5EncoderModel.from_pretrained(\n    "{home}", subfolder="text_encoder", '
            f"torch_dtype=torch.{dtype}\n)"
        )
        loads.append(f'tokenizer = T5Tokenizer.from_pretrained("{home}", subfolder="tokenizer")')
        arguments += ["text_encoder=text_encoder", "tokenizer=tokenizer"]
    passed = "".join(f", {each}" for each in arguments)
    call = f'pipe = {family.pipeline_class}.from_pretrained(\n    "."{passed}, torch_dtype=torch.{dtype}\n)'
    intro = f"{NO_TEXT_ENCODER}\n\n" if "text_encoder" in report.missing else ""
    code = "\n".join([*imports, "", *loads, call])
    return f"{intro}With diffusers, in this folder:\n\n```python\n{code}\n```\n"


def sat_usage(result: ConversionReport) -> str:
    """Return how SAT loads the result."""
    lines = []
    for part in result.parts:
        if part.name == "vae":
            lines.append(
                f"`{SAT_VAE}` is the VAE: `ckpt_path` of `first_stage_config` in SAT's configuration."
            )
        else:
            lines.append("Give this folder as `load` in SAT's configuration.")
    if "alpha" in result.settings:
        rank, alpha = result.settings["rank"], result.settings["alpha"]
        lines.append(f"The LoRA has rank {rank} (`r`); use it with `lora_alpha` {alpha:g}.")
    else:
        lines.append(
            "The file has no position tables, because SAT computes them. The text encoder is loaded from its "
            "own folder."
        )
    return "\n\n".join(lines)


def lora_usage(result: ConversionReport) -> str:
    """Return how diffusers loads the LoRA."""
    rank, alpha = result.settings["rank"], result.settings["alpha"]
    return (
        '```python\npipe.load_lora_weights("lora.safetensors")\n```\n\n'
        f"At strength 1 it has the effect it had in SAT with alpha {alpha:g}: alpha / rank, "
        f"{alpha:g} / {rank}, is multiplied into the B matrices. Do not scale it a second time. SAT does not "
        "store alpha: if the "
        "LoRA was trained with another alpha, convert it again with that."
    )


def _readme(report: ConversionReport, usage: str) -> str:
    sections = [f"# {report.variant[:1].upper()}{report.variant[1:]}, converted {report.direction}", usage]
    rows = ["| part | found | tensors | type | size | source |", "|---|---|---|---|---|---|"]
    rows += [
        f"| {part.name} | {part.variant} | {part.tensors} | {part.dtype} | {size_text(part.bytes)} | "
        f"{part.source.replace('|', ' ')} |"
        for part in report.parts
    ]
    sections.append("## What was converted\n\n" + "\n".join(rows))
    checks = [f"- {part.name}: {part.checked}" for part in report.parts if part.checked]
    notes = [f"- {note}" for note in report.notes]
    if report.settings:
        notes.append(f"- Used: {', '.join(f'{name} {value}' for name, value in report.settings.items())}")
    sections.append("\n".join(checks + notes))
    if dropped := [_dropped(part) for part in report.parts if part.dropped]:
        sections.append("## Not in the result\n\n" + "\n".join(dropped))
    files = [
        f"| {name} | {size_text(file.bytes)} | {file.sha256} |"
        for part in report.parts
        for name, file in part.files.items()
    ]
    sections.append("## Files\n\n| file | size | SHA-256 |\n|---|---|---|\n" + "\n".join(files))
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def _about_values(part: Part) -> str:
    counts = {name: count for file in part.files.values() for name, count in file.not_finite.items()}
    if not counts:
        return ""
    names = ", ".join(list(counts)[:SHOWN]) + " ..." * (len(counts) > SHOWN)
    total = sum(counts.values())
    return (
        f"{part.source} contains NaN or infinity, and so does the result: {total} values in {names}. Its "
        "output will be unusable."
    )


def _dropped(part: Part) -> str:
    lines = []
    for reason, names in part.dropped_by_reason():
        shown = ", ".join(f"`{name}`" for name in names[:SHOWN])
        more = f" and {len(names) - SHOWN} more, listed in {REPORT}" * (len(names) > SHOWN)
        lines.append(f"- {part.name}: {shown}{more}: {reason}")
    return "\n".join(lines)
