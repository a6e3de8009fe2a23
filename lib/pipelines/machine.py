"""The machine that a model runs on: its device, the dtype to compute in, and free memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib.models.specs import ModelSpec
from lib.settings import Dtype

CONTROL_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Files of a control group with its limit and use, versions 2 and 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A device and its memory; bytes are None or 0 where they are not known."""

    device: Literal["cpu", "cuda"]
    free_bytes: int | None
    """Free memory of the device: the GPU's, or the system's."""
    dtype: Dtype
    system_bytes: int | None = None
    """Free system memory next to a GPU, for weights that are offloaded."""


def inspect_machine(spec: ModelSpec) -> Machine:
    """Return CUDA if there is a GPU, with the checkpoint's dtype; else the CPU in float32."""
    import torch  # not at the top: free_system_bytes is needed before torch is loaded

    system = free_system_bytes()
    if not torch.cuda.is_available():
        return Machine(device="cpu", free_bytes=system, dtype="float32")
    free, _ = torch.cuda.mem_get_info()
    dtype = spec.dtype
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        dtype = "float16"
    return Machine(device="cuda", free_bytes=free, dtype=dtype, system_bytes=system)


def free_system_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory that this process may still take.

    It is what Linux calls available, or less where a control group bounds it; None on other systems.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    for folder in _control_groups(root):
        for limit, used in CONTROL_FILES:
            try:
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                free = min(free, max(0, left + _reclaimable(folder / "memory.stat")))
            except (OSError, ValueError):  # not there, or "max"
                continue
    return free


def _control_groups(root: Path) -> list[Path]:
    """Return this process's group and those that contain it, in either version of the interface."""
    folders = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in [*lines, "0::/", "0:memory:/"]:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if kinds else "")
        group = Path(path.lstrip("/"))
        folders += [base / part for part in (group, *group.parents)]
    return list(dict.fromkeys(folders))


def _reclaimable(statistics: Path) -> int:
    """Return the bytes of file pages of a group that the kernel frees when memory is short."""
    try:
        lines = statistics.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, StopIteration):
        return 0
