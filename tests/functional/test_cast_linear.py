"""The values and gradients of nn.Linear under autocast, without its copies of weights."""

import copy

import pytest
import torch
from torch import nn

from rlif_lightning.functional.cast_linear import CastLinear, cast_linear


def run(layer, x, autocast):
    """Output, gradients of everything, and what is kept for the backward pass."""
    x, kept = x.clone().requires_grad_(), []
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with keeping, torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        out = layer(x)
    out.float().square().sum().backward()
    return [out, x.grad, *(p.grad for p in layer.parameters())], kept


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 40), (3, 5, 40)])
def test_as_torch(shape, bias, autocast):
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(40, 24, bias=bias)
    for p in plain.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    other = nn.Sequential(copy.deepcopy(plain))
    cast_linear(other)
    assert type(other[0]) is CastLinear
    x = torch.randn(shape, generator=generator)
    (want, before), (got, after) = run(plain, x, autocast), run(other, x, autocast)
    assert got[0].dtype == want[0].dtype == (torch.bfloat16 if autocast else torch.float32)
    assert torch.equal(got[0], want[0])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7 * float(b.detach().abs().max()))
    weights = [t for t in after if sorted(t.shape) == [24, 40]]
    assert [t.data_ptr() for t in weights] == [other[0].weight.data_ptr()]
    copies = [t for t in before if sorted(t.shape) == [24, 40] and t.dtype == torch.bfloat16]
    assert len(copies) == autocast  # what it is good for


def test_without_gradient_and_frozen_as_torch():
    layer = nn.Sequential(nn.Linear(40, 24).requires_grad_(False).bfloat16())
    x = torch.randn(5, 40, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        want = layer(x)
        cast_linear(layer)
        assert torch.equal(layer(x), want)
        with torch.no_grad():
            assert torch.equal(layer(x), want)
