"""A training step as one CUDA graph: a single launch where eager PyTorch has hundreds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator

Tensors = tuple[torch.Tensor, ...]
Step = Callable[..., Tensors]

# Eager calls before a shape of inputs is captured: in them cuDNN chooses its algorithms and the
# optimizer creates its state.
WARM_UP = 3


def can_use_graphs(accelerator: Accelerator) -> bool:
    """Whether a training step can be a CUDA graph: with one process, on a GPU.

    DistributedDataParallel's reducer is not captured, nor is fp16's loss scale, which skips steps.
    """
    scales_loss = accelerator.mixed_precision == "fp16"
    alone = accelerator.num_processes == 1
    return accelerator.device.type == "cuda" and alone and not scales_loss


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Make an optimizer keep its learning rate and its count of steps on the device.

    A Python number would be baked into the graph at its capture. With `fused`, SGD updates all
    weights in one kernel.
    """
    for group in optimizer.param_groups:
        kernels = {"capturable": True} if "capturable" in group else {"fused": True}
        group.update(kernels, foreach=False, lr=torch.tensor(float(group["lr"]), device=device))


class GraphedStep:
    """Calls `step`; from the fourth call with inputs of the same shapes on it replays a graph.

    Results are those of `step` to the bit. A replay draws from the generator's current seed. An
    output is valid until the next call. A step that cannot be captured, also for want of memory, is
    computed kernel by kernel, as the first three were.

    Args:
        step: takes tensors on the GPU and numbers, returns tensors, and never waits for the GPU.
        forget: drops what an unfinished step leaves behind: gradients.
    """

    def __init__(self, step: Step, forget: Callable[[], object] = lambda: None) -> None:
        self.step, self.forget = step, forget
        self.is_capturable = True
        self.calls: dict[object, int] = {}
        self.captured: dict[object, tuple[torch.cuda.CUDAGraph, Tensors, Tensors]] = {}
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, *inputs: torch.Tensor, **numbers: float) -> Tensors:
        key = (*((t.shape, t.dtype) for t in inputs), *sorted(numbers.items()))
        self.calls[key] = self.calls.get(key, 0) + 1
        is_due = self.is_capturable and self.calls[key] > WARM_UP
        if is_due and key not in self.captured:
            self._capture(key, inputs, numbers)
        if key not in self.captured:
            if self.captured:
                # A graph keeps its step's memory, and an epoch's shorter last batch would need its
                # own beside that. So the graph is dropped, and captured anew later.
                self._free()
            # On the stream of the capture, for which cuBLAS has a workspace of its own.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                # Clones, as at the capture: cuDNN's choice depends on the memory's alignment too.
                outputs = self.step(*(tensor.clone() for tensor in inputs), **numbers)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        graph, own, outputs = self.captured[key]
        for own_input, given in zip(own, inputs, strict=True):
            own_input.copy_(given)
        graph.replay()
        return outputs

    def _capture(
        self, key: object, inputs: tuple[torch.Tensor, ...], numbers: dict[str, float]
    ) -> None:
        own = tuple(tensor.clone() for tensor in inputs)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()  # an earlier step's error is not the capture's
        stream = torch.cuda.current_stream()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        seeded = generator.clone_state()
        try:
            # Only this thread is captured: another may be writing a checkpoint.
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                outputs = self.step(*own, **numbers)
        except RuntimeError as error:
            # Torch leaves the stream of a failed capture current, and the generator in a state in
            # which it refuses to draw.
            torch.cuda.set_stream(stream)
            generator.graphsafe_set_state(seeded)
            # The end of the capture fails as well, and hides why.
            reason = str(error.__context__ or error).partition("\n")[0]
        else:
            self.captured[key] = graph, own, outputs
            return
        self.is_capturable = False
        del graph, own
        self.forget()
        self._free()
        print(
            f"=> this step cannot become a CUDA graph ({reason}): it is computed kernel by kernel "
            "from here on"
        )

    def _free(self) -> None:
        """Drop all graphs and give their memory back."""
        torch.cuda.synchronize()
        self.captured.clear()
        self.pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()
