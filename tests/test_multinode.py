"""Two torchrun groups on loopback, each a "node" of one process: one run, one folder, and its end when one dies."""

import re
import socket
import sys
import time

import pytest

from tests.processes import Processes, Result, assert_same_state, differences, finish, largest_difference, start
from tests.training import many_ends

pytestmark = pytest.mark.slow

SHORT = ("--trainer.max_steps=3", "--evaluation.n=3")


@pytest.fixture(scope="module")
def fit(model_folder, problems_file, tmp_path_factory):
    """Runs of one process or of several on one node."""
    root = tmp_path_factory.mktemp("nodes")
    return Processes(root, many_ends(model_folder(), root / "model"), problems_file)


@pytest.fixture(scope="module")
def nodes(fit):
    """``nodes(runs, *settings, strategy="ddp", kill_at=0)``: the result, and what each node said and returned."""

    def run(runs, *settings, strategy="ddp", kill_at=0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank in (0, 1):
            words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--node_rank", rank,
                     "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", port,
                     fit.script, "fit", *fit.arguments, *SHORT, "--trainer.num_nodes", 2, "--trainer.devices", 1,
                     f"--trainer.strategy={strategy}", "--runs", runs, *settings]  # fmt: skip
            environment = {**fit.environment(runs, kill_at, kill_rank="1"), "GLOO_SOCKET_IFNAME": "lo"}
            started.append(start(words, fit.root, environment))
        last = time.monotonic() + 200
        said = [sum(finish(node, max(1, last - time.monotonic())), "") for node in started]
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
    assert largest_difference(alone.weights, two.weights) < 1e-5
    for step, name, one, other in differences(alone, two):
        assert float(one) == pytest.approx(float(other), rel=1e-3, abs=1e-5), (step, name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_killed_process_ends_the_other_and_the_run_continues(nodes, two, strategy):
    begun = time.monotonic()
    part, (first, second) = nodes(strategy, strategy=strategy, kill_at=4)
    assert re.search(r"error: Another process of this run has ended .*\n.*\n.*--ckpt_path last", first), first[-3000:]
    assert "Traceback" not in first.split("torch.distributed.elastic")[0]
    assert part.checkpoint["global_step"] == 1
    end, _ = nodes(strategy, "--ckpt_path=last", strategy=strategy)
    if strategy == "ddp":
        assert_same_state(two, end)
    else:
        assert largest_difference(end.weights, two.weights) < 1e-5
    del begun, second
