"""validate, test and predict: what they write, against a computation by hand; and what they say on the way."""

import json
import os
import re
import sys
import time
from itertools import pairwise

import pytest
import torch

from rlif_lightning.data.problems import Problem, Source, read_problems
from rlif_lightning.data.prompts import Template
from rlif_lightning.evaluation.answering import (
    SEED,
    Answered,
    Attempt,
    Attempts,
    answer_problems,
    summarise,
    summarise_by,
)
from rlif_lightning.evaluation.results import by_table, write_rows
from rlif_lightning.functional.seeds import completion_seeds
from rlif_lightning.grading import AnswerFormat, Gold, Grader
from rlif_lightning.models.loading import PolicySettings
from rlif_lightning.models.policy import Policy
from rlif_lightning.sampling import NativeSampler, Sampling
from tests.processes import MAIN, forked, used_by

GOLD = r"[#]{4}\s*(.+)"


def gold_sources(file, *names):
    return [f"--data.{n}.{k}={v}" for n in names for k, v in (("path", file), ("gold", GOLD))]


@pytest.fixture
def args(model_folder, problems_file):
    """An evaluation of the tiny model with four samples."""
    return [
        "--model.name", str(model_folder()), *gold_sources(problems_file, "val", "test"),
        "--data.answers.completion=last_number", "--data.template={prompt} ", "--evaluation.max_new_tokens=12",
        "--evaluation.samples=4", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


def read(path):
    return json.loads(path.read_text())


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_results_and_rows_equal_a_computation_by_hand(rlif, args, model_folder, problems_file, tmp_path):
    """The answer is a completion's first character, and some references are what the model says: some are right."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # By hand: transformers, the sampler, and plain counting; one problem at a time.
    model = AutoModelForCausalLM.from_pretrained(model_folder()).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    sampler = NativeSampler()
    sampler.update(model, [tokenizer.eos_token_id], tokenizer.pad_token_id)
    raw = [json.loads(line) for line in problems_file.read_text().splitlines()]
    texts, ended = {"greedy": [], "samples": []}, {"greedy": [], "samples": []}
    tokens = {"greedy": [], "samples": []}
    for i, row in enumerate(raw):
        ids = tokenizer(row["question"] + " ")["input_ids"]
        for kind, count, temperature in (("greedy", 1, 0.0), ("samples", 4, 1.0)):
            seeds = completion_seeds(SEED, [(i,)], count)
            drawn = sampler.sample([ids], count, seeds, Sampling(12, temperature=temperature))
            pairs = list(zip(drawn.completion_ids.tolist(), drawn.lengths.tolist(), strict=True))
            texts[kind].append([tokenizer.decode(r[:n], skip_special_tokens=True) for r, n in pairs])
            ended[kind].append(drawn.ended.tolist())
            tokens[kind] += drawn.lengths.tolist()
        wanted = texts["greedy" if i % 2 else "samples"][i][0][:1].strip()
        row["answer"] = wanted or "none"
    right = {
        kind: [[t[:1].strip() == row["answer"] for t in own] for own, row in zip(of, raw, strict=True)]
        for kind, of in texts.items()
    }
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in raw))

    own = [a for a in args if "data.test" not in a and "answers" not in a]
    own += [f"--data.test.path={file}", "--data.answers.completion=^(.)", "--data.answers.compare=exact"]
    folder = rlif("test", *used_by("test", own), "--evaluation.batch_size=7") / "runs/run/test/1"
    results, problems = read(folder / "results.json"), rows(folder / "problems.jsonl")
    for i, (row, problem) in enumerate(zip(raw, problems, strict=True)):
        assert (problem["index"], problem["problem"], problem["gold"]) == (i, row["question"], row["answer"])
        assert problem["prompt"] == row["question"] + " "
        for kind in ("greedy", "samples"):
            assert [a["text"] for a in problem[kind]] == texts[kind][i]
            assert [a["ended"] for a in problem[kind]] == ended[kind][i]
            assert [a["correct"] for a in problem[kind]] == right[kind][i]
    assert 0.2 < results["accuracy"] < 1

    n = len(raw)
    assert results["n"] == n == 40
    assert results["accuracy"] == pytest.approx(sum(x[0] for x in right["greedy"]) / n)
    assert results["accuracy_sampled"] == pytest.approx(sum(map(sum, right["samples"])) / (4 * n))
    assert results["pass@1"] == pytest.approx(results["accuracy_sampled"])
    assert results["pass@4"] == pytest.approx(sum(map(any, right["samples"])) / n)
    for name in ("accuracy", "accuracy_sampled"):
        assert 0 <= results[f"{name}_low"] <= results[name] <= results[f"{name}_high"] <= 1
    assert {"pass@1", "pass@2", "maj@2", "maj@4"} <= set(results)
    assert results["mean_tokens"] == pytest.approx(sum(tokens["greedy"]) / n)
    assert results["mean_tokens_sampled"] == pytest.approx(sum(tokens["samples"]) / (4 * n))
    assert results["truncated_fraction_sampled"] == pytest.approx(1 - sum(map(sum, ended["samples"])) / (4 * n))
    assert results["model"] == str(model_folder())
    assert results["checkpoint"] is None
    assert results["data"]["path"] == str(file)
    assert results["evaluation"]["samples"] == 4
    assert {"torch", "transformers", "lightning", "rlif-lightning", "python"} <= set(results["versions"])
    assert (folder / "config.yaml").is_file()


def attempt(answer, correct, ended=True, tokens=3):
    return Attempt("text", tokens, ended, answer, correct)


def test_a_summary_worked_out_by_hand():
    """Two problems, four samples each. The first: 7, 7, 8, none with 7 right; the second: all wrong, all 1."""
    one = Answered(0, "p", "p", "7", [attempt("7", True)])
    one.samples = [attempt("7", True), attempt("7", True), attempt("8", False), attempt(None, False, False, 9)]
    two = Answered(1, "q", "q", "2", [attempt(None, False, False, 9)])
    two.samples = [attempt("1", False) for _ in range(4)]
    s = summarise([one, two], intervals=True)
    assert s["n"] == 2
    assert (s["accuracy"], s["accuracy_sampled"]) == (0.5, 0.25)
    assert (s["accuracy_low"], s["accuracy_high"]) == pytest.approx((0.0945, 0.9055), abs=5e-5)
    # pass@2 of the first: 1 - C(2,2)/C(4,2) = 5/6
    assert s["pass@1"] == pytest.approx(0.25)
    assert s["pass@2"] == pytest.approx(5 / 12)
    assert s["pass@4"] == pytest.approx(0.5)
    assert s["maj@4"] == pytest.approx(0.5)
    assert (s["mean_tokens"], s["truncated_fraction"]) == (6.0, 0.5)
    assert (s["mean_tokens_sampled"], s["truncated_fraction_sampled"]) == (30 / 8, 1 / 8)


def test_a_summary_of_data_where_some_lack_an_answer_names_no_accuracy():
    one = Answered(0, "p", "p", "7", [attempt("7", True)], [attempt("7", True)] * 2)
    two = Answered(1, "q", "q", None, [attempt("7", None)], [attempt("7", None)] * 2)
    assert set(summarise([one, two])) == {"n", "mean_tokens", "truncated_fraction",
                                          "mean_tokens_sampled", "truncated_fraction_sampled"}  # fmt: skip
    assert summarise([]) == {"n": 0}


def test_the_seed_and_the_batches_change_nothing(rlif, args, tmp_path):
    rlif("test", *used_by("test", args), "--evaluation.batch_size=64", "--seed_everything=0")
    sampler = ["--evaluation.sampler=rlif_lightning.sampling.NativeSampler", "--evaluation.sampler.rows=5"]
    rlif("test", *used_by("test", args), "--evaluation.batch_size=9", "--seed_everything=7", *sampler)
    one, two = (rows(tmp_path / f"runs/run/test/{n}/problems.jsonl") for n in (1, 2))
    assert one == two


def test_a_limit_takes_the_first_problems(rlif, args, tmp_path):
    rlif("test", *used_by("test", args), "--data.test.limit=5")
    rlif(
        "validate",
        *used_by("validate", args),
        "--data.val.limit=5",
        "--evaluation.greedy=false",
        "--evaluation.samples=1",
    )
    tested, validated = (rows(tmp_path / f"runs/run/{name}/1/problems.jsonl") for name in ("test", "validate"))
    assert [r["index"] for r in tested] == [r["index"] for r in validated] == list(range(5))
    # fewer samples are the first of more, and greedy may be left out
    assert [r["samples"][:1] for r in tested] == [r["samples"] for r in validated]
    assert [r["greedy"] for r in validated] == [[]] * 5
    results = read(tmp_path / "runs/run/validate/1/results.json")
    assert {"accuracy_sampled", "accuracy_sampled_low"} <= set(results)
    assert not {"accuracy", "pass@1", "maj@1"} & set(results)


def columns(folder):
    lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def test_validate_repeats_the_last_evaluation_of_the_fit(rlif, small_fit, problems_file, tmp_path):
    """The same weights, prompts and seeds: the numbers are the same to the last digit."""
    common = [*small_fit, *gold_sources(problems_file, "val", "test"), "--evaluation.max_new_tokens=12",
              "--evaluation.samples=2", "--evaluation.batch_size=16", "--model.optimizer.lr=0.02"]  # fmt: skip
    rlif("fit", *common, "--evaluation.every=1", "--trainer.max_steps=3")
    fitted = columns(tmp_path / "runs/run/1")
    rlif("validate", *used_by("validate", common), "--ckpt_path=last", "--seed_everything=5")
    rlif("validate", *used_by("validate", common))
    trained, base = (read(tmp_path / f"runs/run/validate/{n}/results.json") for n in (1, 2))
    names = ["accuracy", "accuracy_sampled", "mean_tokens", "mean_tokens_sampled", "truncated_fraction_sampled"]
    for row, results in ((fitted[-1], trained), (fitted[0], base)):
        assert {n: float(row[f"val/{n}"]) for n in names} == {n: results[n] for n in names}
    assert trained["checkpoint"].endswith("runs/run/1/checkpoints/last.ckpt")
    before, after = (rows(tmp_path / f"runs/run/validate/{n}/problems.jsonl") for n in (2, 1))
    assert [r["samples"] for r in before] != [r["samples"] for r in after], "training changed nothing"
    assert trained["fingerprint"] == base["fingerprint"]


def test_predict_writes_what_the_model_says(rlif, args, tmp_path):
    """Of data without answers; nothing is graded."""
    (tmp_path / "in.jsonl").write_text('{"question": "Why?"}\n{"question": "What is {x}?"}\n')
    source = ["--data.predict.path=in.jsonl", "--data.predict.answer=null"]
    folder = rlif("predict", *used_by("predict", args), *source) / "runs/run/predict/1"
    found = rows(folder / "predictions.jsonl")
    assert [r["problem"] for r in found] == ["Why?", "What is {x}?"]
    assert [len(r["samples"]) for r in found] == [4, 4]
    assert all(isinstance(a["text"], str) and a["correct"] is None for r in found for a in r["samples"])
    assert not (folder / "results.json").exists()


def test_predict_takes_the_test_problems_where_none_are_given(rlif, args):
    folder = rlif("predict", *used_by("predict", args), "--evaluation.samples=0") / "runs/run/predict/1"
    assert len(rows(folder / "predictions.jsonl")) == 40


HOSTILE = [
    r"\boxed{9**9**9}", r"\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}", r"\boxed{" + "9" * 1_000_000 + "}",
    r"\boxed{" * 3000, r"\boxed{2^{2^{2^{2^{2^{2}}}}}}", "{" * 100_000, r"\boxed{\frac{1}{0}}", "\x00\ud800",
]  # fmt: skip


def test_hostile_completions_are_wrong_and_cost_little(tmp_path, model_folder):
    """Each hostile answer costs at most the grader's limit, and the rows can be written."""
    policy = Policy.load(PolicySettings(str(model_folder())))
    policy.decode = lambda ids: list(HOSTILE)
    problems = [Problem("p", Gold(r"\sqrt{2}")) for _ in HOSTILE]
    prompts = [Template().encode(p, policy.tokenizer) for p in problems]
    grader = Grader(AnswerFormat())
    start = time.perf_counter()
    try:
        results = answer_problems(NativeSampler(), policy, list(enumerate(prompts)), Attempts(Sampling(2)), grader)
    finally:
        grader.close()
    assert time.perf_counter() - start < 10 * len(HOSTILE)
    assert [a.correct for r in results for a in r.greedy + r.samples] == [False] * 2 * len(HOSTILE)
    assert len(rows(write_rows(tmp_path / "rows.jsonl", results))) == len(HOSTILE)


def test_a_data_module_alone_evaluates_too(rlif, args, problems_file):
    """`answers` and `gold` of several sources do not mix: val and test may have other formats."""
    own = [a.replace("--data.val.gold=" + GOLD, "--data.val.gold=last_number") for a in args]
    folder = (
        rlif("validate", *used_by("validate", own), "--data.val.limit=3", "--evaluation.samples=0")
        / "runs/run/validate/1"
    )
    golds = [p.gold.text for p in read_problems(Source(str(problems_file), gold="last_number", limit=3))]
    assert [r["gold"] for r in rows(folder / "problems.jsonl")] == golds


# -- what is shown on the way ---------------------------------------------------------------------------------


@pytest.fixture
def shown(args):
    return [a for a in args if "enable_progress_bar" not in a]


def test_a_log_file_gets_one_line_and_the_results(rlif, shown, capsys):
    """Lightning's bar wrote one picture per batch into it."""
    rlif("test", *used_by("test", shown), "--evaluation.batch_size=2", "--evaluation.samples=0")
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("Testing")]
    assert len(lines) == 1
    assert lines[0].startswith("Testing: 40/40 problems")


