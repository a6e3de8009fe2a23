"""Models from one layout to the other, each into a new folder with a report in it.

    to_diffusers(transformer=file, vae=file, target=folder)     SAT -> what from_pretrained loads
    to_sat(transformer=folder, target=folder)                   and back

Memory stays at a few tensors, whatever the size of the files. LoRAs are in lora_files.py.
"""

import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from lib.convert import configs, detect
from lib.convert.check import check_component, check_sat
from lib.convert.configs import Options
from lib.convert.locating import SAT_VAE, STATES, vae_beside
from lib.convert.lora import split_base
from lib.convert.parts import include_text_encoder
from lib.convert.pickled import write_pickle
from lib.convert.planning import CLASSES, Job, check_dtype, sat_job, transformer_job, vae_job
from lib.convert.reading import MODEL, Checkpoint
from lib.convert.report import Part, Report, pipeline_usage, write_report
from lib.convert.results import STEP, announce, open_source, progress_of, sat_usage, write_states
from lib.convert.writing import SHARD_BYTES, new_folder, require_room, write_safetensors
from lib.convert.writing import Report as Say
from lib.errors import UserError
from lib.models.layout import INDEX
from lib.storage.archive import Stop
from lib.weights.shared_components import BORROWED

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
    report: Say = print,
    stop: Stop = None,
    shard_bytes: int = SHARD_BYTES,
) -> Report:
    """Convert a SAT transformer, a SAT VAE or both into the new folder `target`, which from_pretrained loads.

    `transformer` may be a fine-tuned file that holds a VAE too, or a folder with 3d-vae.pt beside `latest`;
    `vae` goes before both. `family` is needed for a VAE alone, whose scaling is in no tensor. `dtype` is the
    transformer's, by default what its family is released in; the VAE's is float32. `text_encoder` is a
    diffusers folder whose text_encoder and tokenizer are taken over. `options` are configuration values that
    no tensor says (configs.OPTIONS).

    Raises UserError naming the file and the reason, before anything is written where possible; `target`
    appears when everything is written and checked, else not at all. Stopped when `stop` is set.
    """
    if transformer is None and vae is None:
        raise UserError("Give a transformer, a VAE or both; there is nothing to convert.")
    check_dtype(dtype)
    check_dtype(vae_dtype, name="vae_dtype")
    options = options or {}
    configs.check_options(options)
    if family is not None:
        configs.family_named(family)
    with new_folder(target) as folder, ExitStack() as opened:
        result = Report(direction="to diffusers", variant="")
        sources = _open_both(opened, transformer, vae, folder, result, stop)
        jobs = _jobs(sources, result, family, dtype, vae_dtype, options)
        require_room(folder, [tensor for job in jobs for tensor in job.planned])
        for job in jobs:
            _write_component(job, folder, result, report, stop, shard_bytes)
        opened.close()
        shutil.rmtree(folder / "work", ignore_errors=True)
        _finish_pipeline(result, jobs, folder, text_encoder, options, report)
    announce(result, target, report)
    return result


def to_sat(
    *,
    transformer: Path | None = None,
    vae: Path | None = None,
    target: Path,
    dtype: str | None = None,
    options: Options | None = None,
    report: Say = print,
    stop: Stop = None,
) -> Report:
    """Convert a diffusers transformer, VAE or both into files that SAT loads, in the new folder `target`.

    Each is a component's folder, its safetensors file, or a whole pipeline's folder; a pipeline given as the
    transformer brings its VAE along. Types stay as they are unless `dtype` is given. The transformer becomes
    `latest` and 1/mp_rank_00_model_states.pt, the VAE 3d-vae.pt. Raises as to_diffusers does.
    """
    if transformer is None and vae is None:
        raise UserError("Give a transformer, a VAE or both; there is nothing to convert.")
    check_dtype(dtype)
    configs.check_options(options or {})
    if vae is None and transformer is not None and (Path(transformer) / "vae").is_dir():
        vae = transformer
    with new_folder(target) as folder, ExitStack() as opened:
        jobs = []
        for component, path in (("transformer", transformer), ("vae", vae)):
            if path is None:
                continue
            inside = Path(path) / component
            source = inside if inside.is_dir() else Path(path)
            checkpoint = open_source(opened, source, folder / "work" / component, stop)
            detect.require(detect.identify(checkpoint.tensors), component, "diffusers", name=checkpoint.name)
            jobs.append(
                sat_job(
                    component,
                    checkpoint.tensors,
                    name=checkpoint.name,
                    config=checkpoint.config,
                    dtype=dtype,
                    options=options or {},
                )
            )
        result = Report(direction="to SAT", variant=jobs[0].variant, family=jobs[0].family)
        require_room(folder, [tensor for job in jobs for tensor in job.planned])
        for job in jobs:
            result.parts.append(_write_sat(job, folder, report, stop))
        opened.close()
        shutil.rmtree(folder / "work", ignore_errors=True)
        write_report(result, folder, sat_usage(result))
    announce(result, target, report)
    return result


