"""A configuration -> a run directory: the training loop.

    batch(step) --forward, backward (accumulation times)--> FOGZO, if asked for --> clip --> AdamW at
    learning_rate_at(step) --> journal, checkpoint

Several processes (`bitbell.training.distributed`) take the same steps together, each with its share of every batch. The
first one writes and speaks. What one of them sees (a loss that is not finite, a request to stop) all act upon, after
the same step.

Everything a step depends on is a function of the step number (data, learning rate, FOGZO's noise) or part of the
checkpoint (weights, scales, statistics, moments), so a run that is stopped anywhere and started again ends with the
same numbers.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitbell.evaluation import logits_of, weight_entropies
from bitbell.evaluation.loss import autocast
from bitbell.layers import TrainedLayer, calibrate, quantized_layers, report
from bitbell.models import find_preset
from bitbell.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from bitbell.training.config import TrainConfig
from bitbell.training.distributed import (
    World,
    average_running_statistics,
    clip_gradients,
    distribute,
    gradients_synchronised,
    join,
    share_statistics,
    whole,
)
from bitbell.training.fogzo import Fogzo, beta_at
from bitbell.training.health import TrainingDiverged, first_bad_gradient, first_not_finite
from bitbell.training.journal import Journal, Progress, read_metrics
from bitbell.training.optimizer import learning_rate_at, make_optimizer
from bitbell.training.run import build_run_model, load_run, lock_run, open_run, read_json, write_json
from bitbell.training.tasks import Batch, Measured, Task, open_task


@dataclass(frozen=True)
class TrainingResult:
    """Where the run is, how far it went, and its final numbers if it is finished."""

    run: Path
    step: int
    status: Literal["finished", "stopped"]
    summary: dict[str, Any] = field(default_factory=dict)


def train(config: TrainConfig, progress: Progress | None = None) -> TrainingResult:
    """Train the model of `config`, or continue it, until it is finished, interrupted (Ctrl-C, SIGTERM) or at
    `stop_after`.

    Raises ValueError for a configuration that does not fit its data or its directory, TrainingDiverged with step and
    place when numbers stop being finite, and CheckpointError when a checkpoint cannot be written; the last good one
    is always intact. Where the first of several processes failed alone, the others raise RankFailed.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with join(config.device) as world:
        return _train(config, progress or Progress(config.steps, None if world.is_first else StringIO()), world)