def test_a_fit_says_its_plan_and_writes_lines_not_pictures(rlif, small_fit, problems_file, capfd):
    args = [a for a in small_fit if "enable_progress_bar" not in a]
    rlif("fit", *args, "--trainer.max_steps=4", *gold_sources(problems_file, "val"))
    out, err = capfd.readouterr()
    assert "step/s" not in out + err
    lines = [line for line in err.splitlines() if line.startswith("Training:")]
    assert len(lines) == 1
    assert lines[0].startswith("Training: 4/4 steps, val ")
    assert ", reward " in lines[0]


def test_lines_come_at_intervals_and_say_what_is_waited_for(monkeypatch, capsys):
    from types import SimpleNamespace

    from rlif_lightning.callbacks import StepProgressBar

    now = [100.0]
    monkeypatch.setattr("rlif_lightning.callbacks.progress.time.monotonic", lambda: now[0])
    bar = StepProgressBar(seconds=10)
    trainer = SimpleNamespace(global_step=5, callback_metrics={"rollout/reward": torch.tensor(0.5)})
    bar.on_train_start(trainer, SimpleNamespace(total_steps=lambda: 20))
    for token in range(1, 31):
        now[0] += 1
        bar.sampling(token, 30)
    for _ in range(4):
        now[0] += 5
        trainer.global_step += 1
        bar.on_train_batch_end(trainer)
    bar.on_fit_end(trainer, None)
    bar.sampling(1, 30)  # after the end nothing is shown
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "Training: 5/20 steps, sampling token 10/30",
        "Training: 5/20 steps, sampling token 20/30",
        "Training: 5/20 steps, sampling token 30/30",
        "Training: 7/20 steps, reward 0.500, 20 s/step, 4.3 min left",
        "Training: 9/20 steps, reward 0.500, 12 s/step, 2.3 min left",
        "Training: 9/20 steps, reward 0.500, 12 s/step, 2.3 min left",
    ]


