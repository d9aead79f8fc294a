"""Per-token statistics of the distribution that a token was drawn from."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Statistic = Callable[[Tensor], Tensor]
"""Log-probabilities [..., V] of the next token to one number [...] for each distribution."""
NOTHING: Mapping[str, Statistic] = {}


class TokenStats(NamedTuple):
    """Statistics of softmax(z / temperature) for each token, in nats."""

    logprob: Tensor  # [...] log p(token), at most 0
    entropy: Tensor  # [...] H(p), from 0 to log V
    self_certainty: Tensor  # [...] KL(U || p), at least 0, unbounded above
    own: Mapping[str, Tensor] = {}  # [...] each, what rewards ask for besides these, by name

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them in one order: the three, then those that rewards ask for."""
        return (*self[:3], *self.own.values())

    def with_tensors(self, tensors: Iterable[Tensor]) -> "TokenStats":
        """Other numbers under the same names, in the order of :attr:`tensors`."""
        logprob, entropy, self_certainty, *own = tensors
        return TokenStats(logprob, entropy, self_certainty, dict(zip(self.own, own, strict=True)))

    def map(self, change: Callable[[Tensor], Tensor]) -> "TokenStats":
        """The same statistics after a change of each tensor."""
        return self.with_tensors(change(x) for x in self.tensors)

    @staticmethod
    def zeros(shape: Sequence[int], own: Iterable[str], device: torch.device) -> "TokenStats":
        """Room for the statistics of tokens of this shape in fp32."""
        logprob, entropy, self_certainty = (torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(3))
        return TokenStats(logprob, entropy, self_certainty, {name: torch.zeros_like(logprob) for name in own})


def token_stats(
    logits: Tensor,  # [..., V] that predict the tokens; bf16 and fp16 are raised to fp32
    ids: Tensor,  # [...] token ids in 0 .. V-1, at padding too
    temperature: float = 1.0,  # divides the logits first
    own: Mapping[str, Statistic] = NOTHING,  # further statistics by name, functions of log p [..., V]
) -> TokenStats:
    """Log-probability, entropy and self-certainty of each token, differentiable in the logits.

    With z the tempered logits, p = softmax(z) and U the uniform distribution over the vocabulary::

        logprob        = z[id] - logsumexp(z)
        entropy        = logsumexp(z) - sum_j p_j z_j
        self_certainty = KL(U || p) = logsumexp(z) - mean_j z_j - log V

    Self-certainty is that of arXiv 2505.19590 with the log V left in, so a uniform p scores 0.

    A vocabulary entry with a logit of -inf has probability 0: it adds nothing to the entropy and makes the
    self-certainty +inf, its true value. Hand over unfiltered logits where self-certainty is the reward.

    Returns:
        Tensors [...], fp32 (float64 for float64 logits).

    Raises:
        ValueError: The ids do not match the logits' rows, or the temperature is not positive.
    """
    log_p = _log_softmax(logits, ids, temperature)  # [..., V]
    return TokenStats(
        logprob=_pick(log_p, ids),
        entropy=_entropy(log_p),
        self_certainty=-log_p.mean(-1) - math.log(log_p.shape[-1]),
        own={name: statistic(log_p) for name, statistic in own.items()},
    )


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """The log-probabilities [...] alone, in nats, bit for bit as :func:`token_stats`, with its errors."""
    return _pick(_log_softmax(logits, ids, temperature), ids)


def _log_softmax(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [..., V] of the tempered logits, in fp32 at least."""
    if logits.shape[:-1] != ids.shape:
        # gather would take the first rows in silence: every token scored by a wrong position.
        raise ValueError(
            "ids do not match the rows of logits\n"
            f"  got: ids {list(ids.shape)}, logits {list(logits.shape)}\n"
            f"  expected: ids {list(logits.shape[:-1])}"
        )
    _check_temperature(temperature)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if temperature != 1.0:
        logits = logits.to(dtype) / temperature
    # The dtype raises bf16 inside the kernel: no fp32 copy of z.
    return torch.log_softmax(logits, -1, dtype=dtype)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive\n  got: {temperature}\n  expected: a number above 0")


def _entropy(log_p: Tensor) -> Tensor:
    """Entropy [...] of distributions [..., V]."""
    # Written with log p = z - logsumexp(z): the same quantity without the cancellation that large logits
    # would bring. The clamp turns 0 * -inf, which is nan, into 0 * (lowest number) = 0, in the gradient too.
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)


def _pick(log_p: Tensor, ids: Tensor) -> Tensor:
    """The entry [...] of each row of log_p [..., V] that ids [...] names."""
    return log_p.gather(-1, ids.long().unsqueeze(-1)).squeeze(-1)
