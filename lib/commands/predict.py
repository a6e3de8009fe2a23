"""Make one prediction, on a new server or on a running one: script/predict NAME -i input=value."""

import argparse
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib import settings
from lib.commands.common import EXAMPLE_PROMPT, MISUSED, checking_arguments, run_command
from lib.errors import UserError
from lib.progress import LogView
from lib.serving.client import fetch_schema, predict
from lib.serving.inputs import describe_inputs, input_properties, parse_inputs
from lib.serving.outputs import save_output
from lib.serving.registry import PredictorConfig, find_predictor, predictors
from lib.serving.server import Server

USAGE = "script/predict NAME [-i input=value ...] [-o PATH] [--url http://host:port]"
PATH_INPUTS = frozenset({"lora_weights", "extra_lora", "transformer_url", "vae_url", "lora_url"})
"""Text inputs that may be paths of this machine."""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status."""
    return run_command(_predict, arguments)


def _predict(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="script/predict", usage=USAGE, add_help=False)
    parser.add_argument("name", nargs="?")
    parser.add_argument("-i", "--input", action="append", default=[], metavar="input=value")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--url")
    parser.add_argument("-h", "--help", action="store_true")
    given = parser.parse_args(arguments)
    if given.name is None:
        print(_help())
        return 0 if given.help else MISUSED
    with checking_arguments():
        config = find_predictor(given.name)
    document = fetch_schema(given.url) if given.url else config.openapi()
    if given.help:
        print(_predictor_help(config, document))
        return 0
    with checking_arguments():
        _check_output(given.output)
        inputs = parse_inputs(given.input, document)
        match_format(inputs, given.output, document)
    if not given.url:
        _make_paths_absolute(inputs)
    view = LogView()
    try:
        with _server(config, given.url, view) as url:
            reply = predict(url, inputs, on_logs=view.logs)
    finally:
        view.close()
    for path in save_output(reply["output"], target=given.output):
        print(path)
    _print_metrics(reply.get("metrics", {}))
    _print_command(given, reply.get("metrics", {}).get("seed"), document)
    return 0


def match_format(inputs: dict[str, Any], output: Path | None, document: dict[str, Any]) -> None:
    """Set output_format to the ending of --output unless it is given. Raises UserError where they differ."""
    formats = document["components"]["schemas"].get("output_format", {}).get("enum", [])
    ending = output.suffix.removeprefix(".").lower() if output else ""
    if ending in formats and inputs.setdefault("output_format", ending) != ending:
        raise UserError(f"--output {output} does not fit output_format={inputs['output_format']}")


def _help() -> str:
    names = [f"  {name:18}{config.summary()}" for name, config in predictors().items()]
    return "\n".join(
        [
            f"usage: {USAGE}",
            "",
            "predictors:",
            *names,
            "",
            "script/predict NAME --help lists a predictor's inputs.",
            f'Example: script/predict t2v -i prompt="{EXAMPLE_PROMPT}"',
        ]
    )


def _predictor_help(config: PredictorConfig, document: dict[str, Any]) -> str:
    usage = USAGE.replace("NAME", config.name)
    return "\n".join([f"usage: {usage}", "", config.summary(), "", "inputs:", describe_inputs(document)])


def _check_output(output: Path | None) -> None:
    if output and not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: the folder {output.parent} does not exist")
    if output and output.is_dir():
        raise UserError(f"--output {output} is a folder; give a file's path")


def _make_paths_absolute(inputs: dict[str, Any]) -> None:
    """Resolve paths relative to the caller's working directory: the server has another."""
    for name in PATH_INPUTS & inputs.keys():
        path = Path(str(inputs[name]).removeprefix("@")).expanduser()
        if inputs[name] and path.exists():
            inputs[name] = str(path.resolve())


@contextmanager
def _server(config: PredictorConfig, url: str | None, view: LogView) -> Iterator[str]:
    """Yield the address of the given server, or of one that runs until the block ends."""
    if url:
        yield url
        return
    print(f"starting {config.name} ...", file=sys.stderr, flush=True)
    with Server(config, local_sources=True, on_log=view.line) as server:
        yield server.url


def _print_metrics(metrics: dict[str, Any]) -> None:
    shown = {name: f"{value:.2f}" if isinstance(value, float) else value for name, value in metrics.items()}
    print(", ".join(f"{name} {value}" for name, value in shown.items()), file=sys.stderr)


def _print_command(given: argparse.Namespace, seed: int | None, document: dict[str, Any]) -> None:
    """Print the command that makes the same result again."""
    if seed is None or "seed" not in input_properties(document):
        return
    pairs = [pair for pair in given.input if not pair.startswith("seed=")] + [f"seed={seed}"]
    words = ["script/predict", given.name, *(word for pair in pairs for word in ("-i", pair))]
    words += ["-o", str(given.output)] if given.output else []
    words += ["--url", given.url] if given.url else []
    model = "" if given.url else settings.current().model
    prefix = f"COGVIDEOX_MODEL={shlex.quote(model)} " if model else ""
    print(f"again: {prefix}{shlex.join(words)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
