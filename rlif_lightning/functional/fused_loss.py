"""The loss and its gradients from hidden states in one pass over the logits, for a head that is a weight alone.

Plain autograd computes the logits, keeps them, and comes back for the gradients; checkpointed chunks compute them
twice. But for a loss that is a sum over tokens, each with its own log-probability
(:attr:`LossSettings.is_separable`), the gradient in a token's logits z is known as soon as its own row
is: with s the scale and t the temperature::

    log p = log_softmax(s z / t)
    dz    = c s / t (onehot(id) - p),    c = d loss / d log p[id]
    dh    = dz W,    dW = dz' h

So each chunk of tokens goes through three matrix products at once, and no logits outlive their chunk. The backward
only multiplies by the gradient that comes in.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlif_lightning.functional.chunked import LinearHead, chunk_rows, exponentials
from rlif_lightning.functional.loss_records import LossInputs, LossSettings, PolicyLoss
from rlif_lightning.functional.losses import nonzero, policy_loss, token_loss, token_weights


def fused_policy_loss(
    hidden: Tensor,  # [N, T, H] that predict the tokens; anything outside the completion mask
    weight: Tensor,  # [V, H] of the output embeddings, trainable or frozen, tied or not
    ids: Tensor,  # [N, T] token ids, in 0 .. V-1 inside the completion mask
    completion_mask: Tensor,  # [N, T] bool, the tokens that go through the head
    inputs: LossInputs,  # their mask lies within the completion mask
    denominator: Tensor | float,  # D of the window
    settings: LossSettings,  # of a separable loss
    *,
    temperature: float = 1.0,  # divides the logits
    scale: float = 1.0,  # multiplies the logits
    chunk: int | None = None,  # tokens at a time; None: chunk_rows
) -> PolicyLoss:
    """:func:`policy_loss` of the log-probabilities of ``scale * hidden @ weight.T``, with gradient in both, once.

    Where a reference was scored over the same completion mask in the same chunks
    (:func:`~rlif_lightning.functional.chunked.chunked_logprobs` with a :class:`LinearHead`, under the same autocast),
    equal weights have a KL of exactly 0. The sum of the entropies is 0.

    Raises:
        ValueError: The loss is not separable; or as in :func:`policy_loss`.
    """
    mask = inputs.mask
    _check(hidden, inputs, settings, ids=ids, completion_mask=completion_mask)
    chosen = completion_mask.flatten().nonzero().squeeze(1)  # [M]

    def flat(x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, chosen)  # [M, ...]

    tokens = inputs.by_token().map(flat)
    weights = token_weights(mask, settings, torch.promote_types(hidden.dtype, torch.float32))  # [N, T]
    weights = flat(weights / nonzero(denominator, mask.device))

    def weighted(logprob: Tensor, rows: slice) -> Tensor:
        return token_loss(logprob, tokens.map(lambda x: x[rows]), settings).loss * weights[rows]

    total, logprob = fused_loss(
        flat(hidden),
        weight,
        flat(ids),
        weighted,
        temperature=temperature,
        scale=scale,
        chunk=chunk_rows(len(weight)) if chunk is None else chunk,
    )
    padded = logprob.new_zeros(mask.shape).masked_scatter_(completion_mask, logprob)  # [N, T]
    return policy_loss(padded, inputs, denominator, settings)._replace(loss=total)


def _check(hidden: Tensor, inputs: LossInputs, settings: LossSettings, ids: Tensor, completion_mask: Tensor) -> None:
    if not settings.is_separable:
        got = settings.name if settings.entropy_coefficient is None else "an entropy"
        raise ValueError(
            f"the fused loss needs a separable one\n  got: {got}\n  expected: any loss but gspo, without an entropy"
        )
    inputs.check_shapes(hidden[..., 0], ids=ids, completion_mask=completion_mask)
    if (inputs.mask & ~completion_mask).any():
        raise ValueError("mask holds tokens outside the completion mask\n  expected: a part of it")


def fused_loss(
    hidden: Tensor,  # [M, H] that predict the tokens
    weight: Tensor,  # [V, H]
    ids: Tensor,  # [M] token ids in 0 .. V-1
    loss: Callable[[Tensor, slice], Tensor],
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The sum [] of a separable loss over tokens, with gradient, and the log-probabilities [M] in nats without one.

    ``loss`` takes the log-probabilities [chunk] of a slice of the tokens to their losses [chunk], weights and
    denominator included; a token's loss takes no gradient from another's log-probability. Products are in the dtype
    of autocast where it is enabled, everything else in fp32 at least: the gradient of the weight is a sum in fp32
    over chunks. The gradients are given away in the first backward: a second one is a RuntimeError.
    """
    total, logprob = _FusedLoss.apply(hidden, weight, ids, loss, temperature, scale, chunk, torch.is_grad_enabled())
    return total, logprob


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        loss: Callable[[Tensor, slice], Tensor],
        temperature: float,
        scale: float,
        chunk: int,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        head = LinearHead(weight, scale)
        logprob = hidden.new_empty(len(ids), dtype=dtype)
        total = hidden.new_zeros((), dtype=dtype)
        # A gradient scaler multiplies the loss, and so these gradients, in the backward alone: before that they would
        # be rounded to 0 in float16.
        small = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        dh = torch.zeros_like(hidden, dtype=small) if with_gradient and ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight, dtype=dtype) if with_gradient and ctx.needs_input_grad[1] else None
        for rows, values, e, sums in exponentials(hidden, head, ids, temperature, chunk):
            logprob[rows] = values
            with torch.enable_grad():
                leaf = values.detach().requires_grad_()
                part = loss(leaf, rows).sum()
            total += part.detach()
            if dh is None and dw is None:
                continue
            (c,) = torch.autograd.grad(part, leaf)
            live = c.nonzero().squeeze(1)  # clipped, masked or without advantage: no product is spent on a token
            if not len(live):
                continue
            here = slice(rows.start, rows.stop)
            if len(live) < len(c):
                e, c, sums, here = e[live], c[live], sums[live], live + rows.start
            # From here on e is sums x (p - onehot); the rest of the factor goes to the small side of each product.
            e[torch.arange(len(c), device=c.device), ids[here].long()] -= sums
            c = c * -(scale / temperature)
            if head.weight.dtype == torch.float16:  # whose range the sums may exceed
                e.div_(sums[:, None])
            else:
                c = c / sums
            e, c = e.to(head.weight.dtype), c[:, None]
            if dh is not None:
                dh[here] = (c * (e @ head.weight)).to(dh.dtype)
            if dw is not None:
                _add_product(dw, e.t(), c * hidden[here])
        ctx.gradients = dh, dw
        ctx.mark_non_differentiable(logprob)
        return total, logprob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("fused_loss: a second backward; its gradients were given away in the first")
        (dh, dw), ctx.gradients = ctx.gradients, None
        if dh is not None:
            dh.mul_(gradient)
        if dw is not None:
            dw.mul_(gradient)  # autograd casts it to the weight's dtype
        return dh, dw, *[None] * 6


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b in place, in the precision of a, which may be less than that of the total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b.to(a.dtype))
    elif a.dtype == torch.float16:  # small numbers are rounded to 0: its range is used from the top
        largest = b.abs().amax().clamp_min(torch.finfo(total.dtype).tiny)
        total += (a @ (b / largest).to(a.dtype)).to(total.dtype) * largest
    else:
        total += a @ b.to(a.dtype)
