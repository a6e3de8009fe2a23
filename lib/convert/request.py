"""Requests for a conversion: the inputs checked once, then checkpoints on this disk -> a new folder."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.convert.configs import OPTIONS, check_options
from lib.convert.convert import to_diffusers, to_sat
from lib.convert.encoder import encoder_for
from lib.convert.locating import STATES
from lib.convert.lora import check_alpha
from lib.convert.lora_files import LORA_FILE, lora_to_diffusers, lora_to_sat
from lib.convert.report import Report
from lib.convert.results import STEP
from lib.errors import UserError
from lib.models.layout import find_model
from lib.network.upload import Repository, claim
from lib.storage.archive import Stop

AUTO = "auto"
TO_DIFFUSERS = "to_diffusers"
BOOLEANS = {"true": True, "false": False}

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRequest:
    """How a transformer, a VAE or both are to be converted."""

    direction: str
    family: str | None
    dtype: str | None
    vae_dtype: str | None
    text_encoder: bool
    options: dict[str, float | int | bool]
    hub_repository: str = ""
    hub_token: str | None = field(default=None, repr=False)

    def repository(self) -> Repository | None:
        """Where the result is to go too; None for nowhere. Raises UserError when it may not be written to."""
        if not self.hub_repository:
            return None
        return claim(self.hub_repository, self.hub_token, setting="hub_repository")

    def convert(
        self, transformer: Path | None, vae: Path | None, target: Path, *, report: Say, stop: Stop
    ) -> Report:
        """Make the new folder `target`. Raises as to_diffusers and to_sat do."""
        common = {
            "target": target,
            "dtype": self.dtype,
            "options": self.options,
            "report": report,
            "stop": stop,
        }
        if self.direction != TO_DIFFUSERS:
            return to_sat(transformer=_model_in(transformer), vae=_model_in(vae), **common)
        encoder = None
        if self.text_encoder and transformer is not None:
            work = target.with_name(f"{target.name}.look.partial")
            encoder = encoder_for(transformer, self.family, work=work, report=report, stop=stop)
        return to_diffusers(
            transformer=transformer,
            vae=vae,
            family=self.family,
            vae_dtype=self.vae_dtype,
            text_encoder=encoder,
            **common,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraRequest:
    """How a LoRA is to be converted."""

    direction: str
    alpha: float | None
    dtype: str | None

    def convert(self, lora: Path, target: Path, *, report: Say, stop: Stop) -> tuple[Report, Path]:
        """Make the new folder `target`; the report and the LoRA's file. Raises as the core does."""
        settings = {"alpha": self.alpha, "dtype": self.dtype, "report": report, "stop": stop}
        if self.direction == TO_DIFFUSERS:
            return lora_to_diffusers(lora, target=target, **settings), target / LORA_FILE
        return lora_to_sat(lora, target=target, **settings), target / STEP / STATES


def model_request(inputs: Mapping[str, Any], *, has_transformer: bool, has_vae: bool) -> ModelRequest:
    """Check the inputs of predict_convert. Raises UserError for what cannot go together."""
    if not has_transformer and not has_vae:
        raise UserError(
            "Give a transformer, a VAE or both: upload them as transformer and vae, or give addresses as "
            "transformer_url and vae_url."
        )
    token = inputs.get("hub_token")
    request = ModelRequest(
        direction=inputs["direction"],
        family=_unless_auto(inputs["family"]),
        dtype=_unless_auto(inputs["dtype"]),
        vae_dtype=_unless_auto(inputs["vae_dtype"]),
        text_encoder=inputs["text_encoder"],
        options=parse_overrides(inputs["overrides"]),
        hub_repository=inputs["hub_repository"].strip(),
        hub_token=None if token is None else str(getattr(token, "get_secret_value", lambda: token)()),
    )
    if request.text_encoder and not has_transformer:
        raise UserError("text_encoder=true needs a transformer: a VAE alone is used without a text encoder.")
    if request.direction != TO_DIFFUSERS:
        given = {
            "family": request.family,
            "vae_dtype": request.vae_dtype,
            "text_encoder": request.text_encoder,
        }
        if wrong := next((name for name, value in given.items() if value), None):
            raise UserError(
                f"{wrong}={_shown(given[wrong])} counts only with direction=to_diffusers; leave it out."
            )
    return request


def lora_request(inputs: Mapping[str, Any], *, has_lora: bool) -> LoraRequest:
    """Check the inputs of predict_export_lora. Raises UserError."""
    if not has_lora:
        raise UserError("Give a LoRA: upload it as lora, or give its address as lora_url.")
    check_alpha(inputs["alpha"])
    return LoraRequest(
        direction=inputs["direction"], alpha=inputs["alpha"], dtype=_unless_auto(inputs["dtype"])
    )


def parse_overrides(text: str) -> dict[str, float | int | bool]:
    """`sample_frames=49, norm_num_groups=2` -> what no tensor says. Raises UserError naming what there is."""
    found: dict[str, float | int | bool] = {}
    for pair in filter(None, (each.strip() for each in text.replace("\n", ",").split(","))):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise UserError(f"overrides: {pair[:80]!r} is not name=value; allowed are {', '.join(OPTIONS)}.")
        found[name] = _value(name, value)
    check_options(found)
    return found


def facts(report: Report) -> dict[str, object]:
    """What the metrics say of a conversion."""
    family = {"family": report.family} if report.family else {}
    return {
        "variant": report.variant,
        **family,
        "tensors": sum(part.tensors for part in report.parts),
        "dropped": sum(len(part.dropped) for part in report.parts),
        **{name: value for name, value in report.settings.items() if name in ("rank", "alpha")},
    }


def _value(name: str, text: str) -> float | int | bool:
    if text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"overrides: {name}={text[:80]} is not a number.")
    return int(value) if value.is_integer() and "." not in text else value


def _model_in(path: Path | None) -> Path | None:
    """The pipeline's folder in what an archive held, however many folders are around it."""
    if path is None or not path.is_dir():
        return path
    return find_model(path) or path


def _unless_auto(choice: str) -> str | None:
    return None if choice == AUTO else choice


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
