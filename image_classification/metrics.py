"""Loss and accuracy of image classifiers, and the original's progress lines."""

from __future__ import annotations

import collections
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from accelerate import Accelerator
from tqdm import tqdm

from engine.metrics import Means, step_sums

T = TypeVar("T")

# What is measured, as TensorBoard and the lines call it, with its format in a line. `batch_sums`
# sums them in this order. Accuracies are in percent.
METRICS = {"Loss": ".4e", "Acc@1": "6.2f", "Acc@5": "6.2f"}


@torch.no_grad()
def batch_sums(
    logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """`step_sums` of METRICS and the number of samples, without a synchronisation.

    Args:
        logits: [batch, classes].
        targets: [batch], class indices.
        losses: [batch].
        weights: [batch], 1 for a sample that counts and 0 for padding.
    """
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (top == targets[:, None]) * (weights > 0)[:, None]
    # Padding may be anything: it must not even turn a sum into NaN.
    loss = torch.where(weights > 0, losses, 0).sum()
    return step_sums(loss, 100 * hits[:, 0].sum(), 100 * hits.sum(), (weights > 0).sum())


def summary(means: Means) -> str:
    """The original's line at the end of an evaluation."""
    return f" * Acc@1 {means['Acc@1']:.3f} Acc@5 {means['Acc@5']:.3f} Loss {means['Loss']:.3f}"


class Progress:
    """The original's line every `print_freq` steps, and a tqdm bar when on a terminal.

    Iterate over `steps(batches)` and call `tick` at the end of the loop's body. "Time" is that of
    the whole step, "Data" what the loop waits for its batch.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        prefix: str,
        total: int,
        print_freq: int,
        *,
        start: int = 0,
        show_data: bool = True,
    ) -> None:
        self.main = accelerator.is_main_process
        self.prefix, self.total, self.print_freq = prefix, total, print_freq
        self.start, self.show_data = start, show_data
        self.time = self.time_sum = self.data = self.data_sum = 0.0  # seconds
        self.count = self.images = 0
        # The steps under way on a GPU, at most two: waiting for a full queue would count as "Data".
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
            self._wait_for_gpu(0)
            self.time_sum += time.perf_counter() - self.end

    def tick(self, step: int, images: int) -> bool:
        """Count the time of `step`, now done, and its images; True when its line is due."""
        if self.on_gpu:
            self.under_way.append(torch.cuda.Event(blocking=True))
            self.under_way[-1].record()
            self._wait_for_gpu(2)
        now = time.perf_counter()
        self.time = now - self.end
        self.time_sum += self.time
        self.count += 1
        self.images += images
        self.end = now
        self.bar.update()
        return step % self.print_freq == 0

    def _wait_for_gpu(self, most: int) -> None:
        """Wait until at most so many steps are under way."""
        while len(self.under_way) > most:
            self.under_way.popleft().synchronize()

    def rate(self) -> float | None:
        """Images per second since `steps` began; None where there was no step."""
        return self.images / max(self.time_sum, 1e-9) if self.images else None

    def display(self, step: int, last: Means, total: Means) -> None:
        """Print the line of `step`: its own figures, and in parentheses those of the epoch."""
        if not self.main:
            return
        width, n = len(str(self.total)), self.count
        entries = [
            f"{self.prefix}[{step + 1:{width}d}/{self.total}]",
            f"Time {self.time:6.3f} ({self.time_sum / n:6.3f})",
        ]
        if self.show_data:
            entries.append(f"Data {self.data:6.3f} ({self.data_sum / n:6.3f})")
        entries += [f"{name} {last[name]:{f}} ({total[name]:{f}})" for name, f in METRICS.items()]
        self.bar.set_postfix_str(
            f"loss {total['Loss']:.3f}, acc@1 {total['Acc@1']:.2f}, {self.rate():.0f} images/s"
        )
        tqdm.write("\t".join(entries), file=sys.stdout)
