"""lib/pipelines/attention.py against diffusers' own processor and blocks."""

import copy

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from peft import LoraConfig, inject_adapter_in_model

from lib.pipelines.attention import install

LAYOUTS = {
    "2b": {},
    "5b": {"use_rotary_positional_embeddings": True},
    "5b-i2v": {
        "use_rotary_positional_embeddings": True,
        "use_learned_positional_embeddings": True,
        "in_channels": 8,
    },
    "1.5-5b-i2v": {
        "use_rotary_positional_embeddings": True,
        "patch_size_t": 2,
        "patch_bias": False,
        "ofs_embed_dim": 8,
        "in_channels": 8,
    },
}


def build(layout: str) -> CogVideoXTransformer3DModel:
    torch.manual_seed(0)
    settings = {"in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 12} | LAYOUTS[
        layout
    ]
    model = CogVideoXTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        sample_width=8,
        sample_height=6,
        sample_frames=9,
        max_text_seq_length=5,
        **settings,
    )
    for parameter in model.parameters():  # what starts at nought or one would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def run(model: CogVideoXTransformer3DModel, layout: str, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    config = model.config
    frames = 4 if config.patch_size_t else 3
    inputs = {
        "hidden_states": torch.randn(batch, frames, config.in_channels, 6, 8),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "timestep": torch.tensor([7] * batch),
    }
    if config.use_rotary_positional_embeddings:
        tokens = frames // (config.patch_size_t or 1) * 3 * 4
        angles = torch.randn(tokens, 16)
        inputs["image_rotary_emb"] = (angles.cos(), angles.sin())
    if config.ofs_embed_dim:
        inputs["ofs"] = torch.full((batch,), 2.0)
    with torch.inference_mode():
        return model(**inputs, return_dict=False)[0]


def with_lora(model: CogVideoXTransformer3DModel, *targets: str) -> None:
    torch.manual_seed(2)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False), model)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 2])
def test_every_layout_computes_diffusers_bits(layout, batch):
    model = build(layout)
    expected = run(model, layout, batch)
    install(model)
    assert torch.equal(run(model, layout, batch), expected)


def test_half_precision_computes_diffusers_bits():
    model = build("5b").to(torch.bfloat16)
    stock = copy.deepcopy(model)
    install(model)

    def states(of):
        torch.manual_seed(3)
        block, angles = of.transformer_blocks[1], torch.randn(7, 16)
        draw = [torch.randn(2, count, 48).bfloat16() for count in (7, 5)]
        with torch.inference_mode():
            return block(*draw, torch.randn(2, 8).bfloat16(), (angles.cos(), angles.sin()))

    for found, expected in zip(states(model), states(stock), strict=True):
        assert torch.equal(found, expected)


def test_the_processor_takes_diffusers_call_and_its_mask():
    model = build("5b")
    attn, angles = model.transformer_blocks[0].attn1, torch.randn(6, 16)
    torch.manual_seed(4)
    video, text = torch.randn(1, 6, 48), torch.randn(1, 5, 48)
    mask = torch.zeros(1, 1, 11)
    mask[..., 3] = -10_000.0
    given = {
        "hidden_states": video,
        "encoder_hidden_states": text,
        "attention_mask": mask,
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }
    with torch.inference_mode():
        expected = attn(**given)
        install(model)
        found = attn(**given)
        unmasked = attn(**given | {"attention_mask": None})
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not torch.equal(unmasked[0], expected[0])


def test_the_backend_that_is_set_is_the_one_that_runs(monkeypatch):
    model = build("2b")
    install(model)
    expected = run(model, "2b")
    calls = []
    active = _AttentionBackendRegistry._active_backend  # diffusers sets the choice for the process, too
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", active)
    native = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]
    monkeypatch.setitem(
        _AttentionBackendRegistry._backends,
        AttentionBackendName._NATIVE_MATH,
        lambda **kwargs: calls.append(1) or native(**kwargs),
    )
    model.set_attention_backend("_native_math")
    found = run(model, "2b")
    assert len(calls) == len(model.transformer_blocks)
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "targets", [("to_q", "to_k", "to_v", "to_out.0"), ("to_k",), ("ff.net.0.proj", "norm1.linear")]
)
def test_a_lora_takes_effect_and_leaves_no_trace(targets):
    model, stock = build("5b"), build("5b")
    install(model)
    base = run(model, "5b")
    with_lora(stock, *targets)
    expected = run(stock, "5b")
    with_lora(model, *targets)
    assert torch.equal(run(model, "5b"), expected)
    assert not torch.equal(expected, base)
    for layer in [layer for layer in model.modules() if hasattr(layer, "lora_A")]:
        layer.merge()
    assert (run(model, "5b") - expected).abs().max() < 1e-4
    for layer in [layer for layer in model.modules() if hasattr(layer, "lora_A")]:
        layer.unmerge()
        layer.enable_adapters(False)
    assert (run(model, "5b") - base).abs().max() < 1e-5


def test_another_processor_is_used_with_diffusers_own_block():
    model, stock = build("5b"), build("5b")
    install(model)
    calls = []

    class Counting(CogVideoXAttnProcessor2_0):
        def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb):
            calls.append(1)
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )

    model.set_attn_processor(Counting())
    assert torch.equal(run(model, "5b"), run(stock, "5b"))
    assert len(calls) == len(model.transformer_blocks)
