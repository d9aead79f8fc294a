"""Numbers out of bounds: are they refused, is it said where nothing is learned, do weights stay finite?

    python -m benchmarks.faults.numbers     # about 5 minutes of one core

No case may end in a traceback or leave a checkpoint with weights that are not finite. Whatever else happens, a user
who looks at the screen must see that something is wrong: an error, or a line that a sound run does not print.
"""

import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults import compare, runs
from benchmarks.faults.runs import Calls, Run
from benchmarks.faults.table import Options, Row, run

Case = tuple[str, list[str], bool, Callable[[Calls], None] | None]
"""Its name, settings, whether they must be refused, and what is done to the run."""

QUICK = [
    "--trainer.max_steps=8", "--checkpoint.every=2", "--evaluation.every=0", "--evaluation.n=8",
    "--rollout.prompts_per_step=4", "--rollout.group_size=4",
]  # fmt: skip
LR = "--model.optimizer.init_args.lr"
SHORT = "--rollout.max_new_tokens=1"
REFUSED = [
    "--model.kl_coefficient=.nan", "--model.kl_coefficient=.inf", "--model.clip_low=.nan", f"{LR}=.nan", f"{LR}=.inf",
    f"{LR}=-0.1", "--rollout.temperature=.nan", "--rollout.temperature=.inf", "--rollout.temperature=1e-30",
    "--rollout.min_spread=.nan", "--rollout.top_p=.nan", "--rollout.importance_cap=.nan", "--guard.drop=.nan",
    "--trainer.gradient_clip_val=.nan", "--trainer.gradient_clip_val=-1.0", "--trainer.precision=16-true",
    "--rollout.rewards=[{class_path: SelfCertainty, init_args: {weight: .nan}}]",
    "--rollout.rewards=[{class_path: SelfCertainty, init_args: {weight: .inf}}]",
]  # fmt: skip
IDLE = {  # accepted, and nothing good can come of it
    "lr 1000": [f"{LR}=1000.0"],
    "lr 1000, not clipped": [f"{LR}=1000.0", "--trainer.gradient_clip_val=null"],
    "SGD with lr 1e8": ["--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 1.0e8}}"],
    "kl_coefficient 1e30": ["--model.kl_coefficient=1e30"],
    "entropy_coefficient 1e30": ["--model.entropy_coefficient=1e30"],
    "temperature 1e-4": ["--rollout.temperature=1e-4"],
    "temperature 1e6": ["--rollout.temperature=1e6"],
    "all completions cut off and masked": [SHORT, "--rollout.mask_truncated=true"],
    "all completions cut off and masked, dapo": [SHORT, "--rollout.mask_truncated=true", "--model.loss=dapo"],
    "all lengths equal": [SHORT, "--rollout.rewards=[{class_path: Length, init_args: {prefer: long}}]"],
    "a band that leaves all out": ["--rollout.agreement_band=[0.0, 0.0]"],
    "min_spread 1000": ["--rollout.min_spread=1000"],
}
WRONG = (
    "nan",
    "nan later",
    "infinite",
    "some -infinite",
    "some nan",
    "constant",
    "1e37 times",
    "3e38 apart",
    "complex",
)
NOTHING = ("a column", "a number", "too short", "a list", "None", "raises")
REWARDS = '''
import torch
from rlif_lightning.rewards import Reward

calls = 0


class Odd(Reward):
    """Something is wrong with it."""

    def __init__(self, how: str, weight: float = 1.0):
        super().__init__(weight)
        self.how = how

    def __call__(self, rollout):
        global calls
        calls += 1
        x = rollout.statistics().self_certainty.sum(1) / rollout.samples.lengths
        some = torch.arange(len(x)) % 3 == 0
        if self.how == "raises":
            raise KeyError("answer")
        return {
            "nan": lambda: x * torch.nan,
            "nan later": lambda: x * torch.nan if calls > 2 else x,
            "infinite": lambda: x * torch.inf,
            "some -infinite": lambda: x.masked_fill(some, -torch.inf),
            "some nan": lambda: x.masked_fill(some, torch.nan),
            "constant": lambda: torch.ones_like(x),
            "1e37 times": lambda: x * 1e37,
            "3e38 apart": lambda: torch.where(some, 3e38, -3e38),
            "complex": lambda: x.to(torch.complex64),
            "a column": lambda: x[:, None],
            "a number": lambda: x.mean(),
            "too short": lambda: x[:-1],
            "a list": lambda: x.tolist(),
            "None": lambda: None,
        }[self.how]()
'''


