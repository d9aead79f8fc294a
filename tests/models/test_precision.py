"""Precisions without a Trainer, against Lightning's Trainer."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from rlif_lightning.errors import UserError
from rlif_lightning.models.precision import autocast, convert, precision_name

CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore:.*AMP with fp16")
@pytest.mark.parametrize(
    "precision", [None, 32, 64, "bf16", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"]
)
def test_a_forward_is_that_of_the_trainer(precision):
    trainer = Trainer(accelerator="cpu", precision=precision, logger=False, enable_progress_bar=False)
    name = precision_name(precision, "cpu")
    assert name == trainer.precision
    outs = []
    for context, change in (
        (trainer.precision_plugin.forward_context(), trainer.precision_plugin.convert_module),
        (autocast(name, CPU), lambda model: convert(model, name, CPU)),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        change(model)
        weight = model[0].weight
        with context:
            outs.append([weight.dtype, torch.ones(2).dtype, model(torch.ones(1, 8, dtype=weight.dtype))])
    assert outs[0][:2] == outs[1][:2]
    assert outs[0][2].dtype == outs[1][2].dtype and torch.equal(outs[0][2], outs[1][2])
    assert torch.get_default_dtype() == torch.float32


def test_what_only_a_trainer_has_is_refused():
    with pytest.raises(UserError, match=r"(?s)needs a Trainer.*transformer-engine"):
        autocast(precision_name("transformer-engine"), CPU)
