"""Two torchrun groups on loopback, each a "node" of one process: one run, one folder, and its end when one dies."""

import os
import re
import socket
import sys
from pathlib import Path

import pytest

from tests.processes import Processes, Result, differences, finish, largest_difference, start
from tests.short_runs import many_ends

pytestmark = pytest.mark.slow

TOLERANCE = 5e-5  # of any weight after three steps with a learning rate of 0.03
TORCHRUN = Path(__file__).parents[1] / "docs" / "torchrun.sh"
SECONDS = 600  # a loaded machine may take long; where a process hangs, any limit shows it
SHORT = ("--trainer.max_steps=3", "--evaluation.n=3")


@pytest.fixture(scope="module")
def fit(model_folder, problems_file, tmp_path_factory):
    """Runs of one process or of several on one node."""
    root = tmp_path_factory.mktemp("nodes")
    return Processes(root, many_ends(model_folder(), root / "model"), problems_file)


@pytest.fixture(scope="module")
def nodes(fit):
    """``nodes(runs, *settings, strategy="ddp", kill_at=0)``: the result, and what each node said.

    By the script that users are given, with another ``rlif``.
    """
    programs = fit.root / "bin"
    programs.mkdir()
    (programs / "rlif").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{fit.script}" "$@"\n')
    (programs / "rlif").chmod(0o755)

    def run(runs, *settings, strategy="ddp", kill_at=0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank in (0, 1):
            environment = {
                **fit.environment(runs, kill_at, kill_rank="1"),
                "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
                "NODES": "2", "NODE_RANK": str(rank), "GPUS": "1", "STRATEGY": strategy,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
            }  # fmt: skip
            words = ["bash", TORCHRUN, *fit.arguments, *SHORT, "--runs", runs, *settings]
            started.append(start(words, fit.root, environment))
        # The killed one first; then the other has to end by itself, or it is killed and this fails.
        said = ["".join(finish(started[1], SECONDS)), "".join(finish(started[0], SECONDS))][::-1]
        codes = [node.returncode for node in started]
        assert all(code != 0 for code in codes) if kill_at else codes == [0, 0], "\n".join(said)[-3000:]
        return Result(fit.root / runs, 2, "".join(said), max(codes)), said

    return run


@pytest.fixture(scope="module")
def two(nodes):
    """An uninterrupted run on two nodes."""
    return nodes("two")[0]


def test_two_nodes_train_like_one_process_in_one_folder(fit, two):
    assert [path.name for path in (two.runs / "run").iterdir()] == ["1"]
    folders = {note["folder"] for notes in two.notes for note in notes}
    assert len(folders) == 1 and folders.pop().endswith("two/run/1")
    alone = fit("one", *SHORT, processes=1)
    assert largest_difference(alone.weights, two.weights) < TOLERANCE
    for step, name, one, other in differences(alone, two):
        assert float(one) == pytest.approx(float(other), rel=1e-3, abs=1e-5), (step, name)


def test_a_killed_process_ends_the_other_and_the_run_continues(nodes, two):
    """The one that is left says why it ends; and all this with weights that are shared out over the nodes."""
    part, (left, _) = nodes("killed", strategy="fsdp2", kill_at=4)
    assert re.search(r"error: Another process of this run has ended .*\n.*\n.*--ckpt_path last", left), left[-3000:]
    assert "Traceback" not in left[: left.index("error: Another")]
    assert part.checkpoint["global_step"] == 1
    end, _ = nodes("killed", "--ckpt_path=last", strategy="fsdp2")
    assert largest_difference(end.weights, two.weights) < TOLERANCE
