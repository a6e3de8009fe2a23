"""LoRAs as peft and diffusers write them, for the embedded models, large enough to change frames."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

State = dict[str, torch.Tensor]


@cache
def transformer_config() -> dict:
    return json.loads((WEIGHTS / "tiny-t2v" / "transformer" / "config.json").read_text())


def lora_state(*, rank: int = 4, seed: int = 0, alpha: float | None = None, **options) -> tuple[State, dict]:
    """Return peft's state dict and configuration of a random LoRA; `options` are LoraConfig's."""
    changes = options.pop("model", {})
    torch.manual_seed(seed)
    transformer = CogVideoXTransformer3DModel.from_config(transformer_config() | changes)
    options = {"target_modules": list(TARGETS)} | options
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, init_lora_weights=False, **options)
    transformer.add_adapter(config)
    state = {
        key: 0.3 * value.detach().clone() for key, value in get_peft_model_state_dict(transformer).items()
    }
    return state, {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()
    }


def save_lora(
    path: Path,
    *,
    metadata: bool = True,
    recorded: dict | None = None,
    **options,
) -> Path:
    """Write a file as diffusers does, with or without its alpha; `recorded` is our trainer's record."""
    state, config = lora_state(**options)
    path.parent.mkdir(parents=True, exist_ok=True)
    CogVideoXPipeline.save_lora_weights(
        path.parent,
        transformer_lora_layers=state,
        weight_name=path.name,
        transformer_lora_adapter_metadata=config if metadata else None,
    )
    if recorded is not None:
        stored = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
        prefixed = {f"transformer.{key}": value for key, value in state.items()}
        save_file(prefixed, path, metadata=stored | {"cogvideox": json.dumps(recorded)})
    return path


def as_kohya(state: State, alpha: float | None) -> State:
    """Rename the keys as VideoX-Fun and other kohya-style trainers do."""
    renamed = {}
    for key, value in state.items():
        module, _, side = key.removesuffix(".weight").rpartition(".")
        flat = "lora_unet__" + module.replace(".", "_")
        renamed[f"{flat}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = value
        if alpha is not None:
            renamed[f"{flat}.alpha"] = torch.tensor(float(alpha))
    return renamed


def prefixed(state: State, prefix: str) -> State:
    """Put a prefix before each key."""
    return {prefix + key: value for key, value in state.items()}


def renamed(state: State, *pairs: tuple[str, str]) -> State:
    """Replace parts of each key."""
    for old, new in pairs:
        state = {key.replace(old, new): value for key, value in state.items()}
    return state


LAYOUTS: dict[str, Callable[[State], State]] = {
    "diffusers": lambda state: prefixed(state, "transformer."),
    "diffusers with down and up": lambda state: renamed(
        prefixed(state, "transformer."), ("lora_A", "lora.down"), ("lora_B", "lora.up")
    ),
    "diffusers, older": lambda state: renamed(
        prefixed(state, "transformer."),
        ("lora_A", "lora_linear_layer.down"),
        ("lora_B", "lora_linear_layer.up"),
    ),
    "diffusers, oldest": lambda state: renamed(
        prefixed(state, "transformer."),
        ("to_out.0.lora_A", "to_out_lora.down"),
        ("to_out.0.lora_B", "to_out_lora.up"),
        (".lora_A", "_lora.down"),
        (".lora_B", "_lora.up"),
    ),
    "peft": lambda state: prefixed(state, "base_model.model."),
    "peft with its adapter's name": lambda state: renamed(
        prefixed(state, "base_model.model."), (".weight", ".default.weight")
    ),
    "peft around diffusers": lambda state: prefixed(state, "base_model.model.transformer."),
    "wrapper": lambda state: prefixed(state, "diffusion_model."),
    "wrapper around a model": lambda state: prefixed(state, "model.diffusion_model."),
    "plain": dict,
    "plain in DDP": lambda state: prefixed(state, "module."),
    "plain, compiled": lambda state: prefixed(state, "_orig_mod."),
    "plain, DiffSynth": lambda state: prefixed(state, "pipe.dit."),
    "plain, FSDP and checkpoints": lambda state: renamed(
        prefixed(state, "_fsdp_wrapped_module."), (".attn1.", "._checkpoint_wrapped_module.attn1.")
    ),
    "diffusers, attention processors": lambda state: renamed(
        prefixed(state, "transformer."),
        ("attn1.", "attn1.processor."),
        ("to_out.0.lora_A", "to_out_lora.down"),
        ("to_out.0.lora_B", "to_out_lora.up"),
        (".lora_A", "_lora.down"),
        (".lora_B", "_lora.up"),
    ),
    "peft with an adapter of any name": lambda state: renamed(
        prefixed(state, "base_model.model."), (".weight", ".my-lora v1.2.weight")
    ),
    "wrapper (ComfyUI core)": lambda state: renamed(
        prefixed(state, "diffusion_model."),
        ("transformer_blocks.", "blocks."),
        ("attn1.to_q.", "q."),
        ("attn1.to_k.", "k."),
        ("attn1.to_v.", "v."),
        ("attn1.to_out.0.", "attn_out."),
    ),
    "kohya": lambda state: as_kohya(state, None),
    "kohya, one underscore": lambda state: renamed(as_kohya(state, None), ("lora_unet__", "lora_unet_")),
    "kohya, to_out without 0": lambda state: renamed(as_kohya(state, None), ("to_out_0", "to_out")),
    "kohya (ComfyUI core)": lambda state: renamed(
        as_kohya(state, None),
        ("transformer_blocks_", "blocks_"),
        ("attn1_to_out_0", "attn_out"),
        ("attn1_to_", ""),
    ),
    "kohya (LyCORIS)": lambda state: renamed(as_kohya(state, None), ("lora_unet__", "lycoris_")),
}
"""Layout, as messages call it -> the keys of peft's state in it."""
