"""Every way to write a LoRA's address is parsed, and wrong ones are refused with the right form."""

import base64

import pytest

from lib.errors import UserError
from lib.lora.source import parse


@pytest.fixture
def local(monkeypatch):
    monkeypatch.setenv("COGVIDEOX_LOCAL_SOURCES", "1")


def refused(source: str, **options) -> str:
    with pytest.raises(UserError) as caught:
        parse(source, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "repository", "revision", "path"),
    [
        ("owner/name", "owner/name", "main", ""),
        (" owner/name ", "owner/name", "main", ""),
        ("owner/name/a.safetensors", "owner/name", "main", "a.safetensors"),
        ("owner/name/sub/a.safetensors", "owner/name", "main", "sub/a.safetensors"),
        ("owner/name@v1", "owner/name", "v1", ""),
        ("owner/name@v1/a.safetensors", "owner/name", "v1", "a.safetensors"),
        ("https://huggingface.co/owner/name", "owner/name", "main", ""),
        ("huggingface.co/owner/name", "owner/name", "main", ""),
        ("huggingface.co/owner/name/a.safetensors", "owner/name", "main", "a.safetensors"),
        ("https://huggingface.co/owner/name/", "owner/name", "main", ""),
        ("https://www.huggingface.co/owner/name", "owner/name", "main", ""),
        ("https://hf.co/owner/name/tree/v2", "owner/name", "v2", ""),
        ("https://huggingface.co/owner/name/tree/main/sub", "owner/name", "main", "sub"),
        ("https://huggingface.co/owner/name/blob/main/a.safetensors", "owner/name", "main", "a.safetensors"),
        ("https://hf.co/o/n/resolve/refs%2Fpr%2F1/a%20b.tar?x=1", "o/n", "refs/pr/1", "a b.tar"),
    ],
)
def test_every_form_of_a_hub_file_gives_the_same_address(source, repository, revision, path):
    address = parse(source)
    assert (address.place, address.repository, address.revision, address.path) == (
        "hub",
        repository,
        revision,
        path,
    )


def test_a_page_and_a_name_share_one_cached_file():
    names = ("o/n/a.safetensors", "https://huggingface.co/o/n/blob/main/a.safetensors")
    assert len({parse(name).key for name in names}) == 1


def test_pages_of_the_operators_own_hub_are_hub_pages(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example/")
    assert parse("https://hub.example/o/n/blob/main/a.safetensors").repository == "o/n"


def test_secrets_in_an_address_are_not_shown():
    source = "https://user:password@files.example/a/style.safetensors?token=secret#top"
    address = parse(source)
    assert (address.place, address.url) == ("url", source.removesuffix("#top"))
    assert address.label == "https://files.example/a/style.safetensors"
    assert "secret" not in address.name and "password" not in address.name


def test_a_civitai_download_address_is_accepted():
    url = "https://civitai.com/api/download/models/12345?type=Model"
    assert parse(url).url == url


def test_a_data_uri_is_decoded():
    content = bytes(range(256))
    uri = "data:application/octet-stream;base64," + base64.b64encode(content).decode()
    address = parse(uri)
    assert (address.place, address.content) == ("data", content)
    assert address.label.startswith("data URI ") and len(address.label) < 30
    assert parse(uri.replace("octet-stream", "x")).key == address.key


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        ("https://replicate.com/owner/model", ["page on Replicate", "https://replicate.delivery/"]),
        ("replicate.com/owner/model", ["page on Replicate", "trained_model.tar"]),
        ("owner/model:" + "0" * 64, ["a version of a model on Replicate. ", "https://replicate.delivery/"]),
        ("https://civitai.com/models/123/name", ["CivitAI", "api/download/models/<modelVersionId>"]),
        (
            "https://civitai.com/models/123?modelVersionId=456",
            ["https://civitai.com/api/download/models/456."],
        ),
        ("owner/name/a.bin", ["pickle by its name"]),
        ("https://x.example/a.ckpt?x=1", ["pickle by its name"]),
        ("https://huggingface.co/o/n/blob/main/a.pt", ["pickle by its name"]),
        (
            "https://huggingface.co/o/n/discussions",
            ["not a file of a Hugging Face repository", "give o/n or"],
        ),
        ("/etc/passwd", ["is a path on the server", "give an https:// address"]),
        ("file:///etc/passwd", ["is a path on the server"]),
        ("./a.safetensors", ["is a path on the server"]),
        ("~/a.safetensors", ["is a path on the server"]),
        ("a.safetensors", ["does not name a LoRA; give an https:// address"]),
        ("owner/../name", ["does not name a LoRA"]),
        ("ftp://x/y", ["does not name a LoRA"]),
        ("https://[x/y", ["does not name a LoRA"]),
        ("a sentence", ["does not name a LoRA"]),
        ("data:text/plain,abc", ["has to be in base64"]),
        ("data:x;base64,a!b", ["not valid base64"]),
        ("data:x;base64," + "A" * 2_000_000, ["more than the 1.0 MB that are allowed"]),
    ],
)
def test_text_that_names_no_lora_is_refused_with_the_allowed_forms(monkeypatch, source, messages):
    monkeypatch.setattr("lib.lora.source.MAX_FILE_BYTES", 10**6)
    refusal = refused(source)
    for message in messages:
        assert message in refusal
    assert len(refusal) < 700


def test_local_files_need_the_setting_or_the_servers_owner(tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"x")
    assert "is a path on the server" in refused(str(file))
    assert parse(str(file), trusted=True).file == file
    monkeypatch.setenv("COGVIDEOX_LOCAL_SOURCES", "1")
    address = parse(f"file://{file}")
    assert (address.place, address.file, address.label) == ("local", file, "a.safetensors")
    before = address.key
    file.write_bytes(b"another")
    assert parse(str(file)).key != before
    assert "does not exist on the server" in refused(str(tmp_path / "b.safetensors"))


def test_a_relative_path_that_exists_is_the_file_where_files_are_allowed(tmp_path, monkeypatch, local):
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert parse("owner/name").place == "local"
    assert parse("owner/other").place == "hub"


def test_a_relative_path_is_a_hub_name_where_files_are_not_allowed(tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert parse("owner/name").place == "hub"


@pytest.mark.parametrize("given", ["r8.im/owner/model", "owner/model:0123abcdef", "r8.im/o/m@sha256:00"])
def test_replicate_versions_are_refused_without_asking_the_hub(given):
    with pytest.raises(UserError, match="is a version of a model on Replicate"):
        parse(given)


@pytest.mark.parametrize("name", ["a.bin", "dir/a.PT", "a.ckpt", "a.pth", "a.pkl"])
def test_a_pickles_file_name_is_refused(name):
    assert "is a pickle by its name" in refused(f"owner/name/{name}")


def test_a_pickle_is_refused_with_the_command_that_converts_a_sat_lora():
    assert refused("owner/name/1/mp_rank_00_model_states.pt") == (
        "'owner/name/1/mp_rank_00_model_states.pt' is a pickle by its name, and loading one could run any "
        "code: give a .safetensors file. Most repositories hold both. script/export-lora, or the predictor "
        "predict_export_lora, converts a SAT LoRA to one."
    )
