"""One run of a training: where it is, and how it is resumed, saved, stopped and reported.

A job trains inside `Run.training` and tells the run of every step and every epoch:

    model, optimizer = run.prepare(model, optimizer)
    with run.training(contents):
        for epoch in run.epochs(args.epochs):
            ...                             # run.begin_epoch, and run.end_of_step after each step
            run.end_of_epoch({"Loss/train": ..., "Loss/val": ...}, is_best)
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from engine.checkpoints import Checkpoint, Writer
from engine.cli import UserError
from engine.exits import Stopped
from engine.metrics import Curves, Sums, diverged
from engine.preemption import Preemption
from engine.streams import fall_back_to_stderr


@dataclasses.dataclass
class Run:
    """Where a training is: with weights and optimizer, all that its checkpoint holds."""

    accelerator: Accelerator
    latest: Path  # where the state of the run is saved
    best: Path  # where the best epoch is kept as well
    log_dir: Path  # of TensorBoard
    values: dict[str, Any]  # what only the job keeps: plain values, under its checkpoint's keys
    width: int  # number of sums
    average: bool = False  # see `Sums`
    first_epoch: int = 0  # how the job numbers its first epoch, in lines and curves
    checkpoint_every: int = 0  # steps within an epoch; 0 for its end only
    epoch: int = 0  # epochs that are done, and so the number, from 0, of the one under way
    step: int = 0  # steps that are done in it
    sums: Sums | None = None  # of the epoch under way
    graphed: bool = False  # whether its steps are replayed as CUDA graphs
    stopped: Stopped | None = None  # what ended the training before its last epoch
    resumed: Path | None = None  # the checkpoint that the run goes on from
    carried: list[list[float]] | None = None  # sums of its unfinished epoch
    writer: Writer | None = None  # within `training`

    def __post_init__(self) -> None:
        self.preemption = Preemption(self.accelerator)

    @property
    def number(self) -> int:
        """The epoch under way as lines and curves number it."""
        return self.epoch + self.first_epoch

    def resume(
        self,
        checkpoint: Checkpoint,
        optimizer: torch.optim.Optimizer,
        steps: int,
        batches: Mapping[str, Any],
    ) -> None:
        """Take up the run that `checkpoint` holds; one that holds only weights starts anew.

        Args:
            steps: of an epoch.
            batches: what the batches of an epoch depend on, under the checkpoint's keys.

        Raises:
            UserError: damaged values, or a checkpoint within an epoch of other batches.
        """
        for name in ("epoch", "step"):
            number = checkpoint.value(name, int)
            setattr(self, name, getattr(self, name) if number is None else number)
        for name, value in batches.items() if self.step else ():
            if checkpoint.get(name) != value:
                raise checkpoint.error(
                    f"lies within an epoch of {name} {checkpoint.get(name)}, and this run has "
                    f"{value}: resume it as it was, or from the end of an epoch"
                )
        if self.epoch < 0 or not 0 <= self.step <= steps:
            raise checkpoint.error(f"epoch {self.epoch}, step {self.step} of {steps}: damaged")
        self.carried = checkpoint.sums(self.width)
        checkpoint.load_optimizer(optimizer)
        self.resumed = checkpoint.path
        self.accelerator.print(
            f"=> loaded checkpoint '{self.resumed}' (epoch {self.epoch}, step {self.step})"
        )

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """`Accelerator.prepare`; what it returns is what `save` saves."""
        with warnings.catch_warnings():
            # Torch 2.15 has another name for it, which 2.11 and Accelerate do not know.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        return self.model, self.optimizer

    @contextlib.contextmanager
    def training(self, contents: Callable[[], dict[str, Any]]) -> Iterator[None]:
        """Within it the run is saved, and a signal stops it after a step.

        Args:
            contents: what the job adds to a checkpoint; every process calls it.
        """
        self.contents = contents
        if self.resumed is None and self.latest.exists():
            self.accelerator.print(
                f"=> {self.latest} and {self.best} of an earlier run will be replaced at the first "
                "epoch's end; --resume would continue it"
            )
        self.curves = Curves(self.accelerator, self.log_dir, self.number)
        try:
            with Writer(self.latest, self.resumed) as self.writer, self.preemption.deferred():
                yield
        finally:
            self.writer = None

    def is_done(self, count: int) -> bool:
        """Whether no epoch is left of `count`, which is said."""
        if self.epoch >= count:
            self.accelerator.print(f"=> {self.epoch} epochs are done: raise --epochs to go on")
        return self.epoch >= count

    def epochs(self, count: int) -> Iterator[int]:
        """The epochs that are left of `count`; each ends with `end_of_epoch`."""
        while self.epoch < count:
            yield self.epoch

    def set_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):  # which a CUDA graph reads
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def begin_epoch(self, steps: int) -> Sums:
        """The sums of an epoch of `steps`: empty, or as they were where the epoch is taken up."""
        self.steps = steps
        self.sums = Sums(self.accelerator, self.width, self.average, self.number, self.carried)
        self.carried = None
        return self.sums

    def end_of_step(self, step: int) -> None:
        """Count `step` as done, save if that is due, and stop if a signal came."""
        self.step = step + 1
        is_due = self.checkpoint_every and self.step % self.checkpoint_every == 0
        if is_due and self.step < self.steps:  # the epoch's end has a checkpoint of its own
            self.save()
        self.check()

    def check(self) -> None:
        """Where a run can end: all processes call this after every step, of validation too.

        Raises:
            Stopped: when a signal came to any of them, in training once a checkpoint is on the
                disk. After that `check` does nothing, so that a command can test its best model.
        """
        if self.writer is not None:
            self.writer.check()
        if self.stopped is not None:
            return
        try:
            self.preemption.check()
        except Stopped as stopped:
            self.stopped = stopped
            fall_back_to_stderr()
            if self.writer is not None:
                self.save()
                self.writer.wait()
                # The first process to leave makes the launcher end the others.
                self.accelerator.wait_for_everyone()
                self.accelerator.print(
                    f"=> epoch {self.epoch}, step {self.step}: saved to {self.latest}"
                )
            raise

    def end_of_training_steps(self) -> list[float]:
        """The sums of the whole epoch; raises `UserError` when loss or weights are not finite."""
        assert self.sums is not None
        self._refuse_overflow()
        if self.accelerator.num_processes > 1:
            # DistributedDataParallel gives every process the main one's running statistics before
            # a training step, not after the last one.
            for buffer in self.accelerator.unwrap_model(self.model).buffers():
                buffer.copy_(broadcast(buffer))
        return self.sums.read()[1]

    def _refuse_overflow(self) -> None:
        """Raise `UserError` before weights are saved that are not finite.

        If an update overflows, the loss of that same step is still finite.
        """
        if self.sums is not None:
            self.sums.read()
        finite = [parameter.isfinite().all() for parameter in self.model.parameters()]
        if not torch.stack(finite).all():
            raise diverged(self.number, self.step - 1)

    def end_of_epoch(self, scalars: Mapping[str, float], is_best: bool) -> None:
        """Report the epoch, which is then done, and save the run, also as the best one so far.

        Args:
            scalars: TensorBoard's tags and the epoch's figures, `Loss/val` among them.

        Raises:
            UserError: when the validation loss is not finite; nothing is saved.
        """
        if not math.isfinite(scalars["Loss/val"]):
            raise UserError(
                f"the validation loss is not finite after epoch {self.number}: lower --lr; "
                f"{self.latest} is from before"
            )
        # Points come before the checkpoint: a run that is killed in between draws them once more,
        # and TensorBoard shows the later ones.
        self.curves.add(self.number, scalars)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, None
        self.save(*([self.best] if is_best else []))

    def save(self, *copies: Path) -> None:
        """Write a checkpoint; every process calls this, the main one writes."""
        assert self.writer is not None
        self._refuse_overflow()
        sums = self.sums.carry() if self.sums is not None else None
        contents = {**self.values, **self.contents()}
        if self.accelerator.is_main_process:
            optimizer = self.optimizer.state_dict()
            for group in optimizer["param_groups"]:
                group["lr"] = float(group["lr"])
            self.writer.save(
                {
                    **contents,
                    "epoch": self.epoch,
                    "step": self.step,
                    "sums": sums,
                    "state_dict": self.accelerator.unwrap_model(self.model).state_dict(),
                    "optimizer": optimizer,
                },
                *copies,
            )
