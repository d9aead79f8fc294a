"""Per-token statistics of the distribution that a token was drawn from."""

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """Statistics of softmax(z / temperature) for each token, in nats."""

    logprob: Tensor  # [...] log p(token), at most 0
    entropy: Tensor  # [...] H(p), from 0 to log V
    self_certainty: Tensor  # [...] KL(U || p), at least 0, unbounded above
    expected_agreement: Tensor | None = None  # [...] sum_j p_j^2, from 1/V to 1; only where asked for
    margin: Tensor | None = None  # [...] largest probability minus the second largest; only where asked for

    def map(self, change: Callable[[Tensor], Tensor]) -> "TokenStats":
        """The same statistics after a change of each tensor."""
        return TokenStats(**{name: change(x) for name, x in self._asdict().items() if x is not None})


EXTRA = frozenset({"expected_agreement", "margin"})
"""Statistics that cost more work over the vocabulary, and are taken only where a reward asks for them."""


def token_stats(logits: Tensor, ids: Tensor, temperature: float = 1.0, extra: Collection[str] = ()) -> TokenStats:
    """Log-probability, entropy and self-certainty of each token, differentiable in the logits.

    With z the tempered logits, p = softmax(z) and U the uniform distribution over the vocabulary::

        logprob        = z[id] - logsumexp(z)
        entropy        = logsumexp(z) - sum_j p_j z_j
        self_certainty = KL(U || p) = logsumexp(z) - mean_j z_j - log V
        expected_agreement = sum_j p_j^2       (RLSC, arXiv 2506.06395: the chance that two draws agree)
        margin         = p_(1) - p_(2)         (the two largest probabilities)

    Self-certainty is that of arXiv 2505.19590 with the log V left in, so a uniform p scores 0.

    A vocabulary entry with a logit of -inf has probability 0: it adds nothing to the entropy and makes the
    self-certainty +inf, its true value. Hand over unfiltered logits where self-certainty is the reward.

    Args:
        logits: [..., V], the rows that predict the tokens; bf16 and fp16 are raised to fp32.
        ids: [...] token ids in 0 .. V-1, at padding too.
        temperature: Divides the logits first.
        extra: Of :data:`EXTRA`, what to take beside the first three.

    Returns:
        Tensors [...], fp32 (float64 for float64 logits).

    Raises:
        ValueError: The ids do not match the logits' rows, or the temperature is not positive.
    """
    log_p = _log_softmax(logits, ids, temperature)  # [..., V]
    p = log_p.exp()  # [..., V]
    margin = None
    if "margin" in extra:
        first, second = p.topk(2, -1).values.unbind(-1)
        margin = first - second
    return TokenStats(
        logprob=_pick(log_p, ids),
        entropy=_entropy(p, log_p),
        self_certainty=-log_p.mean(-1) - math.log(log_p.shape[-1]),
        expected_agreement=p.square().sum(-1) if "expected_agreement" in extra else None,
        margin=margin,
    )


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """The log-probability alone, for the forward with gradient; see :func:`token_stats`.

    Args:
        logits: [..., V].
        ids: [...] token ids in 0 .. V-1.
        temperature: Divides the logits first.

    Returns:
        [...] log p(token) in nats, bit for bit that of :func:`token_stats`.

    Raises:
        ValueError: The ids do not match the logits' rows, or the temperature is not positive.
    """
    return _pick(_log_softmax(logits, ids, temperature), ids)


def logprobs_and_entropy(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy alone, for a forward with gradient through both; see :func:`token_stats`.

    Args:
        logits: [..., V].
        ids: [...] token ids in 0 .. V-1.
        temperature: Divides the logits first.

    Returns:
        [...] log p(token) and [...] H(p) in nats, bit for bit those of :func:`token_stats`.

    Raises:
        ValueError: The ids do not match the logits' rows, or the temperature is not positive.
    """
    log_p = _log_softmax(logits, ids, temperature)  # [..., V]
    return _pick(log_p, ids), _entropy(log_p.exp(), log_p)


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


def _entropy(p: Tensor, log_p: Tensor) -> Tensor:
    """Entropy [...] of distributions [..., V]."""
    # Written with log p = z - logsumexp(z): the same quantity without the cancellation that large logits
    # would bring. The clamp turns 0 * -inf, which is nan, into 0 * (lowest number) = 0, in the gradient too.
    return -(p * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)


def _pick(log_p: Tensor, ids: Tensor) -> Tensor:
    """The entry [...] of each row of log_p [..., V] that ids [...] names."""
    return log_p.gather(-1, ids.long().unsqueeze(-1)).squeeze(-1)
