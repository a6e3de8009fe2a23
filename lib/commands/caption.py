"""Captions a data set on this machine: script/caption FOLDER [setting=value ...]

A folder is captioned in place: a .txt next to each clip, metadata.jsonl (which takes precedence), prompts.txt
and videos.txt. Existing captions are kept. With output_dir=PATH, which an archive (zip or tar) needs, they go
to a separate folder, along with the clips unless include_videos=false.
On several GPUs: accelerate launch --multi_gpu --num_processes 2 -m lib.commands.caption FOLDER ...
The same command resumes a stopped run (captions.jsonl lists what is done).
"""

import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lib.commands.caption_paths import CaptionPaths, resolve_paths
from lib.commands.common import Job, checking_arguments, help_status, run_job
from lib.distributed.accelerate_processes import AccelerateProcesses, FirstProcessError
from lib.errors import UserError
from lib.predictors.input_files import check_file
from lib.progress import Report
from lib.serving.inputs import parse_inputs
from lib.serving.registry import PROJECT
from lib.serving.schema import input_document

USAGE = "script/caption FOLDER_OR_ARCHIVE [output_dir=PATH] [setting=value ...]"
SOURCE, OUTPUT_DIR = "input_videos", "output_dir"


def main(arguments: list[str]) -> int:
    """Return the exit status: 0, 1 for an error, 2 for a wrong command line, 130 after Ctrl-C."""
    document = _settings()
    status = help_status(arguments, usage=USAGE, about=__doc__ or "", document=document)
    if status is not None:
        return status

    def prepare() -> tuple[Job, Callable[[], str]]:
        with checking_arguments():
            values = parse_inputs(_pairs(arguments), document, send_files=False)
        paths = _paths(values.pop(SOURCE), values.pop(OUTPUT_DIR, ""))
        return partial(_run, paths, values), lambda: "stopped; the same command resumes it"

    return run_job(prepare, stopping="stopping")


def _settings() -> dict[str, Any]:
    """Return the schema of the predictor's inputs with those of this command: a folder, and output_dir."""
    document = input_document(PROJECT / "predict_caption_dataset.py", name="Runner")
    properties = document["components"]["schemas"]["Input"]["properties"]
    properties[SOURCE] = {
        "type": "string",
        "x-order": 0,
        "description": properties[SOURCE]["description"].replace("Zip or tar", "Folder, zip or tar"),
    }
    properties[OUTPUT_DIR] = {
        "type": "string",
        "x-order": 0,
        "default": "",
        "description": "Where captions and clips go. Empty: captions next to the clips. An archive needs it.",
    }
    return document


def _paths(source: str, output: str) -> CaptionPaths:
    """Return the paths of the run. Raises UserError if the data set is not on this machine."""
    if "://" in source:
        raise UserError(f"{source} is an address; give a folder, zip or tar on this machine.")
    clips = check_file(Path(source.removeprefix("@")).expanduser())
    return resolve_paths(clips, Path(output).expanduser() if output else None)


def _run(
    paths: CaptionPaths, values: dict[str, Any], *, report: Report, stop: threading.Event
) -> Path | None:
    """Return the folder of captions; None if the first process failed, which reports why."""
    from lib.commands.caption_run import caption_dataset  # torch loads only after the arguments are checked

    processes = AccelerateProcesses()
    try:
        return caption_dataset(paths, values, processes=processes, stop=stop, report=report)
    except FirstProcessError:
        return None
    finally:
        processes.close()


def _pairs(arguments: list[str]) -> list[str]:
    """Return all arguments as NAME=VALUE, the data set included."""
    pairs: list[str] = []
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if equals and name.isidentifier():
            pairs.append(argument)
        elif any(pair.startswith(f"{SOURCE}=") for pair in pairs):
            raise UserError(f"{argument!r} is not setting=value; usage: {USAGE}")
        else:
            pairs.append(f"{SOURCE}={argument}")
    if not any(pair.startswith(f"{SOURCE}=") for pair in pairs):
        raise UserError(f"a folder or archive is missing; usage: {USAGE}")
    return pairs


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
