"""What every result comes with: report.json for programs, README.md for people, both in its folder."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lib.convert.writing import Written
from lib.models.specs import ModelSpec
from lib.storage.disk import size_text

REPORT, README = "report.json", "README.md"
SHOWN = 12
"""How many dropped entries the log names, and the README for each reason."""
BORROWED = (
    "The text encoder and the tokenizer are not in this folder: all released CogVideoX models have the same "
    "ones, 9.5 GB in 16 bits."
)


@dataclass(kw_only=True)
class Part:
    """One model that was converted."""

    name: str
    """transformer, vae or lora."""
    source: str
    variant: str
    tensors: int
    """Written."""
    dtype: str
    files: dict[str, Written] = field(default_factory=dict)
    """By their paths in the folder."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Name in the source, or a prefix and an asterisk, -> why it is not in the result."""
    checked: str = ""
    """What the self-check compared."""

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    def dropped_by_reason(self) -> list[tuple[str, list[str]]]:
        """The fewest first: two dozen states of a training do not hide the one tensor of the model."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.dropped.items():
            reasons.setdefault(reason, []).append(name)
        return sorted(reasons.items(), key=lambda item: len(item[1]))


@dataclass(kw_only=True)
class Report:
    """What was found, written, left out and checked."""

    direction: str
    """to diffusers or to SAT."""
    variant: str
    family: str | None = None
    parts: list[Part] = field(default_factory=list)
    included: list[str] = field(default_factory=list)
    """Components taken over from elsewhere as they were."""
    missing: list[str] = field(default_factory=list)
    """Components of the pipeline that are not in the folder."""
    notes: list[str] = field(default_factory=list)
    settings: dict[str, float | int | bool | str] = field(default_factory=dict)
    """What is in no tensor and was used: scaling factor, alpha and so on."""

    def lines(self) -> list[str]:
        """The report in a few lines, for a terminal or a log."""
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


def write_report(report: Report, folder: Path, usage: str) -> None:
    """Write report.json and README.md; `usage` is the README's part about how the result is used.

    What was seen of the values while they were written becomes a note of the report first.
    """
    report.notes += [note for part in report.parts if (note := _about_values(part))]
    text = json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n"
    for name, content in ((REPORT, text), (README, _readme(report, usage))):
        (folder / name).write_text(content, encoding="utf-8")
        (folder / name).chmod(0o644)


def pipeline_usage(report: Report, family: ModelSpec, dtype: str) -> str:
    """The call that loads the folder, with what is missing taken from the released model."""
    imports, given, loads = ["import torch", f"from diffusers import {family.pipeline_class}"], [], []
    home = family.repository
    if "vae" in report.missing:
        imports[1] = f"from diffusers import AutoencoderKLCogVideoX, {family.pipeline_class}"
        loads.append(
            f'vae = AutoencoderKLCogVideoX.from_pretrained(\n    "{home}", subfolder="vae", '
            f"torch_dtype=torch.{dtype}\n)"
        )
        given.append("vae=vae")
    if "text_encoder" in report.missing:
        imports.append("from transformers import T5EncoderModel, T5Tokenizer")
        loads.append(
            f'text_encoder = T5EncoderModel.from_pretrained(\n    "{home}", subfolder="text_encoder", '
            f"torch_dtype=torch.{dtype}\n)"
        )
        loads.append(f'tokenizer = T5Tokenizer.from_pretrained("{home}", subfolder="tokenizer")')
        given += ["text_encoder=text_encoder", "tokenizer=tokenizer"]
    arguments = "".join(f", {each}" for each in given)
    call = (
        f'pipe = {family.pipeline_class}.from_pretrained(\n    "."{arguments}, torch_dtype=torch.{dtype}\n)'
    )
    said = f"{BORROWED}\n\n" if "text_encoder" in report.missing else ""
    code = "\n".join([*imports, "", *loads, call])
    return f"{said}With diffusers, in this folder:\n\n```python\n{code}\n```\n"


def _readme(report: Report, usage: str) -> str:
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
        f"{part.source} has values that are no finite numbers (NaN or infinite), and so has the result: "
        f"{total} in {names}. What is computed with them is of no use."
    )


def _dropped(part: Part) -> str:
    lines = []
    for reason, names in part.dropped_by_reason():
        shown = ", ".join(f"`{name}`" for name in names[:SHOWN])
        more = f" and {len(names) - SHOWN} more, which are in {REPORT}" * (len(names) > SHOWN)
        lines.append(f"- {part.name}: {shown}{more}: {reason}")
    return "\n".join(lines)
