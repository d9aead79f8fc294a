"""The problems that a run is trained on, and whether a continued one has the same."""

from array import array
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from rlif_lightning.data.prompts import Prompt
from rlif_lightning.errors import UserError

CHECKPOINT = "RolloutCheckpoint"  # the callback whose state holds the marks


def problem_marks(prompts: Sequence[Prompt]) -> Tensor:
    """A short mark of each problem [problems] int32: of the prompt's tokens and the right answer."""
    golds = ((g := p.problem.gold) and (g.text, g.unit, g.tolerance) for p in prompts)
    texts = (array("q", p.ids).tobytes() + ascii(gold).encode() for p, gold in zip(prompts, golds, strict=True))
    return torch.frombuffer(bytearray(b"".join(blake2b(t, digest_size=4).digest() for t in texts)), dtype=torch.int32)


def check_problems(trainer: Any, checkpoint: Mapping[str, Any]) -> bool:
    """Refuse to continue a run on other training problems, or with rollouts of another size.

    Returns whether the checkpoint tells its problems: those of older versions don't.
    """
    data = trainer.datamodule
    (place,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    data.train_dataloader().load_state_dict(place)  # refuses another number of problems
    prompts = data.prompts["train"]
    was, now = checkpoint["callbacks"].get(CHECKPOINT, {}).get("problems"), problem_marks(prompts)
    if was is None:
        return False
    differ = (was != now).nonzero().flatten().tolist()
    if differ:
        text = f"{len(differ)} of {len(prompts)} differ, the first is number {differ[0] + 1}: "
        in_other_order = torch.equal(was.sort().values, now.sort().values)
        raise UserError(
            "The checkpoint was trained on other problems, prompts or answers",
            got="the same ones in another order" if in_other_order else text + repr(prompts[differ[0]].text[:60]),
            expected="those of the run so far",
            do="leave data.train.*, the prompt's template and the files as they were, or begin a new run",
        )
    return True
