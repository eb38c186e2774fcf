"""Train and evaluate word language models on WikiText-2, on a CPU, a GPU or several.

    accelerate launch --config_file accelerate_configs/gpu4.yaml lm_main.py --epochs 6 --tied
    python lm_main.py --model Transformer --lr 5             # no launcher
    python lm_main.py --data sample --epochs 3               # built-in text, no download
    python lm_main.py --evaluate --resume model.pt

pytorch/examples' word_language_model/main.py with the devices left to Accelerate: the flags, the
printed lines and the defaults are the original's, and so are, in one process and with
--dropout 0, the weights at the start and the losses. The batch size is that of all processes
together, each of which takes whole columns of the text.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

import checkpoint as checkpoints
import lm_checkpoint
import lm_data
import lm_model
import runtime
from lm_checkpoint import TrainingState
from lm_model import LanguageModel, ModelSpec
from metrics import Curves, LossSums, refuse_overflow
from runtime import (
    Preemption,
    Stopped,
    UserError,
    derive_seed,
    non_negative_float,
    non_negative_int,
    positive_int,
)

EVAL_BATCH_SIZE = 10
RULE = 89  # characters of a line between epochs


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to below 1, not {text}")
    return value


# What decides the weights' shapes: a resumed run has its checkpoint's.
SHAPE = {"model": "LSTM", "emsize": 200, "nhid": 200, "nlayers": 2, "nhead": 2, "tied": False}
# What a resumed run takes from its checkpoint unless it is given, and how it is checked.
SETTINGS: dict[str, tuple[Callable[[str], float], float]] = {
    "lr": (non_negative_float, 20.0),
    "clip": (non_negative_float, 0.25),
    "batch_size": (positive_int, 20),
    "bptt": (positive_int, 35),
    "dropout": (fraction, 0.2),
    "seed": (non_negative_int, 1111),
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = runtime.ArgumentParser(description="Train word language models on WikiText-2")
    add = parser.add_argument
    # A table, one flag after another: the formatter would give every argument a line of its own.
    # The defaults of SHAPE and SETTINGS are filled in later, a checkpoint's values come first.
    # fmt: off
    add("--data", metavar="DIR", default=str(lm_data.WIKITEXT),
        help="folder of the corpus, or `sample` for the built-in one (default: %(default)s)")
    add("--model", choices=lm_model.MODELS, help="type of network (default: LSTM)")
    add("--emsize", type=positive_int, help="size of word embeddings (default: 200)")
    add("--nhid", type=positive_int, help="hidden units per layer (default: 200)")
    add("--nlayers", type=positive_int, help="number of layers (default: 2)")
    add("--lr", type=non_negative_float, help="initial learning rate (default: 20)")
    add("--clip", type=non_negative_float, help="largest norm of the gradient (default: 0.25)")
    add("--epochs", type=positive_int, default=40, metavar="N",
        help="upper epoch limit (default: %(default)s)")
    add("--batch_size", "--batch-size", type=positive_int, metavar="N",
        help="columns of text, over all processes together (default: 20)")
    add("--bptt", type=positive_int, help="words of a column in a step (default: 35)")
    add("--dropout", type=fraction, help="dropout applied to layers (0 = no dropout; default: 0.2)")
    add("--tied", action="store_true", default=None,
        help="the word embedding is the decoder's weight as well")
    add("--seed", type=non_negative_int, help="random seed (default: 1111)")
    add("--log-interval", type=positive_int, default=200, metavar="N",
        help="steps between two lines (default: %(default)s)")
    add("--save", type=Path, default=Path("model.pt"), metavar="PATH",
        help="the best model; the state of the run is put beside it as STEM.checkpoint.pt "
        "(default: %(default)s)")
    add("--onnx-export", type=Path, metavar="PATH", help="also write the best model as ONNX")
    add("--nhead", type=positive_int, help="attention heads of the Transformer (default: 2)")
    add("--dry-run", action="store_true", help="one step and one evaluation, to verify the setup")
    add("--use-optimizer", action="store_true", default=None, help="AdamW instead of plain SGD")
    # The original's end here; these are new.
    add("--resume", type=Path, metavar="PATH",
        help="checkpoint to continue or to evaluate, or `auto` for the newest whole one beside "
        "--save, if there is one")
    add("--evaluate", action="store_true",
        help="evaluate --resume, or else --save, on the validation and test texts and exit")
    add("--log-dir", type=Path, metavar="DIR", help="for TensorBoard (default: STEM.logs)")
    add("--checkpoint-every", default=0, type=non_negative_int, metavar="STEPS",
        help="also checkpoint within an epoch (default: at its end only)")
    add("--compile", action="store_true", help="torch.compile the model")
    for flag in ("--cuda", "--accel"):
        add(flag, action="store_true", help=argparse.SUPPRESS)
    # fmt: on
    args = parser.parse_args(argv)
    args.log_dir = args.log_dir or args.save.with_name(f"{args.save.stem}.logs")
    args.latest = args.save.with_name(f"{args.save.stem}.checkpoint.pt")
    if args.evaluate:
        args.resume = args.resume or args.save
    if args.dry_run:
        args.epochs = 1
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    accelerator = runtime.build_accelerator()
    runtime.keep_freed_memory(2**30)  # the logits are the largest
    preemption = Preemption(accelerator)
    accelerator.print(runtime.describe_run(accelerator))
    for flag in ("cuda", "accel"):
        if getattr(args, flag):
            accelerator.print(f"=> --{flag} changes nothing: devices are the launcher's business")
    args.resume = checkpoints.find(args.resume, args.latest, accelerator, needed=args.evaluate)
    checkpoint = lm_checkpoint.load(args.resume) if args.resume else {}
    settle(args, checkpoint, accelerator)
    if args.batch_size % accelerator.num_processes:
        raise UserError(
            f"--batch-size {args.batch_size} is for all processes together and cannot be divided "
            f"by {accelerator.num_processes}: use a multiple"
        )
    if args.compile:
        runtime.check_compiler()
    spec = ModelSpec(words=0, **{name: getattr(args, name) for name in SHAPE})
    lm_model.check_spec(spec, args.bptt)
    check_outputs(args, accelerator)
    runtime.use_deterministic_kernels(True)

    with accelerator.local_main_process_first():  # a node's first process downloads, tokenises
        corpus = lm_data.load(args.data)
    if checkpoint:
        lm_checkpoint.refuse_other_words(checkpoint, corpus.vocabulary, args.resume)
    spec = spec._replace(words=len(corpus.vocabulary))
    accelerator.print(
        f"=> {corpus.root}: {len(corpus.train)} training, {len(corpus.valid)} validation and "
        f"{len(corpus.test)} test words, {spec.words} different"
    )
    train = lm_data.batchify(corpus.train, args.batch_size, "train")
    valid = lm_data.batchify(corpus.valid, EVAL_BATCH_SIZE, "valid").to(accelerator.device)
    test = lm_data.batchify(corpus.test, EVAL_BATCH_SIZE, "test").to(accelerator.device)

    torch.manual_seed(args.seed)
    model = lm_model.build_model(spec, args.dropout)
    if checkpoint:
        lm_checkpoint.load_weights(model, checkpoint, args.resume, spec)
    if args.evaluate:
        model.to(accelerator.device)
        for name, data in (("valid", valid), ("test", test)):
            loss = evaluate(accelerator, model, data, args.bptt, preemption.check)
            accelerator.print(f"| Evaluation | {summary(name, loss)}")
    else:
        if args.compile:
            model.compile()
        run = fit(accelerator, preemption, model, spec, corpus, train, valid, checkpoint, args)
        lm_checkpoint.take_best(accelerator, model, spec, run, args.save)
        loss = evaluate(accelerator, model, test, args.bptt, lambda: None)
        accelerator.print("=" * RULE)
        accelerator.print(f"| End of training | {summary('test', loss)}")
        accelerator.print("=" * RULE)
    if args.onnx_export and accelerator.is_main_process:
        lm_model.export_onnx(model.cpu(), args.onnx_export, args.bptt)
        print(f"The model is also exported in ONNX format at {args.onnx_export.resolve()}.")
    if not args.evaluate and run.stopped is not None:
        raise run.stopped
    accelerator.end_training()


def settle(args: argparse.Namespace, checkpoint: dict[str, Any], accelerator: Accelerator) -> None:
    """Fill in what is not given: the checkpoint's values, else the defaults.

    Says so where a flag disagrees with the checkpoint's weights.
    """
    found: dict[str, Any] = {}
    if checkpoint:
        found = lm_checkpoint.read_spec(checkpoint, args.resume)._asdict()
        algorithm = checkpoints.value(checkpoint, "algorithm", str, args.resume)
        if not args.evaluate and algorithm is not None:
            found["use_optimizer"] = algorithm == "AdamW"
    for name, default in {**SHAPE, "use_optimizer": False}.items():
        asked = getattr(args, name)
        if asked is not None and asked != found.get(name, asked):
            accelerator.print(
                f"=> {args.resume} has {name} {found[name]}: "
                f"--{name.replace('_', '-')} {asked} is ignored"
            )
            asked = found[name]
        setattr(args, name, found.get(name, default) if asked is None else asked)
    for name, (parse, default) in SETTINGS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
            if name in checkpoint:
                try:
                    setattr(args, name, parse(str(checkpoint[name])))
                except (ValueError, argparse.ArgumentTypeError) as error:
                    raise UserError(
                        f"checkpoint {args.resume}: {name} is {checkpoint[name]!r}: damaged"
                    ) from error


def check_outputs(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Find out before hours of training that something cannot be written."""
    exporter = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if args.onnx_export and exporter:
        raise UserError(
            f"--onnx-export needs {' and '.join(exporter)}: pip install onnx onnxscript"
        )
    if not accelerator.is_main_process:
        return
    for flag, path in (("--save", args.save), ("--onnx-export", args.onnx_export)):
        if path is None or (args.evaluate and path == args.save):
            continue
        if path.is_dir():
            raise UserError(f"{flag} {path}: is a directory, and a file is wanted")
        runtime.check_writable(path.parent, flag)
    if not args.evaluate:
        runtime.check_writable(args.log_dir, "--log-dir")


