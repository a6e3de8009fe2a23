"""Trains a LoRA on a CogVideoX base: prepare once, then the loop, with checkpoints that resume exactly.

    train(TrainingConfig(input_videos="clips.zip"), Path("runs/star"))

The folder of a run holds checkpoints/, loss.csv, validation/, captions that were made, what trackers write,
at last result/. A run whose folder has checkpoints goes on from the newest.
"""

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lib.cancellation import Stopped
from lib.network import offline
from lib.progress import Report
from training import checkpoints, objective
from training.adapter import add_adapter, check_adapter, check_targets, load_adapter, save_adapter
from training.ahead import Ahead
from training.autocaption import as_lines, write_captions
from training.base import load_transformer, skeleton, store_in_fp8
from training.batches import Chances, Sampler
from training.checkpoints import State
from training.config import TrainingConfig, digest
from training.devices import alone, from_main, log_clips, memory_advice, start_accelerator, start_trackers
from training.inputs import Feeder, Inputs, with_last
from training.optimization import build_optimizer, build_schedule, load_states
from training.origin import found_origin
from training.plan import Plan, base_name, check_at_the_door, label, locate_base, settle, total_steps
from training.prepare import Data, encode_data, found_clips
from training.publish import Publisher
from training.result import RESULT, TRAINING_STATE, facts, steps_of_result, write_result
from training.validation import Wanted, load_scheduler, validate, validation_requests
from training.watch import LossFile, LossWatch

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import CogVideoXTransformer3DModel

REPORT_SECONDS = 1.0
CHANGES = {
    "seed": "the seed",
    "data": "clips, captions, their sizes or the chances of dropouts and flips",
    "global_batch": "the batch over all devices",
}
"""Fields of a state with which the losses of a run that goes on differ from an unbroken one's."""


def train(
    config: TrainingConfig, run: Path, *, stop: threading.Event | None = None, report: Report = print
) -> Path:
    """Train and return the folder of results: lora.safetensors, README.md, captions, loss curve, clips.

    When `stop` is set, a checkpoint is saved and Stopped raised. Raises UserError for what the caller can
    mend; the run's checkpoints stay.
    """
    stop = stop or threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Stopped

    accelerator = start_accelerator(config, run)
    if not accelerator.is_main_process:
        report = _silent
    name, device = base_name(), accelerator.device.type
    check_at_the_door(config, name, device)
    with alone(run, accelerator), checkpoints.telling_what_is_kept(run), memory_advice(config):
        with found_origin(config.resume_from, run, accelerator, stop=stop, report=report) as origin:
            if origin is not None and checkpoints.is_checkpoint(origin):
                state = checkpoints.read_state(origin)
                config = checkpoints.continued(config, state)
                # Steps that follow from epochs are known when the samples are.
                steps = math.inf if config.num_train_epochs else total_steps(config, 0, 1)
                check_unfinished(state, origin, base=label(name), steps=steps)
            elif origin is not None:
                check_adapter(
                    origin / checkpoints.LORA, base=label(name), rank=config.rank, alpha=config.alpha
                )
            publisher = Publisher(config, report, active=accelerator.is_main_process)
            with found_clips(config, run / "data", accelerator, stop=stop, report=report) as found:
                folder = locate_base(name, config, report)
                # A seed that is not given is drawn once for all.
                plan = from_main(accelerator, lambda: settle(config, name, folder, device))
                offline.go_offline()
                check_targets(skeleton(folder), config.targets)
                wanted = validation_requests(plan)
                captions = []
                if config.autocaption:
                    *found, captions = write_captions(
                        plan, *found, run, accelerator, origin=origin, stop=stop, report=report
                    )
                data = encode_data(plan, *found, accelerator, report=report, check=check)
                data.captions = captions
            start_trackers(accelerator, config)
            trainer = Trainer(plan, data, run, accelerator, publisher, wanted, origin=origin, report=report)
        try:
            trainer.run_to_end(stop)
            return trainer.finish()
        finally:
            accelerator.end_training()  # closes the trackers, which would receive the next run's figures too


class Denoiser(nn.Module):
    """What accelerate wraps, so that the transformer inside stays as validation and saving need it."""

    def __init__(self, transformer: "CogVideoXTransformer3DModel") -> None:
        super().__init__()
        self.transformer = transformer
        # The frozen base is the same everywhere: several processes need not compare or send it.
        frozen = [n for n, p in self.named_parameters() if not p.requires_grad]
        self._ddp_params_and_buffers_to_ignore = frozen + [n for n, _ in self.named_buffers()]

    def forward(self, inputs: Inputs) -> torch.Tensor:
        return self.transformer(**inputs.arguments(), return_dict=False)[0]


