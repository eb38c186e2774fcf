"""What a run reports: sums kept on the device, the original's progress lines, TensorBoard."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from runtime import UserError

T = TypeVar("T")


class Statistics(NamedTuple):
    """Mean loss, and accuracies in percent, over `samples`."""

    loss: float
    acc1: float
    acc5: float
    samples: int

    @classmethod
    def from_sums(cls, sums: Iterable[float]) -> Statistics:
        loss, correct1, correct5, samples = sums
        count = max(samples, 1.0)
        return cls(loss / count, 100 * correct1 / count, 100 * correct5 / count, int(samples))


@torch.no_grad()
def batch_sums(
    logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """[loss sum, correct at 1, correct at 5, samples], on the device, without a synchronisation.

    Args:
        logits: [batch, classes].
        targets: [batch], class indices.
        losses: [batch].
        weights: [batch], 1 for a sample that counts and 0 for padding.
    """
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (top == targets[:, None]) * (weights > 0)[:, None]
    # Padding may be anything: it must not even turn a sum into NaN.
    loss = torch.where(weights > 0, losses, 0)
    sums = torch.stack([loss.sum(), hits[:, 0].sum(), hits.sum(), (weights > 0).sum()])
    return sums.to(torch.float32 if sums.device.type == "mps" else torch.float64)


class RunningSums:
    """Sums of an epoch so far, on the device; reading them is the only synchronisation.

    Args:
        carried: per process [loss sum, correct at 1, correct at 5, samples], what `carry`
            returned in the run that this one continues.
    """

    def __init__(self, accelerator: Accelerator, carried: list[list[float]] | None = None) -> None:
        self.accelerator = accelerator
        self.total = torch.zeros(4, device=accelerator.device, dtype=torch.float64)
        if accelerator.device.type == "mps":
            self.total = self.total.float()
        if carried is not None:
            rows = torch.tensor(carried, dtype=self.total.dtype)
            if len(rows) == accelerator.num_processes:
                self.total += rows[accelerator.process_index].to(self.total.device)
            elif accelerator.is_main_process:
                self.total += rows.sum(0).to(self.total.device)
        self.last = torch.zeros_like(self.total)
        self.bad_step = torch.full_like(self.total[0], -1)

    def update(self, sums: torch.Tensor, step: int) -> None:
        """Add what `batch_sums` returned for this process's slice of global batch `step`."""
        self.last = sums
        self.total = self.total + sums
        is_new = (self.bad_step < 0) & ~sums[0].isfinite()
        self.bad_step = torch.where(is_new, step, self.bad_step)

    def read(self, refuse_nan: bool = True) -> tuple[Statistics, Statistics]:
        """Statistics of the last global batch and of the epoch so far, over all processes.

        Raises:
            FloatingPointError: with the first step whose loss was not finite as its argument,
                if `refuse_nan`.
        """
        mine = torch.cat([self.last, self.total, self.bad_step[None]])
        rows = self.accelerator.gather(mine[None]).cpu()
        bad = [int(step) for step in rows[:, 8].tolist() if step >= 0]
        if bad and refuse_nan:
            raise FloatingPointError(min(bad))
        sums = rows.sum(0).tolist()
        return Statistics.from_sums(sums[:4]), Statistics.from_sums(sums[4:8])

    def carry(self) -> list[list[float]]:
        """The sums of every process, for the checkpoint of an unfinished epoch."""
        rows: list[list[float]] = self.accelerator.gather(self.total[None]).tolist()
        return rows


class LossSums:
    """Sums of losses on the device; reading them is the only synchronisation.

    Args:
        carried: what `carry` returned in the run that this one continues.
    """

    def __init__(self, accelerator: Accelerator, carried: list[list[float]] | None) -> None:
        self.accelerator = accelerator
        kind = torch.float32 if accelerator.device.type == "mps" else torch.float64
        # Of this process's columns: since the last line, and over the epoch times rows.
        self.total = torch.zeros(2, device=accelerator.device, dtype=kind)
        if carried is not None:
            rows = torch.tensor(carried, dtype=kind)
            same = len(rows) == accelerator.num_processes
            self.total += rows[accelerator.process_index] if same else rows.mean(0)
        self.bad_step = torch.full_like(self.total[0], -1)

    def update(self, loss: torch.Tensor, rows: int, step: int) -> None:
        """Add the mean loss of a segment of so many rows."""
        loss = loss.detach().to(self.total.dtype)
        self.total += torch.stack([loss, rows * loss])
        is_new = (self.bad_step < 0) & ~loss.isfinite()
        self.bad_step = torch.where(is_new, step, self.bad_step)

    def read(self) -> tuple[float, float]:
        """Both sums, of the mean over all columns.

        Raises:
            FloatingPointError: with the first step whose loss was not finite as its argument.
        """
        mine = torch.cat([self.total, self.bad_step[None]])
        rows = self.accelerator.gather(mine[None]).cpu()
        bad = [int(step) for step in rows[:, 2].tolist() if step >= 0]
        if bad:
            raise FloatingPointError(min(bad))
        interval, epoch, _ = rows.mean(0).tolist()
        return interval, epoch

    def begin_interval(self) -> None:
        self.total[0].zero_()

    def carry(self) -> list[list[float]]:
        """The sums of every process, for the checkpoint of an unfinished epoch."""
        rows: list[list[float]] = self.accelerator.gather(self.total[None]).tolist()
        return rows