def fit(
    accelerator: Accelerator,
    preemption: Preemption,
    bare: LanguageModel,
    spec: ModelSpec,
    corpus: lm_data.Corpus,
    train: torch.Tensor,
    valid: torch.Tensor,
    checkpoint: dict[str, Any],
    args: argparse.Namespace,
) -> TrainingState:
    """Train from `checkpoint`, or from the start when it is empty, to the last epoch or Ctrl-C.

    Raises:
        Stopped: by another signal, once a checkpoint is on the disk.
    """
    # The original's `p -= lr * grad`, or its AdamW, whose learning rate it never lowers.
    kind = torch.optim.AdamW if args.use_optimizer else torch.optim.SGD
    optimizer = kind(bare.parameters(), lr=args.lr)
    run = TrainingState()
    share = args.batch_size // accelerator.num_processes
    columns = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    train = train[:, columns].contiguous().to(accelerator.device)
    accelerator.print(
        f"=> {args.batch_size} columns of {args.bptt} words a step, {share} columns a process; "
        f"best model {args.save}, latest state {args.latest}, curves in {args.log_dir}"
    )
    if checkpoint:
        steps = lm_data.segment_count(train, args.bptt)
        run = lm_checkpoint.restore(checkpoint, bare, optimizer, steps, args)
        run.hidden = tuple(h[:, columns].contiguous().to(accelerator.device) for h in run.hidden)
        accelerator.print(f"=> loaded {args.resume} (epoch {run.epoch}, step {run.step})")
    elif args.latest.exists():
        accelerator.print(
            f"=> {args.latest} of an earlier run will be replaced at the first epoch's end; "
            "--resume would continue it"
        )
    model, optimizer = accelerator.prepare(bare, optimizer)

    def save(*copies: Path) -> None:
        """Every process calls this; the main one writes."""
        refuse_overflow(model, run.sums, run.step)
        sums = run.sums.carry() if run.sums is not None else None
        hidden = [accelerator.gather(h.transpose(0, 1).contiguous()) for h in run.hidden]
        if accelerator.is_main_process:
            writer.save(
                {
                    **spec._asdict(),
                    **{name: getattr(args, name) for name in SETTINGS},
                    "algorithm": kind.__name__,
                    "vocabulary": corpus.vocabulary,
                    "epoch": run.epoch,
                    "step": run.step,
                    "annealed": run.annealed,
                    "best_val_loss": run.best_val_loss,
                    "sums": sums,
                    "hidden": [h.transpose(0, 1).cpu() for h in hidden],
                    "state_dict": bare.state_dict(),
                    "optimizer": optimizer.state_dict(),
                },
                *copies,
            )

    def end_of_step() -> None:
        """Every process calls this, in training and validation."""
        writer.stop_if_asked(accelerator, preemption, save)

    curves = Curves(accelerator, args.log_dir, first_epoch=run.epoch + 1)
    try:
        with checkpoints.Writer(args.latest, args.resume) as writer, preemption.deferred():
            while run.epoch < args.epochs:
                started = time.time()
                lr = math.ldexp(args.lr, -2 * run.annealed)  # a quarter each time
                rate = args.lr if args.use_optimizer else lr
                for group in optimizer.param_groups:
                    group["lr"] = rate
                train_loss = train_epoch(
                    accelerator, model, optimizer, train, run, lr, save, end_of_step, args
                )
                val_loss = evaluate(accelerator, bare, valid, args.bptt, end_of_step)
                accelerator.print("-" * RULE)
                accelerator.print(
                    f"| end of epoch {run.epoch + 1:3d} | time: {time.time() - started:5.2f}s | "
                    f"{summary('valid', val_loss)}"
                )
                accelerator.print("-" * RULE)
                if not math.isfinite(val_loss):
                    raise UserError(
                        f"the validation loss is not finite in epoch {run.epoch + 1}: lower --lr "
                        f"({args.lr}); {args.latest} is from before"
                    )
                # The point before the checkpoint: killed in between, the run draws it once more,
                # and the later one replaces it.
                curves.add(
                    run.epoch + 1,
                    {
                        "Loss/train": train_loss,
                        "Loss/val": val_loss,
                        "Perplexity/val": perplexity(val_loss),
                        "LR": rate,
                    },
                )
                is_best = not run.best_val_loss or val_loss < run.best_val_loss
                if is_best:
                    run.best_val_loss = val_loss
                else:
                    run.annealed += 1
                run.epoch, run.step, run.hidden, run.sums = run.epoch + 1, 0, (), None
                save(*([args.save] if is_best else []))
    except Stopped as stopped:
        if stopped.signum != signal.SIGINT:
            raise
        accelerator.print("-" * RULE)
        accelerator.print("Exiting from training early")
        run.stopped = stopped
    curves.close()
    return run