class Trainer:
    """One run, from its newest checkpoint to its end."""

    def __init__(
        self, plan: Plan, data: Data, run: Path, accelerator: "Accelerator", publisher: Publisher,
        wanted: list[Wanted], *, origin: Path | None, report: Report,
    ) -> None:  # fmt: skip
        config = plan.config
        self.plan, self.data, self.run, self.accelerator = plan, data, run, accelerator
        self.publisher, self.report = publisher, report
        self.global_batch = (
            config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        )
        self.steps = total_steps(config, len(data.sections), self.global_batch)
        self.wanted = wanted

        torch.manual_seed(plan.seed)  # where the LoRA begins
        self.transformer = load_transformer(plan)
        self.parameters = add_adapter(
            self.transformer, rank=config.rank, alpha=config.alpha, targets=config.targets
        )
        if config.base_precision == "fp8":
            store_in_fp8(self.transformer, getattr(torch, plan.dtype))
        if plan.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.transformer.train()
        rate = config.learning_rate * (self.global_batch if config.scale_lr else 1)
        optimizer = build_optimizer(config, self.parameters, rate)
        self.schedule = build_schedule(config, optimizer, self.steps)
        self.denoiser, self.optimizer = accelerator.prepare(Denoiser(self.transformer), optimizer)

        scheduler = load_scheduler(plan.folder)
        sampler = Sampler(
            data.sections,
            data.encodings,
            seed=plan.seed,
            global_batch=self.global_batch,
            chances=Chances(
                flip=config.random_flip,
                caption_dropout=config.caption_dropout,
                image_dropout=config.noised_image_dropout,
                prior=config.prior_preservation,
            ),
            prior_prompts=plan.config.prior_captions,
            scaling_factor=data.scaling_factor,
            temporal_patch=self.transformer.config.patch_size_t,
            timesteps=scheduler.config.num_train_timesteps,
        )
        self.feeder = Feeder(
            sampler,
            transformer_config=self.transformer.config,
            alphas_cumprod=scheduler.alphas_cumprod.float(),
            vae=data.vae,
            batch_size=config.train_batch_size,
            micro_batches=config.gradient_accumulation_steps,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            device=accelerator.device,
            dtype=getattr(torch, plan.dtype),
        )
        self.state = self._begun(origin)
        self.watch = LossWatch(self.state.losses)

    def run_to_end(self, stop: threading.Event) -> None:
        """The loop. Saves a checkpoint and raises Stopped once `stop` is set on any process."""
        config, reported = self.plan.config, 0.0
        micro_batches = config.gradient_accumulation_steps
        numbers = range(self.state.step * micro_batches, self.steps * micro_batches)
        with (
            LossFile(self.run / "loss.csv", self.state.losses, active=self.is_main) as file,
            Ahead(self.feeder.micro_batch, numbers, active=self.plan.device != "cpu") as batches,
        ):
            for step in range(self.state.step, self.steps):
                rate = self.schedule.get_last_lr()[0]
                loss, norm, stopping = self.step(batches, stop.is_set())
                self.watch.see(loss, norm=norm, scaled=self.plan.precision == "fp16")
                self.state.step = step + 1
                file.add(step + 1, loss)
                self.accelerator.log({"loss": loss, "learning_rate": rate, "gradient_norm": norm}, step + 1)
                last = step + 1 == self.steps
                if last or time.monotonic() - reported >= REPORT_SECONDS:
                    reported = time.monotonic()
                    self.report(f"progress: training {step + 1}/{self.steps}, loss {self.watch.recent():.4f}")
                due = (step + 1) % config.checkpointing_steps == 0 and self.watch.looks_sound()
                if last or stopping or due:
                    self.save_checkpoint()
                if stopping and not last:
                    raise Stopped
                if (step + 1) % config.validation_steps == 0 and not last and not self.validate(stop):
                    self.save_checkpoint()
                    raise Stopped
        if not self.validate(stop):
            raise Stopped

    def step(self, batches: Iterator[list[Inputs]], stopping: bool) -> tuple[float, float, bool]:
        """One optimizer step: loss over the global batch, norm of the gradients, whether anyone stops."""
        config, accelerator = self.plan.config, self.accelerator
        total = torch.zeros((), device=accelerator.device)
        ours = config.train_batch_size * config.gradient_accumulation_steps
        for micro in range(config.gradient_accumulation_steps):
            last_batch = micro + 1 == config.gradient_accumulation_steps
            for inputs, last in with_last(next(batches), last=last_batch):
                # The processes exchange their gradients once a step.
                with contextlib.nullcontext() if last else accelerator.no_sync(self.denoiser):
                    loss = self.losses(inputs).sum() / ours
                    accelerator.backward(loss)
                total += loss.detach()
        norm = accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        figures = torch.stack([total, torch.tensor(float(stopping), device=total.device)])
        mean_loss, stops = accelerator.reduce(figures, reduction="mean").tolist()
        return mean_loss, float(norm), stops > 0

    def losses(self, inputs: Inputs) -> torch.Tensor:
        """The loss of each sample, float32 [B]."""
        predicted = self.denoiser(inputs)
        if not inputs.prior:
            return objective.losses(predicted, inputs.latents, inputs.noise, inputs.alphas_cumprod)
        self.transformer.disable_adapters()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                target = self.transformer(**inputs.arguments(), return_dict=False)[0]
        finally:
            self.transformer.enable_adapters()
        return objective.mean_squares(predicted.float() - target.float())

    def save_checkpoint(self) -> None:
        """By the main process; the others wait for it."""
        if self.is_main:
            scaler = self.accelerator.scaler
            folder = checkpoints.save(
                checkpoints.folder_of(self.run, self.state.step),
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
            checkpoints.keep_newest(self.run, self.plan.config.checkpoints_total_limit)
            self.publisher.checkpoint(folder)
        self.accelerator.wait_for_everyone()

    def save_lora(self, path: Path, dtype: torch.dtype) -> None:
        save_adapter(self.transformer, path, facts(self.plan, self.state, self.steps), dtype=dtype)

    def validate(self, stop: threading.Event) -> bool:
        """Clips of every validation prompt with the LoRA as it stands, made by the main process.

        False on every process when `stop` was set meanwhile.
        """
        if not self.wanted:
            return True
        done = True
        if self.is_main:
            try:
                made = validate(
                    self.plan, self.wanted, self.transformer, self.data.encodings, self.run / "validation",
                    step=self.state.step, stop=stop, report=self.report,
                )  # fmt: skip
                log_clips(self.accelerator, made, fps=round(self.plan.sampling.fps), step=self.state.step)
            except Stopped:
                done = False
        agreed = self.accelerator.reduce(torch.tensor(float(done), device=self.accelerator.device), "mean")
        return agreed.item() == 1

    def finish(self) -> Path:
        """Write the folder of results, upload it if asked to, and return it."""
        if self.is_main:
            result = write_result(self.run, self.plan, self.data, self.state, self.save_lora)
            self.publisher.result(result)
        self.accelerator.wait_for_everyone()
        return self.run / RESULT

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def _begun(self, origin: Path | None) -> State:
        """The state to go on from: a checkpoint's, only its weights, or the beginning."""
        config, plan = self.plan.config, self.plan
        sections = [[section.clip, section.caption, section.frames] for section in self.data.sections]
        data = digest([sections, asdict(plan.sampling), asdict(self.feeder.sampler.chances)])
        fresh = State(
            step=0,
            seed=plan.seed,
            base=plan.base,
            fits=config.fits(),
            data=data,
            global_batch=self.global_batch,
        )
        if origin is None:
            return fresh
        load_adapter(self.transformer, origin / checkpoints.LORA)
        if not checkpoints.is_checkpoint(origin):
            self.report(f"starting from the LoRA in {origin.name}, with a fresh optimizer")
            return fresh
        state = checkpoints.read_state(origin)
        check_unfinished(state, origin, base=plan.base, steps=self.steps)
        for name, what in CHANGES.items():
            if getattr(state, name) != getattr(fresh, name):
                self.report(f"{what} changed since the checkpoint: losses are not those of an unbroken run")
        tensors = checkpoints.read_tensors(origin)
        load_states(self.optimizer, self.schedule, self.accelerator.scaler, tensors)
        self.report(f"continuing at step {state.step} of {self.steps}")
        return replace(state, seed=plan.seed, fits=fresh.fits, data=data, global_batch=self.global_batch)


def check_unfinished(state: State, origin: Path, *, base: str, steps: float) -> None:
    """Raise UserError unless there is something left to do for a state from `origin`.

    A run that ended after the last step and before its result was written lacks that only.
    """
    done = origin.name == TRAINING_STATE or steps_of_result(origin.parent.parent) == steps
    checkpoints.check_unfinished(state, base=base, steps=steps, has_result=done)


def _silent(line: str) -> None:
    """What all processes but the first report with."""
