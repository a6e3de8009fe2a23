"""Hostile pickles: .pt files with allowed names in any combination, huge sizes, depth and damage.

script/bench hostile-pickles [--count 300] [--seed 0]

Each is read as a model and as a LoRA, as script/convert and script/export-lora do. Prints what came of each
kind, the longest reading and the most memory. Ends with status 1 if a reading took more than 10 s or 1 GiB,
executed something, raised anything but UserError, or changed what is read next. Needs no GPU.
"""

import argparse
import io
import multiprocessing
import os
import pickle
import random
import resource
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench._arguments import at_least_one
from lib.convert import pickle_worker
from lib.convert.lora import convert_lora
from lib.convert.models import to_diffusers
from lib.convert.reading import open_checkpoint
from lib.errors import UserError
from lib.progress import silent

MAX_SECONDS = 10.0
MAX_BYTES = 1 << 30
KINDS = ("names", "sizes", "depth", "forbidden", "cut", "flipped", "tensors", "legacy")
LORA_KEY = "transformer.layers.0.attention.query_key_value.matrix_A.0"
HUGE = (1 << 20, 1 << 31, 1 << 40, (1 << 62) - 1, -1, -(1 << 40))
NAMES = (
    *((module, name) for module, names in pickle_worker.DROPPED.items() for name in sorted(names)),
    *(("torch._utils", name) for name in sorted(pickle_worker.PLAIN_TENSORS | pickle_worker.PARAMETERS)),
    *(("torch._utils", name) for name in sorted(pickle_worker.OTHER_TENSORS)),
    *(("torch", name) for name in (*pickle_worker.STORAGES, "FloatTensor", "float8_e4m3fn")),
    ("collections", "OrderedDict"),
    ("torch.nn.parameter", "Parameter"),
)
FORBIDDEN = (
    ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec"), ("builtins", "open"),
    ("builtins", "getattr"), ("builtins", "__import__"), ("subprocess", "Popen"), ("torch", "load"),
    ("torch.serialization", "load"), ("numpy", "load"), ("importlib", "import_module"), ("io", "open"),
    ("collections", "deque"), ("functools", "partial"), ("operator", "attrgetter"), ("torch.hub", "load"),
    ("torch._utils", "os.system"), ("builtins", "bytearray.fromhex"), ("collections", "abc.Callable"),
)  # fmt: skip


class Result(NamedTuple):
    """What came of the pickles of one kind."""

    kind: str
    read: int
    refused: int
    seconds: float
    memory: int
    faults: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="script/bench hostile-pickles", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--count", type=at_least_one, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shares = [(kind, range(place, options.count, len(KINDS)), options.seed)
              for place, kind in enumerate(KINDS)]  # fmt: skip
    # A process for each kind: the memory of children is known only as the most of all of a process.
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        results = pool.starmap(read_share, shares, chunksize=1)
    print(f"{options.count} pickles, seed {options.seed}, each read as a model and as a LoRA")
    print("| kind | read | refused | longest | most memory |\n|---|---|---|---|---|")
    for each in results:
        print(f"| {each.kind} | {each.read} | {each.refused} | {each.seconds:.1f} s "
              f"| {each.memory / 1e6:.0f} MB |")  # fmt: skip
    faults = [fault for each in results for fault in each.faults]
    print("\n".join(faults) or "no faults")
    sys.exit(bool(faults))


