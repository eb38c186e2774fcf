"""Train and evaluate word language models on WikiText-2, on a CPU, a GPU or several.

    accelerate launch --config_file accelerate_configs/gpu4.yaml lm_main.py --epochs 6 --tied
    python lm_main.py --model Transformer --lr 5             # no launcher; or --model CNN
    python lm_main.py --data sample --save sample.pt         # built-in text, no download
    python lm_main.py --evaluate --resume model.pt

pytorch/examples' word_language_model/main.py with the devices left to Accelerate: the flags, the
printed lines and the defaults are the original's. In one process and without dropout
(--dropout 0 --layer-dropout 0), so are the initial weights and the training losses. The batch size
is that of all processes together; each of them takes whole columns of the text.

On 245,569 words of WikiText-2, 12 epochs in bf16, mean of three seeds: test perplexity 318 of an
LSTM and 412 of a Transformer (docs/language_models.md has the commands).
"""

from __future__ import annotations

# First, before slow imports: see engine/stop.py.
from engine.stop import Stopped, check_flags, handlers_put_back, run_script

# isort: split

import argparse
import contextlib
import math
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine import cli
from word_language_model.settings import DEFAULT_KERNEL_SIZE, MODELS, SETTINGS, WIKITEXT


def make_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__, SETTINGS, cli.LAUNCHING)
    # A table, one flag after another: the formatter would give every argument a line of its own.
    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--data", type=cli.nonempty, metavar="DIR", default=str(WIKITEXT),
        help="folder of the corpus, or `sample` for the built-in one")
    add("--bptt", type=cli.positive_int, default=35, metavar="N",
        help="words of each column (see --batch_size) in a step")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODELS, default="LSTM", help="type of network")
    add("--emsize", type=cli.positive_int, default=200, metavar="N",
        help="numbers in a word's embedding")
    add("--nhid", type=cli.positive_int, default=200, metavar="N", help="hidden units of a layer")
    add("--nlayers", type=cli.positive_int, default=2, metavar="N", help="layers")
    add("--nhead", type=cli.positive_int, default=2, metavar="N", help="heads of the Transformer")
    add("--kernel-size", type=cli.positive_int, default=DEFAULT_KERNEL_SIZE, metavar="N",
        help="words that a layer of the CNN sees")
    add("--tied", action="store_true", help="the word embedding is the decoder's weight as well")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile the model; one process on a GPU instead replays each step as a CUDA "
        "graph, unless --no-compile or --use-optimizer is given")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=cli.positive_int, default=40, metavar="N", help="total epochs to run")
    add("--batch_size", "--batch-size", type=cli.positive_int, default=20, metavar="N",
        help="columns, over all processes together: the text is cut into so many equal pieces, "
        "which are read side by side, --bptt words of each in a step")
    add("--gradient-accumulation-steps", type=cli.positive_int, default=1, metavar="N",
        help="parts of each process's columns that are computed one after the other: one process "
        "with 4 trains what four do, in less memory")
    add("--lr", type=cli.non_negative_float, default=20.0, metavar="LR",
        help="initial learning rate; an epoch without a better validation loss divides it by 4. "
        "The Transformer wants 5, RNN_TANH 5, RNN_RELU 0.5 to 2, AdamW 0.001")
    add("--clip", type=cli.non_negative_float, default=0.25, metavar="NORM",
        help="largest norm of the gradient, which is scaled down to it; 0: no limit")
    add("--dropout", type=cli.fraction, default=0.2, metavar="P",
        help="share of values that are dropped; 0: none")
    add("--layer-dropout", type=cli.fraction, default=0.1, metavar="P",
        help="the same within the Transformer's layers, which --dropout does not reach")
    add("--use-optimizer", action="store_true", help="AdamW instead of plain SGD")
    add("--seed", type=cli.non_negative_int, default=1111, metavar="N", help="random seed")
    add = parser.add_argument_group("run").add_argument
    add("--evaluate", action="store_true",
        help="evaluate --resume, or else --save, on the validation and test texts and exit")
    add("--resume", type=cli.pathname, metavar="PATH",
        help="checkpoint to continue or to evaluate, or `auto` for the newest whole one beside "
        "--save, if there is one")
    add("--overwrite", action="store_true", help="begin anew where a run is")
    add("--checkpoint-every", type=cli.non_negative_int, default=0, metavar="STEPS",
        help="also checkpoint within an epoch; 0: at its end only")
    add("--dry-run", action="store_true", help="one step and one evaluation; keeps no file")
    add = parser.add_argument_group("output").add_argument
    add("--log-interval", type=cli.positive_int, default=200, metavar="N",
        help="steps between two lines")
    add("--save", type=cli.filename, default=Path("model.pt"), metavar="PATH",
        help="the best model; the run's state is put beside it, model.checkpoint.pt for model.pt")
    add("--log-dir", type=cli.pathname, metavar="DIR", help="for TensorBoard, else model.logs")
    add("--onnx-export", type=cli.filename, metavar="PATH",
        help="also write the best model as ONNX")
    for flag in ("--cuda", "--accel"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    # fmt: on
    return parser


if __name__ == "__main__":
    check_flags(make_parser())


import torch
from accelerate.utils import broadcast
from torch import nn
from tqdm import tqdm

from engine.checkpoints import Checkpoint
from engine.graphs import GraphedStep, Step, can_use_graphs, make_capturable
from engine.launch import build_accelerator, check_compiler, describe_run, keep_freed_memory
from engine.metrics import step_sums, sum_dtype, sum_of_parts
from engine.run import Run
from engine.seeds import use_deterministic_kernels
from word_language_model.checkpoint import (
    beside,
    load,
    load_weights,
    refuse_other_words,
    settle,
    spec_of,
)
from word_language_model.data import (
    Corpus,
    batchify,
    corpus_files,
    identity,
    load_corpus,
    segment_count,
    segments,
)
from word_language_model.export import check_exporter, export_onnx, onnx_files
from word_language_model.kernels import EvaluationLoss
from word_language_model.model import LanguageModel, build_model

EVAL_BATCH_SIZE = 10
RULE = 89  # characters of a line between epochs


@handlers_put_back()
def main(argv: Sequence[str] | None = None) -> None:
    with contextlib.ExitStack() as at_the_end:
        run, args, checkpoint = begin(argv, at_the_end)
        accelerator = run.accelerator
        with accelerator.local_main_process_first():  # a node's first process downloads
            corpus = load_corpus(args.data)
        if checkpoint:
            refuse_other_words(checkpoint, corpus.vocabulary)
        accelerator.print(
            f"=> {corpus.root}: {len(corpus.train)} training, {len(corpus.valid)} validation and "
            f"{len(corpus.test)} test words, {len(corpus.vocabulary)} different"
        )
        valid = batchify(corpus.valid, EVAL_BATCH_SIZE, "valid").to(accelerator.device)
        test = batchify(corpus.test, EVAL_BATCH_SIZE, "test").to(accelerator.device)
        model, optimizer, train = build(run, corpus, args, checkpoint)
        checkpoint.clear()  # model and optimizer have what they need of it
        if args.evaluate:
            for name, text in (("valid", valid), ("test", test)):
                loss = evaluate(run, model, text, args)
                accelerator.print(f"| Evaluation | {summary(name, loss)}")
        else:
            fit(run, model, optimizer, train, valid, corpus, args)
            take_best(run, accelerator.unwrap_model(model))
            loss = evaluate(run, model, test, args)
            rule = "=" * RULE
            accelerator.print(f"{rule}\n| End of training | {summary('test', loss)}\n{rule}")
        if args.onnx_export and accelerator.is_main_process:
            export_onnx(accelerator.unwrap_model(model).cpu(), args.onnx_export, args.bptt)
            print(f"The model is also exported in ONNX format at {args.onnx_export.resolve()}.")
    if run.stopped is not None:
        raise run.stopped


def begin(
    argv: Sequence[str] | None, at_the_end: contextlib.ExitStack | None = None
) -> tuple[Run, argparse.Namespace, Checkpoint]:
    """Flags, accelerator, the run's place, and the checkpoint that it goes on from, if any.

    Args:
        at_the_end: removes the files of a dry run.
    """
    parser = make_parser()
    args = parser.parse(argv)
    # The only buffers, the Transformer's sines, never change.
    accelerator = build_accelerator(broadcast_buffers=False)
    keep_freed_memory(2**30)  # the logits are the largest
    use_deterministic_kernels(accelerator, True)
    if args.evaluate and not args.resume:
        args.resume = args.save
    if args.dry_run and at_the_end and accelerator.is_main_process:
        at_the_end.enter_context(dry(args))
    latest, log_dir = beside(args.save)
    run = Run(
        accelerator,
        latest=latest,
        best=args.save,
        log_dir=args.log_dir or log_dir,
        flag="--save",
        metrics=["Loss"],
        figure="best_val_loss",
        best_figure=math.inf,
        first_epoch=1,
        checkpoint_every=args.checkpoint_every,
    )
    accelerator.print(describe_run(accelerator))
    for flag in ("cuda", "accel"):
        if getattr(args, flag):
            accelerator.print(f"=> --{flag} changes nothing: devices are the launcher's business")
    if args.onnx_export:
        check_exporter()
    paths = onnx_files(args.onnx_export), corpus_files(args.data)
    args.resume = run.find(args.resume, args.evaluate, args.overwrite, *paths)
    checkpoint = load(args.resume) if args.resume else Checkpoint()
    run.changed = settle(parser, args, checkpoint, accelerator)
    return run, args, checkpoint


@contextlib.contextmanager
def dry(args: argparse.Namespace) -> Iterator[None]:
    """Puts all files of --dry-run into a folder beside --save, which is removed at the end.

    A full or read-only disk shows, and an earlier run's model stays.
    """
    try:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".dry-run-", dir=args.save.parent)
    except OSError as error:
        raise cli.UserError(f"cannot write to {args.save.parent}: {error.strerror}") from error
    with folder:
        args.save, args.log_dir = Path(folder.name, args.save.name), None
        args.onnx_export = args.onnx_export and Path(folder.name, args.onnx_export.name)
        yield
    print("=> dry run: its files are removed again")


