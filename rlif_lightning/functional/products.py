"""Matrix products in float32 on a CPU, by oneDNN where MKL would leave half of the processor idle.

On x86 torch multiplies float32 matrices by Intel's MKL, which makes do with AVX2 on an AMD processor that has
AVX-512. oneDNN, which torch carries for half precision, takes what is there: products of 32 rows or more are then 1.3
to 2.4 times as fast (docs/benchmarks.md). Everywhere else, and for all but float32, these are torch's own products.

``torch.backends.mkldnn.flags(enabled=False)`` switches it off.
"""

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

WORTH = 2**20
"""Multiplications below which a call of oneDNN costs more than it saves."""

PIECE = 4096
"""Rows of a vocabulary's weight at a time: the piece of the result stays in the processor's cache."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`torch.nn.functional.linear`, with gradient (once).

    Args:
        x: [.., K].
        weight: [N, K].
        bias: [N].

    Returns:
        [.., N].
    """
    if not _suits(x, weight, x.numel() * len(weight)):
        return nn.functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def multiply_into(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Write x weight' into ``out``, without gradient.

    Args:
        out: [M, V].
        x: [M, H].
        weight: [V, H].
    """
    if not _suits(x, weight, out.numel() * x.shape[1]):
        return torch.mm(x, weight.t(), out=out)
    for rows in _pieces(len(weight)):
        out[:, rows] = _product(x, weight[rows])
    return out


def multiply(a: Tensor, weight: Tensor) -> Tensor:
    """A weight, without gradient.

    Args:
        a: [M, V].
        weight: [V, H].

    Returns:
        [M, H].
    """
    if not _suits(a, weight, a.numel() * weight.shape[1]):
        return a @ weight
    return _product(a, weight.t())


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a' b in place, without gradient, also where the factors have less precision than the total.

    Args:
        total: [V, H].
        a: [M, V].
        b: [M, H], of the dtype of a.
    """
    if a.dtype != total.dtype:
        total += a.t() @ b
    elif not _suits(a, b, a.numel() * b.shape[1]):
        total.addmm_(a.t(), b)
    else:
        for rows in _pieces(len(total)):
            total[rows] += _product(a[:, rows].t(), b.t())


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., K] to [.., N]."""
        return linear(x, self.weight, self.bias)


def speed_up(model: nn.Module) -> None:
    """Let the linear layers of a model be :class:`Linear`, in place, on a machine where that is faster.

    Nothing else about them changes: parameters, names, type checks by ``isinstance``.
    """
    if is_faster_here():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear


@cache
def is_faster_here() -> bool:
    """Whether this is an AMD processor with AVX-512, and torch has both libraries."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _processor()
    )


def _processor() -> str:
    """What the processor says of itself."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    with info.open() as lines:
        return next((line for line in lines if line.startswith("vendor_id")), "")


def _suits(x: Tensor, weight: Tensor, multiplications: int) -> bool:
    """Whether oneDNN takes the product, and is worth the call."""
    return (
        multiplications >= WORTH
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and is_faster_here()
        and torch.backends.mkldnn.enabled  # type: ignore[attr-defined]
        and not torch.is_autocast_enabled("cpu")
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X weight' + bias. The weight is contiguous or the transpose of what is: others can be very slow."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _pieces(rows: int) -> list[slice]:
    return [slice(start, min(start + PIECE, rows)) for start in range(0, rows, PIECE)]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1]).contiguous()  # [M, N]
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _product(rows, weight.t()).view_as(x)
        if ctx.needs_input_grad[1]:
            dw = _product(rows.t(), x.reshape(len(rows), -1).contiguous().t())
        if ctx.needs_input_grad[2]:
            db = rows.sum(0)
        return dx, dw, db
