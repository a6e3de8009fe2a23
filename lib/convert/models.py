"""Convert models from one layout to the other, each into a new folder with a report in it.

    to_diffusers(transformer=file, vae=file, target=folder)     SAT -> what from_pretrained loads
    to_sat(transformer=folder, target=folder)                   and back

Memory use is a few tensors, whatever the size of the files. LoRAs are converted by lora.py.
"""

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from lib.convert import configs, detect
from lib.convert.configs import Options
from lib.convert.formats import (
    SHARD_BYTES,
    STEP,
    check_component,
    check_torch,
    write_config,
    write_safetensors,
    write_states,
    write_torch,
)
from lib.convert.locate import SAT_VAE, STATES, find_vae
from lib.convert.lora import split_base
from lib.convert.planning import CLASSES, Component, Conversion, plan_sat, plan_transformer, plan_vae
from lib.convert.reading import Checkpoint, open_checkpoint
from lib.convert.report import (
    VAE_USAGE,
    ConversionReport,
    Part,
    announce,
    pipeline_usage,
    sat_usage,
    write_report,
)
from lib.convert.text_encoder import include_text_encoder
from lib.convert.writing import Progress, new_folder, require_room
from lib.errors import UserError
from lib.models.layout import INDEX
from lib.progress import Report
from lib.weights.shared_components import SHARED_COMPONENTS

STEM = "diffusion_pytorch_model"


