import hashlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest

from lib.errors import UserError
from lib.network import http, offline, partial_file
from lib.storage.lock import lock
from lib.weights import cache, checkpoints
from lib.weights.cache import is_complete
from lib.weights.checkpoints import locate
from lib.weights.manifest import read_manifest
from tests.http_host import Host, Served, hub_of

ROOT = Path(__file__).resolve().parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK = 50_000


@pytest.fixture(autouse=True)
def online_in_small_steps(monkeypatch, tmp_path):
    for name in (*offline.OFFLINE, "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(offline, "_offline_by_us", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("PATH", str(tmp_path / "no-programs"))
    monkeypatch.setattr(partial_file, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(http, "BACKOFF_SECONDS", 0.01)


def model_files(seed: int = 0) -> dict[str, bytes]:
    """Return a small diffusers folder: its layout is real, its weights are noise."""
    noise = random.Random(seed)
    index = {
        "_class_name": "CogVideoXPipeline",
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    shards = {
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    }
    return {
        "model_index.json": json.dumps(index).encode(),
        "scheduler/scheduler_config.json": b"{}",
        "tokenizer/tokenizer_config.json": b"{}",
        "tokenizer/spiece.model": noise.randbytes(500),
        "text_encoder/config.json": b"{}",
        "text_encoder/model.safetensors.index.json": json.dumps(shards).encode(),
        "text_encoder/model-00001-of-00002.safetensors": noise.randbytes(60_000),
        "text_encoder/model-00002-of-00002.safetensors": noise.randbytes(60_000),
        "transformer/config.json": b"{}",
        "transformer/diffusion_pytorch_model.safetensors": noise.randbytes(400_000),
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.safetensors": noise.randbytes(30_000),
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    return folder


def tar_of(files: dict[str, bytes], *, prefix: str = "", mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, body in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def tar_manifest(folder: Path, host: Host, **more: object) -> Path:
    lines = ["[model]", f'tar = "{host.url("/model.tar")}"', 'licence = "Apache-2.0"']
    path = folder / "manifest.toml"
    path.write_text("\n".join(lines + [f"{key} = {json.dumps(value)}" for key, value in more.items()]) + "\n")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def quiet(line: str) -> None:
    pass


# The manifest


def test_the_manifest_names_every_published_checkpoint_once():
    sources = read_manifest()
    published = {"cogvideox-2b", "cogvideox-5b", "cogvideox-5b-i2v", "cogvideox1.5-5b", "cogvideox1.5-5b-i2v"}
    others = {"cogvlm2-caption", "qwen3-4b-instruct", "flux.2-klein-4b"}
    assert set(sources) >= published | others | {"tiny-t2v", "tiny-i2v", "tiny-writer", "tiny-painter"}
    assert all(source.licence for source in sources.values())
    assert sources["cogvideox-5b"].tar.endswith("/THUDM/CogVideo/model_cache.tar")
    assert sources["cogvideox-5b-i2v"].tar.endswith("/THUDM/CogVideo/model_cache_i2v.tar")
    assert len({source.key for source in sources.values() if source.path is None}) == len(published | others)


@pytest.mark.parametrize(
    "table", ["", 'tar = "https://a/b"\nrepository = "a/b"', 'tar = "https://a/b"\nsha = "1"']
)
def test_a_malformed_manifest_is_refused(tmp_path, table):
    (tmp_path / "manifest.toml").write_text(f"[model]\n{table}\n")
    with pytest.raises(ValueError, match=r"model: give exactly one|unexpected keyword"):
        read_manifest(tmp_path / "manifest.toml")


# Folders


def test_a_local_folder_is_taken_as_it_is(tmp_path):
    folder = write(tmp_path / "mine", model_files())
    assert locate(str(folder), cache=tmp_path / "cache") == folder
    assert is_complete(folder)


@pytest.mark.parametrize("lost", [name for name in model_files() if not name.endswith("spiece.model")])
def test_an_incomplete_local_folder_is_refused_with_the_missing_files(tmp_path, lost):
    folder = write(tmp_path / "mine", model_files())
    (folder / lost).unlink()
    assert not is_complete(folder)
    if lost == "transformer/diffusion_pytorch_model.safetensors" or lost.startswith("vae/diffusion"):
        lost = f"{lost.partition('/')[0]}/*.safetensors"
    with pytest.raises(UserError, match="not a complete model") as caught:
        locate(str(folder), cache=tmp_path / "cache")
    assert lost in str(caught.value)


def test_a_sat_checkpoint_is_refused_with_the_command_that_converts_it(tmp_path):
    sat = write(tmp_path / "sat", {"latest": b"1", "1/mp_rank_00_model_states.pt": b"weights"})
    file = sat / "1" / "mp_rank_00_model_states.pt"
    incomplete = f"{sat} is not a complete model; missing: model_index.json."
    no_folder = f"{file} is not a folder; a model is a folder with model_index.json in it."
    for path, message in ((sat, incomplete), (file, no_folder)):
        with pytest.raises(UserError) as caught:
            locate(str(path), cache=tmp_path / "cache")
        assert str(caught.value) == (
            f"{message} It looks like a SAT checkpoint: script/convert {path}, or the predictor "
            "predict_convert, converts it."
        )
    with pytest.raises(UserError, match=r"missing: model_index\.json\.$"):
        locate(str(write(tmp_path / "other", {"a.txt": b""})), cache=tmp_path / "cache")


def test_a_captioning_model_is_a_folder_without_model_index(tmp_path):
    files = {"config.json": b'{"architectures": ["CogVLMVideoForCausalLM"]}', "model.safetensors": b"noise"}
    assert locate(str(write(tmp_path / "mine", files)), cache=tmp_path / "cache") == tmp_path / "mine"


def test_an_embedded_model_is_next_to_the_manifest(tmp_path):
    write(tmp_path / "tiny", model_files())
    (tmp_path / "manifest.toml").write_text('[small]\npath = "tiny"\n[gone]\npath = "gone"\n')
    assert locate("small", manifest=tmp_path / "manifest.toml") == tmp_path / "tiny"
    with pytest.raises(UserError, match="gone is not a folder"):
        locate("gone", manifest=tmp_path / "manifest.toml")


@pytest.mark.parametrize(
    "name", ["", "cogvideox-9b", "/no/such/folder", "a/b/c", "a/..", "a/b@", "../x", "a/b?c"]
)
def test_an_unknown_name_is_refused_with_the_known_names(tmp_path, name):
    with pytest.raises(UserError, match=r"There is no model .* cogvideox-2b, cogvideox-5b"):
        locate(name, cache=tmp_path / "cache")
    assert names(tmp_path) == []


# Archives


@pytest.mark.parametrize("prefix", ["", "./", "model_cache/", "models--a--b/snapshots/0123/"])
def test_an_archive_becomes_a_complete_folder_with_a_record(tmp_path, prefix):
    archive = tar_of(model_files(), prefix=prefix)
    with Host({"/model.tar": Served(archive)}) as host:
        manifest = tar_manifest(tmp_path, host)
        folder = locate("model", manifest=manifest, cache=tmp_path / "cache", report=quiet)
        asked = len(host.requests)
        assert locate("model", manifest=manifest, cache=tmp_path / "cache", report=quiet) == folder
        assert len(host.requests) == asked
        url = host.url("/model.tar")
    assert {name: (folder / name).read_bytes() for name in model_files()} == model_files()
    (final,) = (tmp_path / "cache").iterdir()
    assert is_complete(final) and is_complete(folder)
    record = json.loads((final / cache.RECORD).read_text())
    assert record["source"] == url and record["licence"] == "Apache-2.0"
    assert record["sha256"] == hashlib.sha256(archive).hexdigest()


def fails_and_leaves_nothing(tmp_path: Path, served: Served, match: str, **more: object) -> None:
    with Host({"/model.tar": served}) as host, pytest.raises(UserError, match=match):
        locate("model", manifest=tar_manifest(tmp_path, host, **more), cache=tmp_path / "cache", report=quiet)
    assert names(tmp_path / "cache") == []


def test_an_archive_with_a_wrong_checksum_leaves_nothing(tmp_path):
    fails_and_leaves_nothing(tmp_path, Served(tar_of(model_files())), "SHA-256", sha256="0" * 64)


def test_an_archive_of_the_wrong_length_leaves_nothing(tmp_path):
    fails_and_leaves_nothing(tmp_path, Served(tar_of(model_files())), "were expected", size=123)


def test_a_missing_archive_leaves_nothing_and_names_the_alternative(tmp_path):
    served = Served(b"", status=404)
    fails_and_leaves_nothing(tmp_path, served, r"HTTP 404.* Hub: zai-org/X", alternative="zai-org/X")


def test_a_truncated_archive_leaves_nothing(tmp_path):
    served = Served(tar_of(model_files()), ranges=False, truncate_at=90_000)
    fails_and_leaves_nothing(tmp_path, served, "the connection ended after 90,000 of")


def test_a_complete_download_of_a_truncated_archive_leaves_nothing(tmp_path):
    fails_and_leaves_nothing(tmp_path, Served(tar_of(model_files())[:90_000]), "not a complete tar archive")


def test_an_archive_without_a_model_leaves_nothing(tmp_path):
    fails_and_leaves_nothing(
        tmp_path, Served(tar_of({"readme.txt": b"hello"})), r"missing: model_index\.json"
    )


def test_an_archive_without_one_of_the_shards_leaves_nothing(tmp_path):
    files = model_files()
    del files["text_encoder/model-00002-of-00002.safetensors"]
    fails_and_leaves_nothing(tmp_path, Served(tar_of(files)), r"missing: text_encoder/model-00002-of-00002")


def test_an_archive_that_reaches_outside_leaves_nothing(tmp_path):
    files = {**model_files(), "../../evil.txt": b"evil"}
    fails_and_leaves_nothing(tmp_path, Served(tar_of(files)), "would leave the target folder")
    assert names(tmp_path) == ["cache", "manifest.toml"]


def test_an_archive_that_unpacks_to_far_more_than_itself_leaves_nothing(tmp_path):
    files = {**model_files(), "vae/diffusion_pytorch_model.safetensors": bytes(40_000_000)}
    fails_and_leaves_nothing(tmp_path, Served(tar_of(files, mode="w:gz")), r"unpacks to more than the")
    # What compresses as little as weights do is taken.
    with Host({"/model.tar": Served(tar_of(model_files(), mode="w:gz"))}) as host:
        manifest = tar_manifest(tmp_path, host)
        assert is_complete(locate("model", manifest=manifest, cache=tmp_path / "cache", report=quiet))


def test_an_archive_needs_room_for_itself_and_its_content(tmp_path, monkeypatch):
    archive = tar_of(model_files())
    usage = type("Usage", (), {"free": int(1.5 * len(archive))})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    fails_and_leaves_nothing(tmp_path, Served(archive), r"Not enough room .* set COGVIDEOX_CACHE")


def test_an_archive_that_was_not_unpacked_yet_is_not_fetched_again(tmp_path, monkeypatch):
    class KilledError(BaseException):
        pass

    def killed(archive: Path, content: Path, *, max_bytes: int) -> None:
        raise KilledError

    with Host({"/model.tar": Served(tar_of(model_files()))}) as host:
        manifest, cache = tar_manifest(tmp_path, host), tmp_path / "cache"
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "extract_tar", killed)
            with pytest.raises(KilledError):
                locate("model", manifest=manifest, cache=cache, report=quiet)
        asked = len(host.requests)
        assert is_complete(locate("model", manifest=manifest, cache=cache, report=quiet))
        assert len(host.requests) == asked


def test_an_archive_left_by_a_killed_process_is_removed_by_the_next_start(tmp_path, monkeypatch):
    class KilledError(BaseException):
        pass

    def killed(work: Path, *, keep: bool) -> None:
        raise KilledError

    with Host({"/model.tar": Served(tar_of(model_files()))}) as host:
        manifest, cache = tar_manifest(tmp_path, host), tmp_path / "cache"
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "_remove_leftovers", killed)
            with pytest.raises(KilledError):
                locate("model", manifest=manifest, cache=cache, report=quiet)
        assert len(list(cache.rglob("archive.tar"))) == 1
        asked = len(host.requests)
        folder = locate("model", manifest=manifest, cache=cache, report=quiet)
        assert len(host.requests) == asked
    assert is_complete(folder) and names(cache) == [folder.name]


def test_a_working_folder_is_left_to_the_process_that_holds_the_lock(tmp_path):
    with Host({"/model.tar": Served(tar_of(model_files()))}) as host:
        manifest, cache = tar_manifest(tmp_path, host), tmp_path / "cache"
        folder = locate("model", manifest=manifest, cache=cache, report=quiet)
        work = write(cache / f"{folder.name}.partial", {"archive.tar": b"bytes"})
        with lock(folder, quiet) as held:  # another open file: as good as another process
            assert held
            assert locate("model", manifest=manifest, cache=cache, report=quiet) == folder
            assert names(work) == ["archive.tar"]
        assert locate("model", manifest=manifest, cache=cache, report=quiet) == folder
    assert names(cache) == [folder.name]


@pytest.mark.parametrize("harm", ["remove", "shorten", "record"])
def test_a_damaged_folder_is_noticed_and_downloaded_again(tmp_path, harm):
    with Host({"/model.tar": Served(tar_of(model_files()))}) as host:
        manifest = tar_manifest(tmp_path, host)
        folder = locate("model", manifest=manifest, cache=tmp_path / "cache", report=quiet)
        victim = folder / "transformer/diffusion_pytorch_model.safetensors"
        if harm == "remove":
            victim.unlink()
        elif harm == "shorten":
            victim.write_bytes(b"half")
        else:
            (folder / cache.RECORD).write_text("{")
        assert not is_complete(folder)
        lines = []
        assert locate("model", manifest=manifest, cache=tmp_path / "cache", report=lines.append) == folder
    assert victim.read_bytes() == model_files()["transformer/diffusion_pytorch_model.safetensors"]
    assert "is damaged" in lines[0]


def test_the_cache_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("COGVIDEOX_CACHE", str(tmp_path / "elsewhere"))
    with Host({"/model.tar": Served(tar_of(model_files()))}) as host:
        folder = locate("model", manifest=tar_manifest(tmp_path, host), report=quiet)
    assert folder.parent == tmp_path / "elsewhere"
    monkeypatch.delenv("COGVIDEOX_CACHE")
    assert cache.cache_folder() == Path.home() / ".cache" / "cogvideox"


def test_a_cache_that_cannot_be_written_is_an_error_with_the_variable(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with (
        Host({"/model.tar": Served(tar_of(model_files()))}) as host,
        pytest.raises(UserError, match="COGVIDEOX_CACHE"),
    ):
        locate("model", manifest=tar_manifest(tmp_path, host), cache=tmp_path / "file", report=quiet)


# Whether the caller can use the model


class WrongTaskError(UserError):
    """What a caller's check raises."""


def refuse(index: dict) -> None:
    raise WrongTaskError(f"{index.get('_class_name') or index['architectures']} is another task")


def test_every_kind_of_source_is_checked_by_its_index(tmp_path, hub):
    hub.files["/model.tar"] = Served(tar_of(model_files(), prefix="wrapped/"))
    manifest, cache = tar_manifest(tmp_path, hub), tmp_path / "cache"
    write(tmp_path / "tiny", model_files())
    manifest.write_text(manifest.read_text() + '[small]\npath = "tiny"\n')
    options = {"manifest": manifest, "cache": cache, "report": quiet}
    for name in ("model", "owner/name", "small", str(tmp_path / "tiny")):
        seen: list[dict] = []
        folder = locate(name, check=seen.append, **options)
        assert seen and all(index == json.loads(model_files()["model_index.json"]) for index in seen)
        with pytest.raises(WrongTaskError, match="CogVideoXPipeline is another task"):
            locate(name, check=refuse, **options)  # also if it is complete already
        assert is_complete(folder) or is_complete(folder.parent)


def test_a_repository_of_another_task_is_refused_before_its_files_are_fetched(tmp_path, hub):
    with pytest.raises(WrongTaskError):
        locate("owner/name", check=refuse, cache=tmp_path / "cache", report=quiet)
    fetched = [path for path, _, _ in hub.requests if "/resolve/" in path]
    assert fetched == [f"/owner/name/resolve/{COMMIT}/model_index.json"]
    assert names(tmp_path / "cache") == []


def test_a_refusal_keeps_what_another_download_of_the_repository_left(tmp_path, hub):
    hub.files.pop(f"/owner/name/resolve/{COMMIT}/vae/diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="HTTP 404"):
        locate("owner/name", cache=tmp_path / "cache", report=quiet)
    kept = sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    with pytest.raises(WrongTaskError):
        locate("owner/name", check=refuse, cache=tmp_path / "cache", report=quiet)
    assert sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file()) == kept != []


def test_a_captioning_model_is_checked_by_its_config_before_its_weights(tmp_path, hub):
    files = {
        "config.json": b'{"architectures": ["CogVLMVideoForCausalLM"]}',
        "model.safetensors": bytes(2000),
    }
    hub.files.update(hub_of("owner/caption", files, commit=COMMIT))
    with pytest.raises(WrongTaskError):
        locate("owner/caption", check=refuse, cache=tmp_path / "cache", report=quiet)
    fetched = [path for path, _, _ in hub.requests if "/resolve/" in path]
    assert fetched == [f"/owner/caption/resolve/{COMMIT}/config.json"]
    folder = write(tmp_path / "mine", files)
    with pytest.raises(WrongTaskError):
        locate(str(folder), check=refuse, cache=tmp_path / "cache")


@pytest.mark.parametrize("index", [b"{", b"[1]", b"\xff\xfe"])
def test_an_index_that_is_not_a_json_object_is_refused_before_the_other_files(tmp_path, hub, index):
    hub.files.update(hub_of("owner/name", {**model_files(), "model_index.json": index}, commit=COMMIT))
    with pytest.raises(UserError, match=r"model_index\.json is not a JSON object"):
        locate("owner/name", check=quiet, cache=tmp_path / "cache", report=quiet)
    assert names(tmp_path / "cache") == []


# Several processes

CHILD = f"""
import sys
from pathlib import Path
from lib.network import http, partial_file
from lib.weights import checkpoints
partial_file.CHUNK_BYTES = {CHUNK}
http.BACKOFF_SECONDS = 0.01
print("found", checkpoints.locate("model", manifest=Path(sys.argv[1]), cache=Path(sys.argv[2])), flush=True)
"""


def child(manifest: Path, cache: Path) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    arguments = [sys.executable, "-c", CHILD, str(manifest), str(cache)]
    return subprocess.Popen(arguments, env=env, stdout=subprocess.PIPE, text=True)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def test_two_processes_at_once_download_once(tmp_path):
    archive, permits = tar_of(model_files()), threading.Semaphore(0)
    with Host({"/model.tar": Served(archive, piece=CHUNK, permits=permits)}) as host:
        manifest = tar_manifest(tmp_path, host)
        first = child(manifest, tmp_path / "cache")
        wait_until(lambda: host.bodies("/model.tar"))
        second = child(manifest, tmp_path / "cache")
        assert "another process is downloading it" in second.stdout.readline()
        permits.release(1000)
        outputs = [first.communicate(timeout=120)[0], second.communicate(timeout=120)[0]]
        ranges = host.bodies("/model.tar")
    assert [first.returncode, second.returncode] == [0, 0]
    assert outputs[0].splitlines()[-1] == outputs[1].splitlines()[-1]
    assert len(ranges) == len(set(ranges)) == -(-len(archive) // CHUNK)
    assert names(tmp_path / "cache") == [Path(outputs[0].splitlines()[-1].split()[1]).name]


def test_a_killed_download_is_taken_over_and_continued_by_the_one_that_waited(tmp_path):
    archive, permits = tar_of(model_files()), threading.Semaphore(0)
    with Host({"/model.tar": Served(archive, piece=CHUNK, permits=permits)}) as host:
        manifest, cache = tar_manifest(tmp_path, host), tmp_path / "cache"
        first = child(manifest, cache)
        wait_until(lambda: host.bodies("/model.tar"))
        second = child(manifest, cache)
        assert "waiting" in second.stdout.readline()
        permits.release(4)  # so many chunks, a line of the journal each
        wait_until(lambda: any(p.read_text().count("\n") == 5 for p in cache.rglob("*.journal")))
        first.send_signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
        first.stdout.close()
        before = len(host.bodies("/model.tar"))
        permits.release(1000)
        output = second.communicate(timeout=120)[0]
        again = len(host.bodies("/model.tar")) - before
    assert second.returncode == 0 and "continuing at" in output
    assert again < -(-len(archive) // CHUNK)
    folder = Path(output.splitlines()[-1].split()[1])
    assert {name: (folder / name).read_bytes() for name in model_files()} == model_files()
    assert names(cache) == [folder.name]


# The Hub


@pytest.fixture
def hub(monkeypatch):
    files = {
        **model_files(),
        "README.md": b"# hello",
        "LICENSE": b"terms",
        "code.py": b"evil",
        "vae/old.bin": b"pickle",
    }
    with Host(hub_of("owner/name", files, commit=COMMIT)) as host:
        monkeypatch.setenv("HF_ENDPOINT", host.address)
        yield host


def test_the_hub_of_the_tests_speaks_as_the_library_expects(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    info = huggingface_hub.HfApi(endpoint=hub.address).model_info(
        "owner/name", revision="main", files_metadata=True
    )
    assert info.sha == COMMIT
    sizes = {entry.rfilename: entry.size for entry in info.siblings}
    assert sizes.items() >= {name: len(body) for name, body in model_files().items()}.items()
    large = next(entry for entry in info.siblings if entry.rfilename.startswith("transformer/diffusion"))
    assert large.lfs.sha256 == hashlib.sha256(model_files()[large.rfilename]).hexdigest()
    url = huggingface_hub.hf_hub_url("owner/name", "vae/config.json", revision=COMMIT, endpoint=hub.address)
    assert url.removeprefix(hub.address) in hub.files


@pytest.mark.parametrize("name", ["owner/name", "owner/name@main", f"owner/name@{COMMIT}"])
def test_a_hub_repository_comes_without_code_and_pickles_and_records_its_commit(tmp_path, hub, name):
    folder = locate(name, cache=tmp_path / "cache", report=quiet)
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    record = json.loads(found.pop(cache.RECORD))
    assert found == {**model_files(), "LICENSE": b"terms"}
    assert record["source"] == "owner/name" and record["commit"] == COMMIT
    asked = len(hub.requests)
    assert locate(name, cache=tmp_path / "cache", report=quiet) == folder
    assert len(hub.requests) == asked
    assert names(tmp_path / "cache") == [folder.name]


def test_a_hub_download_that_broke_off_continues_with_the_files_that_are_missing(tmp_path, hub):
    broken = f"/owner/name/resolve/{COMMIT}/vae/diffusion_pytorch_model.safetensors"
    served = hub.files.pop(broken)
    with pytest.raises(UserError, match="HTTP 404"):
        locate("owner/name", cache=tmp_path / "cache", report=quiet)
    assert names(tmp_path / "cache") == ["owner--name@main.partial"]
    hub.files[broken] = served
    hub.requests.clear()
    assert is_complete(locate("owner/name", cache=tmp_path / "cache", report=quiet))
    assert {path for path, _, _ in hub.requests} == {"/api/models/owner/name/revision/main", broken}


def test_a_branch_that_moved_meanwhile_does_not_mix_two_commits(tmp_path, hub):
    hub.files.pop(f"/owner/name/resolve/{COMMIT}/vae/diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="HTTP 404"):
        locate("owner/name", cache=tmp_path / "cache", report=quiet)
    hub.files.update(hub_of("owner/name", model_files(seed=1), commit="f" * 40))
    folder = locate("owner/name", cache=tmp_path / "cache", report=quiet)
    assert {name: (folder / name).read_bytes() for name in model_files(1)} == model_files(1)


def test_a_damaged_hub_file_is_refused_by_the_hubs_own_checksum(tmp_path, hub):
    path = f"/owner/name/resolve/{COMMIT}/transformer/diffusion_pytorch_model.safetensors"
    hub.files[path] = Served(bytes(400_000))
    with pytest.raises(UserError, match="SHA-256"):
        locate("owner/name", cache=tmp_path / "cache", report=quiet)
    assert not list((tmp_path / "cache").rglob("transformer/diffusion*"))
    assert names(tmp_path / "cache") == ["owner--name@main.partial"]


@pytest.mark.parametrize(
    ("status", "code", "match"),
    [
        (401, "RepoNotFound", "no repository owner/gone, or it is private"),
        (404, "RevisionNotFound", "owner/gone has no revision 'main'"),
        (403, "GatedRepo", "owner/gone is gated"),
    ],
)
def test_a_refusal_of_the_hub_is_explained(tmp_path, hub, status, code, match):
    answer = Served(b"", status=status, headers={"X-Error-Code": code})
    hub.files["/api/models/owner/gone/revision/main"] = answer
    with pytest.raises(UserError, match=match):
        locate("owner/gone", cache=tmp_path / "cache", report=quiet)
    assert names(tmp_path / "cache") == []


def test_a_repository_without_a_model_is_refused_before_anything_is_fetched(tmp_path, hub):
    hub.files.update(
        hub_of("owner/sat", {"1/mp_rank_00_model_states.pt": b"x", "config.json": b"{}"}, commit=COMMIT)
    )
    with pytest.raises(UserError) as caught:
        locate("owner/sat", cache=tmp_path / "cache", report=quiet)
    assert str(caught.value) == (
        "owner/sat on the Hub is not a model that can be loaded here: it needs model_index.json and "
        "safetensors weights in the diffusers layout. For a SAT checkpoint script/convert, or the predictor "
        "predict_convert, makes such a folder."
    )
    assert not any("/resolve/" in path for path, _, _ in hub.requests)
    assert names(tmp_path / "cache") == []


def test_a_captioning_repository_gives_its_root_without_code(tmp_path, hub):
    config = b'{"architectures": ["CogVLMVideoForCausalLM"]}'
    files = {
        "config.json": config,
        "model.safetensors": bytes(2000),
        "modeling.py": b"evil",
        "tokenizer.json": b"{}",
    }
    hub.files.update(hub_of("owner/caption", files, commit=COMMIT))
    folder = locate("owner/caption", cache=tmp_path / "cache", report=quiet)
    assert names(folder) == ["config.json", cache.RECORD, "model.safetensors", "tokenizer.json"]


VARIANTS = {
    "text_encoder/model.fp16.safetensors": b"half",
    "text_encoder/model.fp16-00001-of-00002.safetensors": b"half",
    "text_encoder/model-00001-of-00002.fp16.safetensors": b"half",
    "text_encoder/model.safetensors.index.fp16.json": b"{}",
    "text_encoder/model.fp16.safetensors.index.json": b"{}",
    "transformer/diffusion_pytorch_model.bf16.safetensors": b"half",
    "vae/diffusion_pytorch_model.non_ema.safetensors": b"half",
}


def test_variants_of_weights_that_are_there_plain_are_not_fetched(tmp_path, hub):
    hub.files.update(hub_of("owner/name", {**model_files(), **VARIANTS}, commit=COMMIT))
    folder = locate("owner/name", cache=tmp_path / "cache", report=quiet)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {*model_files(), cache.RECORD}


def test_weights_that_only_look_like_a_variant_are_fetched(tmp_path, hub):
    files = {**model_files(), "transformer/adapter.v2.safetensors": b"noise"}
    hub.files.update(hub_of("owner/name", files, commit=COMMIT))
    folder = locate("owner/name", cache=tmp_path / "cache", report=quiet)
    assert (folder / "transformer/adapter.v2.safetensors").read_bytes() == b"noise"


def test_the_users_token_goes_to_the_hub(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    locate("owner/name", cache=tmp_path / "cache", report=quiet)
    assert {headers.get("Authorization") for _, _, headers in hub.requests} == {"Bearer hf_secret"}


def test_room_for_the_complete_repository_is_checked_before_its_first_file(tmp_path, hub, monkeypatch):
    usage = type("Usage", (), {"free": 300_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"Not enough room .* set COGVIDEOX_CACHE"):
        locate("owner/name", cache=tmp_path / "cache", report=quiet)
    assert not any("/resolve/" in path for path, _, _ in hub.requests)


# Offline


def test_a_complete_model_opens_no_socket(tmp_path, hub, monkeypatch):
    hub.files["/model.tar"] = Served(tar_of(model_files()))
    manifest, cache = tar_manifest(tmp_path, hub), tmp_path / "cache"
    local = write(tmp_path / "mine", model_files())
    every = ["model", "owner/name", str(local)]
    folders = [locate(name, manifest=manifest, cache=cache, report=quiet) for name in every]

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was used")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, forbidden)
    monkeypatch.setattr(socket, "create_connection", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    monkeypatch.setattr(checkpoints, "lock", forbidden)
    assert [locate(name, manifest=manifest, cache=cache, report=quiet) for name in every] == folders


def test_offline_mode_is_respected_with_a_message(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids"):
        locate("owner/name", cache=tmp_path / "cache", report=quiet)
    assert hub.requests == []


def test_a_model_can_be_fetched_after_go_offline_unless_the_user_forbids_it(tmp_path, hub, monkeypatch):
    for name in (*offline.OFFLINE, *offline.QUIET):
        monkeypatch.setenv(name, "")  # which is restored after the test
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK"):
        monkeypatch.setattr(huggingface_hub.constants, name, False)
    offline.go_offline()
    offline.go_offline()
    with pytest.raises(UserError, match="has no repository owner/none"):
        locate("owner/none", cache=tmp_path / "cache", report=quiet)
    assert hub.requests != []
    hub.requests.clear()
    monkeypatch.setattr(offline, "_offline_by_us", False)
    offline.go_offline()  # HF_HUB_OFFLINE is the user's now
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids"):
        locate("owner/none", cache=tmp_path / "cache", report=quiet)
    assert hub.requests == []


@pytest.mark.parametrize("before", ["", "import huggingface_hub.constants"])
def test_after_go_offline_the_libraries_do_not_ask_the_hub(hub, before):
    code = f"""
{before}
from lib.network.offline import go_offline
go_offline()
import huggingface_hub.constants
from huggingface_hub.errors import OfflineModeIsEnabled
assert huggingface_hub.constants.HF_HUB_OFFLINE and huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY
try:
    huggingface_hub.HfApi().model_info("owner/name")
except OfflineModeIsEnabled:
    print("offline")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "offline\n", done.stderr
    assert hub.requests == []


def test_importing_is_cheap():
    code = "import sys, lib.weights.checkpoints; print({'torch', 'diffusers'} & set(sys.modules))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