def train_epoch(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: torch.Tensor,
    run: TrainingState,
    lr: float,
    save: Callable[[], None],
    end_of_step: Callable[[], None],
    args: argparse.Namespace,
) -> float:
    """Train the rest of epoch `run.epoch`; returns the mean loss of a word in the whole of it."""
    model.train()
    run.hidden = run.hidden or accelerator.unwrap_model(model).initial_hidden(data.shape[1])
    run.sums, run.carried = LossSums(accelerator, run.carried), None
    bar = tqdm(
        desc=f"epoch {run.epoch + 1}",
        total=lm_data.segment_count(data, args.bptt),
        initial=run.step,
        unit=" tokens",
        unit_scale=args.bptt * args.batch_size,
        leave=False,
        disable=None if accelerator.is_main_process else True,
    )
    started = time.time()
    try:
        with bar:
            for step, tokens, targets in lm_data.segments(data, args.bptt, run.step):
                # Dropout of a step follows from what it is, not from the past.
                torch.manual_seed(
                    derive_seed("dropout", args.seed, run.epoch, step, accelerator.process_index)
                )
                # DistributedDataParallel averages the gradients: the mean over all columns.
                loss, run.hidden = model(tokens, targets, run.hidden)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), args.clip)
                optimizer.step()
                optimizer.zero_grad()
                run.sums.update(loss, len(tokens), step)
                run.step = step + 1
                bar.update()
                if step % args.log_interval == 0 and step > 0:
                    # As the original: the first line's sum has one batch more than it counts.
                    mean = run.sums.read()[0] / args.log_interval
                    run.sums.begin_interval()
                    milliseconds = (time.time() - started) * 1000 / args.log_interval
                    started = time.time()
                    bar.set_postfix_str(f"loss {mean:.2f}, ppl {perplexity(mean):.2f}")
                    if accelerator.is_main_process:
                        tqdm.write(
                            f"| epoch {run.epoch + 1:3d} | {step:5d}/{len(data) // args.bptt:5d} "
                            f"batches | lr {lr:02.2f} | ms/batch {milliseconds:5.2f} | "
                            f"loss {mean:5.2f} | ppl {perplexity(mean):8.2f}",
                            file=sys.stdout,
                        )
                if args.checkpoint_every and run.step % args.checkpoint_every == 0:
                    save()
                end_of_step()
                if args.dry_run:
                    break
        refuse_overflow(model, run.sums, run.step)
        total = run.sums.read()[1]
    except FloatingPointError as error:
        raise UserError(
            f"the loss is not finite in epoch {run.epoch + 1} at batch {error}: lower --lr "
            f"({args.lr}); {args.save} and its checkpoint are from before"
        ) from error
    rows: int = min(run.step * args.bptt, len(data) - 1)
    return total / rows