def build(
    run: Run, corpus: Corpus, args: argparse.Namespace, checkpoint: Checkpoint
) -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor]:
    """Model, optimizer and training text, as new or as `checkpoint` has them.

    Returns:
        Model and optimizer as prepared, and this process's columns of the text, [rows, columns],
        on the device.
    """
    accelerator = run.accelerator
    torch.manual_seed(args.seed)
    model = build_model(spec_of(args, len(corpus.vocabulary)), args.dropout, args.layer_dropout)
    if checkpoint:
        load_weights(model, checkpoint)

    kind = torch.optim.AdamW if args.use_optimizer else torch.optim.SGD
    optimizer: torch.optim.Optimizer = kind(model.parameters(), lr=args.lr)
    # Graphs were never measured with AdamW.
    graphable = can_use_graphs(accelerator) and not args.use_optimizer
    run.graphed = graphable and args.compile is not False
    if run.graphed:
        make_capturable(optimizer, accelerator.device)
    elif args.compile:
        check_compiler()
        model.compile()
    prepared, optimizer = run.prepare(model, optimizer)

    text = batchify(corpus.train, args.batch_size, "train")
    share = args.batch_size // accelerator.num_processes
    first = accelerator.process_index * share
    columns = slice(first, first + share)

    run.measured_on = identity(corpus.valid)
    batches = {
        "batch_size": args.batch_size,
        "bptt": args.bptt,
        "trained_on": identity(corpus.train),
    }
    run.state = {"annealed": 0, "hidden": ()}
    if not args.evaluate:
        run.resume(checkpoint, optimizer, segment_count(text, args.bptt), batches, args.epochs)
        run.state["annealed"] = checkpoint.value("annealed", int) or 0
        if run.state["annealed"] < 0:
            raise checkpoint.error(f"annealed is {run.state['annealed']}: damaged")
        if run.step:
            hidden = checkpoint.value("hidden", list) or []
            shapes = [h.shape for h in model.initial_hidden(args.batch_size)]
            if [getattr(h, "shape", None) for h in hidden] != shapes or not run.carried:
                raise checkpoint.error(f"sums or hidden state are not those of a {args.model}")
            mine = (h[:, columns].contiguous().to(accelerator.device) for h in hidden)
            run.state["hidden"] = tuple(mine)
    return prepared, optimizer, text[:, columns].contiguous().to(accelerator.device)


