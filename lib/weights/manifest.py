"""The sources of the known checkpoints, read from weights/manifest.toml."""

import hashlib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

MANIFEST = Path(__file__).resolve().parents[2] / "weights" / "manifest.toml"


@dataclass(frozen=True, kw_only=True)
class Source:
    """The source of a checkpoint: one of `path`, `tar` and `repository`; see weights/manifest.toml."""

    name: str
    path: str | None = None
    tar: str | None = None
    sha256: str | None = None
    size: int | None = None
    alternative: str | None = None
    repository: str | None = None
    revision: str = "main"
    files: dict[str, dict] = field(default_factory=dict)
    licence: str | None = None

    def __post_init__(self) -> None:
        if sum(place is not None for place in (self.path, self.tar, self.repository)) != 1:
            raise ValueError(f"{self.name}: give exactly one of path, tar and repository")

    @property
    def key(self) -> str:
        """The folder's name in the cache, different for another source or another revision of it."""
        if self.tar is not None:
            return f"{self.name}-{hashlib.sha256(self.tar.encode()).hexdigest()[:8]}"
        return f"{self.repository}@{quote(self.revision, safe='')}".replace("/", "--")


def read_manifest(path: Path = MANIFEST) -> dict[str, Source]:
    """Return the manifest's sources by name. Raises ValueError when it is malformed."""
    with open(path, "rb") as file:
        tables = tomllib.load(file)
    try:
        return {name: Source(name=name, **table) for name, table in tables.items()}
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error