def lines_of(said: str) -> set[tuple[str, ...]]:
    """The lines of a log, of each its words: no numbers, no paths."""
    return {tuple(re.findall(r"[A-Za-z_]{2,}", re.sub(r"\S*/\S*", "", text))) for text in re.split(r"[\r\n]", said)}


def judged(name: str, words: list[str], sound: Run, must_refuse: bool, prepare: Any = None) -> Row:
    """Run, and look at what is said and at the weights."""
    folder = re.sub(r"\W+", "-", name)
    done = Run([*words, "--runs", folder], f"{folder}.log", prepare=prepare).wait(120)
    finite = compare.finite(runs.newest(folder))
    tells = done.code != 0 or bool(lines_of(done.said) - lines_of(sound.said))
    right = finite and tells and not done.traceback and not done.hangs and (done.refused or not must_refuse)
    saved = "" if finite else "; saved weights that are not finite"
    return Row(name, f"{done.ending}{saved}{'' if tells else ', without a word'}", right)


def poisoned(at: int) -> Callable[[Calls], None]:
    """The loss of one update is NaN."""

    def prepare(_: Calls) -> None:
        from rlif_lightning.training.module import RLIFModule

        step, calls = RLIFModule.training_step, iter(range(1, 1 << 30))
        RLIFModule.training_step = lambda *args: step(*args) * (math.nan if next(calls) == at else 1.0)  # type: ignore[method-assign]

    return prepare


def model_with(value: float, toy: Path) -> str:
    """A model folder with such a number among its weights."""
    from safetensors.torch import load_file, save_file

    folder = Path(f"model-{value}").absolute()
    shutil.copytree(toy, folder)
    weights = load_file(folder / "model.safetensors")
    next(w for name, w in weights.items() if "mlp" in name).view(-1)[5] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def numbers(options: Options) -> Iterator[Row]:
    """The harness."""
    from rlif_lightning.toy import toy_model

    Path("odd.py").write_text(REWARDS)
    fit = [*options.fit, *QUICK]
    sound = Run([*fit, "--runs", "sound"], "sound.log").wait()
    assert sound.code == 0, "see sound.log"
    toy = runs.untrained() if options.tiny else toy_model(progress=False)
    cases: list[Case] = [(text.removeprefix("--"), [text], True, None) for text in REFUSED]
    cases += [(name, words, False, None) for name, words in IDLE.items()]
    for how in (*WRONG, *NOTHING):
        reward = f"--rollout.rewards=[{{class_path: odd.Odd, init_args: {{how: {how!r}}}}}]"
        cases.append((f"a reward that is {how}", [reward], how in NOTHING[:-1], None))
    for x in (math.nan, math.inf):
        cases.append((f"a weight that is {x}", [f"--model.name={model_with(x, toy)}"], True, None))
    for at, every in ((6, 3), (5, 3), (5, 1)):
        words = [f"--checkpoint.every={every}", "--trainer.max_steps=12"]
        cases.append((f"the loss of update {at} is NaN, checkpoint.every {every}", words, False, poisoned(at)))
    for name, words, must_refuse, prepare in options.drawn(cases):
        yield judged(name, [*fit, *words], sound, must_refuse, prepare)


if __name__ == "__main__":
    run(numbers)
