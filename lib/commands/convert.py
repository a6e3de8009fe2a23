"""Convert on this machine: script/convert FILE [vae=FILE] [output=PATH] [setting=value ...]
or script/export-lora FILE [alpha=64] [output=PATH] [setting=value ...]

FILE is a checkpoint, a folder or archive of one, or an https:// address; vae= takes the same. The result is
the new folder output=PATH, by default next to FILE, with -diffusers or -sat appended to its name. It appears
when it is complete. A stopped or killed conversion leaves nothing that would load; the same command starts it
again and resumes the download.
"""

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lib.commands.common import Job, checking_arguments, help_status, run_job
from lib.convert.request import LoraRequest, ModelRequest, lora_request, model_request
from lib.errors import UserError
from lib.network import offline
from lib.predictors.convert import UPLOAD_MESSAGE, convert_lora, convert_model
from lib.predictors.convert_files import CheckpointInput
from lib.progress import Report
from lib.serving.inputs import parse_inputs
from lib.serving.registry import PROJECT
from lib.serving.schema import input_document
from lib.storage.lock import exclusive

OUTPUT = "output"
ENDINGS = {"to_diffusers": "-diffusers", "to_sat": "-sat"}
LOCALLY = {
    ", up to 2 GiB": ", by its path or https:// address",
    "a zip or tar of the folder that it came in": "the folder that it came in, also as a zip or tar",
    "a zip or tar of its folder": "its folder, also as a zip or tar",
    "an archive of a diffusers folder": "a diffusers folder",
}
"""Text about uploads in the predictors' descriptions -> its replacement for the commands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One of the two scripts: the predictor whose inputs it takes, and which of these are checkpoints."""

    script: str
    predictor: str
    sources: tuple[str, ...]
    """The first may be given without its name."""

    @property
    def usage(self) -> str:
        others = "".join(f" [{name}=FILE]" for name in self.sources[1:])
        return f"{self.script} FILE_FOLDER_OR_ADDRESS{others} [output=PATH] [setting=value ...]"


COMMANDS = {
    "model": Command(script="script/convert", predictor="predict_convert.py", sources=("transformer", "vae")),
    "lora": Command(script="script/export-lora", predictor="predict_export_lora.py", sources=("lora",)),
}


def main(arguments: list[str]) -> int:
    """Return the exit status: 0, 1 for an error, 2 for a wrong command line, 130 after Ctrl-C."""
    command, arguments = COMMANDS[arguments[0]], arguments[1:]
    document = settings_of(command)
    status = help_status(arguments, usage=command.usage, about=__doc__ or "", document=document)
    if status is not None:
        return status

    def prepare() -> tuple[Job, Callable[[], str]]:
        with checking_arguments():
            pairs, output = _split(arguments, command)
            values = _defaults(document) | parse_inputs(pairs, document, send_files=False)
            return _prepare(command, values, output), lambda: "stopped; the same command starts it again"

    return run_job(prepare, stopping="stopping")


def settings_of(command: Command) -> dict[str, Any]:
    """Return the predictor's inputs as the command takes them: one per checkpoint, a path or an address."""
    document = input_document(PROJECT / command.predictor, name="Runner")
    properties = document["components"]["schemas"]["Input"]["properties"]
    for name in command.sources:
        del properties[f"{name}_url"], properties[name]["format"]
        for text, replacement in LOCALLY.items():
            properties[name]["description"] = properties[name]["description"].replace(text, replacement)
    return document


def _prepare(command: Command, values: dict[str, Any], output: Path | None) -> Callable[..., Path]:
    """Check everything that is given and return the function that converts; it returns what to print."""
    offline.go_offline()
    inputs = [_input(values, name) for name in command.sources]
    if not any(inputs):
        raise UserError(f"no file, folder or address is given; usage: {command.usage}")
    target = _target(inputs, values["direction"], output)
    if command.predictor == COMMANDS["lora"].predictor:
        return partial(_convert_lora, lora_request(values, has_lora=True), *inputs, target)
    transformer, vae = inputs
    request = model_request(values, has_transformer=bool(transformer), has_vae=bool(vae))
    return partial(_convert_model, request, transformer, vae, target)


def _convert_model(
    request: ModelRequest,
    transformer: CheckpointInput,
    vae: CheckpointInput,
    target: Path,
    *,
    report: Report,
    stop: threading.Event,
) -> Path:
    """Convert into the new folder `target` and return it.

    A failed upload to the Hub is an error, but the folder stays.
    """
    with _exclusive(target) as work:
        repository = request.repository()
        convert_model(request, transformer, vae, target, work=work, report=report, stop=stop)
        if repository is not None:
            repository.upload(target, message=UPLOAD_MESSAGE)
            report(f"uploaded to {repository.address}")
    return target


def _convert_lora(
    request: LoraRequest, lora: CheckpointInput, target: Path, *, report: Report, stop: threading.Event
) -> Path:
    """Convert into the new folder `target` and return the LoRA's file in it."""
    with _exclusive(target) as work:
        return convert_lora(request, lora, target, work=work, report=report, stop=stop)[1]


@contextmanager
def _exclusive(target: Path) -> Iterator[Path]:
    """Yield a folder for unpacked archives while no other process converts into the same target."""
    work = target.with_name(f"{target.name}.work.partial")
    with exclusive(target, f"Another process is converting into {target}; wait for it."):
        shutil.rmtree(work, ignore_errors=True)  # left by a killed process
        yield work


def _split(arguments: list[str], command: Command) -> tuple[list[str], Path | None]:
    """Return the settings, including the checkpoints, and the output folder if one is given."""
    pairs: list[str] = []
    output = None
    first = command.sources[0]
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == OUTPUT and equals:
            output = Path(value).expanduser() if value else None
        elif equals and name.isidentifier():
            pairs.append(argument)
        elif any(pair.startswith(f"{first}=") for pair in pairs):
            raise UserError(f"{argument!r} is not setting=value; usage: {command.usage}")
        else:
            pairs.append(f"{first}={argument}")
    return pairs, output


def _defaults(document: dict[str, Any]) -> dict[str, Any]:
    properties = document["components"]["schemas"]["Input"]["properties"]
    return {name: shape.get("default") for name, shape in properties.items()}


def _input(values: dict[str, Any], name: str) -> CheckpointInput:
    """Take a checkpoint, given by its path or address, out of `values`."""
    text = (values.pop(name) or "").removeprefix("@")
    if not text or "://" in text:
        return CheckpointInput(name=name, address=text)
    return CheckpointInput(name=name, upload=Path(text).expanduser())


def _target(inputs: list[CheckpointInput], direction: str, output: Path | None) -> Path:
    """Return where the result goes: next to the first checkpoint; for an address, the current folder."""
    if output is not None:
        return _absolute(output)
    first = next(each for each in inputs if each)
    text = str(_absolute(first.upload)) if first.upload else first.address
    path = Path(text.partition("?")[0].rstrip("/"))
    stem = path.name if path.is_dir() else path.name.removesuffix(path.suffix)
    folder = path.parent if "://" not in text else Path()
    return _absolute(folder / f"{stem}{ENDINGS[direction]}")


def _absolute(path: Path) -> Path:
    """Return the absolute path without `..`; a link at its end stays a link."""
    absolute = path.absolute()
    return absolute.resolve() if absolute.name == ".." else absolute.parent.resolve() / absolute.name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
