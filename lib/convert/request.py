"""Requests for a conversion: inputs checked once, then checkpoints on this disk -> a new folder.

Nothing here imports torch before `convert`, so that wrong inputs are refused at once.
"""

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.convert.configs import OPTIONS, check_alpha, check_options
from lib.convert.report import ConversionReport
from lib.errors import UserError
from lib.models.layout import find_model
from lib.network.upload import Repository, claim
from lib.progress import Report
from lib.text_limits import check_length

AUTO = "auto"
TO_DIFFUSERS = "to_diffusers"
BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRequest:
    """How to convert a transformer, a VAE or both."""

    direction: str
    family: str | None
    dtype: str | None
    vae_dtype: str | None
    text_encoder: bool
    options: dict[str, float | int | bool]
    hub_repository: str = ""
    hub_token: str | None = field(default=None, repr=False)

    def repository(self) -> Repository | None:
        """Return where to upload the result, None for nowhere. Raises UserError when it is not writable."""
        if not self.hub_repository:
            return None
        return claim(self.hub_repository, self.hub_token, setting="hub_repository")

    def convert(
        self,
        transformer: Path | None,
        vae: Path | None,
        target: Path,
        *,
        report: Report,
        stop: threading.Event | None,
    ) -> ConversionReport:
        """Create the new folder `target`. Raises as to_diffusers and to_sat do."""
        from lib.convert.models import to_diffusers, to_sat  # torch, once the inputs are checked
        from lib.convert.text_encoder import find_text_encoder

        if self.direction != TO_DIFFUSERS:
            return to_sat(
                transformer=_model_in(transformer),
                vae=_model_in(vae),
                target=target,
                dtype=self.dtype,
                options=self.options,
                report=report,
                stop=stop,
            )
        text_encoder = None
        if self.text_encoder and transformer is not None:
            text_encoder = find_text_encoder(transformer, self.family, report=report, stop=stop)
        return to_diffusers(
            transformer=transformer,
            vae=vae,
            target=target,
            family=self.family,
            dtype=self.dtype,
            vae_dtype=self.vae_dtype,
            text_encoder=text_encoder,
            options=self.options,
            report=report,
            stop=stop,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraRequest:
    """How to convert a LoRA."""

    direction: str
    alpha: float | None
    dtype: str | None

    def convert(
        self, lora: Path, target: Path, *, report: Report, stop: threading.Event | None
    ) -> tuple[ConversionReport, Path]:
        """Create the new folder `target`; return the report and the LoRA's file."""
        from lib.convert.lora import convert_lora  # torch, once the inputs are checked

        result = convert_lora(
            lora,
            target=target,
            direction=self.direction,
            alpha=self.alpha,
            dtype=self.dtype,
            report=report,
            stop=stop,
        )
        return result, target / next(iter(result.parts[0].files))


def model_request(inputs: Mapping[str, Any], *, has_transformer: bool, has_vae: bool) -> ModelRequest:
    """Check the inputs of predict_convert. Raises UserError for inputs that contradict each other."""
    if not has_transformer and not has_vae:
        raise UserError(
            "Give a transformer, a VAE or both: upload them as transformer and vae, or give addresses as "
            "transformer_url and vae_url."
        )
    for name in ("overrides", "hub_repository"):
        check_length(name, inputs[name])
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
        unused = {
            "family": request.family,
            "vae_dtype": request.vae_dtype,
            "text_encoder": request.text_encoder,
        }
        for name, value in unused.items():
            if value:
                text = str(value).lower() if isinstance(value, bool) else value
                raise UserError(f"{name}={text} applies only to direction=to_diffusers; leave it out.")
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
    """Parse `sample_frames=49, norm_num_groups=2`. Raises UserError listing the names that are allowed."""
    found: dict[str, float | int | bool] = {}
    for pair in filter(None, (each.strip() for each in text.replace("\n", ",").split(","))):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise UserError(f"overrides: {pair[:80]!r} is not name=value; allowed are {', '.join(OPTIONS)}.")
        found[name] = _value(name, value)
    check_options(found)
    return found


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
    """Return the pipeline's folder inside an unpacked archive, at whatever depth."""
    if path is None or not path.is_dir():
        return path
    return find_model(path) or path


def _unless_auto(choice: str) -> str | None:
    return None if choice == AUTO else choice