def _train(config: TrainConfig, progress: Progress, world: World) -> TrainingResult:
    task = open_task(config, world)
    device = pick_device(config.device, world.local_rank if world.size > 1 else None)
    precision = pick_precision(config.precision, device)
    out = Path(config.out)
    if config.distributed == "fsdp" and world.size == 1:
        progress.say("one process has nothing to shard: --distributed fsdp is for several (torchrun)")
    if "augmented_by" in task.facts:
        progress.say(f"images are augmented by {task.facts['augmented_by']}")
    with world.held_by_first(lambda: lock_run(out)):
        if world.first(lambda: (out / "summary.json").exists()):
            run = world.first(lambda: open_run(config, task.facts, dtype_name(precision)))
            progress.say(f"{run} is finished already")
            return TrainingResult(run, config.steps, "finished", read_json(run / "summary.json"))
        return _Run(config, task, device, precision, progress, world).go()


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """The torch device for "auto", "cpu", "cuda" or "cuda:N"; the GPU of a process's own for its `local_rank`. Raises
    ValueError for cuda without a GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={name} but PyTorch sees no GPU here; use --device cpu")
    return torch.device(name) if name != "cuda" or local_rank is None else torch.device("cuda", local_rank)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype for "float32", "bfloat16" or "auto": bfloat16 on GPUs and on CPUs with instructions for it."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    features = torch.cpu.get_capabilities()
    fast = bool(features.get("amx_bf16") or features.get("avx512_bf16"))
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


class _Run:
    """The state of one process's part of a run."""

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        device: torch.device,
        precision: torch.dtype,
        progress: Progress,
        world: World,
    ) -> None:
        self.config, self.task, self.progress, self.world = config, task, progress, world
        progress.unit = task.unit
        self.device, self.precision = device, precision
        self.peak = config.learning_rate or find_preset(config.preset).learning_rate
        self.model = build_run_model(config, task.facts).to(self.device)
        self.fogzo: Fogzo | None = None
        if config.fogzo:
            self.fogzo = Fogzo(self.model, noise=config.fogzo_noise, samples=config.fogzo_samples, seed=config.seed)
        self.run = world.first(lambda: open_run(config, task.facts, dtype_name(precision)))
        self._prepare(world.first(lambda: list_checkpoints(self.run)))
        self.journal: Journal | None = None
        world.first(self._open_journal)
        self.stop_requested = self.stop_agreed = False

    def _prepare(self, checkpoints: list[Checkpoint]) -> None:
        """The model with the state of the newest checkpoint, or calibrated on its first batch, spread over the
        processes, and its optimizer."""
        config, world = self.config, self.world
        share_statistics(self.model, world.statistics)
        if not checkpoints and any(True for _ in quantized_layers(self.model)):
            with autocast(self.model, self.precision):
                calibrate(self.model, self._batch(0)[0])
        if not config.sync_statistics:
            share_statistics(self.model, world.statistics._replace(group=None))
        self.forward = distribute(self.model, config, world, self.progress.say)
        self.optimizer = make_optimizer(self.model, config, self.peak)
        self.step = 0
        if checkpoints:
            self.step = checkpoints[-1].step
            load_checkpoint(checkpoints[-1], self.model, self.optimizer)
            self.progress.say(f"continuing {self.run} after step {self.step}")

    def _open_journal(self) -> None:
        self.journal = Journal(self.run, self.step, self.config.tensorboard)

    def _batch(self, micro_batch: int) -> Batch:
        inputs, targets = self.task.batch(micro_batch)
        return inputs.to(self.device), targets.to(self.device)

    def go(self) -> TrainingResult:
        self.losses: list[float] = []
        self.agreements: list[float] = []  # FOGZO's, since the last line of metrics
        self.started, self.logged_step = time.perf_counter(), self.step
        self.paused, self.logged_at = 0.0, time.perf_counter()
        last = min(self.config.steps, self.config.stop_after or self.config.steps)
        self.model.train()
        try:
            with _stop_on_signals(self):
                while self.step < last and not self._is_stopping():
                    self._take_step()
                    self._report_step(at_end=self.step == last)
                if self.step < self.config.steps:
                    self._checkpoint()  # a second SIGTERM must not spoil it
            if self.step < self.config.steps:
                self.progress.say(
                    f"stopped after step {self.step} of {self.config.steps}; the same command continues it"
                )
                return TrainingResult(self.run, self.step, "stopped")
            return TrainingResult(self.run, self.step, "finished", self._finish())
        finally:
            if self.journal is not None:
                self.journal.close()

    def _is_stopping(self) -> bool:
        return self.stop_requested if self.world.size == 1 else self.stop_agreed

    def _record(self, event: str, step: int, **values: Any) -> None:
        if self.journal is not None:
            self.journal.write(event, step, **values)

    def _take_step(self) -> None:
        config = self.config
        rate = learning_rate_at(self.step, steps=config.steps, peak=self.peak, warmup=config.warmup, final=config.final)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        losses = []
        for index, batch in enumerate(self._micro_batches(), 1):
            with gradients_synchronised(self.forward, now=index == config.accumulation or config.reduce_every):
                loss = self._loss(batch)
                (loss / config.accumulation).backward()
            losses.append(loss.detach())
        total = self._agree_on_losses(torch.stack(losses).tolist())
        self._correct_gradients()
        norm = clip_gradients(self.model, config.clip, self.world)
        if not math.isfinite(norm):
            self._diverge(f"the gradient norm is {norm}", first_bad_gradient(self.model, self.world.smallest))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.world.size > 1:
            average_running_statistics(self.model, self.world.statistics)
        self.step += 1
        self.losses.append(total)
        self.rate, self.norm = rate, norm

    def _agree_on_losses(self, losses: list[float]) -> float:
        """The mean loss of the step's micro-batches over all processes, once it is finite; also whether to stop."""
        *sums, stops = self.world.sum([*losses, float(self.stop_requested)])
        self.stop_agreed = stops > 0
        means = [value / self.world.size for value in sums]
        bad = next((index for index, mean in enumerate(means) if not math.isfinite(mean)), None)
        if bad is not None:
            inputs, _ = list(self._micro_batches())[bad]
            where = first_not_finite(self.model, inputs, self.world.smallest)
            self._diverge(f"the loss is {means[bad]}", where)
        return sum(value / self.config.accumulation for value in means)

    def _micro_batches(self) -> Iterator[Batch]:
        for index in range(self.config.accumulation):
            yield self._batch(self.step * self.config.accumulation + index)

    def _loss(self, batch: Batch) -> Tensor:
        inputs, targets = batch
        with autocast(self.model, self.precision):
            logits = logits_of(self.forward, inputs)
        return self.task.loss(logits, targets)

    def _correct_gradients(self) -> None:
        """FOGZO, where it is asked for and due: once a step, over the same micro-batches as the gradient."""
        if self.fogzo is None:
            return
        config = self.config
        beta = beta_at(self.step, steps=config.steps, start=config.fogzo_start, last=config.fogzo_beta)
        if beta is None:
            return

        def loss() -> float:
            here = sum(self._loss(batch).item() for batch in self._micro_batches())
            return self.world.sum([here])[0] / self.world.size / config.accumulation

        try:
            self.agreements.append(self.fogzo.correct(loss, beta=beta, step=self.step).agreement)
        except TrainingDiverged as error:
            self._diverge(str(error), "the probe's forward pass: the weights themselves gave a finite loss")

    def _diverge(self, what: str, where: str) -> None:
        good = list_checkpoints(self.run)
        kept = f"the last good checkpoint is {good[-1].path}" if good else "there is no checkpoint yet"
        self._record("diverged", self.step + 1, reason=f"{what}, first in {where}")
        raise TrainingDiverged(f"{what} at step {self.step + 1}, first in {where}; {kept}")

    def _report_step(self, at_end: bool) -> None:
        """Write what is due after this step: metrics, entropy, validation, checkpoint."""
        config, step = self.config, self.step
        if step % config.log_every == 0 or at_end:
            self._log()
        if step % config.entropy_every == 0 or at_end or step == 1:
            self._pause_clock(self._log_quantizers)
        if step % config.evaluate_every == 0 and step < config.steps:  # the end has a validation of its own
            self._pause_clock(self._validate)
        if step % config.checkpoint_every == 0 and step < config.steps:
            self._pause_clock(self._checkpoint)

    def _pause_clock(self, action: Any) -> None:
        begun = time.perf_counter()
        action()
        self.paused += time.perf_counter() - begun

    def _log(self) -> None:
        config, now = self.config, time.perf_counter()
        done = self.step - self.logged_step
        step_seconds = (now - self.logged_at - self.paused) / max(done, 1)
        units = config.batch_size * config.accumulation * self.task.units_per_sample / max(step_seconds, 1e-9)
        loss = sum(self.losses) / len(self.losses)
        self._record(
            "train",
            self.step,
            loss=loss,
            learning_rate=self.rate,
            gradient_norm=self.norm,
            **{f"{self.task.unit}_per_second": units},
            step_seconds=step_seconds,
            seconds=(self.journal.seconds_before if self.journal else 0.0) + now - self.started,
            **({"fogzo_agreement": sum(self.agreements) / len(self.agreements)} if self.agreements else {}),
        )
        self.progress.show(self.step, loss, self.rate, units, (config.steps - self.step) * step_seconds)
        self.losses, self.agreements = [], []
        self.logged_step, self.paused, self.logged_at = self.step, 0.0, time.perf_counter()

    def _log_quantizers(self) -> None:
        layers = {}
        for name, layer in quantized_layers(self.model):
            with whole(layer, *filter(None, [layer.activation_quantizer])):  # which a sibling may own
                layers[name] = {"weight_entropy": weight_entropies(layer)[""], **_scales(layer)}
        if layers:
            self._record("quantizers", self.step, layers=layers)

    def _validate(self) -> None:
        measured = self.task.measure(self.model, self.config.evaluate_windows, self.precision)
        self._record("valid", self.step, **measured.numbers)
        self.progress.say(f"step {self.step}  validation loss {measured.numbers['loss']:.4f}, {measured.words}")

    def _checkpoint(self) -> None:
        keep = self.config.keep_checkpoints
        save_checkpoint(self.run, self.step, self.model, self.optimizer, keep, self.world)

    def _finish(self) -> dict[str, Any]:
        """Checkpoint, evaluate on the validation split, and write the summary."""
        self._checkpoint()
        measured = self.task.measure(self.model, self.config.final_windows, self.precision)
        summary = self.world.first(lambda: self._summarize(measured))
        self._record("valid", self.step, **measured.numbers)
        self._record("end", self.step)
        self.progress.say(f"finished: validation loss {measured.numbers['loss']:.4f}, {measured.words}")
        return summary

    def _summarize(self, measured: Measured) -> dict[str, Any]:
        """Write the summary, in one process; of several, from the checkpoint, whose quantizers wait for no other."""
        config = self.config
        model = self.model if self.world.size == 1 else load_run(self.run)[0].to(self.device)
        result = self.task.conclude(model, measured, config.final_windows, self.precision)
        self.task.leave(self.run, model, config.final_windows, self.precision)
        counts = {f"{self.task.unit}_seen": samples_seen(config) * self.task.units_per_sample}
        summary = summarize(self.run, config, model, result, self.precision, measured.numbers | counts)
        write_json(self.run / "summary.json", summary)
        return summary


