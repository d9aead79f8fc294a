"""Products by oneDNN against float64, and where they are used at all."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rlif_lightning.functional import products
from rlif_lightning.functional.products import Linear, add_product, linear, multiply, multiply_into, speed_up


@pytest.fixture(autouse=True)
def one_dnn(monkeypatch):
    """Any CPU has oneDNN: take it here whether it is faster or not, for products of any size. Counts its products."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    calls = []

    def product(*args):
        calls.append(args)
        return real(*args)

    real = products._product
    monkeypatch.setattr(products, "_product", product)
    monkeypatch.setattr(products, "is_faster_here", lambda: True)
    monkeypatch.setattr(products, "WORTH", 0)
    monkeypatch.setattr(products, "PIECE", 128)
    return calls


def close(got, want):
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 40), (3, 5, 40), (2, 3, 5, 40), (1, 40)])
@pytest.mark.parametrize("frozen", [(), (0,), (1,)])
def test_linear_and_its_gradients(one_dnn, shape, bias, frozen):
    torch.manual_seed(0)
    tensors = [torch.randn(shape), torch.randn(60, 40), *([torch.randn(60)] if bias else [])]
    ours = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
    wide = [t.double().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
    got, want = linear(*ours), F.linear(*wide)
    close(got.detach(), want.detach())
    direction = torch.randn(want.shape)
    got.backward(direction)
    want.backward(direction.double())
    for i, (x, y) in enumerate(zip(ours, wide, strict=True)):
        assert (x.grad is None) == (i in frozen)
        if x.grad is not None:
            close(x.grad, y.grad)
    assert len(one_dnn) == 3 - len(frozen)


@pytest.mark.parametrize("layout", [lambda x: x.t().contiguous().t(), lambda x: torch.cat([x, x], 1)[:, :40]])
def test_other_layouts_of_the_input_and_of_its_gradient(layout):
    torch.manual_seed(0)
    x, weight, direction = torch.randn(30, 40), torch.randn(40, 40), torch.randn(30, 40)
    leaf = layout(x).detach().requires_grad_()
    result = linear(leaf, weight)
    close(result.detach(), x.double() @ weight.double().t())
    result.backward(layout(direction))
    close(leaf.grad, direction.double() @ weight.double())


def test_the_products_of_a_vocabulary_in_pieces(one_dnn):
    torch.manual_seed(0)
    m, h, v = 20, 30, 300  # three pieces, the last a part
    a, b, weight = torch.randn(m, v), torch.randn(m, h), torch.randn(v, h)
    buffer = torch.full((m + 5, v), torch.nan)
    assert multiply_into(buffer[:m], b, weight).data_ptr() == buffer.data_ptr()
    close(buffer[:m], b.double() @ weight.double().t())
    close(multiply(a, weight), a.double() @ weight.double())
    total = torch.randn(v, h)
    want = total.double() + a.double().t() @ b.double()
    add_product(total, a, b)
    close(total, want)
    assert len(one_dnn) == 3 + 1 + 3


def test_where_it_is_not_used(one_dnn, monkeypatch):
    x, weight = torch.randn(8, 16), torch.randn(32, 16)

    def all_products(x, weight):
        linear(x, weight)
        y = multiply_into(x.new_empty(len(x), len(weight)), x, weight)
        multiply(y, weight)
        add_product(torch.zeros_like(weight), y, x)

    for dtype in (torch.float64, torch.bfloat16):
        all_products(x.to(dtype), weight.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        all_products(x, weight)
    linear(x.to("meta"), weight.to("meta"))
    monkeypatch.setattr(products, "WORTH", 8 * 16 * 32 + 1)
    all_products(x, weight)
    monkeypatch.setattr(products, "WORTH", 0)
    monkeypatch.setattr(products, "is_faster_here", lambda: False)
    all_products(x, weight)
    assert not one_dnn
    monkeypatch.setattr(products, "is_faster_here", lambda: True)
    all_products(x, weight)
    assert len(one_dnn) == 4


def test_a_model_keeps_all_but_the_class_of_its_linear_layers(one_dnn, monkeypatch):
    class Other(nn.Linear):
        pass

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Sequential(nn.Linear(32, 8, bias=False), Other(8, 8)))
    before, x = copy.deepcopy(model), torch.randn(4, 16)
    monkeypatch.setattr(products, "is_faster_here", lambda: False)
    speed_up(model)
    assert type(model[0]) is nn.Linear
    monkeypatch.setattr(products, "is_faster_here", lambda: True)
    speed_up(model)
    assert [type(m) for m in (model[0], model[2][0], model[2][1])] == [Linear, Linear, Other]
    assert model.state_dict().keys() == before.state_dict().keys()
    model(x).square().sum().backward()
    before(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert len(one_dnn) == 2 + 3  # no gradient in the input
    assert type(copy.deepcopy(model)[0]) is Linear


@pytest.mark.parametrize(("vendor", "capability", "expected"), [
    ("AuthenticAMD", "AVX512", True),
    ("AuthenticAMD", "AVX2", False),
    ("GenuineIntel", "AVX512", False),
])  # fmt: skip
def test_it_is_taken_on_amd_with_avx512(monkeypatch, vendor, capability, expected):
    monkeypatch.undo()
    monkeypatch.setattr(products, "_processor", lambda: f"vendor_id : {vendor}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    products.is_faster_here.cache_clear()
    try:
        assert products.is_faster_here() is expected
    finally:
        products.is_faster_here.cache_clear()
