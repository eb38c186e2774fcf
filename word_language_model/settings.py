"""What the flags of the language commands offer, and what a checkpoint keeps of them.

Imports nothing slow, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

WIKITEXT = Path("data/wikitext-2")
RECURRENT = ("RNN_TANH", "RNN_RELU", "LSTM", "GRU")
MODELS = (*RECURRENT, "Transformer", "CNN")
DEFAULT_KERNEL_SIZE = 4  # with it two layers have as many parameters as the LSTM's
MAX_POSITIONS = 5000


class ModelSpec(NamedTuple):
    """All that decides a model's weights and outputs; the fields are the flags of lm_main.py."""

    model: str
    words: int  # in the vocabulary
    emsize: int
    nhid: int
    nlayers: int
    nhead: int
    tied: bool
    kernel_size: int = DEFAULT_KERNEL_SIZE


# What a resumed run takes from its checkpoint unless a flag says otherwise; the weights and the
# optimizer's state decide MODEL_SETTINGS.
MODEL_SETTINGS = (*(f for f in ModelSpec._fields if f != "words"), "use_optimizer")
SETTINGS = (
    *(*MODEL_SETTINGS, "epochs", "batch_size", "bptt", "lr", "clip"),
    *("dropout", "layer_dropout", "seed", "gradient_accumulation_steps"),
)
