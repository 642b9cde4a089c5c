"""`Trainer`: a run from its configuration to its export, through whatever happens on the way."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveal.lab.data.dataset import BatchStream, LatentDataset
from foveal.lab.pipelines import check_torchvision
from foveal.lab.train.checkpoint import MANIFEST, Checkpoint, CheckpointError, CheckpointStore
from foveal.lab.train.config import TrainingConfig, differences
from foveal.lab.train.evaluation import DivergenceAlarm, Evaluation, HeldOut
from foveal.lab.train.export import export, export_files
from foveal.lab.train.faults import LossGuard, TrainingError, out_of_memory, stopping_on_signals
from foveal.lab.train.fit import check_fit, check_training
from foveal.lab.train.inputs import NoiseAhead, check_sizes, open_data, read_batch
from foveal.lab.train.log import METRICS_FILE, RunLog, check_tracker
from foveal.lab.train.loop import Action, run_steps
from foveal.lab.train.losses import Losses
from foveal.lab.train.model import (
    anneal,
    build_model,
    check_first_frame,
    compile_blocks,
    load_transformer,
    noise_shifts,
    token_grid,
    trained_parameters,
    velocities,
)
from foveal.lab.train.optimization import (
    StepReport,
    optimizer_step,
)
from foveal.lab.train.parallel import (
    any_of,
    build_accelerator,
    check_tokens,
    data_part,
    mean_of,
    place,
    starts_empty,
)
from foveal.lab.train.sampling import dense_and_sparse, sample_file, visible, write_samples
from foveal.lab.train.state import build_state
from foveal.lab.train.throughput import peak_flops, sample_flops
from foveal.models.families.table import family_of
from foveal.models.report import report as forwards_report
from foveal.models.training import Streams


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Args:
        step: optimizer steps taken in all.
        finished: False where it was told to stop before its last step.
        evaluation: the last one of this process; None if there was none.
        export: the folder of the exported model, in the process that wrote it; None where it did not finish.
    """

    step: int
    finished: bool
    evaluation: Evaluation | None
    export: Path | None


def run_training(config: TrainingConfig) -> TrainingResult:
    """Trains as a configuration says, to the end and the export, or until SIGTERM or SIGINT, and saves.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: for a configuration that cannot be run.
        FileExistsError: a name that is needed is taken by a file that foveal did not write, or that was changed since.
        TrainingError: where it cannot go on: out of memory, or too many bad losses or batches in a row.
        CheckpointError: where the last checkpoint could not be written, or none could be read.
    """
    try:
        return Trainer(config).run()
    except torch.OutOfMemoryError as error:
        raise out_of_memory(config, error) from error


