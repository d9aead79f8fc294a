"""How a CPU computes a model: with how many threads, and in which precision it would be faster."""

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
    if not chosen and DEFAULT > 1 and _size(model) < TINY:
        torch.set_num_threads(1)
        rank_zero_info(
            f"One thread computes this tiny model ({_size(model):,} weights); OMP_NUM_THREADS sets another number."
        )


def recommend_bfloat16(model: nn.Module, precision: str) -> None:
    """Say that training is faster in bfloat16, on a CPU that multiplies it; a tiny model's is not."""
    able = torch.cpu.get_capabilities()
    multiplies = able.get("avx512_bf16") or able.get("amx_bf16")
    if multiplies and precision == "32-true" and _size(model) >= TINY:
        rank_zero_info(
            "This CPU multiplies bfloat16, which takes about half the time of float32: --trainer.precision bf16-mixed"
        )


def _size(model: nn.Module) -> int:
    return sum(weights.numel() for weights in model.parameters())