def read_share(kind: str, places: range, seed: int) -> Result:
    """Read the pickles of one kind, and after each the reference."""
    read, refused, worst, faults = 0, 0, 0.0, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        reference = torch.arange(12.0).reshape(3, 4)
        torch.save({"module": {"layer.weight": reference}}, folder / "reference.pt")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for place in places:
            label, path = f"{kind}, number {place}", folder / "hostile.pt"
            path.write_bytes(make_hostile(kind, random.Random(f"{seed} {place}"), folder / "canary"))
            for convert in (as_model, as_lora):
                started = time.monotonic()
                try:
                    convert(path, folder / "target")
                    read += 1
                except UserError as error:
                    refused += 1
                    if len(str(error)) > 1000 or str(folder) in str(error):
                        faults.append(f"{label}: says {str(error)[:300]!r}")
                except Exception as error:  # what this looks for
                    faults.append(f"{label}: raised {type(error).__name__}: {str(error)[:200]}")
                worst = max(worst, seconds := time.monotonic() - started)
                if seconds > MAX_SECONDS:
                    faults.append(f"{label}: took {seconds:.1f} s")
            if (folder / "canary").exists():
                faults.append(f"{label}: executed")
                (folder / "canary").unlink()
            with open_checkpoint(folder / "reference.pt") as checkpoint:
                if not torch.equal(checkpoint.tensors["layer.weight"], reference):
                    faults.append(f"{label}: the reference differs after it")
            if (left := sorted(os.listdir(folder))) != ["hostile.pt", "reference.pt"]:
                faults.append(f"{label}: left {left}")
        os.chdir("/")
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if max(child, own) * 1024 > MAX_BYTES:
        faults.append(f"{kind}: took {max(child, own) / 1e3:.0f} MB")
    return Result(kind, read, refused, worst, max(child, own) * 1024, faults)


def as_model(path: Path, target: Path) -> None:
    to_diffusers(transformer=path, target=target, report=silent)


def as_lora(path: Path, target: Path) -> None:
    convert_lora(path, target=target, direction="to_diffusers", report=silent)