def _scales(layer: TrainedLayer) -> dict[str, float]:
    scales = {"weight_scale": float(layer.weight_quantizer.scale.detach().abs().mean())}
    if layer.activation_quantizer is not None and layer.activation_quantizer.scale_is_learned:
        scales["activation_scale"] = float(layer.activation_quantizer.scale.detach().abs().mean())
    return scales


def samples_seen(config: TrainConfig) -> int:
    """Sequences, or images, that a whole run trains on."""
    return config.steps * config.batch_size * config.accumulation


def summarize(
    run: Path,
    config: TrainConfig,
    model: nn.Module,
    result: Any,
    precision: torch.dtype,
    numbers: dict[str, float],
) -> dict[str, Any]:
    """Every final number of a run, as plain JSON: quality (`numbers`), entropy, sizes and speed."""
    rows = report(model).rows
    layers = [asdict(layer) for layer in result.layers]
    recipes = {(row.recipe, row.weight_bits, row.activation_bits) for row in result.layers}
    name, weight_bits, activation_bits = recipes.pop() if len(recipes) == 1 else (None, None, None)
    seconds = sorted(e["step_seconds"] for e in read_metrics(run / "metrics.jsonl") if e["event"] == "train")
    return {
        "name": run.name,
        "recipe": name or ("mixed" if layers else None),
        "method": name.rpartition("-w")[0] if name else ("mixed" if layers else None),
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "steps": config.steps,
        "seed": config.seed,
        "fogzo": config.fogzo,
        **numbers,
        "weight_entropy": result.weight_entropy,
        "activation_entropy": result.activation_entropy,
        "parameters": sum(p.numel() for p in model.parameters()),
        "quantized_parameters": sum(row.shape[0] * row.shape[1] for row in result.layers),
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "packed_bytes": sum(row.bytes_packed for row in rows) if layers else None,
        "seconds_per_step": seconds[len(seconds) // 2] if seconds else None,
        "precision": dtype_name(precision),
        "layers": layers,
    }


class _stop_on_signals:
    """Inside a `with`, the first Ctrl-C or SIGTERM asks the run to stop after its step; a second Ctrl-C interrupts at
    once."""

    def __init__(self, run: _Run) -> None:
        self.run = run

    def __enter__(self) -> None:
        self.previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.run.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.run.stop_requested = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