class Trainer:
    """One run, built from its configuration; `run` trains to the end.

    Args:
        config: the run.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: for a configuration that cannot be run.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        check_torchvision()
        # At once, before data and output; a model of the hub is looked at when it is loaded.
        if config.model.place is not None and Path(config.model.place).is_dir():
            check_training(config)
        check_sizes(config.data, config.model)
        check_tracker(config.tracker)
        if config.deterministic:
            torch.use_deterministic_algorithms(True)
        self.accelerator = build_accelerator(config)
        self.log = RunLog(config, self.accelerator)
        self.store = CheckpointStore(config.output / "checkpoints", keep=config.checkpoint.keep, report=self.log.warn)
        self._in_use = contextlib.ExitStack()
        try:
            if self.accelerator.is_main_process:
                self._take_output()
            self._set_up()
        except BaseException:
            self._in_use.close()
            raise

    def _set_up(self) -> None:
        """Open the data, build the model, and put together what the run changes."""
        config = self.config
        train_data, held_out_data = open_data(config.data, config.output_folder(), self.accelerator)
        check_training(config)
        check_fit(train_data, config.data, config.model)
        self.data_settings = train_data.settings
        if config.evaluation.sample_every and self.data_settings["space"] == "latent" and not self._pipeline():
            raise ValueError("evaluation.sample_every needs a pipeline to decode latents with, and the data names none")
        self.shifts = noise_shifts(config)
        check_first_frame(config)
        self.noise = NoiseAhead(
            seed=config.seed,
            shift=self.shifts[0],
            sigma_range=config.objective.sigma_range,
            device=self.accelerator.device,
            first_frame=config.objective.first_frame,
        )
        self.held_out = HeldOut(held_out_data, config, self.accelerator, self.shifts)
        self.part = data_part(self.accelerator, config)
        self.stream = BatchStream(
            train_data,
            config.batch_size // self.part.parts,
            seed=config.seed,
            rank=self.part.rank,
            world_size=self.part.parts,
            caption_dropout=config.data.caption_dropout,
            num_workers=config.data.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

        # `transformer` is the model itself, `model` what a forward in training calls: the same, or DDP around it.
        with self.log.before_steps("load the model"):
            self.transformer = build_model(config, empty=starts_empty(self.accelerator, config))
        for shape in train_data.buckets | held_out_data.buckets:
            check_tokens(config.context_parallel, token_grid(self.transformer, shape).num_tokens, shape)
        if config.model.compile:
            # Before `place`: blocks are found by their class, and FSDP2 changes it.
            keep = config.model.keep_exchanged if config.context_parallel > 1 else None
            compile_blocks(self.transformer, keep_exchanged=keep)
        self.model = place(self.transformer, self.accelerator, config)
        self.losses = Losses(
            config,
            self.accelerator,
            model=self.model,
            transformer=self.transformer,
            teacher=self._build_teacher(),
            noise=self.noise,
            shifts=self.shifts,
            no_text=self._no_text(train_data),
            part=self.part,
        )
        self.parameters = trained_parameters(self.transformer)
        self.guard = LossGuard(config.faults, self.log.warn)
        self.alarm = DivergenceAlarm(config.evaluation.warn_gap)
        self.state = build_state(
            config, self.transformer, self.parameters, self.stream, self.guard, self.alarm, self.accelerator
        )
        # Weights are alike in every process, dropout is not.
        torch.manual_seed(config.seed + self.accelerator.process_index)
        self.step = 0
        self.saved_at = self.evaluated_at = -1
        self.evaluation: Evaluation | None = None

    def _take_output(self) -> None:
        """Lock the output, and check that the run can write all of its files, before it does any work."""
        config, output = self.config, self.config.output_folder()
        output.check()
        self._in_use.enter_context(output.locked())
        if not self.store.exists():
            output.check_alone()
        elif not config.resume:
            raise ValueError(
                f"output {config.output} holds checkpoints: resume goes on from them, another output starts anew"
            )
        every = config.evaluation.sample_every
        samples = [sample_file(step) for step in range(every, config.steps + 1, every)] if every else []
        output.check([METRICS_FILE, *samples, *export_files(config)])

    def run(self) -> TrainingResult:
        """Trains to the last step and exports, or until SIGTERM or SIGINT, and saves.

        Raises:
            TrainingError: where it cannot go on: too many bad losses or batches in a row.
            CheckpointError: where the last checkpoint could not be written, or none could be read.
        """
        with stopping_on_signals(self.log.warn) as stop, self.log:
            try:
                if self.config.resume:
                    self._resume()
                self.log.start(self.step)
                return self._run(stop)
            finally:
                self.stream.close()
                self.noise.close()
                self._in_use.close()

    def _run(self, stop: threading.Event) -> TrainingResult:
        config = self.config
        run_steps(
            self._take_step,
            steps=config.steps,
            begin=self.step,
            actions=(
                Action(self._evaluate, every=config.evaluation.every, at_start=True, at_end=True),
                Action(self._sample, every=config.evaluation.sample_every),
                Action(self._save_on_the_way, every=config.checkpoint.every),
            ),
            stopped=lambda: any_of(self.accelerator, stop.is_set())[0],
        )
        if self.saved_at != self.step:
            self._save()
        ran = forwards_report(self.transformer)
        if ran.rows:
            self.log.say(str(ran))
        finished = self.step >= config.steps
        folder = None
        if finished:
            if self.accelerator.is_main_process:
                folder = self._export()
            self.accelerator.wait_for_everyone()
        else:
            self.log.say(f"stopped at step {self.step} of {config.steps} and saved; resume goes on from there")
        return TrainingResult(self.step, finished, self.evaluation, folder)

    def _take_step(self) -> None:
        self._train_step(time.perf_counter())
        self.step += 1

    def _train_step(self, started: float) -> None:
        """One optimizer step, or one that is refused, and a note of it."""
        config, step = self.config, self.step + 1
        batch = self._read()
        annealing, kept, dense_now = config.sparsity.annealing, None, False
        if annealing is not None:
            kept = anneal(self.transformer, config.sparsity.attention, annealing, step)
            dense_now = kept is None
        self.model.train()
        rate = self.state.schedule.get_last_lr()[0]
        report = optimizer_step(
            list(self.parameters.values()),
            self.state.optimizer,
            self.state.schedule,
            # The stream has moved on already.
            self.losses.of_batch(batch, self.stream.position - 1, dense_now=dense_now),
            accept=self.guard.accept,
            max_gradient_norm=config.optimizer.max_gradient_norm,
            # Gradients are the mean over processes, and each of a group has its part of a sample's.
            backward=lambda loss: self.accelerator.backward(loss * config.context_parallel),
            mean=lambda loss: mean_of(self.accelerator, loss),
        )
        if report.taken and self.state.average is not None:
            self.state.average.step(self.parameters.values())
        self._note(step, report, rate, kept, batch, time.perf_counter() - started)

    def _read(self) -> dict[str, Any]:
        """The next batch that every process can read."""
        for _ in range(self.config.faults.max_skipped):
            batch, problem = read_batch(self.stream)
            if problem:
                self.log.warn(problem)
            if not any_of(self.accelerator, batch is None)[0]:
                return batch
        raise TrainingError(
            f"{self.config.faults.max_skipped} batches in a row could not be read; check the data: "
            "LatentDataset(folder, verify=True) names what is damaged"
        )

    def _note(
        self, step: int, report: StepReport, rate: float, kept: float | None, batch: dict[str, Any], seconds: float
    ) -> None:
        grid = token_grid(self.transformer, batch["latents"].shape)
        tokens = grid.num_tokens * self.config.batch_size / seconds
        peak = peak_flops(self.accelerator.device)
        used = None
        if peak is not None:
            still_dense = kept is None and self.config.sparsity.annealing is not None
            flops = sample_flops(self.transformer, grid, dense=still_dense)
            used = flops * self.config.batch_size / (seconds * peak * self.accelerator.num_processes)
        self.log.note(
            step,
            {
                "loss": report.loss,
                "gradient_norm": report.gradient_norm,
                "learning_rate": rate,
                "skipped": None if report.taken else 1,
                "kept": kept,
                "seconds": seconds,
                "tokens_per_second": tokens,
                "mfu": used,
            },
        )
        utilization = "" if used is None else f", MFU {used:.0%}"
        self.log.show(step, f"loss {report.loss:.4f}, {tokens:,.0f} tokens/s{utilization}")

    def _evaluate(self) -> None:
        with self.log.doing("held-out loss"):
            self.evaluation = self.held_out.evaluate(self.transformer)
        self.evaluated_at = self.step
        self.log.note(self.step, self.evaluation.figures())
        self.log.say(f"step {self.step}: held-out {self.evaluation}")
        annealing = self.config.sparsity.annealing
        if self.evaluation.layers and not (annealing and self.step <= annealing.dense_steps):
            warning = self.alarm.warning(self.evaluation)
            if warning:
                self.log.warn(warning)

    def _sample(self) -> None:
        """A video from the first held-out sample's caption and noise, sparse on the right of dense; without sound."""
        _, noise, text, _ = self.held_out.sample(0)

        def predicted(noisy: Streams, sigmas: Streams) -> Streams:
            with self.accelerator.autocast():
                return velocities(self.transformer, noisy, sigmas, text)

        steps = self.config.evaluation.sampling_steps
        with self.log.doing("sample"):
            latents = dense_and_sparse(self.transformer, predicted, noise, shifts=self.shifts, steps=steps)
        if self.accelerator.is_main_process:
            device, fps = self.accelerator.device, self.data_settings["fps"]
            try:
                how = {"family": family_of(self.transformer).name, "pipeline": self._pipeline(), "device": device}
                videos = [visible(x, self.data_settings["space"], **how) for x in latents]
                with self.config.output_folder().writing(sample_file(self.step)) as aside:
                    write_samples(aside, videos, fps=fps)
            except OSError as error:
                self.log.warn(f"no sample was written: {error}")

    def _pipeline(self) -> str | None:
        """The folder or hub name of the pipeline that the data was made with, or that training started from."""
        return self.data_settings.get("model") or self.config.model.path

    def _build_teacher(self) -> nn.Module | None:
        """A frozen dense copy of what training starts from, where the objective asks for one."""
        objective = self.config.objective
        if not objective.distillation or objective.teacher != "copy":
            return None
        torch.manual_seed(self.config.seed)
        empty = starts_empty(self.accelerator, self.config)
        teacher = load_transformer(self.config.model, empty=empty).requires_grad_(False).eval()
        return place(teacher, self.accelerator, self.config, trained=False)

    def _no_text(self, data: LatentDataset) -> dict[str, Tensor]:
        """The text tensors of the empty caption, where the teacher needs them."""
        if self.config.objective.guidance_scale is None:
            return {}
        found = data.empty_prompt()
        if not found:
            raise ValueError(
                "objective.guidance_scale needs data with text and the empty caption, as precompute writes"
            )
        return found

    def _save_on_the_way(self) -> None:
        """Save a checkpoint before the end. The run continues if that fails."""
        if self.step == self.config.steps:
            return
        try:
            self._save()
        except CheckpointError as error:
            self.log.warn(f"{error}; training goes on and tries again in {self.config.checkpoint.every} steps")

    def _save(self) -> None:
        loss = self.evaluation.sparse if self.evaluated_at == self.step else None
        with self.log.doing("checkpoint"):
            self.state.save(self.store, self.step, config=self.config.to_dict(), held_out_loss=loss)
        self.saved_at = self.step

    def _export(self) -> Path:
        from safetensors import SafetensorError

        try:
            with self.log.doing("export"):
                return export(self.config, self._checkpoint(self.step), report=self.log.warn)
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"the export to {self.config.output} failed ({error}); "
                "the checkpoint is whole: the same run with resume exports it"
            ) from error

    def _checkpoint(self, step: int) -> Checkpoint:
        """One that is known to be whole."""
        folder = self.store.folder / f"step-{step:08d}"
        return Checkpoint(folder, json.loads((folder / MANIFEST).read_bytes()))

    def _resume(self) -> None:
        from accelerate.utils import broadcast_object_list

        # One process checks the files, and all take the same one.
        found = [None]
        if self.accelerator.is_main_process:
            latest = self.store.latest()
            found = [None if latest is None else latest.step]
        broadcast_object_list(found)
        if found[0] is None:
            if self.store.exists():
                raise CheckpointError(f"no checkpoint in {self.store.folder} is whole; nothing to resume from")
            self.log.say(f"no checkpoint in {self.store.folder} yet: starting at step 0")
            return
        checkpoint = self._checkpoint(found[0])
        self.log.say(f"resuming at step {checkpoint.step}")
        for line in differences(checkpoint.state["config"], self.config.to_dict()):
            if line.split(":")[0] not in ("resume", "output"):
                self.log.say(f"  changed since: {line}")
        with self.log.before_steps("read the checkpoint"):
            self.state.restore(checkpoint, self.log.say)
        self.step = self.saved_at = checkpoint.step
