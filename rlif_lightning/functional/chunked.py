"""Statistics of tokens from hidden states, a chunk of tokens at a time: the logits [M, V] are never held.

With a vocabulary of 151,936 the logits of 8 rows of 1,024 tokens are 5 GB a copy, and a loss holds several.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlif_lightning.functional.token_stats import (
    NOTHING,
    Statistic,
    TokenStats,
    _check_temperature,
    _pick,
    token_logprobs,
    token_stats,
)

Result = TypeVar("Result")

CHUNK_BYTES = 96 * 2**20  # the most that one chunk of logits may take in fp32


def chunk_rows(vocabulary: int) -> int:
    """Tokens in a chunk, such that its logits take 96 MiB in fp32 at most: 128 for a vocabulary of 151,936.

    From 16 to 1,024 tokens, in multiples of 64 where there is room. The policy and a frozen reference agree bit for
    bit only where their chunks have the same size, since a matrix product may be rounded otherwise at another size.
    Larger chunks save little: 256 tokens of this vocabulary in place of 128 save 2 to 5 % of the time on a CPU core.
    """
    rows = min(CHUNK_BYTES // (4 * vocabulary), 1024)
    return rows // 64 * 64 if rows >= 64 else max(rows, 16)


def chunks(tokens: int, rows: int) -> Iterator[slice]:
    """Slices of ``rows`` tokens that cover all; one empty slice of none, so that a gradient of 0 has a graph."""
    for start in range(0, max(tokens, 1), rows):
        yield slice(start, min(start + rows, tokens))


class LinearHead:
    """Logits of a head that is a weight alone, without gradient, in a buffer that the next call overwrites.

    Under autocast the weight [V, H] is cast once, here, not at every chunk. Otherwise hidden states and weight have
    one dtype. Logits are those of ``scale * F.linear(hidden, weight)``.
    """

    def __init__(self, weight: Tensor, scale: float = 1.0) -> None:
        device, dtype = weight.device.type, weight.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:  # autocast leaves float64 alone
            dtype = torch.get_autocast_dtype(device)
        self.weight = weight.detach().to(dtype)  # [V, H]
        self.scale = scale
        self._buffer = self.weight.new_empty(0, len(weight))

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states [M, H] to logits [M, V] in the weight's dtype."""
        if len(hidden) > len(self._buffer):
            self._buffer = self.weight.new_empty(len(hidden), len(self.weight))
        logits = self._buffer[: len(hidden)]
        torch.mm(hidden.to(self.weight.dtype), self.weight.t(), out=logits)
        return logits if self.scale == 1.0 else logits.mul_(self.scale)


def chunked_stats(
    hidden: Tensor,  # [M, H] that predict the tokens
    head: Callable[[Tensor], Tensor],  # hidden states [.., H] to logits [.., V]
    ids: Tensor,  # [M] token ids in 0 .. V-1
    temperature: float = 1.0,  # divides the logits first
    own: Mapping[str, Statistic] = NOTHING,  # further statistics by name, functions of log p [chunk, V]
    *,
    chunk: int,  # tokens at a time, see chunk_rows
) -> TokenStats:
    """:func:`token_stats` of ``head(hidden)``, differentiable in the hidden states and in what the head trains.

    Tensors and errors are those of :func:`token_stats`. Where gradients are enabled each chunk is checkpointed: its
    logits are computed again in the backward, so that any head (with a bias, LoRA, softcap, in 4 bit) has its right
    gradient.
    """
    parts = list(_map_chunks(lambda h, i: token_stats(head(h), i, temperature, own), hidden, ids, chunk))
    return parts[0].with_tensors(map(torch.cat, zip(*(part.tensors for part in parts), strict=True)))


def chunked_logprobs(
    hidden: Tensor, head: Callable[[Tensor], Tensor], ids: Tensor, temperature: float = 1.0, *, chunk: int
) -> Tensor:
    """The log-probabilities [M] alone, in nats. Arguments and errors: :func:`chunked_stats`.

    Without gradient they are bit for bit those of :func:`chunked_stats`.
    """
    if isinstance(head, LinearHead):
        return torch.cat([x for _, x, _, _ in exponentials(hidden, head, ids, temperature, chunk)])
    return torch.cat(list(_map_chunks(lambda h, i: token_logprobs(head(h), i, temperature), hidden, ids, chunk)))


def exponentials(
    hidden: Tensor, head: LinearHead, ids: Tensor, temperature: float, chunk: int
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Without gradient and in one buffer for all: what each chunk's log-probabilities and their gradients need.

    The caller may overwrite what it gets. A fresh buffer each time costs a third of the time on a CPU, most of it in
    page faults. Arguments and errors are those of :func:`chunked_stats`.

    Yields:
        The tokens of a chunk; their log-probabilities [chunk]; exp(z / t - max) [chunk, V] of logits z; its sums
        [chunk]. fp32 at least.
    """
    _check_rows(hidden, ids)
    _check_temperature(temperature)
    wide: Tensor | None = None  # where logits of half precision are raised
    for rows in chunks(len(ids), chunk):
        z = head(hidden[rows])
        if z.element_size() < 4:
            wide = z.new_empty(z.shape, dtype=torch.float32) if wide is None else wide
            z = wide[: len(z)].copy_(z)
        if temperature != 1.0:
            z.div_(temperature)
        z.sub_(z.amax(-1, keepdim=True))
        chosen = _pick(z, ids[rows])
        total = z.exp_().sum(-1)
        yield rows, chosen - total.log(), z, total


def _map_chunks(
    function: Callable[[Tensor, Tensor], Result], hidden: Tensor, ids: Tensor, chunk: int
) -> Iterator[Result]:
    """The function of each chunk of hidden states and ids, checkpointed where gradients are enabled."""
    _check_rows(hidden, ids)
    for rows in chunks(len(ids), chunk):
        if torch.is_grad_enabled():
            yield checkpoint(function, hidden[rows], ids[rows], use_reentrant=False)
        else:
            yield function(hidden[rows], ids[rows])


def _check_rows(hidden: Tensor, ids: Tensor) -> None:
    """Refuse hidden states and ids of different length: slices would pair them in silence."""
    if hidden.ndim != 2 or ids.shape != hidden.shape[:1]:
        raise ValueError(
            "hidden states and ids do not match\n"
            f"  got: hidden {list(hidden.shape)}, ids {list(ids.shape)}\n"
            "  expected: [M, H] and [M]"
        )