def to_diffusers(
    *,
    transformer: Path | None = None,
    vae: Path | None = None,
    target: Path,
    family: str | None = None,
    dtype: str | None = None,
    vae_dtype: str | None = None,
    text_encoder: Path | None = None,
    options: Options | None = None,
    report: Report = print,
    stop: threading.Event | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> ConversionReport:
    """Convert a SAT transformer, a SAT VAE or both into the new folder `target`, which from_pretrained loads.

    The inputs are checked by lib/convert/request.py.

    Args:
        transformer: A checkpoint, which may contain a VAE too, or a folder with 3d-vae.pt next to `latest`.
        vae: A checkpoint, used instead of the transformer's own.
        family: Needed for a VAE alone, because its scaling cannot be read from the weights.
        dtype: The transformer's; by default the one its family is released in.
        vae_dtype: The VAE's; by default float32.
        text_encoder: A diffusers folder whose text_encoder and tokenizer are included.
        options: Configuration values that cannot be read from the weights (configs.OPTIONS).

    Raises:
        UserError: Names the file and the reason, before anything is written where possible.
        Stopped: `stop` was set.

    `target` appears when everything is written and checked, or not at all.
    """
    options = options or {}
    result = ConversionReport(direction="to diffusers", variant="")
    with new_folder(target) as folder:
        with ExitStack() as opened:
            sources = _open_sources(opened, transformer, vae, result, stop)
            conversions = _plan(sources, result, family, dtype, vae_dtype, options)
            require_room(folder, [tensor for each in conversions for tensor in each.planned])
            for conversion in conversions:
                progress = Progress(conversion.component, conversion.planned, report, stop)
                result.parts.append(_write_component(conversion, folder, progress, shard_bytes))
        if text_encoder is not None:
            report("Including the text encoder and the tokenizer.")
            result.included = include_text_encoder(text_encoder, folder)
        _finish_pipeline(result, conversions, folder, options)
    announce(result, target, report)
    return result


def to_sat(
    *,
    transformer: Path | None = None,
    vae: Path | None = None,
    target: Path,
    dtype: str | None = None,
    options: Options | None = None,
    report: Report = print,
    stop: threading.Event | None = None,
) -> ConversionReport:
    """Convert a diffusers transformer, VAE or both into files that SAT loads, in the new folder `target`.

    Each is a component's folder, its safetensors file, or a pipeline's folder; with a pipeline as the
    transformer its VAE is converted too. Dtypes stay as they are unless `dtype` is given. The transformer
    becomes `latest` and 1/mp_rank_00_model_states.pt, the VAE 3d-vae.pt. Raises as to_diffusers does.
    """
    if vae is None and transformer is not None and (transformer / "vae").is_dir():
        vae = transformer
    paths: dict[Component, Path | None] = {"transformer": transformer, "vae": vae}
    with new_folder(target) as folder:
        with ExitStack() as opened:
            conversions = []
            for component, path in paths.items():
                if path is None:
                    continue
                inside = path / component
                source = opened.enter_context(open_checkpoint(inside if inside.is_dir() else path, stop=stop))
                detect.require(detect.identify(source.tensors), component, "diffusers", name=source.name)
                conversions.append(plan_sat(component, source, dtype=dtype, options=options or {}))
            result = ConversionReport(
                direction="to SAT", variant=conversions[0].variant, family=conversions[0].family
            )
            require_room(folder, [tensor for each in conversions for tensor in each.planned])
            for conversion in conversions:
                progress = Progress(conversion.component, conversion.planned, report, stop)
                result.parts.append(_write_sat(conversion, folder, progress))
        write_report(result, folder, sat_usage(result))
    announce(result, target, report)
    return result


def _open_sources(
    opened: ExitStack,
    transformer: Path | None,
    vae: Path | None,
    result: ConversionReport,
    stop: threading.Event | None,
) -> dict[Component, Checkpoint]:
    """Open both files and check their kinds, also whether they were swapped."""
    paths: dict[Component, Path | None] = {"transformer": transformer, "vae": vae}
    sources: dict[Component, Checkpoint] = {
        part: opened.enter_context(open_checkpoint(path, stop=stop)) for part, path in paths.items() if path
    }
    found_vae = find_vae(transformer) if vae is None and transformer is not None else None
    if found_vae is not None and not sources["transformer"].vae:
        sources["vae"] = opened.enter_context(open_checkpoint(found_vae, stop=stop))
        result.notes.append(f"The VAE is {found_vae.name}, which is in the same folder.")
    found = {part: detect.identify(source.tensors) for part, source in sources.items()}
    if {part: each.kind for part, each in found.items()} == {"transformer": "vae", "vae": "transformer"}:
        raise UserError(
            f"The two files are swapped: {sources['transformer'].name}, given as the transformer, is "
            f"{found['transformer'].label}, and {sources['vae'].name}, given as the VAE, is "
            f"{found['vae'].label}."
        )
    for part, source in sources.items():
        if part == "transformer" and found[part].kind == "lora" and found[part].layout == "sat":
            continue  # its file may contain the base too
        detect.require(found[part], part, "sat", name=source.name)
    return sources


def _plan(
    sources: dict[Component, Checkpoint],
    result: ConversionReport,
    family: str | None,
    dtype: str | None,
    vae_dtype: str | None,
    options: Options,
) -> list[Conversion]:
    conversions: list[Conversion] = []
    model, vae = sources.get("transformer"), sources.get("vae")
    if model is not None:
        conversions.append(_plan_transformer(model, result, family, dtype, options))
        family = conversions[0].family
    if family is None:
        raise UserError(
            "family is needed for a VAE alone, because its scaling cannot be read from the weights. Allowed "
            f"are {', '.join(configs.FAMILIES)}."
        )
    if vae is not None:
        conversion = plan_vae(vae.tensors, name=vae.name, family=family, dtype=vae_dtype, options=options)
        conversion.dropped = vae.dropped | conversion.dropped
        conversions.append(conversion)
    elif model is not None and model.vae:
        name = f"{model.name} (first_stage_model)"
        conversions.append(plan_vae(model.vae, name=name, family=family, dtype=vae_dtype, options=options))
        result.notes.append(f"The VAE is the one inside {model.name}.")
    result.family, result.variant = family, conversions[0].variant
    return conversions


def _plan_transformer(
    source: Checkpoint, result: ConversionReport, family: str | None, dtype: str | None, options: Options
) -> Conversion:
    """Plan the transformer in a file, without a LoRA that it may contain too."""
    base, matrices = split_base(source.tensors)
    if matrices and detect.identify(base).kind != "transformer":
        raise UserError(
            f"{source.name} is a SAT LoRA without its base; a transformer was expected. Convert LoRAs with "
            "script/export-lora or predict_export_lora."
        )
    conversion = plan_transformer(base, name=source.name, family=family, dtype=dtype, options=options)
    conversion.dropped = source.dropped | conversion.dropped
    if matrices:
        conversion.dropped["*.matrix_*"] = (
            f"{len(matrices)} tensors: of a LoRA, which is converted separately"
        )
        result.notes.append(
            f"{source.name} contains a LoRA in addition to the transformer, which is not in the result. "
            "Convert it separately."
        )
    return conversion


def _write_component(conversion: Conversion, folder: Path, progress: Progress, shard_bytes: int) -> Part:
    component = conversion.component
    place = folder / component
    place.mkdir()
    files = write_safetensors(place, STEM, conversion.planned, progress, shard_bytes=shard_bytes)
    write_config(place / "config.json", CLASSES[component], conversion.config)
    part = conversion.part()
    part.files = {f"{component}/{name}": file for name, file in files.items()}
    part.checked = check_component(place, component)
    return part


def _write_sat(conversion: Conversion, folder: Path, progress: Progress) -> Part:
    part = conversion.part()
    if conversion.component == "vae":
        file = folder / SAT_VAE
        part.files = {SAT_VAE: write_torch(file, "state_dict", conversion.planned, progress)}
        part.checked = check_torch(file, "state_dict", conversion.planned)
    else:
        part.files = write_states(folder, conversion.planned, progress)
        part.checked = check_torch(folder / STEP / STATES, "module", conversion.planned)
    return part


def _finish_pipeline(
    result: ConversionReport, conversions: Sequence[Conversion], folder: Path, options: Options
) -> None:
    """Write everything but the weights; model_index.json last, so that nothing loads an incomplete folder."""
    family = configs.FAMILIES[result.family or ""]
    by_component = {conversion.component: conversion for conversion in conversions}
    result.settings = {"family": family.name}
    if (vae := by_component.get("vae")) is not None:
        result.settings |= {name: vae.config[name] for name in ("scaling_factor", "invert_scale_latents")}
    if (transformer := by_component.get("transformer")) is None:
        write_report(result, folder, VAE_USAGE)
        return
    scheduler = configs.scheduler_config(family, options)
    write_config(folder / "scheduler" / "scheduler_config.json", "CogVideoXDDIMScheduler", scheduler)
    result.settings["snr_shift_scale"] = scheduler["snr_shift_scale"]
    result.missing = [part for part in SHARED_COMPONENTS if not (folder / part).is_dir()]
    write_report(result, folder, pipeline_usage(result, family, transformer.part().dtype))
    write_config(folder / INDEX, family.pipeline_class, configs.model_index())
