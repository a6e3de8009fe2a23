"""Training tiny-writer on requests and answers."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

from tiny import loop
from tiny.writer import LONGEST, build_writer, build_writer_tokenizer, sample_exchange

PEAK_RATE = 2e-3
BATCH = 64
"""Exchanges per step, over all processes."""
PART = 16
"""Exchanges of one forward pass on a CPU; on a GPU it takes all at once."""
EASY_SHARE = 0.1
"""Share of the steps, at the start, with ideas of one scene only."""
EVALUATED = 100


def train_writer(worker: loop.Worker, folder: Path, steps: int, seed: int) -> None:
    """Train for `steps`, resuming from folder/writer.pt, with a checkpoint every 100 steps."""
    tokenizer = build_writer_tokenizer()
    model = build_writer(len(tokenizer)).to(worker.device)
    average = loop.Average(model, 0.995)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    checkpoint = folder / "writer.pt"
    start = loop.resume(checkpoint, model, average, optimizer, steps)
    log, losses = loop.Log(folder / "writer.jsonl", worker), []
    exchanges = Exchanges(tokenizer, worker, seed, steps)
    for step, batches in zip(range(start, steps), exchanges.load(start), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = loop.learning_rate(step, steps, peak=PEAK_RATE)
        answered = sum(int((wanted != -100).sum()) for _, wanted in batches)
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=worker.device)
        for ids, wanted in batches:
            part = _loss(model, ids.to(worker.device), wanted.to(worker.device)) / answered
            part.backward()
            loss += part.detach()
        worker.average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model, step)
        losses.append(loss)
        last = step + 1 == steps
        if worker.is_main and ((step + 1) % 100 == 0 or last):
            figures = _right(average.module, tokenizer) if (step + 1) % 1000 == 0 or last else {}
            log(step=step + 1, loss=float(torch.stack(losses[-100:]).mean()), **figures)
            loop.save_training(checkpoint, model, average, optimizer, step=step + 1, steps=steps)


def _loss(model: Qwen3ForCausalLM, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the sum of the cross entropies of the answers' tokens."""
    with loop.autocast(ids.device.type), loop.attention_in_fp32():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        answered = wanted[:, 1:] != -100
        logits = model.lm_head(hidden[:, :-1][answered])
    return F.cross_entropy(logits.float(), wanted[:, 1:][answered], reduction="sum")


class Exchanges(Dataset[list[tuple[torch.Tensor, torch.Tensor]]]):
    """The exchanges of each step."""

    def __init__(self, tokenizer: Qwen2Tokenizer, worker: loop.Worker, seed: int, steps: int) -> None:
        self.tokenizer, self.worker, self.seed, self.steps = tokenizer, worker, seed, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        easy = step < EASY_SHARE * self.steps
        part = PART if self.worker.device == "cpu" else BATCH
        rng = self.worker.rng(self.seed, step)
        return _batches(self.tokenizer, rng, BATCH // self.worker.count, part, easy=easy)

    def load(self, start: int) -> Iterable[list[tuple[torch.Tensor, torch.Tensor]]]:
        """Return the steps from `start` on; beside a GPU the other cores sample them."""
        workers = 0 if self.worker.device == "cpu" else max(1, (os.cpu_count() or 1) - 1)
        return DataLoader(
            self, batch_size=None, sampler=range(start, self.steps), num_workers=workers,
            prefetch_factor=8 if workers else None,
        )  # fmt: skip


def _batches(
    tokenizer: Qwen2Tokenizer, rng: np.random.Generator, count: int, part: int, *, easy: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sample `count` exchanges in parts of similar length.

    Each part has ids [n, length] padded on the right, and labels (-100 for tokens without a loss).
    """
    exchanges = [sample_exchange(rng, easy=easy) for _ in range(count)]
    asked = tokenizer([chat(request) for request, _ in exchanges])["input_ids"]
    answers = tokenizer([f"{answer}<|im_end|>" for _, answer in exchanges])["input_ids"]
    rows = [(a, b) for a, b in zip(asked, answers, strict=True) if len(a) + len(b) <= LONGEST]
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    parts = []
    for start in range(0, len(rows), part):
        chosen = rows[start : start + part]
        ids = [torch.tensor(a + b) for a, b in chosen]
        wanted = [torch.tensor([-100] * len(a) + b) for a, b in chosen]
        pad = torch.nn.utils.rnn.pad_sequence
        parts.append((pad(ids, batch_first=True), pad(wanted, batch_first=True, padding_value=-100)))
    return parts


def chat(request: str) -> str:
    """Return a request in the tokenizer's chat template."""
    return f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"


@torch.no_grad()
def _right(model: Qwen3ForCausalLM, tokenizer: Qwen2Tokenizer) -> dict[str, float]:
    """Return the share of sampled exchanges of another seed that are answered exactly."""
    rng = np.random.default_rng(10**6)
    exchanges = [sample_exchange(rng) for _ in range(EVALUATED)]
    asked = tokenizer(
        [chat(request) for request, _ in exchanges], padding=True, padding_side="left", return_tensors="pt"
    ).to(model.device)
    output = model.generate(
        input_ids=asked["input_ids"], attention_mask=asked["attention_mask"], do_sample=False,
        max_new_tokens=320,
    )  # fmt: skip
    answers = tokenizer.batch_decode(output[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [answer == wanted for answer, (_, wanted) in zip(answers, exchanges, strict=True)]
    return {"right": float(np.mean(right))}
