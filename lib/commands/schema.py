"""Print or write OpenAPI documents: script/schema t2v, script/schema --all --output tests/data/schemas."""

import argparse
import json
import sys
from pathlib import Path

from lib.commands.common import checking_arguments, run_command
from lib.errors import UserError
from lib.serving.compatibility import incompatibilities
from lib.serving.registry import find_predictor, predictors
from lib.serving.schema import write_schema


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status."""
    return run_command(_schema, arguments)


def _schema(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="script/schema", description="Prints a predictor's OpenAPI document, or writes it with --output."
    )
    parser.add_argument("name", nargs="?", help=f"one of: {', '.join(predictors())}; all names without it")
    parser.add_argument("--all", action="store_true", help="write NAME.json of each predictor")
    parser.add_argument("-o", "--output", type=Path, help="a file; with --all a folder")
    given = parser.parse_args(arguments)
    with checking_arguments():
        if given.all and (given.name or not given.output):
            raise UserError("--all writes every document: give --output FOLDER and no name")
        config = find_predictor(given.name) if given.name else None
    if given.all:
        _write_all(given.output)
    elif config is None:
        print("\n".join(predictors()))
    elif given.output:
        write_schema(given.output, config.openapi())
    else:
        print(json.dumps(config.openapi(), indent=1))
    return 0


def _write_all(folder: Path) -> None:
    """Write every document, and print what existing callers will no longer be able to do."""
    for name, config in predictors().items():
        document, path = config.openapi(), folder / f"{name}.json"
        if path.is_file():
            for problem in incompatibilities(json.loads(path.read_text(encoding="utf-8")), document):
                print(f"{name}: {problem}", file=sys.stderr)
        write_schema(path, document)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
