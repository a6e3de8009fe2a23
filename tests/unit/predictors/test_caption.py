from lib.models.specs import SPECS
from lib.predictors.caption import model_fingerprint
from lib.predictors.model import Model


def test_the_fingerprint_of_a_model_has_the_format_of_existing_journals(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    changed = (tmp_path / "config.json").stat().st_mtime_ns
    model = Model(spec=SPECS["tiny-caption"], folder=tmp_path, label="tiny-caption", embedded=False)
    assert model_fingerprint(model) == f"tiny-caption ['', ''] [('config.json', 2, {changed})]"
    monkeypatch.setenv("COGVIDEOX_DTYPE", "bfloat16")
    assert model_fingerprint(model) == f"tiny-caption ['bfloat16', ''] [('config.json', 2, {changed})]"
