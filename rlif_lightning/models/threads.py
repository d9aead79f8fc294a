"""How many threads compute a model on the CPU."""

import os

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

TINY = 5_000_000  # weights
CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
DEFAULT = torch.get_num_threads()


def use_one_thread_if_tiny(model: nn.Module) -> None:
    """Compute a model of less than 5 million weights with one thread, unless the user has chosen a number.

    More threads would wait for each other: on a busy machine a step of the toy takes six times as long.
    """
    chosen = torch.get_num_threads() != DEFAULT or any(name in os.environ for name in CHOSEN_BY)
    size = sum(weights.numel() for weights in model.parameters())
    if not chosen and DEFAULT > 1 and size < TINY:
        torch.set_num_threads(1)
        rank_zero_info(
            f"One thread computes this tiny model ({size:,} weights); OMP_NUM_THREADS sets another number."
        )
