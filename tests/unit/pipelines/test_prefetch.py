import os
from pathlib import Path

import pytest

from lib.pipelines.prefetch import prefetch, weight_files

EMBEDDED = Path(__file__).resolve().parents[3] / "weights" / "tiny-t2v"


def test_files_are_in_the_order_in_which_they_are_loaded(tmp_path):
    for name in ("text_encoder/model-2", "text_encoder/model-1", "vae/a", "transformer/b", "other/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.safetensors").touch()
    (tmp_path / "transformer" / "config.json").touch()
    names = [file.relative_to(tmp_path).with_suffix("").as_posix() for file in weight_files(tmp_path)]
    assert names == ["transformer/b", "vae/a", "text_encoder/model-1", "text_encoder/model-2"]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_prefetching_ends_by_itself_even_if_a_file_is_missing(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    for folder in (EMBEDDED, tmp_path):
        thread = prefetch(folder)
        thread.join(timeout=30)
        assert not thread.is_alive()
