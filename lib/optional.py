"""Optional packages, which only some settings need."""

from importlib.util import find_spec

from lib.errors import UserError


def available(package: str) -> bool:
    """Return whether a package is installed, without importing it."""
    return find_spec(package) is not None


def require(package: str, *, for_setting: str, install: str | None = None) -> None:
    """Raise UserError unless a package is installed; `install` is its name on PyPI if it differs."""
    if not available(package):
        name = install or package
        raise UserError(
            f"{for_setting} needs {name}, which is not installed: "
            f"pip install {name}, or add a line with it to requirements.txt for an image."
        )
