"""Files with huge claims are refused, and shared or transposed tensors keep their values."""

import torch

from lib.convert.models import to_diffusers, to_sat
from tests import convert_factory as factory
from tests.convert_factory import silent
from tests.unit.convert.test_detect import refusal, tiny


def test_a_name_with_a_huge_number_does_not_make_a_huge_model(tmp_path):
    for layer, message in (
        (
            "9999",
            "file.pt is not a complete transformer: transformer.layers.2.input_layernorm.weight is missing.",
        ),
        ("9" * 5000, "file.pt has 1 tensor that no CogVideoX of 2 layers and width 32, of the"),
    ):
        extra = {f"transformer.layers.{layer}.attention.dense.bias": torch.ones(32)}
        path = tiny(tmp_path / "file.pt", lambda state, extra=extra: state.update(extra))
        assert refusal(transformer=path, target=tmp_path / "out").startswith(message)


def test_a_tensor_that_claims_more_than_it_has_is_refused(tmp_path):
    wide = {"mixins.patch_embed.text_proj.weight": torch.ones(1, 1).expand(32, 10**9)}
    path = tiny(tmp_path / "file.pt", lambda state: state.update(wide))
    assert refusal(transformer=path, target=tmp_path / "out") == (
        "file.pt is refused: its mixins.patch_embed.text_proj.weight claims 128.0 GB and has 4 bytes."
    )


def test_shared_and_transposed_tensors_keep_their_values(tmp_path):
    state = factory.sat_transformer()
    shared = torch.randn(96, 32)
    for layer in range(2):
        state[f"transformer.layers.{layer}.attention.query_key_value.weight"] = shared
    state["transformer.layers.0.attention.dense.weight"] = shared[:32].t()
    path = factory.save_sat(tmp_path / "file.pt", state)
    to_diffusers(transformer=path, target=tmp_path / "out", dtype="float32", report=silent)
    to_sat(transformer=tmp_path / "out", target=tmp_path / "back", report=silent)
    back = factory.states(tmp_path / "back")
    assert factory.same_states(back, {f"model.diffusion_model.{name}": state[name] for name in state})
