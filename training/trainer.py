"""Trains a LoRA on a CogVideoX base: prepare once, then the loop, with checkpoints that resume exactly.

    train(TrainingConfig.from_inputs(input_videos="clips.zip"), Path("runs/star"))

A run's folder has checkpoints/, loss.csv, validation/, generated captions, the trackers' files and in the end
result/. A run whose folder has checkpoints resumes from the newest.
"""

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel
from torch import nn

from lib.cancellation import Stopped, untimed
from lib.generation.request import Request
from lib.network import offline
from lib.progress import Report, print_line, progress_line, silent, throttled
from training import checkpoints, objective
from training.adapter import add_adapter, check_targets, load_adapter, save_adapter
from training.autocaption import as_lines, write_captions
from training.base import load_scheduler, load_transformer, store_in_fp8, transformer_without_weights
from training.batches import Chances, Feeder, Inputs, Sampler, prefetched
from training.checkpoints import State
from training.config import TrainingConfig, digest
from training.devices import (
    exclusive,
    from_main,
    log_clips,
    memory_advice,
    start_accelerator,
    start_trackers,
)
from training.losses import LossWatch, loss_file
from training.optimization import build_optimizer, build_schedule, load_states, total_steps
from training.plan import Plan, base_name, label, locate_base, resolve_plan, validate
from training.prepare import Data, encode_data, found_clips
from training.result import RESULT, Publisher, facts, write_result
from training.resume import check_origin, check_unfinished, found_origin
from training.validation import make_clips, validation_requests

REPORT_SECONDS = 1.0
CHANGES = {
    "seed": "the seed",
    "data": "clips, captions, their sizes or the chances of dropouts and flips",
    "global_batch": "the batch over all devices",
}
"""Fields of a state that change the losses of a resumed run."""


def train(
    config: TrainingConfig, run: Path, *, stop: threading.Event | None = None, report: Report = print_line
) -> Path:
    """Train and return the folder of results: lora.safetensors, README.md, captions, loss curve, clips.

    When `stop` is set, a checkpoint is saved and Stopped raised. Raises UserError for what the caller can
    fix; the run's checkpoints stay.
    """
    stop = stop or threading.Event()
    accelerator = start_accelerator(config, run)
    if not accelerator.is_main_process:
        report = silent
    name, device = base_name(), accelerator.device.type
    validate(config, name, device)
    with (
        exclusive(run, accelerator),
        checkpoints.name_kept_checkpoint(run),
        memory_advice(config),
    ):
        resume_from = config.checkpoints.resume_from
        with found_origin(resume_from, run, accelerator, stop=stop, report=report) as origin:
            config = check_origin(config, origin, base=label(name))
            publisher = Publisher(config.publishing, report, active=accelerator.is_main_process)
            with found_clips(config.data, run / "data", accelerator, stop=stop, report=report) as found:
                clips, left_out = found
                folder = locate_base(name, config.validation, report)
                # In the main process, so that all have the same seed where none is given.
                plan = from_main(accelerator, lambda: resolve_plan(config, name, folder, device))
                offline.go_offline()
                check_targets(transformer_without_weights(folder), config.adapter.targets)
                requests = validation_requests(config.validation, plan)
                captions = []
                with untimed(stop):
                    if config.data.autocaption:
                        clips, left_out, captions = write_captions(
                            config.data, plan, clips, left_out, run, accelerator,
                            origin=origin, stop=stop, report=report,
                        )  # fmt: skip
                    data = encode_data(config, plan, clips, left_out, accelerator, stop=stop, report=report)
                data.captions = captions
            start_trackers(accelerator, config)
            trainer = Trainer(config, plan, data, run, accelerator, publisher, requests, report)
            trainer.resume(origin)
        try:
            with untimed(stop):
                trainer.run_to_end(stop)
                return trainer.finish()
        finally:
            accelerator.end_training()  # closes the trackers, which would log the next run too


class Denoiser(nn.Module):
    """The module that accelerate wraps; the transformer inside stays unwrapped for validation and saving."""

    def __init__(self, transformer: CogVideoXTransformer3DModel) -> None:
        super().__init__()
        self.transformer = transformer
        # The frozen base is the same in all processes: it need not be synchronized.
        frozen = [n for n, p in self.named_parameters() if not p.requires_grad]
        self._ddp_params_and_buffers_to_ignore = frozen + [n for n, _ in self.named_buffers()]

    def forward(self, inputs: Inputs) -> torch.Tensor:
        return self.transformer(**inputs.arguments, return_dict=False)[0]