def make_hostile(kind: str, rng: random.Random, canary: Path) -> bytes:
    """Return a file that torch.load would take for a checkpoint, if it were not damaged."""
    makers: dict[str, Callable[[random.Random], bytes]] = {
        "names": lambda rng: mapping(random_value(rng, 4), rng),
        "sizes": sizes,
        "depth": depth,
        "forbidden": lambda rng: forbidden(rng, canary),
        "tensors": lambda rng: mapping(tensor(rng, "0"), rng),
        "legacy": lambda rng: mapping(random_value(rng, 3), rng),
    }
    if kind in makers:
        content = makers[kind](rng)
        return legacy(content, rng) if kind == "legacy" or rng.random() < 0.2 else zipped(content)
    file = io.BytesIO()
    weights = {f"layers.{n}.matrix_A.0": torch.rand(8, 8) for n in range(20)}
    torch.save({"module": weights, "step": 3}, file, _use_new_zipfile_serialization=rng.random() < 0.7)
    good = bytearray(file.getvalue())
    if kind == "cut":
        return bytes(good[: rng.randrange(1, len(good))])
    for _ in range(rng.choice((1, 10, 100))):
        good[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
    return bytes(good)


def zipped(pickled: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", bytes(64))
        archive.writestr("archive/version", b"3\n")
    return file.getvalue()


def legacy(pickled: bytes, rng: random.Random) -> bytes:
    """Return a file as PyTorch before 1.6 wrote it: five pickles, then the values of the storages."""
    magic, system = 0x1950A86A20F9469CFC6C, {"protocol_version": 1001, "little_endian": True}
    parts = [pickle.dumps(magic, 2), pickle.dumps(1001, 2), pickle.dumps(system, 2), pickled]
    count = rng.choice((16, *HUGE))
    return b"".join([*parts, pickle.dumps(["0"], 2), struct.pack("<q", count), bytes(64)])


def mapping(value: bytes, rng: random.Random) -> bytes:
    """Return a pickle of {"module": {NAME: value}}."""
    name = rng.choice(
        ("transformer.layers.0.attention.query_key_value.matrix_A.0", "mixins.patch_embed.proj.weight")
    )
    return b"\x80\x02}" + text("module") + b"}" + text(name) + value + b"ss."


def random_value(rng: random.Random, depth: int) -> bytes:
    """Return instructions that push a value: allowed names called with, built from and filled with others."""
    if depth == 0:
        return rng.choice((b"N", b"\x88", b"]", b"}", b")", number(rng.choice(HUGE)), text("x" * 99)))
    inner = [random_value(rng, rng.randrange(depth)) for _ in range(rng.randrange(1, 4))]
    arguments = b"(" + b"".join(inner) + b"t"
    called = name(*rng.choice(NAMES)) + arguments + rng.choice((b"R", b"\x81"))
    return rng.choice(
        (
            called,
            called + inner[0] + b"b",  # BUILD
            called + b"(" + inner[0] + inner[-1] + b"u",  # SETITEMS
            called + b"(" + b"".join(inner) + b"e",  # APPENDS
            called + b"\x85" + name("builtins", "set") + b"\x85" + b"0",
            name(*rng.choice(NAMES)) + b"(" + called + arguments + b"t" + b"R",
            b"}" + called + inner[0] + b"s",  # as a key
            arguments + b"Q",  # as a persistent id
            tensor(rng, rng.choice(("0", "1"))),
        )
    )


def tensor(rng: random.Random, key: str) -> bytes:
    """Return instructions for a tensor of random facts."""
    pick = [rng.choice((0, 0, 1, 4, 4, 8, *HUGE[:-1])) for _ in range(6)]
    storage = (
        b"(" + text("storage") + name("torch", rng.choice(("FloatStorage", "HalfStorage", "ByteStorage")))
        + text(key) + text("cpu") + number(pick[0]) + b"tQ"
    )  # fmt: skip
    shape, strides = (b"(" + b"".join(map(number, part)) + b"t" for part in (pick[1:3], pick[3:5]))
    return (
        name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + number(pick[5]) + shape + strides
        + b"\x89" + name("collections", "OrderedDict") + b")RtR"
    )  # fmt: skip


def sizes(rng: random.Random) -> bytes:
    """Return a pickle that asks for a huge object, or announces a huge text."""
    module, called = rng.choice((("builtins", "bytearray"), ("torch", "Size"), ("numpy", "ndarray")))
    announced = b"\x8e" + struct.pack("<Q", 1 << rng.randrange(30, 62))  # BINBYTES8, PROTO 4
    large = name(module, called) + b"(" + number(rng.choice(HUGE)) + b"tR"
    memo = b"r" + struct.pack("<I", rng.choice((1 << 20, 1 << 31, (1 << 32) - 1)))  # LONG_BINPUT
    return mapping(rng.choice((large, announced, large + memo, b"N" + memo)), rng)


def depth(rng: random.Random) -> bytes:
    """Return a pickle of deep, wide or doubling containers, as a value or as a key."""
    times = rng.choice((30, 1000, 100_000, 1_000_000))
    doubling = b")" + b"".join(b"q%c" % n + b"h%c" % n + b"\x86" for n in range(min(times, 200)))
    nested = b")" + b"\x85" * times
    lists = b"]" * min(times, 100_000) + b"a" * (min(times, 100_000) - 1)
    itself = b"]q\x00h\x00a"
    mappings = b"}" + b"".join(b"}" + text("module") for _ in range(min(times, 10_000)))
    closed = mappings + b"N" + b"s" * min(times, 10_000)
    value = rng.choice((doubling, nested, lists, itself, closed))
    return mapping(rng.choice((value, b"}" + value + b"Ns")), rng)


def forbidden(rng: random.Random, canary: Path) -> bytes:
    """Return a pickle that would make the file `canary`."""
    module, called = rng.choice(FORBIDDEN)
    command = f"open({str(canary)!r}, 'w')" if called in ("eval", "exec") else f"touch {canary}"
    argument = str(canary) if called == "open" else command
    more = text("w") if called == "open" else b""
    call = rng.choice(
        (
            name(module, called) + b"(" + text(argument) + more + b"tR",
            b"(" + text(argument) + more + b"i" + f"{module}\n{called}\n".encode(),  # INST
            text(module) + text(called) + b"\x93(" + text(argument) + more + b"tR",  # STACK_GLOBAL
            name("collections", "OrderedDict") + b")R" + name(module, called) + b"b",
        )
    )
    return mapping(call, rng)


def name(module: str, called: str) -> bytes:
    return f"c{module}\n{called}\n".encode()


def text(content: str) -> bytes:
    encoded = content.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


if __name__ == "__main__":
    main()