@torch.inference_mode()
def evaluate(
    accelerator: Accelerator,
    model: LanguageModel,
    data: torch.Tensor,
    bptt: int,
    end_of_step: Callable[[], None],
) -> float:
    """Mean loss of a word, the same bits on any number of processes.

    Every process has all columns. Of the segments each decodes its own, whole, which is nine
    tenths of the work; an RNN has to walk through the others as well. `model` is the bare module.
    """
    model.eval()
    losses = torch.zeros(lm_data.segment_count(data, bptt), device=data.device)
    hidden = model.initial_hidden(data.shape[1])
    segments = lm_data.segments(data, bptt)
    for step, tokens, targets in tqdm(
        segments,
        desc="evaluation",
        total=len(losses),
        leave=False,
        disable=None if accelerator.is_main_process else True,
    ):
        mine = step % accelerator.num_processes == accelerator.process_index
        if mine or hidden:
            with accelerator.autocast():
                features, hidden = model.features(tokens, hidden)
                if mine:
                    losses[step] = lm_model.loss(features, model.decoder, targets)
        end_of_step()
    # A sum with zeros, which has no rounding.
    losses = accelerator.reduce(losses, "sum").double().cpu()
    rows = torch.full_like(losses, bptt)
    rows[-1] = (len(data) - 1) - bptt * (len(losses) - 1)
    total: float = (losses * rows).sum().item()
    return total / (len(data) - 1)


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # where exp would overflow


def summary(part: str, loss: float) -> str:
    return f"{part} loss {loss:5.2f} | {part} ppl {perplexity(loss):8.2f}"


if __name__ == "__main__":
    runtime.run_script(main)
