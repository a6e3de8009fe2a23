"""The commands behind script/predict, script/serve and script/schema."""

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lib.commands.common import FAILED, INTERRUPTED, MISUSED
from lib.errors import UserError
from lib.progress import LogView
from lib.serving.client import Canceled, PredictionError, fetch_schema, predict
from lib.serving.configs import PredictorConfig, find_predictor, predictors
from lib.serving.inputs import describe_inputs, input_properties, parse_inputs
from lib.serving.outputs import save_output
from lib.serving.schema import openapi_schema, write_schema
from lib.serving.server import Server, ServerError
from lib.serving.signature import SignatureError

EXAMPLE_PROMPT = "a red circle moves right on a black background"
TRAINING_EXAMPLE = (
    "curl -s {}/trainings -H 'Content-Type: application/json' "
    """-d '{{"input": {{"input_videos": "https://example.org/clips.zip"}}}}'"""
)
# Text inputs that may be paths of this machine.
PATH_INPUTS = frozenset({"lora_weights", "extra_lora", "transformer_url", "vae_url", "lora_url"})
PREDICT_USAGE = "script/predict NAME [-i input=value ...] [-o PATH] [--url http://host:port]"


class MisusedError(UserError):
    """A wrong command line."""


def main(arguments: list[str]) -> int:
    """Runs one command; the exit status: 0, 1 for an error, 2 for a wrong command line, 130 after Ctrl-C.

    Errors that the caller can mend are one line, not a traceback.
    """
    signal.signal(signal.SIGTERM, _terminate)
    commands = {"predict": predict_command, "serve": serve_command, "schema": schema_command}
    try:
        return commands[arguments[0]](arguments[1:])
    except (UserError, PredictionError, ServerError, SignatureError) as error:
        print(error, file=sys.stderr)
        return MISUSED if isinstance(error, MisusedError) else FAILED
    except (KeyboardInterrupt, Canceled):
        print("cancelled", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def predict_command(arguments: list[str]) -> int:
    """One prediction, on a server of its own or on a running one."""
    parser = argparse.ArgumentParser(prog="script/predict", usage=PREDICT_USAGE, add_help=False)
    parser.add_argument("name", nargs="?")
    parser.add_argument("-i", "--input", action="append", default=[], metavar="input=value")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--url")
    parser.add_argument("-h", "--help", action="store_true")
    given = parser.parse_args(arguments)
    if given.name is None:
        print(predict_help())
        return 0 if given.help else MISUSED
    with _command_line():
        config = find_predictor(given.name)
    document = fetch_schema(given.url) if given.url else schema_of(config)
    if given.help:
        print(predictor_help(config, document))
        return 0
    with _command_line():
        _check_output(given.output)
        inputs = parse_inputs(given.input, document)
        _match_format(inputs, given.output, document)
    if not given.url:
        _name_files_absolutely(inputs)
    view = LogView()
    try:
        with _server(config, given.url, view) as url:
            reply = predict(url, inputs, on_logs=view.logs)
    finally:
        view.close()
    for path in save_output(reply["output"], target=given.output):
        print(path)
    _report(given, reply.get("metrics", {}), document)
    return 0


def serve_command(arguments: list[str]) -> int:
    """A server in the foreground, until Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="script/serve", description="Runs the HTTP server in the foreground."
    )
    parser.add_argument("name", help=f"one of: {', '.join(predictors())}")
    parser.add_argument("--port", type=int, default=5000, help="default 5000")
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine only")
    parser.add_argument("--train", action="store_true", help="serve POST /trainings in place of predictions")
    given = parser.parse_args(arguments)
    with _command_line():
        if not 0 < given.port < 65536:
            raise UserError(f"--port {given.port} is out of range: 1 to 65535")
        config = find_predictor(given.name)
        if given.train and config.train is None:
            raise UserError(f"{config.name} has no training; those that have: {', '.join(_trainable())}")
    options = {"mode": "train"} if given.train else {}
    try:
        with Server(config, host=given.host, port=given.port, prediction_logs=True, **options) as server:
            what = "training" if given.train else config.name
            print(f"{what} is ready at {server.url} (Ctrl-C stops it). Try:", file=sys.stderr)
            example = (
                TRAINING_EXAMPLE.format(server.url)
                if given.train
                else curl_example(server.url, schema_of(config))
            )
            print(example, file=sys.stderr, flush=True)
            raise ServerError(f"the server ended with status {server.wait()}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 0


def schema_command(arguments: list[str]) -> int:
    """The OpenAPI document, printed or written."""
    parser = argparse.ArgumentParser(
        prog="script/schema", description="Prints a predictor's OpenAPI document, or writes it with --output."
    )
    parser.add_argument("name", nargs="?", help=f"one of: {', '.join(predictors())}; all names without it")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args(arguments)
    if given.name is None:
        print("\n".join(predictors()))
        return 0
    with _command_line():
        config = find_predictor(given.name)
    document = schema_of(config)
    if given.output:
        write_schema(given.output, document)
    else:
        print(json.dumps(document, indent=1))
    return 0


def schema_of(config: PredictorConfig) -> dict[str, Any]:
    """The document of one configuration, training included."""
    return openapi_schema(
        config.predictor, name=config.class_name, train=config.train, train_name=config.train_name
    )


def predict_help() -> str:
    """What script/predict --help prints."""
    names = [f"  {name:18}{config.summary()}" for name, config in predictors().items()]
    return "\n".join(
        [
            f"usage: {PREDICT_USAGE}",
            "",
            "predictors:",
            *names,
            "",
            "script/predict NAME --help lists a predictor's inputs.",
            f'Example: script/predict t2v -i prompt="{EXAMPLE_PROMPT}"',
        ]
    )


def predictor_help(config: PredictorConfig, document: dict[str, Any]) -> str:
    """What script/predict NAME --help prints."""
    usage = PREDICT_USAGE.replace("NAME", config.name)
    return "\n".join([f"usage: {usage}", "", config.summary(), "", "inputs:", describe_inputs(document)])


def curl_example(url: str, document: dict[str, Any]) -> str:
    """A request with every required input filled in; for files, data URIs of files to be named.

    Where nothing is required but one of several files is, the address of the first stands in.
    """
    shapes = input_properties(document)
    required = document["components"]["schemas"]["Input"].get("required", [])
    asks_about_files = shapes.keys() & {"video", "input_videos"}
    inputs = {"prompt": EXAMPLE_PROMPT} if "prompt" in shapes and not asks_about_files else {}
    inputs |= {name: _example(name, shapes[name]) for name in required}
    address = next((name for name in shapes if name.endswith("_url")), None)
    inputs |= {address: f"https://example.org/{address.removesuffix('_url')}.pt"} if address else {}
    body = json.dumps({"input": inputs})
    curl = f"curl -s {url}/predictions -H 'Content-Type: application/json' -d"
    files = [_example_file(name)[0] for name in required if shapes[name].get("format") == "uri"]
    if not files:
        return f"{curl} {shlex.quote(body)}"
    # Through a pipe: no argument of a command may be longer than 128 KiB, and printf is the shell's own.
    template = body.replace("\\", "\\\\").replace("%", "%%").replace(_FILE, "%s")
    contents = " ".join(f'"$(base64 -w0 {name})"' for name in files)
    return f"printf {shlex.quote(template)} {contents} | {curl} @-"


@contextmanager
def _command_line() -> Iterator[None]:
    """Where a UserError says what is wrong with the arguments alone."""
    try:
        yield
    except UserError as error:
        raise MisusedError(str(error)) from error


def _check_output(output: Path | None) -> None:
    if output and not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: the folder {output.parent} does not exist")
    if output and output.is_dir():
        raise UserError(f"--output {output} is a folder; give a file's path")


@contextmanager
def _server(config: PredictorConfig, url: str | None, view: LogView) -> Iterator[str]:
    """The address of a server: the given one, or one started here and stopped afterwards."""
    if url:
        yield url
        return
    print(f"starting {config.name} ...", file=sys.stderr, flush=True)
    with Server(config, local_sources=True, on_log=view.line) as server:
        yield server.url


def _report(given: argparse.Namespace, metrics: dict[str, Any], document: dict[str, Any]) -> None:
    """The metrics, and the command that makes the same result again."""
    shown = {name: f"{value:.2f}" if isinstance(value, float) else value for name, value in metrics.items()}
    print(", ".join(f"{name} {value}" for name, value in shown.items()), file=sys.stderr)
    seed = metrics.get("seed")
    if seed is None or "seed" not in input_properties(document):
        return
    pairs = [pair for pair in given.input if not pair.startswith("seed=")] + [f"seed={seed}"]
    words = ["script/predict", given.name, *(word for pair in pairs for word in ("-i", pair))]
    words += ["-o", str(given.output)] if given.output else []
    words += ["--url", given.url] if given.url else []
    model = os.environ.get("COGVIDEOX_MODEL")
    prefix = f"COGVIDEOX_MODEL={shlex.quote(model)} " if model and not given.url else ""
    print(f"again: {prefix}{shlex.join(words)}", file=sys.stderr)


def _name_files_absolutely(inputs: dict[str, Any]) -> None:
    """Weights on this machine: relative paths are the caller's; the server stands in a folder of its own."""
    for name in PATH_INPUTS & inputs.keys():
        path = Path(str(inputs[name]).removeprefix("@")).expanduser()
        if inputs[name] and path.exists():
            inputs[name] = str(path.resolve())


def _match_format(inputs: dict[str, Any], output: Path | None, document: dict[str, Any]) -> None:
    """Let the ending of --output choose the format where none is given; refuse one that contradicts it."""
    schemas = document["components"]["schemas"]
    formats = schemas.get("output_format", {}).get("enum", [])
    ending = output.suffix.removeprefix(".").lower() if output else ""
    if ending in formats and inputs.setdefault("output_format", ending) != ending:
        raise UserError(f"--output {output} does not fit output_format={inputs['output_format']}")


def _trainable() -> list[str]:
    return [name for name, config in predictors().items() if config.train is not None]


_FILE = "@FILE@"


def _example_file(name: str) -> tuple[str, str]:
    """The file that stands for an input in examples, and its type."""
    known = {"video": ("video.mp4", "video/mp4"), "input_videos": ("clips.zip", "application/zip")}
    return known.get(name, (f"{name}.png", "image/png"))


def _example(name: str, shape: dict[str, Any]) -> Any:
    if "enum" in shape:
        return shape["enum"][0]
    if shape.get("format") == "uri":
        return f"data:{_example_file(name)[1]};base64,{_FILE}"
    return {"integer": shape.get("minimum", 1), "number": shape.get("minimum", 1), "boolean": True}.get(
        shape["type"], "text"
    )


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(143)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