def test_other_processes_show_nothing(capsys):
    from types import SimpleNamespace

    from rlif_lightning.callbacks import StepProgressBar

    bar = StepProgressBar(seconds=0)
    bar.disable()
    bar.on_test_start(SimpleNamespace(test_dataloaders=None), None)
    bar.sampling(1, 2)
    bar.on_test_epoch_end(None, None)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_on_a_terminal_there_is_one_bar_and_messages_stay_whole(small_fit, problems_file, tmp_path):
    """On a real pseudo-terminal that tells no size: the plan has a line of its own, then come bar and table."""
    import fcntl
    import os
    import pty
    import struct
    import sys
    import termios

    words = [a for a in small_fit if "enable_progress_bar" not in a] + gold_sources(problems_file, "val")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execv(sys.executable, [sys.executable, "-m", "rlif_lightning", "fit", *words])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
    seen = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:
            break
        if not part:
            break
        seen += part
    assert os.waitpid(pid, 0)[1] == 0
    lines = seen.decode().replace("\r\n", "\n").split("\n")
    plan = next(i for i, line in enumerate(lines) if "Plan:" in line)
    assert lines[plan].startswith("Plan: 2 prompts x 4 completions")
    stays = [line.split("\r")[-1] for line in lines]  # of pictures that are drawn over each other
    assert any(line.startswith("warning: 100% of the completions were cut off") for line in stays[plan + 1 :])
    bars = [i for i, line in enumerate(stays) if line.startswith("Training ") and "|" in line]
    last = lines[bars[0]].split("\r")[-1]
    assert len(bars) == 1 and bars[0] > plan + 1
    assert last.startswith("Training 2/2 |") and len(last) < 80
    assert "val 0." in last
    pictures = lines[bars[0]].split("\r")
    assert all(a != b for a, b in pairwise(pictures[:-2]))
    assert any(line.startswith("val/accuracy") for line in lines[bars[0] + 1 :])