class Trainer:
    """A run's models, optimizer and batches, and the loop over its steps."""

    def __init__(
        self, config: TrainingConfig, plan: Plan, data: Data, run: Path, accelerator: Accelerator,
        publisher: Publisher, requests: list[Request], report: Report,
    ) -> None:  # fmt: skip
        self.config, self.plan, self.data, self.run = config, plan, data, run
        self.accelerator, self.publisher, self.report = accelerator, publisher, report
        self.validation_requests = requests
        self.batch_size = config.optimizer.train_batch_size
        self.micro_batches = config.optimizer.gradient_accumulation_steps
        self.global_batch = self.batch_size * self.micro_batches * accelerator.num_processes
        self.steps = total_steps(config.optimizer, len(data.sections), self.global_batch)

        torch.manual_seed(plan.seed)  # for the LoRA's initial matrices
        self.transformer = load_transformer(plan)
        self.parameters = add_adapter(
            self.transformer,
            rank=config.adapter.rank,
            alpha=config.adapter.alpha,
            targets=config.adapter.targets,
        )
        if config.compute.base_precision == "fp8":
            store_in_fp8(self.transformer, plan.dtype)
        if plan.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.transformer.train()
        optimizer = build_optimizer(config.optimizer, self.parameters, global_batch=self.global_batch)
        self.schedule = build_schedule(config.optimizer, optimizer, self.steps)
        self.denoiser, self.optimizer = accelerator.prepare(Denoiser(self.transformer), optimizer)

        self.chances = Chances(
            flip=config.data.random_flip,
            caption_dropout=config.regularization.caption_dropout,
            image_dropout=config.regularization.noised_image_dropout,
            prior=config.regularization.prior_preservation,
        )
        scheduler = load_scheduler(plan.folder)
        sampler = Sampler(
            data.sections,
            data.encodings,
            seed=plan.seed,
            global_batch=self.global_batch,
            chances=self.chances,
            prior_prompts=config.prior_prompts,
            scaling_factor=data.scaling_factor,
            temporal_patch=self.transformer.config["patch_size_t"],
            timesteps=scheduler.config.num_train_timesteps,
        )
        self.feeder = Feeder(
            sampler,
            transformer_config=self.transformer.config,
            alphas_cumprod=scheduler.alphas_cumprod.float(),
            vae=data.vae,
            batch_size=self.batch_size,
            micro_batches=self.micro_batches,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            device=accelerator.device,
            dtype=plan.dtype,
        )
        self.state = self._initial_state()
        self.watch = LossWatch(self.state.losses)

    def resume(self, origin: Path | None) -> None:
        """Load a checkpoint, or the LoRA alone where there is no training state. None starts from scratch.

        Raises UserError when the checkpoint does not fit or has no steps left.
        """
        if origin is None:
            return
        load_adapter(self.transformer, origin / checkpoints.LORA)
        if not checkpoints.is_checkpoint(origin):
            self.report(f"starting from the LoRA in {origin.name}, with a fresh optimizer")
            return
        state, fresh = checkpoints.read_state(origin), self.state
        check_unfinished(state, origin, base=self.plan.base, steps=self.steps)
        for name, what in CHANGES.items():
            if getattr(state, name) != getattr(fresh, name):
                self.report(
                    f"{what} changed since the checkpoint: losses will differ from an uninterrupted run"
                )
        tensors = checkpoints.read_tensors(origin)
        load_states(self.optimizer, self.schedule, self.accelerator.scaler, tensors)
        self.report(f"continuing at step {state.step} of {self.steps}")
        self.state = replace(fresh, step=state.step, losses=state.losses)
        self.watch = LossWatch(self.state.losses)

    def run_to_end(self, stop: threading.Event) -> None:
        """Run the remaining steps. Saves a checkpoint and raises Stopped if `stop` is set in any process."""
        config, report = self.config, throttled(self.report, REPORT_SECONDS)
        numbers = range(self.state.step * self.micro_batches, self.steps * self.micro_batches)
        with (
            loss_file(self.run / "loss.csv", self.state.losses, active=self.is_main) as write_loss,
            prefetched(self.feeder.micro_batch, numbers, active=self.plan.device != "cpu") as batches,
        ):
            for step in range(self.state.step + 1, self.steps + 1):
                rate = self.schedule.get_last_lr()[0]
                loss, norm, stopping = self.step(batches, stop.is_set())
                self.watch.add(loss, norm=norm, scaled=self.plan.precision == "fp16")
                self.state.step = step
                write_loss(step, loss)
                self.accelerator.log({"loss": loss, "learning_rate": rate, "gradient_norm": norm}, step)
                last = step == self.steps
                report(progress_line("training", step, self.steps, f"loss {self.watch.recent():.4f}"))
                due = step % config.checkpoints.checkpointing_steps == 0 and self.watch.looks_sound()
                if last or stopping or due:
                    self.save_checkpoint()
                if stopping and not last:
                    raise Stopped
                validating = step % config.validation.validation_steps == 0 and not last
                if validating and not self.validate(stop):
                    self.save_checkpoint()
                    raise Stopped
        if not self.validate(stop):
            raise Stopped

    def step(self, batches: Iterator[list[Inputs]], stopping: bool) -> tuple[float, float, bool]:
        """Take one optimizer step.

        Returns the loss over the global batch, the norm of the gradients, and whether any process stops.
        """
        accelerator = self.accelerator
        total = torch.zeros((), device=accelerator.device)
        samples = self.batch_size * self.micro_batches
        for micro in range(1, self.micro_batches + 1):
            entries = next(batches)
            for index, inputs in enumerate(entries, start=1):
                # The processes exchange their gradients once a step.
                last = micro == self.micro_batches and index == len(entries)
                with contextlib.nullcontext() if last else accelerator.no_sync(self.denoiser):
                    loss = self.losses(inputs).sum() / samples
                    accelerator.backward(loss)
                total += loss.detach()
        max_norm = self.config.optimizer.max_grad_norm or math.inf
        norm: Any = accelerator.clip_grad_norm_(self.parameters, max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        figures = torch.stack([total, torch.tensor(float(stopping), device=total.device)])
        reduced: Any = accelerator.reduce(figures, reduction="mean")
        mean_loss, stops = reduced.tolist()
        return mean_loss, float(norm), stops > 0

    def losses(self, inputs: Inputs) -> torch.Tensor:
        """Return the loss of each sample, float32 [B]."""
        predicted = self.denoiser(inputs)
        if not inputs.prior:
            return objective.losses(predicted, inputs.latents, inputs.noise, inputs.alphas_cumprod)
        self.transformer.disable_adapters()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                target = self.transformer(**inputs.arguments, return_dict=False)[0]
        finally:
            self.transformer.enable_adapters()
        return objective.mean_squares(predicted.float() - target.float())

    def save_checkpoint(self) -> None:
        """Save a checkpoint in the main process; the others wait for it."""
        if self.is_main:
            scaler = self.accelerator.scaler
            folder = checkpoints.save(
                checkpoints.checkpoint_folder(self.run, self.state.step),
                self.state,
                {
                    "optimizer": self.optimizer.state_dict(),
                    "schedule": self.schedule.state_dict(),
                    "scaler": scaler.state_dict() if scaler else {},
                    "random": torch.get_rng_state(),
                },
                lambda path: self.save_lora(path, torch.float32),
                captions=as_lines(self.data.captions),
            )
            checkpoints.keep_newest(self.run, self.config.checkpoints.checkpoints_total_limit)
            self.publisher.checkpoint(folder)
        self.accelerator.wait_for_everyone()

    def save_lora(self, path: Path, dtype: torch.dtype) -> None:
        """Write the LoRA with the run's facts as metadata."""
        recorded = facts(self.config, self.plan, self.state, self.steps)
        save_adapter(self.transformer, path, recorded, dtype=dtype)

    def validate(self, stop: threading.Event) -> bool:
        """Make clips of every validation prompt with the current LoRA, in the main process.

        Returns False in every process when `stop` was set meanwhile.
        """
        if not self.validation_requests:
            return True
        done = True
        if self.is_main:
            try:
                made = make_clips(
                    self.plan, self.validation_requests, self.transformer, self.data.encodings,
                    self.run / "validation", compute=self.config.compute, step=self.state.step, stop=stop,
                    report=self.report,
                )  # fmt: skip
                log_clips(self.accelerator, made, step=self.state.step)
            except Stopped:
                done = False
        mine = torch.tensor(float(done), device=self.accelerator.device)
        agreed: Any = self.accelerator.reduce(mine, reduction="mean")
        return agreed.item() == 1

    def finish(self) -> Path:
        """Write the folder of results, upload it if asked to, and return it."""
        if self.is_main:
            result = write_result(self.run, self.config, self.plan, self.data, self.state, self.save_lora)
            self.publisher.result(result)
        self.accelerator.wait_for_everyone()
        return self.run / RESULT

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.accelerator.is_main_process

    def _initial_state(self) -> State:
        sections = [[section.clip, section.caption, section.frames] for section in self.data.sections]
        return State(
            step=0,
            seed=self.plan.seed,
            base=self.plan.base,
            fits=self.config.fixed(),
            data=digest([sections, asdict(self.plan.sampling), asdict(self.chances)]),
            global_batch=self.global_batch,
        )