def _open_both(
    opened: ExitStack, transformer: Path | None, vae: Path | None, folder: Path, result: Report, stop: Stop
) -> dict[str, Checkpoint]:
    """Both files by component, told to be what they should be; also when they were swapped."""
    given = {"transformer": transformer, "vae": vae}
    sources = {
        part: open_source(opened, path, folder / "work" / part, stop) for part, path in given.items() if path
    }
    beside = vae_beside(Path(transformer)) if vae is None and transformer is not None else None
    if beside is not None and not sources["transformer"].vae:
        sources["vae"] = open_source(opened, beside, folder / "work" / "vae", stop)
        result.notes.append(f"The VAE is {beside.name}, which is in the same folder.")
    found = {part: detect.identify(source.tensors) for part, source in sources.items()}
    kinds = {part: each.kind for part, each in found.items()}
    if kinds == {"transformer": "vae", "vae": "transformer"}:
        raise UserError(
            f"The two files are swapped: {sources['transformer'].name}, given as the transformer, is "
            f"{found['transformer'].label}, and {sources['vae'].name}, given as the VAE, is "
            f"{found['vae'].label}."
        )
    for part, source in sources.items():
        if part == "transformer" and kinds[part] == "lora" and found[part].layout == "sat":
            continue  # its base may be beside the LoRA
        detect.require(found[part], part, "sat", name=source.name)
    return sources


def _jobs(
    sources: dict[str, Checkpoint],
    result: Report,
    family: str | None,
    dtype: str | None,
    vae_dtype: str | None,
    options: Options,
) -> list[Job]:
    jobs = []
    model, vae = sources.get("transformer"), sources.get("vae")
    if model is not None:
        base, matrices = split_base(model.tensors)
        if matrices and not detect.identify(base).kind == "transformer":
            raise UserError(
                f"{model.name} is a SAT LoRA without the model it belongs to; a transformer was expected. "
                "A LoRA is converted by itself, into lora.safetensors."
            )
        job = transformer_job(base, name=model.name, family=family, dtype=dtype, options=options)
        job.dropped = model.dropped | job.dropped
        if matrices:
            reason = f"{len(matrices)} tensors: of a LoRA, which is converted by itself"
            job.dropped["*.matrix_*"] = reason
            result.notes.append(
                f"{model.name} holds a LoRA beside the transformer, which is not in the result. Convert it "
                "by itself."
            )
        jobs.append(job)
        family = job.family
    elif family is None:
        raise UserError(
            "family is needed for a VAE alone: its scaling is in no tensor. Allowed are "
            f"{', '.join(configs.FAMILIES)}."
        )
    if vae is not None:
        job = vae_job(vae.tensors, name=vae.name, family=family, dtype=vae_dtype, options=options)
        job.dropped = vae.dropped | job.dropped
        jobs.append(job)
    elif model is not None and model.vae:
        name = f"{model.name} (first_stage_model)"
        jobs.append(vae_job(model.vae, name=name, family=family, dtype=vae_dtype, options=options))
        result.notes.append(f"The VAE is the one inside {model.name}.")
    result.family, result.variant = family, jobs[0].variant
    return jobs


def _write_component(
    job: Job, folder: Path, result: Report, report: Say, stop: Stop, shard_bytes: int
) -> None:
    place = folder / job.component
    place.mkdir()
    progress = progress_of(job.component, job.planned, report, stop)
    files = write_safetensors(place, STEM, job.planned, progress, shard_bytes=shard_bytes)
    configs.write_json(place / "config.json", CLASSES[job.component], job.config)
    result.parts.append(
        Part(
            name=job.component,
            source=job.source,
            variant=job.variant,
            tensors=len(job.planned),
            dtype=job.dtype,
            dropped=job.dropped,
            checked=check_component(place, job.component),
            files={f"{job.component}/{name}": file for name, file in files.items()},
        )
    )


def _finish_pipeline(
    result: Report, jobs: list[Job], folder: Path, text_encoder: Path | None, options: Options, report: Say
) -> None:
    """Everything beside the weights; model_index.json last, so that nothing loads before it is whole."""
    family = configs.family_named(result.family)
    there = {job.component: job for job in jobs}
    result.settings = {"family": family.name}
    if "vae" in there:
        names = ("scaling_factor", "invert_scale_latents")
        result.settings |= {name: there["vae"].config[name] for name in names}
    if text_encoder is not None:
        report("Taking over the text encoder and the tokenizer.")
        result.included = include_text_encoder(text_encoder, folder)
    whole = "transformer" in there
    if whole:
        scheduler = configs.scheduler_config(family, options)
        configs.write_json(
            folder / "scheduler" / "scheduler_config.json", "CogVideoXDDIMScheduler", scheduler
        )
        result.settings["snr_shift_scale"] = scheduler["snr_shift_scale"]
        result.missing = [part for part in BORROWED if not (folder / part).is_dir()]
    dtype = there["transformer"].dtype if whole else "float32"
    usage = pipeline_usage(result, family, dtype) if whole else _vae_usage()
    write_report(result, folder, usage)
    if whole:
        configs.write_json(folder / INDEX, family.pipeline_class, configs.model_index())


def _write_sat(job: Job, folder: Path, report: Say, stop: Stop) -> Part:
    progress = progress_of(job.component, job.planned, report, stop)
    if job.component == "vae":
        files = {SAT_VAE: write_pickle(folder / SAT_VAE, "state_dict", job.planned, progress)}
        checked = check_sat(folder / SAT_VAE, "state_dict", job.planned)
    else:
        planned = [replace(each, name=MODEL + each.name) for each in job.planned]
        files = write_states(folder, planned, progress)
        checked = check_sat(folder / STEP / STATES, "module", planned)
    return Part(
        name=job.component,
        source=job.source,
        variant=job.variant,
        tensors=len(job.planned),
        dtype=job.dtype,
        files=files,
        checked=checked,
    )


def _vae_usage() -> str:
    return (
        "```python\nfrom diffusers import AutoencoderKLCogVideoX\n\n"
        'vae = AutoencoderKLCogVideoX.from_pretrained("vae")\n```'
    )
