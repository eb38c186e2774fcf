"""Loss and accuracy of image classifiers, and the original's progress lines."""

from __future__ import annotations

import collections
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from tqdm import tqdm

from engine.metrics import step_sums

T = TypeVar("T")


class Statistics(NamedTuple):
    """Mean loss, and accuracies in percent."""

    loss: float
    acc1: float
    acc5: float

    @classmethod
    def from_sums(cls, sums: Sequence[float]) -> Statistics:
        """From sums of what `batch_sums` returns."""
        loss, correct1, correct5, samples, *_ = sums
        count = max(samples, 1.0)
        return cls(loss / count, 100 * correct1 / count, 100 * correct5 / count)

    def __str__(self) -> str:
        return f" * Acc@1 {self.acc1:.3f} Acc@5 {self.acc5:.3f} Loss {self.loss:.3f}"


@torch.no_grad()
def batch_sums(
    logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """`step_sums` of [loss sum, correct at 1, correct at 5, samples], without a synchronisation.

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
    return step_sums(loss.sum(), hits[:, 0].sum(), hits.sum(), (weights > 0).sum())


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
        self.time = self.time_sum = self.data = self.data_sum = 0.0  # seconds
        self.count = 0
        # The steps under way on a GPU, of which there are at most two. Otherwise the time that a
        # full queue keeps the loop waiting would be counted as "Data".
        self.on_gpu = accelerator.device.type == "cuda"
        self.under_way: collections.deque[torch.cuda.Event] = collections.deque()

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
                self.data = time.perf_counter() - self.end
                self.data_sum += self.data
                yield step, batch

    def tick(self, step: int) -> bool:
        """Count the time of `step`, now done; True when its line is due."""
        if self.on_gpu:
            self.under_way.append(torch.cuda.Event(blocking=True))
            self.under_way[-1].record()
            if len(self.under_way) > 2:
                self.under_way.popleft().synchronize()
        now = time.perf_counter()
        self.time = now - self.end
        self.time_sum += self.time
        self.count += 1
        self.end = now
        self.bar.update()
        return step % self.print_freq == 0

    def rate(self) -> float:
        """Images per second since `steps` began."""
        return self.count * self.batch_size / max(self.time_sum, 1e-9)

    def display(self, step: int, last: Statistics, total: Statistics) -> None:
        """Print the line of `step`: its own figures, and in parentheses those of the epoch."""
        if not self.main:
            return
        width, n = len(str(self.total)), max(self.count, 1)
        entries = [
            f"{self.prefix}[{step + 1:{width}d}/{self.total}]",
            f"Time {self.time:6.3f} ({self.time_sum / n:6.3f})",
            f"Data {self.data:6.3f} ({self.data_sum / n:6.3f})",
            f"Loss {last.loss:.4e} ({total.loss:.4e})",
            f"Acc@1 {last.acc1:6.2f} ({total.acc1:6.2f})",
            f"Acc@5 {last.acc5:6.2f} ({total.acc5:6.2f})",
        ]
        if not self.show_data:
            del entries[2]
        self.bar.set_postfix_str(
            f"loss {total.loss:.3f}, acc@1 {total.acc1:.2f}, {self.rate():.0f} images/s"
        )
        tqdm.write("\t".join(entries), file=sys.stdout)