def fit(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: torch.Tensor,
    valid: torch.Tensor,
    corpus: Corpus,
    args: argparse.Namespace,
) -> None:
    """Train to the last epoch, or to Ctrl-C.

    Raises:
        Stopped: by another signal, once a checkpoint is on the disk.
    """
    accelerator = run.accelerator
    accelerator.print(
        f"=> {args.batch_size} columns of {args.bptt} words a step, {train.shape[1]} columns a "
        f"process; best model {run.best}, latest state {run.latest}, curves in {run.log_dir}"
    )

    def contents() -> dict[str, Any]:
        """What a checkpoint holds beside what the run itself adds (`Run.save`)."""
        mine = (h.transpose(0, 1).contiguous() for h in run.state["hidden"])
        hidden = [accelerator.gather(h).transpose(0, 1).cpu() for h in mine]  # of all columns
        return {
            **{name: getattr(args, name) for name in SETTINGS},
            "vocabulary": corpus.vocabulary,
            "annealed": run.state["annealed"],
            "hidden": hidden,
        }

    train_step = training_step(run, model, optimizer, args)
    rule = "-" * RULE
    try:
        with run.training(contents):
            for _ in run.epochs(args.epochs):
                started = time.time()
                # As in the original, AdamW keeps its rate, and only the printed one is annealed.
                rate = args.lr if args.use_optimizer else annealed_rate(run, args)
                run.set_learning_rate(rate)
                train_loss = train_epoch(run, model, train_step, train, args)
                val_loss = evaluate(run, model, valid, args)
                accelerator.print(
                    f"{rule}\n| end of epoch {run.number:3d} | time: "
                    f"{time.time() - started:5.2f}s | {summary('valid', val_loss)}\n{rule}"
                )
                if not run.is_better(val_loss):
                    run.state["annealed"] += 1
                run.state["hidden"] = ()
                run.end_of_epoch(
                    {
                        "Loss/train": train_loss,
                        "Loss/val": val_loss,
                        "Perplexity/val": perplexity(val_loss),
                        "LR": rate,
                    },
                    val_loss,
                )
    except Stopped as stopped:
        if stopped.signum != signal.SIGINT:
            raise
        accelerator.print(f"{rule}\nExiting from training early")


