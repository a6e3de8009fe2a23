"""Makes a film from an idea, in a folder: script/story "IDEA" FOLDER [setting=value ...]

The folder gets storyboard.json, scene-01.png, scene-01.mp4 and so on, and film.mp4. Edit the storyboard,
replace a picture or delete a clip, and run the same command again: only what is missing or depends on the
change is made. A stopped run continues the same way.
With a text file instead of the idea, each line is an idea with a folder of its own: FOLDER/001, FOLDER/002.
"""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.commands.common import Job, MisusedError, checking_arguments, help_status, run_job
from lib.datasets.files import UnreadableError, read_lines
from lib.progress import Report
from lib.serving.inputs import input_properties, parse_inputs
from lib.serving.registry import PROJECT
from lib.serving.schema import input_document
from lib.storage.lock import exclusive

USAGE = 'script/story "IDEA" FOLDER [setting=value ...]'
MAX_IDEAS = 1000


def main(arguments: list[str]) -> int:
    """Return the exit status: 0, 1 for an error, 2 for a wrong command line, 130 after Ctrl-C."""
    document = input_document(PROJECT / "predict_story.py", name="Runner")
    document["components"]["schemas"]["Input"]["properties"].pop("idea")  # the first argument
    status = help_status(arguments, usage=USAGE, about=__doc__ or "", document=document)
    if status is not None:
        return status

    def prepare() -> tuple[Job, Callable[[], str]]:
        if len(arguments) < 2 or "=" in arguments[1].partition("/")[0]:
            raise MisusedError(f"an idea and a folder are needed; usage: {USAGE}")
        with checking_arguments():
            values = parse_inputs(arguments[2:], document, send_files=False)
        defaults = {name: shape.get("default") for name, shape in input_properties(document).items()}
        ideas = _ideas(arguments[0], Path(arguments[1]).expanduser())

        def job(*, report: Report, stop: threading.Event) -> str:
            return _make(ideas, defaults | values, report, stop)

        return job, lambda: "stopped; the same command continues"

    return run_job(prepare, stopping="stopping")


def _ideas(text: str, folder: Path) -> list[tuple[str, Path]]:
    """Return each idea with its folder: one idea, or the lines of a text file."""
    file = Path(text).expanduser()
    if not text.lower().endswith(".txt"):
        return [(text, folder)]
    if not file.is_file():
        raise MisusedError(f"there is no file {text}")
    try:
        lines = [line for line in read_lines(file) if line]
    except UnreadableError as error:
        raise MisusedError(f"{text} {error}") from None
    if not 1 <= len(lines) <= MAX_IDEAS:
        raise MisusedError(f"{text} has {len(lines):,} ideas; 1 to {MAX_IDEAS:,} are allowed, one a line.")
    return [(line, folder / f"{number:03}") for number, line in enumerate(lines, start=1)]


def _make(
    ideas: list[tuple[str, Path]], values: dict[str, Any], report: Report, stop: threading.Event
) -> str:
    """Make all stories and return what to print: what was made, and where."""
    from lib.predictors.input_files import check_file
    from lib.predictors.start import prepare_story  # torch loads only after the arguments are checked
    from lib.story.chain import make_story
    from lib.story.request import build_story

    models = prepare_story()
    for name in ("storyboard", "image"):
        values[name] = check_file(Path(values[name])) if values[name] else None
    requests = [(build_story(models.spec, idea=idea, **values), folder) for idea, folder in ideas]
    lines = []
    for request, folder in requests:
        if len(requests) > 1:
            report(f"{folder.name} of {len(requests):03}: {request.idea}")
        with exclusive(folder / ".story", f"another process is making a story in {folder}"):
            made = make_story(request, folder, models, report=report, stop=stop)
        new = ", ".join(made.new) or "nothing, all was there"
        lines.append(f"made {new}\n{os.path.relpath(made.files[-1])}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
