"""Where script/caption reads clips, and writes captions and its journals."""

import re
from dataclasses import dataclass
from pathlib import Path

from lib.datasets.caption_files import METADATA, PROMPTS, VIDEOS
from lib.errors import UserError

JOURNAL = "captions.jsonl"
OTHER_JOURNALS = re.compile(r"captions\.\d+\.jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionPaths:
    """The paths of a run."""

    source: Path
    """A folder or an archive."""
    output: Path
    """Output folder: the source folder, or a separate one."""

    @property
    def in_place(self) -> bool:
        return self.source == self.output

    def journal(self, rank: int) -> Path:
        """Return the journal of the process with this rank."""
        return self.output / (f"captions.{rank}.jsonl" if rank else JOURNAL)

    def journals(self) -> list[Path]:
        """Return the existing journals of all processes."""
        others = sorted(self.output.glob("captions.*.jsonl"))
        paths = [self.output / JOURNAL, *(path for path in others if OTHER_JOURNALS.fullmatch(path.name))]
        return [path for path in paths if path.is_file()]


def resolve_paths(source: Path, output: Path | None) -> CaptionPaths:
    """Return the paths of a run. Raises UserError if its captions would overwrite or mix with other files."""
    source = source.absolute()
    if not source.exists():
        raise UserError(f"{source} does not exist. Give a folder, or a zip or tar of clips.")
    if output is None:
        if not source.is_dir():
            raise UserError(
                f"{source.name} is not a folder. An archive needs output_dir=PATH, where its captions go; "
                "for a single clip there is script/predict caption."
            )
        return CaptionPaths(source=source, output=source)
    output = output.absolute()
    if output.exists() and not output.is_dir():
        raise UserError(f"output_dir={output} is a file; give a folder.")
    inside = source.is_dir() and output.resolve().is_relative_to(source.resolve())
    if inside and output.resolve() != source.resolve():
        raise UserError(
            f"output_dir={output} is inside the data set, whose clips would be found there again; give a "
            "folder outside of it, or omit output_dir."
        )
    paths = CaptionPaths(source=source, output=source if inside else output)
    existing = [name for name in (METADATA, PROMPTS, VIDEOS) if (output / name).exists()]
    if existing and not inside and not paths.journals():
        raise UserError(
            f"output_dir={output} has a {existing[0]} that is not from an earlier run (it has no {JOURNAL}); "
            "give another folder."
        )
    return paths
