"""What a run counts and reports: sums kept on the device, TensorBoard's curves."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from engine.cli import UserError
from engine.files import unwritable

Means = dict[str, float]  # by the metrics' names


def diverged(epoch: int, step: int) -> UserError:
    return UserError(
        f"the loss is not finite in epoch {epoch} at step {step}: lower --lr; the last "
        "checkpoint is from before"
    )


def sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def step_sums(loss: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """What a step adds to `Sums`, in one kernel.

    Args:
        loss: the sum of the samples' losses.
        others: the sums of the other metrics, in the order of their names, and the number of
            samples.

    Returns:
        [1 if the loss is finite, else 0; loss; *others]
    """
    return torch.stack([loss.isfinite(), loss, *others]).to(sum_dtype(loss.device))


def sum_of_parts(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sums of a step from those of its parts; the loss is finite where all of theirs are."""
    if len(parts) == 1:
        return parts[0]
    rows = torch.stack([*parts])
    return torch.cat([rows[:, :1].amin(0), rows[:, 1:].sum(0)])


class Sums:
    """Sums of an epoch over its samples, on the device; reading them is the only synchronisation.

    `update` is one kernel of a GPU, and `step_sums` can be part of the graph of a step.

    Args:
        metrics: their names, the loss first.
        epoch: its number in printed lines.
        carried: what `carry` returned in the run that this one continues.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        metrics: Sequence[str],
        epoch: int = 0,
        carried: Sequence[Sequence[float]] | None = None,
    ) -> None:
        self.accelerator, self.metrics, self.epoch = accelerator, metrics, epoch
        self.first, self.steps = 0, 0  # the first update's step, and the number of updates
        kind = sum_dtype(accelerator.device)
        self.total = torch.zeros(len(metrics) + 2, device=accelerator.device, dtype=kind)
        if carried is not None:
            rows = torch.tensor(carried, dtype=kind, device=accelerator.device)
            if len(rows) == accelerator.num_processes:
                self.total[1:] += rows[accelerator.process_index]
            elif accelerator.is_main_process:
                self.total[1:] += rows.sum(0)
        self.marked = self.total

    def mark(self) -> None:
        """Let the first mean that `read` returns begin here."""
        self.marked = self.total

    def update(self, values: torch.Tensor, step: int) -> None:
        """Add this process's `values` of `step`, from `step_sums`."""
        self.first = step - self.steps
        self.steps += 1
        self.total = self.total + values

    def read(self, refuse_nan: bool = True) -> tuple[Means, Means]:
        """The means since `mark` and those of the epoch so far, over all processes.

        Raises:
            UserError: a step whose loss was not finite, if `refuse_nan`.
        """
        both = torch.stack([self.total - self.marked, self.total])
        rows = self.accelerator.gather(both[None]).cpu()
        # A loss that is not finite makes the weights NaN, and with them all later losses. So the
        # number of finite ones tells the step (a later one, if fp16's loss scale skips updates).
        finite = int(rows[:, 1, 0].min())
        if finite < self.steps and refuse_nan:
            raise diverged(self.epoch, self.first + finite)
        since, total = rows.sum(0)
        return self.means(since), self.means(total)

    def means(self, sums: torch.Tensor) -> Means:
        """The mean of each metric, from sums as `step_sums` has them."""
        _, *values, count = sums.tolist()
        return {
            name: value / max(count, 1.0) for name, value in zip(self.metrics, values, strict=True)
        }

    def carry(self) -> list[list[float]]:
        """The sums of every process, for the checkpoint of an unfinished epoch."""
        rows: list[list[float]] = self.accelerator.gather(self.total[None, 1:]).tolist()
        return rows


def _keep_quiet_about_disks(problem: threading.ExceptHookArgs) -> None:
    """TensorBoard's own thread meets a full disk first; `Curves` raises it for the run."""
    if not isinstance(problem.exc_value, OSError):
        threading.__excepthook__(problem)


def has_points(log_dir: Path) -> bool:
    """Whether a run has drawn the end of an epoch in `log_dir`."""
    return any(b"Loss/val" in file.read_bytes() for file in log_dir.glob("events.out.tfevents.*"))


class Curves:
    """TensorBoard scalars of the main process, one point an epoch.

    Args:
        first_epoch: points of this epoch and later ones, left by an earlier run or by a killed
            one, are replaced.
    """

    def __init__(self, accelerator: Accelerator, log_dir: Path, first_epoch: int) -> None:
        self.writer, self.log_dir = None, log_dir
        if accelerator.is_main_process:
            # Slow to import, and only the main process needs it.
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _keep_quiet_about_disks
            try:
                self.writer = SummaryWriter(str(log_dir), purge_step=first_epoch)
            except (OSError, UnicodeError) as error:  # TensorBoard wants UTF-8
                raise unwritable(log_dir, error, "--log-dir") from error

    def add(self, epoch: int, scalars: Mapping[str, float]) -> None:
        if self.writer is None:
            return
        try:
            for tag, scalar in scalars.items():
                self.writer.add_scalar(tag, scalar, epoch)
            self.writer.flush()
        except OSError as error:
            raise unwritable(self.log_dir, error, "--log-dir") from error
