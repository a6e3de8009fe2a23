"""Where a run on this machine reads clips, writes captions, and notes what is done."""

import re
from dataclasses import dataclass
from pathlib import Path

from lib.datasets.caption_files import METADATA, PROMPTS, VIDEOS
from lib.errors import UserError

RECORD = "captions.jsonl"
OTHERS_RECORD = re.compile(r"captions\.\d+\.jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a run reads and writes."""

    source: Path
    """A folder or an archive."""
    output: Path
    """The same folder, or another one."""

    @property
    def in_place(self) -> bool:
        return self.source == self.output


def settled_place(source: Path, output: Path | None) -> Place:
    """Where to read and write. Raises UserError where captions would get in the way of anything."""
    source = source.absolute()
    if not source.exists():
        raise UserError(f"{source} does not exist. Give a folder, or a zip or tar of clips.")
    if output is None:
        if not source.is_dir():
            raise UserError(
                f"{source.name} is not a folder. An archive needs output_dir=PATH, where its captions go; "
                "for a single clip there is script/predict caption."
            )
        return Place(source=source, output=source)
    output = output.absolute()
    if output.exists() and not output.is_dir():
        raise UserError(f"output_dir={output} is a file; give a folder.")
    inside = source.is_dir() and output.resolve().is_relative_to(source.resolve())
    if inside and output.resolve() != source.resolve():
        raise UserError(
            f"output_dir={output} lies within the data set, where its clips would be found again; give a "
            "folder outside of it, or leave output_dir out."
        )
    if inside:
        return Place(source=source, output=source)
    foreign = [name for name in (METADATA, PROMPTS, VIDEOS) if (output / name).exists()]
    if foreign and not any(record_paths(output)):
        raise UserError(
            f"output_dir={output} has a {foreign[0]} that is not of an earlier run ({RECORD} is not there); "
            "give another folder."
        )
    return Place(source=source, output=output)


def record_path(output: Path, rank: int) -> Path:
    """Where the process of that number notes what it did."""
    return output / (f"captions.{rank}.jsonl" if rank else RECORD)


def record_paths(output: Path) -> list[Path]:
    """The records that are there, of however many processes."""
    names = [RECORD, *sorted(path.name for path in output.glob("captions.*.jsonl"))]
    return [
        output / name
        for name in names
        if (name == RECORD or OTHERS_RECORD.fullmatch(name)) and (output / name).is_file()
    ]
