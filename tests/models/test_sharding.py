"""Weights shared out, in a group of this process alone; tests/test_fsdp2.py trains with two."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from rlif_lightning.models import fsdp2 as sharding
from rlif_lightning.models.fsdp2 import GatheredPolicy, runs_inside, shard
from rlif_lightning.models.references import References
from rlif_lightning.models.strategies import FSDP2Strategy
from rlif_lightning.models.trainable import trainable, trainable_weights
from tests.conftest import make_model


@pytest.fixture
def policy():
    """A tiny Qwen2, shared out."""
    if torch.distributed.is_initialized():  # a strategy that another test has set up in this process
        torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield shard(make_model(), init_device_mesh("cpu", (1,)))
    torch.distributed.destroy_process_group()


def test_references_are_kept_where_they_are_written(policy):
    references = References()
    references.create({"ema"}, policy, torch.float32, torch.device("cpu"))
    assert references.to_checkpoint(keep=False) == {"ema": {}}
    kept = references.to_checkpoint()["ema"]
    assert not any(isinstance(weight, DTensor) for weight in kept.values())
    for weight, own in zip(kept.values(), trainable(policy).values(), strict=True):
        assert torch.equal(weight, own.full_tensor())


def test_copies_are_made_where_they_are_kept(policy):
    assert trainable_weights(policy, keep=False) == {}
    copies = trainable_weights(policy)
    start = make_model()
    assert copies.keys() == dict(start.named_parameters()).keys()
    assert all(torch.equal(copies[name], weight) for name, weight in start.named_parameters())


def test_an_optimiser_state_may_hold_plain_numbers(policy):
    """Such as the step of an optimiser that counts in Python."""
    strategy, stored = FSDP2Strategy(), {}
    strategy.optimizers = [torch.optim.AdamW(policy.parameters())]
    for n, weight in enumerate(policy.parameters()):
        stored[n] = {"step": 3, "exp_avg": torch.full(weight.shape, 0.5)}
    groups = strategy.optimizers[0].state_dict()["param_groups"]
    strategy.load_optimizer_state_dict({"optimizer_states": [{"state": stored, "param_groups": groups}]})
    for own in strategy.optimizers[0].state.values():
        assert own["step"] == 3 and isinstance(own["exp_avg"], DTensor)
        assert own["exp_avg"].full_tensor().eq(0.5).all()


def test_weights_are_gathered_once_for_each_use(policy, monkeypatch):
    """And none for a user who is done: after another version the policy's are gone until they are asked for."""
    gathered = []
    monkeypatch.setattr(sharding, "gather", lambda weight: gathered.append(1) or weight.full_tensor())
    own = dict(policy.named_parameters())
    others = {name: weight.detach() + 1 for name, weight in own.items()}
    one = GatheredPolicy(make_model(), torch.device("cpu"), torch.float32)
    with one.current(policy) as model:
        with one.current(policy):
            pass
        assert len(gathered) == len(own)
        with one.holding("frozen", others):
            assert all(torch.equal(w, others[name].full_tensor()) for name, w in model.named_parameters())
        assert len(gathered) == 2 * len(own)
        assert all(w.numel() == 0 for w in model.parameters())
        with one.current(policy):
            assert all(torch.equal(w, own[name].full_tensor()) for name, w in model.named_parameters())
    assert all(w.numel() == 0 for w in model.parameters())


def test_no_rounded_copy_of_a_layer_waits_for_the_backward(policy):
    """Under autocast autograd would keep one of each gathered weight, and sharing out would save nothing."""
    shapes = {frozenset(p.shape) for layer in policy.model.layers for p in layer.parameters() if p.ndim == 2}
    kept = []
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    body = runs_inside(lambda policy: policy.model(input_ids=torch.arange(3, 36).view(3, 11)).last_hidden_state)
    with keeping, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        out = body(policy)
    weights = [t for t in kept if t.ndim == 2 and frozenset(t.shape) in shapes]
    assert weights and {t.dtype for t in weights} == {torch.float32}
    out.float().square().mean().backward()
    assert all(p.grad is not None for layer in policy.model.layers for p in layer.parameters())
