"""Linear layers that keep no copy of their weight in half precision for the backward pass."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class CastLinear(nn.Linear):
    """``nn.Linear`` that rounds its weight anew in the backward pass of autocast, with gradient (once).

    Autograd keeps what a product needs, which under autocast is the rounded copy: when the backward pass begins all
    copies of a model's weights are there, though the weights themselves may have been let go of meanwhile. This one
    keeps the weight. The values are the same, and so are the gradients.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[.., K] to [.., N]."""
        device = x.device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        if half == self.weight.dtype or not torch.is_grad_enabled():
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(half)
        return _CastLinear.apply(x.to(half), self.weight, bias)


def cast_linear(model: nn.Module) -> None:
    """Let the linear layers of a model be :class:`CastLinear`, in place."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = CastLinear


class _CastLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])  # [M, N]
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = (rows @ weight.to(x.dtype)).view_as(x)
        if ctx.needs_input_grad[1]:
            dw = (rows.t() @ x.reshape(len(rows), -1)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = rows.sum(0)
        return dx, dw, db
