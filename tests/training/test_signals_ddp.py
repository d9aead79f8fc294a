"""A signal to one of two processes, in a rollout of very different lengths: both end soon, and nothing is lost."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from rlif_lightning.models.checkpoints import read_checkpoint
from tests.processes import SCRIPT, Processes, assert_same_state, differences, finish, start
from tests.short_runs import many_ends

pytestmark = pytest.mark.slow

SLOW = 2  # the step in whose rollout the second process takes more than a minute
BOUND = 60.0  # seconds until all processes are gone; measured: 0.5 until they are saved, and 4 more on a busy machine

# In the slow rollout the second process waits at each token, and says so; the first waits for it.
WAITING = """
import time
from rlif_lightning.grading.grader import Grader
from rlif_lightning.sampling.native import _DrawnTokens
slow, where = int(os.environ["SLOW_STEP"]), os.environ["SLOW_AT"]
state = {"step": -1}

def slowly(cls, name):
    method = getattr(cls, name)

    def waits(self, *args):
        if state["step"] == slow and os.environ.get("LOCAL_RANK") == "1":
            with open(f"{notes}.slow", "w") as file:
                file.write(str(os.getpid()))
            time.sleep(5.0)
        return method(self, *args)

    setattr(cls, name, waits)

slowly(*{"sampling": (_DrawnTokens, "draw"), "grading": (Grader, "_read")}[where])
before = RolloutCallback._collect

def counted_step(self, trainer, module, batch):
    state["step"] = trainer.global_step
    return before(self, trainer, module, batch)

RolloutCallback._collect = counted_step
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def runs(model_folder, problems_file, tmp_path_factory):
    root = tmp_path_factory.mktemp("signals")
    runs = Processes(root, many_ends(model_folder(), root / "model"), problems_file)
    (root / "slow.py").write_text(SCRIPT.replace("main(sys.argv[1:])", "") + WAITING)
    return runs


@pytest.fixture(scope="module")
def whole(runs):
    return runs("whole")


def signalled(runs, name, number, rank, where="sampling", strategy="ddp"):
    """Signal one of two processes in the slow rollout; exit code, seconds until all have ended, what they said."""
    words = [sys.executable, runs.root / "slow.py", "fit", *runs.arguments, "--trainer.devices=2"]
    words += [f"--trainer.strategy={strategy}", "--runs", name, "--checkpoint.every=100"]
    own = {"SLOW_STEP": str(SLOW), "SLOW_AT": where}
    process = start(words, runs.root, runs.environment(name) | own)
    mark, end = Path(f"{runs.root / name}.slow"), time.monotonic() + 300
    while not (mark.exists() and mark.read_text()) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(1.0)  # the first has sampled its share and waits
    second = int(mark.read_text())
    begin = time.monotonic()
    os.kill(second if rank else process.pid, number)
    output, errors = finish(process, 90)  # the other process holds the pipe as long as it runs
    return process.returncode, time.monotonic() - begin, output + errors


CASES = [
    (signal.SIGINT, 1, 130, "sampling", "ddp"),
    (signal.SIGUSR1, 0, 75, "grading", "fsdp2"),
]


@pytest.mark.parametrize(("number", "rank", "code", "where", "strategy"), CASES)
def test_a_rollout_is_dropped_by_both(runs, whole, number, rank, code, where, strategy):
    name = f"{number.name}-{rank}"
    ended, seconds, said = signalled(runs, name, number, rank, where, strategy)
    assert ended == code, said[-3000:]
    assert seconds < BOUND, said[-3000:]
    assert f"Stopped by {number.name} after step {SLOW}" in said
    assert read_checkpoint(runs.root / name / "run" / "1" / "checkpoints" / "last.ckpt")["global_step"] == SLOW
    end = runs(name, "--ckpt_path=last", strategy=strategy)
    if strategy == "ddp":
        assert_same_state(whole, end)
        assert differences(whole, end) == []
