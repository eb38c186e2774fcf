"""One run of a training: where it is, and how it is resumed, saved, stopped and reported.

A job trains inside `Run.training` and tells the run of every step and every epoch:

    model, optimizer = run.prepare(model, optimizer)
    with run.training(contents):
        for epoch in run.epochs(args.epochs):
            ...                             # run.begin_epoch, and run.end_of_step after each step
            run.end_of_epoch({"Loss/train": ..., "Loss/val": ...}, figure)
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import nn

from engine.checkpoints import OWN_OPTIONS, Checkpoint, Writer, load, newest_whole, previous_of
from engine.cli import UserError, fall_back_to_stderr
from engine.files import (
    Named,
    check_outputs,
    lock,
    same_place,
    unwritable,
    whole_or_absent,
    writing,
)
from engine.launch import ANSWER_WITHIN, set_patience
from engine.metrics import Curves, Means, Sums, diverged, has_points
from engine.seeds import seed_generators
from engine.stop import Preemption, Stopped

# Seconds that a restart waits for the lock: the old run may still be saving.
PATIENCE = 30.0


@dataclasses.dataclass
class Run:
    """A training's place, settings and progress: all of its state but weights and optimizer."""

    accelerator: Accelerator
    latest: Path  # the latest checkpoint
    best: Path  # the checkpoint of the best epoch, in the same folder
    log_dir: Path  # of TensorBoard
    flag: str  # the one that chooses `latest` and `best`
    metrics: Sequence[str]  # what a training step sums, the loss first
    figure: str  # the checkpoint's key for the figure that ranks epochs
    best_figure: float  # starts at a value that any epoch beats
    first_epoch: int = 0  # the number of the first epoch in lines and curves
    checkpoint_every: int = 0  # steps within an epoch; 0 for its end only
    epoch: int = 0  # epochs that are done; also the index of the one under way
    step: int = 0  # steps of that epoch that are done
    batches: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # see `resume`
    changed: Sequence[str] = ()  # flags whose values differ from the checkpoint
    measured_on: str = ""  # identifies the data behind the best figure
    state: dict[str, Any] = dataclasses.field(default_factory=dict)  # the job's own
    sums: Sums | None = None  # of the epoch under way
    graphed: bool = False  # whether its steps are replayed as CUDA graphs
    stopped: Stopped | None = None  # the signal that ended the training early
    resumed: Path | None = None  # the checkpoint that the run goes on from
    theirs: Path = Path()  # the best epoch of the run that wrote `resumed`
    is_own: bool = False  # whether `resumed` is one of `files`
    is_best: bool = False  # whether `resumed` is itself the best epoch
    locks: Sequence[IO[str] | None] = ()  # open files, on the main process
    carried: list[list[float]] | None = None  # sums of the unfinished epoch in `resumed`
    writer: Writer | None = None  # within `training`

    def __post_init__(self) -> None:
        self.preemption = Preemption(self.accelerator)
        self.no_figure = self.best_figure
        self.files = self.latest, previous_of(self.latest), self.best
        self.owner_note = self.log_dir / ".run"  # says whose curves lie in `log_dir`

    @property
    def number(self) -> int:
        """The epoch under way as lines and curves number it."""
        return self.epoch + self.first_epoch

    def find(
        self,
        asked: Path | None,
        evaluates: bool,
        overwrite: bool = False,
        outputs: Sequence[Named] = (),
        inputs: Sequence[Named] = (),
    ) -> Path | None:
        """Check all paths of the command, keep other runs away, and find what `--resume` means.

        Args:
            asked: `--resume`.
            outputs: files that the command writes beside those of the run.
            inputs: files that it reads beside `asked`.

        Returns:
            The path asked for; for `auto` the newest whole checkpoint, or None.

        Raises:
            UserError: what `check_outputs` refuses; another run that is under way here; a fresh
                start where a run is, without `overwrite`; another run's curves; `auto` where all
                checkpoints are damaged, or where there is none to evaluate.
        """
        answer: list[Any] = [None, False]
        # The main process decides: others may see an older state of a network disk.
        if self.accelerator.is_main_process:
            try:
                self._claim(asked, evaluates, outputs, inputs)
                answer = list(self._find(asked, evaluates, overwrite))
            except UserError as error:
                answer = [error, False]
        broadcast_object_list(answer)
        if isinstance(answer[0], UserError):
            raise answer[0]
        found: Path | None = answer[0]
        self.is_own = answer[1]
        return found

    def _claim(
        self, asked: Path | None, evaluates: bool, outputs: Sequence[Named], inputs: Sequence[Named]
    ) -> None:
        is_auto = str(asked) == "auto"
        is_own = is_auto or any(same_place(asked, path) for path in self.files if asked)
        if asked and not is_auto and (evaluates or not is_own):
            inputs = [*inputs, ("--resume", asked)]
        if evaluates:
            check_outputs(outputs, inputs=inputs)
            return
        own = [(self.flag, path) for path in self.files]
        check_outputs([*own, *outputs], [("--log-dir", self.log_dir)], inputs)
        place = Path(os.path.realpath(self.latest))
        locks = {place.with_name(f".{place.name}.lock"): self.flag}
        locks[self.log_dir / ".lock"] = "--log-dir"
        patience = PATIENCE if is_auto else 0
        self.locks = [lock(path, flag, patience) for path, flag in locks.items()]
        self._refuse_curves_of_others()

    def _refuse_curves_of_others(self) -> None:
        if not (self.owner_note.is_file() and has_points(self.log_dir)):
            return
        owner = self.log_dir / os.fsdecode(self.owner_note.read_bytes())
        if owner.exists() and not same_place(owner, self.latest):
            raise UserError(
                f"--log-dir {self.log_dir} has the curves of {os.path.normpath(owner)}: choose "
                "another for this run"
            )

    def _find(
        self, asked: Path | None, evaluates: bool, overwrite: bool
    ) -> tuple[Path | None, bool]:
        if overwrite and str(asked) == "auto":
            raise UserError("--overwrite begins anew and --resume auto goes on: give one of them")
        there = [path for path in self.files if os.path.isfile(path)]  # noqa: PTH113
        if str(asked) != "auto":
            is_own = asked is not None and any(same_place(asked, path) for path in there)
            there += [self.log_dir] if has_points(self.log_dir) else []
            if there and not (is_own or evaluates or overwrite):
                flag = "--log-dir" if there[0] == self.log_dir else self.flag
                raise UserError(
                    f"{there[0]} is of an earlier run: --resume auto goes on with it, --overwrite "
                    f"replaces it, and another {flag} leaves it alone"
                )
            return asked, is_own
        if latest := [path for path in there if path != self.best] or there:
            return newest_whole(latest), True
        if evaluates:
            raise UserError(f"no checkpoint {self.latest} to evaluate: name one with --resume")
        print(f"=> no checkpoint {self.latest}: starting afresh")
        return None, False

    def resume(
        self,
        checkpoint: Checkpoint,
        optimizer: torch.optim.Optimizer,
        steps: int,
        batches: Mapping[str, Any],
        epochs: int,
    ) -> None:
        """Go on with the run in `checkpoint`; one of weights alone starts a new run.

        Args:
            checkpoint: empty for a new run.
            optimizer: as `prepare` returned it.
            steps: of an epoch.
            batches: what the batches of an epoch depend on (`trained_on` is the data); part of
                every checkpoint.
            epochs: to train in all.

        Raises:
            UserError: damaged values; a checkpoint within an epoch of other batches; changed flags
                when all epochs are done.
        """
        self.batches = batches
        if not checkpoint:
            return
        for name in ("epoch", "step"):
            number = checkpoint.value(name, int)
            setattr(self, name, getattr(self, name) if number is None else number)
        for name, value in batches.items() if self.step else ():
            if (found := checkpoint.get(name)) != value:
                pair = f"{name} {found}, and this run has {value}"
                raise checkpoint.error(
                    f"lies within an epoch of {pair if name != 'trained_on' else 'other data'}: "
                    "resume it as it was, or from the end of an epoch"
                )
        if self.epoch < 0 or not 0 <= self.step <= steps:
            raise checkpoint.error(f"epoch {self.epoch}, step {self.step} of {steps}: damaged")
        if self.changed and self.epoch >= epochs:
            raise checkpoint.error(
                f"its {self.epoch} epochs are done, and {' '.join(self.changed)} would change "
                f"nothing: raise --epochs, or begin anew (--overwrite, or another {self.flag})"
            )
        self.carried = checkpoint.sums(1 + len(self.metrics))
        checkpoint.load_optimizer(optimizer)
        checkpoint.load_scaler(self.accelerator.scaler)
        self.resumed = checkpoint.path
        best_file = checkpoint.value("best_file", str) or ""
        self.theirs = self.resumed.parent / Path(best_file).name
        self.accelerator.print(
            f"=> loaded checkpoint '{self.resumed}' (epoch {self.epoch}, step {self.step})"
        )
        best = checkpoint.value(self.figure, (int, float))
        if best is None or best == self.no_figure:
            return
        if checkpoint.get("measured_on") == self.measured_on:
            self.best_figure = best
            self.is_best = checkpoint.get("is_best") is True
        else:
            self.accelerator.print(
                f"=> its {self.figure} {best:.3f} was measured on other validation data, or at "
                "another size: this run has no best epoch yet"
            )

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """`Accelerator.prepare`, and keep what it returns for `save`."""
        set_patience(ANSWER_WITHIN)  # downloads and decoding are done
        with warnings.catch_warnings():
            # Torch 2.15 has renamed it; 2.11 and Accelerate do not know the new name.
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
        if self.accelerator.is_main_process:
            # Relative: a run can be moved together with its curves.
            owner = os.fsencode(os.path.relpath(self.latest, self.log_dir))
            try:
                with whole_or_absent(self.owner_note) as temporary:
                    temporary.write_bytes(owner)
            except OSError as error:
                raise unwritable(self.log_dir, error, "--log-dir") from error
        self.curves = Curves(self.accelerator, self.log_dir, self.number)
        try:
            with Writer(self.latest, self.resumed) as self.writer, self.preemption.deferred():
                self._carry_best()
                yield
                self.check(is_last=True)
        finally:
            self.writer = None
            # For a signal after the training: --resume auto finds the finished run.
            self.preemption.is_saved = self.latest.is_file()

    def _carry_best(self) -> None:
        """When the run goes on from another place, take its best epoch along."""
        if self.resumed is None or self.is_own:
            return
        if self.is_best:
            self.save(self.best)
        elif not self.accelerator.is_main_process:
            return
        elif self.has_best and self.holds_best(self.theirs):
            with writing(self.best) as temporary:
                shutil.copyfile(self.theirs, temporary)
        else:
            self.best.unlink(missing_ok=True)  # another run's, which --overwrite replaces
            if self.has_best:
                print(
                    f"=> {self.resumed} is without its best epoch: {self.best} takes a better one"
                )

    @property
    def has_best(self) -> bool:
        """Whether an epoch has ended whose figure is of this run's data."""
        return self.best_figure != self.no_figure

    def holds_best(self, path: Path) -> bool:
        """Whether the file at `path` is the best epoch of this run."""
        try:
            found = load(path)
        except UserError:
            return False
        wanted = {self.figure: self.best_figure, "measured_on": self.measured_on}
        return all(found.get(name) == value for name, value in wanted.items())

    def is_better(self, figure: float) -> bool:
        """Whether an epoch of this figure is the best so far."""
        rises = self.no_figure < 0  # an accuracy starts at -1, a loss at infinity
        return figure > self.best_figure if rises else figure < self.best_figure

    def epochs(self, count: int) -> Iterator[int]:
        """The epochs that are left of `count`; each ends with `end_of_epoch`."""
        if self.epoch >= count:
            self.accelerator.print(f"=> {self.epoch} epochs are done: raise --epochs to go on")
        while self.epoch < count:
            yield self.epoch

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the steps that follow."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):  # in place: a CUDA graph reads it
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def begin_epoch(self, steps: int) -> Sums:
        """New sums for an epoch of `steps` steps, or those of the epoch that is taken up."""
        self.steps = steps
        self.sums = Sums(self.accelerator, self.metrics, self.number, self.carried)
        self.carried = None
        return self.sums

    def seed_dropout(self, seed: int, part: int, parts: int) -> None:
        """Seed dropout and stochastic depth by (seed, epoch, step, part), whatever came before.

        A CUDA graph draws for all parts of a step from one seed, set before its replay.

        Args:
            part: its number among the `parts` of this process.
        """
        if part == 0 or not self.graphed:
            number = self.accelerator.process_index * parts + part
            seed_generators(self.accelerator.device, "dropout", seed, self.epoch, self.step, number)

    def end_of_step(self, step: int) -> None:
        """Count `step` as done, save if that is due, and stop if a signal came."""
        self.step = step + 1
        is_due = self.checkpoint_every and self.step % self.checkpoint_every == 0
        if is_due and self.step < self.steps:  # the epoch's end has a checkpoint of its own
            self.save()
        self.check()

    def check(self, is_last: bool = False) -> None:
        """Stop if a signal came; all processes call this after every step, of validation too.

        Args:
            is_last: whether no other call follows.

        Raises:
            Stopped: a signal came to any process; in training, a checkpoint is on the disk by
                then. Later calls do nothing, so that a command can test its best model.
        """
        if self.writer is not None:
            self.writer.check()
        if self.stopped is not None:
            return
        try:
            self.preemption.check(is_last)
        except Stopped as stopped:
            self.stopped = stopped
            fall_back_to_stderr()
            if self.writer is not None:
                if self.sums is not None:  # else the epoch's end has just been saved
                    self.save()
                self.writer.wait()
                # The first process to leave makes the launcher end the others.
                self.accelerator.wait_for_everyone()
                stopped.is_saved = self.latest.is_file()
                if stopped.is_saved:
                    self.accelerator.print(
                        f"=> epoch {self.epoch}, step {self.step}: saved to {self.latest}"
                    )
            raise

    def end_of_training_steps(self) -> Means:
        """The means of the whole epoch; raises `UserError` when loss or weights are not finite."""
        assert self.sums is not None
        self._refuse_overflow()
        if self.accelerator.num_processes > 1:
            # DistributedDataParallel copies the main process's running statistics to the others
            # before every training step, but not after the last one.
            for buffer in self.accelerator.unwrap_model(self.model).buffers():
                buffer.copy_(broadcast(buffer))
        return self.sums.read()[1]

    def _refuse_overflow(self) -> None:
        """Raise `UserError` for a loss or weights that are not finite, before they are saved.

        The weights count as well: a step with a finite loss can have an update that overflows.
        fp16's loss scale may skip a step, but not so many that the scale itself vanishes.
        """
        if self.sums is not None:
            self.sums.read()
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() < torch.finfo(torch.float16).tiny:
            raise UserError(
                f"the gradients are not finite in fp16 at any loss scale, in epoch {self.number}: "
                "lower --lr, or launch with --mixed_precision no; the last checkpoint is from "
                "before"
            )
        finite = [parameter.isfinite().all() for parameter in self.model.parameters()]
        if not torch.stack(finite).all():
            raise diverged(self.number, self.step - 1)

    def end_of_epoch(self, scalars: Mapping[str, float], figure: float) -> None:
        """Draw the curves, count the epoch as done, and save the run, also as the best one so far.

        Args:
            scalars: TensorBoard's tags and the epoch's figures, `Loss/val` among them.
            figure: ranks the epoch.

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
        is_best = self.is_better(figure)
        if is_best:
            self.best_figure = figure
        self.save(*([self.best] if is_best else []))

    def save(self, *copies: Path) -> None:
        """Write a checkpoint; every process calls this, the main one writes."""
        assert self.writer is not None
        self._refuse_overflow()
        sums = self.sums.carry() if self.sums is not None else None
        contents = self.contents()
        if self.accelerator.scaler is not None:
            contents["scaler"] = self.accelerator.scaler.state_dict()
        if self.accelerator.is_main_process:
            optimizer = self.optimizer.state_dict()
            # A CUDA graph's own options are not the run's, which may go on without one.
            usual = {k: v for k, v in self.optimizer.defaults.items() if k in OWN_OPTIONS}
            for group in optimizer["param_groups"]:
                group.update(usual, lr=float(group["lr"]))
            self.writer.save(
                {
                    **contents,
                    **self.batches,
                    "epoch": self.epoch,
                    "step": self.step,
                    "sums": sums,
                    self.figure: self.best_figure,
                    "measured_on": self.measured_on,
                    "is_best": bool(copies),
                    "best_file": self.best.name,
                    "state_dict": self.accelerator.unwrap_model(self.model).state_dict(),
                    "optimizer": optimizer,
                },
                *copies,
            )