def test_n_is_for_fit_and_the_commands_take_all(rlif, args, tmp_path):
    """A recipe's few problems while fitting used to be all that `rlif test` graded."""
    (tmp_path / "few.yaml").write_text("evaluation: {n: 2}")
    rlif("test", *used_by("test", args), "--config=few.yaml")
    assert len(rows(tmp_path / "runs/few/test/1/problems.jsonl")) > 2


def test_a_limit_takes_problems_at_random(rlif, args, tmp_path, caplog):
    """The same ones for the same seed, each answered as among all, and graded with an interval."""
    words, names = used_by("test", args), ("problems.jsonl", "results.json")
    for n, more in enumerate((["--limit=12"], ["--limit", 12], ["--limit=12", "--seed_everything=5"], []), start=1):
        caplog.clear()
        rlif("test", *words, *more)
        assert ("A random sample of 12 of 40 problems" in caplog.text) == bool(more)
        if n == 1:
            assert re.search(r"accuracy +\d\.\d{4}  \[\d\.\d{4}, \d\.\d{4}\]  95 % interval", caplog.text)
    one, again, other, whole = (rows(tmp_path / f"runs/run/test/{n}/{names[0]}") for n in (1, 2, 3, 4))
    assert one == again and len(one) == len(other) == 12 and one != other
    chosen = [row["index"] for row in one]
    assert chosen == sorted({*chosen}) != list(range(12)) and one == [whole[i] for i in chosen]
    results = read(tmp_path / "runs/run/test/1" / names[1])
    assert (results["n"], results["problems"], results["seed"]) == (12, 40, 0)
    assert results["accuracy_low"] < results["accuracy_high"], "none of 12 right is no proof that none ever is"