def refuse_overflow(model: nn.Module, sums: RunningSums | LossSums | None, steps: int) -> None:
    """Raise FloatingPointError before weights are saved that are not finite after `steps` steps.

    A step whose update overflows has itself still a finite loss.
    """
    if sums is not None:
        sums.read()
    if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
        raise FloatingPointError(steps - 1)


class Meter:
    """The latest value of something and its mean, as the original prints them."""

    def __init__(self, name: str, style: str) -> None:
        self.name, self.style = name, style
        self.latest = self.sum = 0.0
        self.count = 0

    def update(self, latest: float) -> None:
        self.latest = latest
        self.sum += latest
        self.count += 1

    def __str__(self) -> str:
        return self.show(self.latest, self.sum / max(self.count, 1))

    def show(self, latest: float, average: float) -> str:
        return f"{self.name} {latest:{self.style}} ({average:{self.style}})"


class Progress:
    """The original's line every `print_freq` steps, and a tqdm bar when on a terminal.

    Iterate over `steps(batches)` and call `tick` at the end of the loop's body: what lies between
    is "Time", what the loop waits for its batch is "Data".
    """

    def __init__(
        self,
        accelerator: Accelerator,
        prefix: str,
        total: int,
        print_freq: int,
        *,
        batch_size: int,
        start: int = 0,
        show_data: bool = True,
    ) -> None:
        self.main = accelerator.is_main_process
        self.prefix, self.total, self.print_freq = prefix, total, print_freq
        self.batch_size, self.start, self.show_data = batch_size, start, show_data
        self.batch_time, self.data_time = Meter("Time", "6.3f"), Meter("Data", "6.3f")

    def steps(self, batches: Iterable[T]) -> Iterator[tuple[int, T]]:
        """Yield (step, batch), counting from `start`."""
        self.bar = tqdm(
            total=self.total,
            initial=self.start,
            desc=self.prefix.strip(": "),
            leave=False,
            disable=None if self.main else True,
        )
        with self.bar:
            self.end = time.perf_counter()
            for step, batch in enumerate(batches, self.start):
                self.data_time.update(time.perf_counter() - self.end)
                yield step, batch

    def tick(self, step: int) -> bool:
        """Count the time of `step`, now done; True when its line is due."""
        now = time.perf_counter()
        self.batch_time.update(now - self.end)
        self.end = now
        self.bar.update()
        return step % self.print_freq == 0

    def rate(self) -> float:
        """Images per second since `steps` began."""
        return self.batch_time.count * self.batch_size / max(self.batch_time.sum, 1e-9)

    def display(self, step: int, last: Statistics, total: Statistics) -> None:
        if not self.main:
            return
        width = len(str(self.total))
        entries = [
            f"{self.prefix}[{step + 1:{width}d}/{self.total}]",
            str(self.batch_time),
            *([str(self.data_time)] if self.show_data else []),
            Meter("Loss", ".4e").show(last.loss, total.loss),
            Meter("Acc@1", "6.2f").show(last.acc1, total.acc1),
            Meter("Acc@5", "6.2f").show(last.acc5, total.acc5),
        ]
        self.bar.set_postfix_str(
            f"loss {total.loss:.3f}, acc@1 {total.acc1:.2f}, {self.rate():.0f} images/s"
        )
        tqdm.write("\t".join(entries), file=sys.stdout)


def _refuse_to_repeat(problem: threading.ExceptHookArgs) -> None:
    """A full disk is met by TensorBoard's own thread first, and then raised where it is used."""
    if not isinstance(problem.exc_value, OSError):
        threading.__excepthook__(problem)


class Curves:
    """TensorBoard scalars of the main process, one point an epoch.

    Args:
        first_epoch: points of this epoch and later ones, left by an earlier run or by a killed
            one, are replaced.
    """

    def __init__(self, accelerator: Accelerator, log_dir: Path, first_epoch: int) -> None:
        self.writer, self.log_dir = None, log_dir
        if accelerator.is_main_process:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and rank 0's alone

            threading.excepthook = _refuse_to_repeat
            try:
                self.writer = SummaryWriter(str(log_dir), purge_step=first_epoch)
            except OSError as error:
                raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write to {self.log_dir}: {error.strerror or error}; choose another with "
            "--log-dir"
        )

    def add(self, epoch: int, scalars: dict[str, float]) -> None:
        if self.writer is None:
            return
        try:
            for tag, scalar in scalars.items():
                self.writer.add_scalar(tag, scalar, epoch)
            self.writer.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