def annealed_rate(run: Run, args: argparse.Namespace) -> float:
    """A quarter of the learning rate for every epoch that brought no better validation loss."""
    return math.ldexp(args.lr, -2 * run.state["annealed"])


def take_best(run: Run, model: LanguageModel) -> None:
    """Give `model` the weights that did best on the validation text, on every process."""
    accelerator = run.accelerator
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if not run.has_best:
            print("=> no epoch is done on this text: testing the weights as they are")
        elif run.holds_best(run.best):
            load_weights(model, load(run.best))
        else:  # resumed with another --save
            print(f"=> {run.best} does not hold this run's best weights: testing the last ones")
    if accelerator.num_processes > 1:
        for parameter in model.parameters():
            parameter.data.copy_(broadcast(parameter.data))


def training_step(
    run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, args: argparse.Namespace
) -> Step:
    """A step as a function of its segment, which a GPU replays as a CUDA graph."""
    accelerator, parts = run.accelerator, args.gradient_accumulation_steps

    def step(
        tokens: torch.Tensor, targets: torch.Tensor, *hidden: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        sums, after = [], []
        columns = (tokens, targets.view_as(tokens), *hidden)  # the second dimension of all
        chunks = zip(*(tensor.chunk(parts, dim=1) for tensor in columns), strict=True)
        for part, (own, next_words, *before) in enumerate(chunks):
            run.seed_dropout(args.seed, part, parts)
            is_last = part == parts - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                own_hidden = tuple(h.contiguous() for h in before)
                loss, own_hidden = model(own, next_words.reshape(-1), own_hidden)
                # DistributedDataParallel averages the gradients: the mean over all columns.
                accelerator.backward(loss / parts if parts > 1 else loss)
            count = torch.full_like(loss, next_words.numel(), dtype=sum_dtype(accelerator.device))
            sums.append(step_sums(count * loss.detach(), count))
            after.append(own_hidden)
        if args.clip:
            accelerator.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        hidden = after[0] if parts == 1 else tuple(map(_columns, zip(*after, strict=True)))
        return sum_of_parts(sums), *hidden

    return GraphedStep(step, optimizer.zero_grad) if run.graphed else step


def _columns(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.cat(parts, dim=1)


def train_epoch(
    run: Run, model: nn.Module, train_step: Step, text: torch.Tensor, args: argparse.Namespace
) -> float:
    """Train the rest of the epoch under way; returns the mean loss of a word in the whole of it."""
    accelerator, state = run.accelerator, run.state
    model.train()
    if not state["hidden"]:
        state["hidden"] = accelerator.unwrap_model(model).initial_hidden(text.shape[1])
    steps = segment_count(text, args.bptt)
    sums = run.begin_epoch(steps)
    bar = tqdm(
        desc=f"epoch {run.number}",
        total=steps,
        initial=run.step,
        unit=" tokens",
        unit_scale=args.bptt * args.batch_size,
        leave=False,
        disable=None if accelerator.is_main_process else True,
    )
    # As in the original, the first line of an epoch sums one step more than it divides by.
    # The first step after the last line that was printed, and that line's step.
    since, last = run.step, max(run.step - 1, 0)
    started = time.time()
    with bar:
        for step, tokens, targets in segments(text, args.bptt, run.step):
            run.seed_dropout(args.seed, 0, args.gradient_accumulation_steps)
            values, *state["hidden"] = train_step(tokens, targets, *state["hidden"])
            sums.update(values, step)
            bar.update()
            if step % args.log_interval == 0 and step > 0:
                mean = sums.read()[0]["Loss"] * (step + 1 - since) / (step - last)
                milliseconds = (time.time() - started) * 1000 / (step - last)
                sums.mark()
                since, last, started = step + 1, step, time.time()
                bar.set_postfix_str(f"loss {mean:.2f}, ppl {perplexity(mean):.2f}")
                if accelerator.is_main_process:
                    tqdm.write(
                        f"| epoch {run.number:3d} | {step:5d}/{len(text) // args.bptt:5d} batches "
                        f"| lr {annealed_rate(run, args):02.2f} | ms/batch {milliseconds:5.2f} | "
                        f"loss {mean:5.2f} | ppl {perplexity(mean):8.2f}",
                        file=sys.stdout,
                    )
            run.end_of_step(step)
            if args.dry_run:
                break
    return run.end_of_training_steps()["Loss"]


@torch.inference_mode()
def evaluate(run: Run, model: nn.Module, text: torch.Tensor, args: argparse.Namespace) -> float:
    """Mean loss of a word, the same bits on any number of processes.

    Every process has all columns and decodes whole segments, in turn with the others: decoding is
    nine tenths of the work. An RNN also has to walk through the others' segments.
    """
    accelerator, bptt = run.accelerator, args.bptt
    bare: LanguageModel = accelerator.unwrap_model(model)
    bare.eval()
    losses = torch.zeros(segment_count(text, bptt), device=text.device)
    hidden = bare.initial_hidden(text.shape[1])
    # Around all segments: autocast drops its converted weights at its end.
    with accelerator.autocast():
        decoded_loss = EvaluationLoss(bare.decoder)
        for step, tokens, targets in tqdm(
            segments(text, bptt),
            desc="evaluation",
            total=len(losses),
            leave=False,
            disable=None if accelerator.is_main_process else True,
        ):
            mine = step % accelerator.num_processes == accelerator.process_index
            if mine or hidden:
                features, hidden = bare.features(tokens, hidden)
                if mine:
                    losses[step] = decoded_loss(features, targets)
            run.check()
    # Each loss is added to zeros only, so the sum is exact.
    losses = accelerator.reduce(losses, "sum").cpu().double()  # MPS has no float64
    rows = torch.full_like(losses, bptt)
    rows[-1] = (len(text) - 1) - bptt * (len(losses) - 1)
    total: float = (losses * rows).sum().item()
    return total / (len(text) - 1)


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # where exp would overflow


def summary(part: str, loss: float) -> str:
    return f"{part} loss {loss:5.2f} | {part} ppl {perplexity(loss):8.2f}"


if __name__ == "__main__":
    run_script(main)