def test_runs_of_a_test_are_no_runs_of_a_fit(rlif, small_fit, problems_file, tmp_path, capsys):
    """They took numbers of the training runs."""
    words = [*small_fit, "--trainer.max_steps=1"]
    test = used_by("test", [*small_fit, *gold_sources(problems_file, "test"), "--limit=2"])
    rlif("fit", *words)
    rlif("test", *test)
    rlif("fit", *words)
    rlif("test", *test, "--ckpt_path=last")
    assert sorted(p.name for p in (tmp_path / "runs/run").iterdir()) == ["1", "2", "test"]
    assert sorted(p.name for p in (tmp_path / "runs/run/test").iterdir()) == ["1", "2"]
    tested = [read(tmp_path / f"runs/run/test/{n}/results.json")["checkpoint"] for n in (1, 2)]
    assert tested[0] is None and tested[1].endswith("runs/run/2/checkpoints/last.ckpt")
    with pytest.raises(SystemExit):
        rlif("test", *test, "--model.name=/nowhere", "--runs=other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(SystemExit):
        rlif("export", "runs/run/test/1")
    assert "runs with checkpoints: runs/run/1, runs/run/2" in capsys.readouterr().err


def test_a_limit_of_more_than_there_is_takes_all(rlif, args, tmp_path):
    rlif("predict", *used_by("predict", args), "--limit=41")
    assert len(rows(tmp_path / "runs/run/predict/1/predictions.jsonl")) == 40


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision(rlif, args, tmp_path, precision):
    """Under bf16-true the statistics' stores and the uniform numbers took the default dtype."""
    rlif("test", *used_by("test", args), f"--trainer.precision={precision}")
    assert json.loads((tmp_path / "runs/run/test/1/results.json").read_text())["precision"] == precision


# -- any engine, any number of processes -----------------------------------------------------------------------

# A sampler of the user's own: no statistics, no log-probabilities.
OWN_SAMPLER = """
from collections.abc import Sequence
import torch
from rlif_lightning.models.stop_strings import StopStrings
from rlif_lightning.rollout import Samples
from rlif_lightning.sampling.protocol import Progress, Sampling

class Echo:
    def __init__(self, token: int = 70) -> None:
        self.token = token

    def check(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, device: torch.device | None, processes: int = 1
    ) -> None:
        pass

    def update(
        self, policy: torch.nn.Module, end_ids: Sequence[int], pad_id: int, stop: StopStrings | None = None
    ) -> None:
        self.end = min(end_ids)

    def sample(
        self, prompts: Sequence[Sequence[int]], group_size: int, seeds: torch.Tensor, sampling: Sampling,
        progress: Progress | None = None,
    ) -> Samples:
        n = len(prompts) * group_size
        assert len(seeds) == n
        ids = torch.tensor([[self.token, self.token, self.end]] * n)
        ones = torch.ones(n, 3, dtype=torch.bool)
        return Samples(ids, ones, ids, ones, torch.ones(n, dtype=torch.bool))

    def release(self) -> None:
        pass
"""


@pytest.fixture
def own_sampler(tmp_path, monkeypatch):
    (tmp_path / "own_sampler.py").write_text(OWN_SAMPLER)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_sampler.Echo"
    sys.modules.pop("own_sampler", None)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_an_engine_without_statistics_is_enough(command, own_sampler, rlif, args, model_folder):
    from transformers import AutoTokenizer

    folder = rlif(
        command, *used_by(command, args), f"--evaluation.sampler={own_sampler}", "--evaluation.sampler.token=75"
    )
    name = "predictions.jsonl" if command == "predict" else "problems.jsonl"
    found = rows(folder / "runs/run" / command / "1" / name)
    text = AutoTokenizer.from_pretrained(model_folder()).decode([75, 75])
    assert {(a["text"], a["tokens"], a["ended"]) for r in found for a in r["greedy"] + r["samples"]} == {
        (text, 3, True)
    }


def test_the_rollouts_engine_answers_where_no_other_is_given(own_sampler, rlif, args):
    folder = rlif("test", *used_by("test", args), f"--rollout.sampler={own_sampler}")
    assert {a["tokens"] for r in rows(folder / "runs/run/test/1/problems.jsonl") for a in r["greedy"]} == {3}
    native = "--evaluation.sampler=rlif_lightning.sampling.NativeSampler"
    rlif("test", *used_by("test", args), f"--rollout.sampler={own_sampler}", native)
    assert {a["tokens"] for r in rows(folder / "runs/run/test/2/problems.jsonl") for a in r["greedy"]} != {3}


def test_results_by_a_field_worked_out_by_hand():
    def answered(index, level, kind, right):
        return Answered(index, "p", "p", "7", [attempt("7", right)], by={"level": level, "kind": kind})

    results = [answered(0, "10", "b", True), answered(1, "9", "a", False), answered(2, "10", "a", False)]
    by = summarise_by(results)
    assert [(name, list(parts)) for name, parts in by.items()] == [("level", ["9", "10"]), ("kind", ["a", "b"])]
    assert [(part["n"], part["accuracy"]) for part in by["level"].values()] == [(1, 0.0), (2, 0.5)]
    assert [(part["n"], part["accuracy"]) for part in by["kind"].values()] == [(2, 0.0), (1, 1.0)]
    ends = (by["level"]["10"]["accuracy_low"], by["level"]["10"]["accuracy_high"])
    assert ends == pytest.approx((0.0945, 0.9055), abs=5e-5)
    lines = by_table("level", by["level"])
    assert lines[1].split() == ["9", "1", "0.0000", "[0.0000,", "0.7935]"]
    assert lines[2].split() == ["10", "2", "0.5000", "[0.0945,", "0.9055]"]
    assert by_table("x", {"long value": {"n": 3}})[1].split() == ["long", "value", "3"]
    assert summarise_by([]) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "name", "limit"), [("test", "problems.jsonl", 7), ("predict", "predictions.jsonl", 1)]
)
def test_two_processes_answer_as_one(command, name, limit, rlif, args, tmp_path):
    """Seven problems in batches of two: four and three; one problem: the second process has none."""
    sizes = [f"--limit={limit}", "--evaluation.batch_size=2", "--data.test.by=question"]
    rlif(command, *used_by(command, args), *sizes, "--runs=one")
    words = [
        MAIN,
        command,
        *used_by(command, args),
        *sizes,
        "--runs=two",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
    ]
    said, code = forked(words, tmp_path, dict(os.environ), processes=2)
    assert code == 0, said
    one, two = tmp_path / "one/run" / command, tmp_path / "two/run" / command
    assert [f.name for f in two.iterdir()] == ["1"]
    assert (one / "1" / name).read_bytes() == (two / "1" / name).read_bytes()
    assert len(rows(two / "1" / name)) == limit
    if command == "test":
        results = [read(runs / "1/results.json") for runs in (one, two)]
        assert results[0].pop("config") != results[1].pop("config")
        assert results[0] == results[1]
