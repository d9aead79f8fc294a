"""Files of a stranger who adds a reward on the whole next-token distribution, each with its formula as a loop."""

import importlib.util
import math
import sys

IMPORTS = """\
import torch
from torch import Tensor
from rlif_lightning.rewards import InternalReward


"""
FILES = {
    "Gini": """\
class Gini(InternalReward):
    def statistic(self, logp: Tensor) -> Tensor:  # [..., V] -> [...]
        p = logp.exp().sort(-1).values
        v = p.shape[-1]
        return (2 * (p * torch.arange(1, v + 1, device=p.device)).sum(-1) - v - 1) / v
""",
    "Renyi": """\
class Renyi(InternalReward):
    def statistic(self, logp: Tensor) -> Tensor:  # minus the entropy of order 2, in nats
        return (2 * logp).logsumexp(-1)
""",
    "TopMass": """\
class TopMass(InternalReward):
    def __init__(self, tokens: int = 20, aggregation: str = "mean", annotator: str = "policy", weight: float = 1.0):
        super().__init__(aggregation, annotator=annotator, weight=weight)
        self.tokens = tokens

    def statistic(self, logp: Tensor) -> Tensor:
        return logp.topk(self.tokens, -1).values.exp().sum(-1)
""",
}
LOOPS = {
    # half the mean absolute difference of two entries, over their mean 1/V
    "Gini": lambda p: sum(abs(x - y) for x in p for y in p) / (2 * len(p)),
    "Renyi": lambda p: math.log(math.fsum(x * x for x in p)),
    "TopMass": lambda p: math.fsum(sorted(p)[-20:]),
}


def write(folder, name, module="my_rewards"):
    """The file of one reward, in a user's working directory."""
    path = folder / f"{module}.py"
    path.write_text(IMPORTS + FILES[name])
    return path


def load(folder, name, module="my_rewards"):
    """The class in that file."""
    spec = importlib.util.spec_from_file_location(module, write(folder, name, module))
    loaded = importlib.util.module_from_spec(spec)
    sys.modules.pop(module, None)
    spec.loader.exec_module(loaded)
    return getattr(loaded, name)
