"""What a run says about the CPU that it computes on."""

import pytest
import torch
from torch import nn

from rlif_lightning.models.cpu import TINY, recommend_bfloat16


@pytest.mark.parametrize("weights", [TINY, TINY - 1])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("able", ["avx512_bf16", "amx_bf16", None])
def test_bfloat16_is_recommended_where_it_is_faster(weights, precision, able, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {} if able is None else {able: True, "avx2": True})
    with torch.device("meta"):
        model = nn.Linear(weights, 1, bias=False)
    with caplog.at_level("INFO"):
        recommend_bfloat16(model, precision)
    assert ("bf16-mixed" in caplog.text) == (weights >= TINY and precision == "32-true" and able is not None)
