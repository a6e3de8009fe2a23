"""LoRAs as peft and diffusers write them, for the embedded models, large enough to change frames."""

import json
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
