"""A run that was stopped anywhere and continued is the uninterrupted run, bit by bit."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor

from rlif_lightning.callbacks import RolloutCheckpoint
from rlif_lightning.cli.trainer import RLIFCLI, changed_settings
from rlif_lightning.training.module import RLIFModule
from tests import events

UNCOMPARED = ("time/", "memory/", "rollout/tokens_per_second")
LORA = ["--model.lora={r: 4, lora_alpha: 8, lora_dropout: 0.1, target_modules: [q_proj, v_proj]}"]
TWO_PASSES = ["--rollout.passes=2", "--rollout.steps_per_rollout=2", "--model.clip_low=0.05"]


class Killed(Exception):
    """Ends a run as a kill does: nothing is saved on the way out."""


@pytest.fixture
def fit(rlif, small_fit, problems_file, monkeypatch):
    """``fit(runs, *settings, kill_at=7)``: train, and die in the 7th micro-batch; returns the run folder."""
    arguments = [
        *small_fit,
        "--data.val.path", problems_file, "--data.val.gold", r"[#]{4}\s*(.+)", "--data.train.limit=7",
        "--evaluation.every=2", "--evaluation.n=3", "--rollout.micro_batch_size=4", "--checkpoint.every=1",
        "--model.schedule=cosine", "--model.warmup_ratio=0.2", "--trainer.max_steps=8",
    ]  # fmt: skip
    step = RLIFModule.training_step

    def run(runs, *settings, kill_at=None):
        calls = []

        def counted(self, batch, batch_idx):
            calls.append(1)
            if len(calls) == kill_at:
                raise Killed
            return step(self, batch, batch_idx)

        monkeypatch.setattr(RLIFModule, "training_step", counted)
        command = ["fit", *arguments, "--runs", runs, *settings]
        if kill_at is None:
            rlif(*command)
        else:
            with monkeypatch.context() as patch:
                patch.setattr(RolloutCheckpoint, "on_exception", lambda *_: None)  # which would save
                with pytest.raises(Killed):
                    rlif(*command)
        numbers = [int(p.name) for p in Path(runs, "run").iterdir()]
        return Path(runs).absolute() / "run" / str(max(numbers))

    return run


def checkpoint(run, name="last.ckpt"):
    return torch.load(run / "checkpoints" / name, weights_only=True)


def table(run):
    """Rows of metrics.csv without times and memory."""
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.startswith(UNCOMPARED)} for row in csv.DictReader(file)]


def scalars(run):
    return {tag: curve for tag, curve in events.scalars(run).items() if not tag.startswith(UNCOMPARED)}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(one, other):
    a, b = checkpoint(one), checkpoint(other)
    for part in ("global_step", "epoch", "state_dict", "optimizer_states", "lr_schedulers", "callbacks"):
        assert same(a[part], b[part]), part
    assert table(one) == table(other)
    assert (one / "completions.jsonl").read_bytes() == (other / "completions.jsonl").read_bytes()
    assert scalars(one) == scalars(other)
    steps = [int(row["step"]) for row in table(one)]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("settings", [[], LORA], ids=["full", "lora"])
def test_killed_and_continued(fit, settings):
    """Three rollouts an epoch of two micro-batches each; the seventh prompt is left over."""
    whole = fit("whole", *settings)
    for kill_at, saved in ((7, 3), (9, 4), (10, 4)):  # at an epoch's edge, in mid-epoch, in mid-accumulation
        part = fit(f"part{kill_at}", *settings, kill_at=kill_at)
        assert checkpoint(part)["global_step"] == saved
        assert fit(f"part{kill_at}", *settings, "--ckpt_path=last") == part
        assert_same_run(whole, part)


def test_killed_within_a_rollout_of_several_passes(fit):
    """Rollouts serve four steps, so that step 7 goes back to the checkpoint of step 4."""
    settings = [*TWO_PASSES, "--data.train.limit=9"]
    whole = fit("whole", *settings)
    part = fit("part", *settings, kill_at=13)
    assert [int(row["step"]) for row in table(part)][-1] == 6
    assert checkpoint(part)["global_step"] == 4
    fit("part", *settings, "--ckpt_path", part / "checkpoints" / "last.ckpt")
    assert_same_run(whole, part)


def test_skipped_steps_are_counted_on(fit, monkeypatch):
    """Of two in a row the first lies before the checkpoint that the run continues from."""
    backward = RLIFModule.backward

    def spoilt(self, loss, *args, **kwargs):
        backward(self, loss, *args, **kwargs)
        if self.trainer.global_step in (1, 3, 4):
            next(p for p in self.parameters() if p.grad is not None).grad.fill_(
                float("inf")
            )  # equal to itself, unlike nan

    monkeypatch.setattr(RLIFModule, "backward", spoilt)
    whole, part = fit("whole"), fit("part", kill_at=10)
    assert checkpoint(part)["global_step"] == 4
    part = fit("part", "--ckpt_path=last")
    assert_same_run(whole, part)
    assert (whole / "skipped.jsonl").read_bytes() == (part / "skipped.jsonl").read_bytes()
    assert [row["train/skipped_steps"] for row in table(whole)[:8]] == ["0.0", "1.0", "1.0", "2.0"] + ["3.0"] * 4
    assert checkpoint(whole)["rlif_window"] == {"skipped": 3, "skipped_in_a_row": 0}


@pytest.mark.parametrize("shorter", [3, 4], ids=["evaluation not due", "evaluation due"])
@pytest.mark.parametrize("longer", [["--trainer.max_steps=6"], ["--trainer.max_steps=-1", "--trainer.max_epochs=2"]])
def test_more_steps_than_at_first(fit, shorter, longer):
    """The evaluation at the end of the shorter run, where it was not due, is not part of the longer one.

    An epoch, of three steps here, that the shorter run left unfinished is trained to its end.
    """
    settings = ["--model.schedule=constant", "--model.warmup_ratio=0"]
    whole = fit("whole", *settings, *longer)
    part = fit("part", *settings, "--trainer.max_steps", shorter)
    assert (part / "checkpoints" / "last.ckpt").exists() and int(table(part)[-1]["step"]) == shorter
    fit("part", *settings, *longer, "--ckpt_path", part)
    assert_same_run(whole, part)


def test_twice_interrupted_and_from_an_older_checkpoint(fit):
    whole = fit("whole", "--checkpoint.keep=2")
    part = fit("part", "--checkpoint.keep=null", kill_at=10)
    part = fit("part", "--checkpoint.keep=null", "--ckpt_path=last", kill_at=4)  # from step 4: dies in step 5
    assert sorted(p.name for p in (part / "checkpoints").glob("*.ckpt")) == [
        "last.ckpt", "step=1.ckpt", "step=2.ckpt", "step=3.ckpt", "step=4.ckpt", "step=5.ckpt",
    ]  # fmt: skip
    fit("part", "--checkpoint.keep=2", "--ckpt_path", part / "checkpoints" / "step=2.ckpt")
    assert_same_run(whole, part)
    for run in (whole, part):
        assert sorted(p.name for p in (run / "checkpoints").glob("*.ckpt")) == [
            "last.ckpt",
            "step=7.ckpt",
            "step=8.ckpt",
        ]


def test_the_newest_checkpoints_are_kept_after_going_back(fit):
    """Checkpoints of the steps given up looked newer than those written since, which were deleted."""
    run = fit("runs", "--checkpoint.keep=2", "--trainer.max_steps=6")
    fit("runs", "--checkpoint.keep=2", "--ckpt_path", run / "checkpoints" / "step=5.ckpt", kill_at=3)
    names = sorted(p.name for p in (run / "checkpoints").glob("*.ckpt"))
    assert names == ["last.ckpt", "step=5.ckpt", "step=6.ckpt"]
    shutil.copy(run / "checkpoints" / "step=6.ckpt", run / "checkpoints" / "step=90.ckpt")
    fit("runs", "--checkpoint.keep=2", "--ckpt_path=last", kill_at=3)
    assert sorted(p.name for p in (run / "checkpoints").glob("*.ckpt")) == ["last.ckpt", "step=6.ckpt", "step=7.ckpt"]


def rates(run):
    return [float(row["train/learning_rate"]) for row in table(run) if row["train/learning_rate"]]


def test_settings_on_the_command_line_win_over_the_checkpoints(fit, capsys):
    """Restoring the optimiser's state brought the old learning rate and weight decay back."""
    whole = fit("whole")
    part = fit("part", kill_at=9)
    changed = ["--model.optimizer.lr=0.006", "--model.optimizer.weight_decay=0.5", "--ckpt_path=last"]
    fit("part", *changed)
    assert rates(part) == [*rates(whole)[:4], *[2 * lr for lr in rates(whole)[4:]]]
    group = checkpoint(part)["optimizer_states"][0]["param_groups"][0]
    assert group["weight_decay"] == 0.5 and group["initial_lr"] == 0.006 and group["betas"] == (0.9, 0.999)
    assert not same(checkpoint(part)["state_dict"], checkpoint(whole)["state_dict"])

    fit("again", kill_at=9)  # in two steps as in one
    fit("again", *changed, kill_at=5)
    again = fit("again", *changed)
    assert_same_run(part, again)


def test_a_changed_schedule_goes_on_from_where_the_run_stands(fit):
    part = fit("part", kill_at=9)
    fit("part", "--ckpt_path=last", "--trainer.max_steps=12")
    longer = fit("longer", "--trainer.max_steps=12", kill_at=17)
    assert rates(part)[4:8] == rates(longer)[4:8]
    fit("other", kill_at=9)
    other = fit("other", "--ckpt_path=last", "--model.schedule=constant", "--model.warmup_ratio=0")
    assert rates(other)[4:] == [0.003] * 4


def test_the_micro_batch_may_change(fit):
    """Batches were counted in slices: a run continued with smaller ones skipped prompts."""
    settings = ["--trainer.max_steps=6"]
    whole = fit("whole", *settings)
    part = fit("part", *settings, kill_at=10)
    fit("part", *settings, "--rollout.micro_batch_size=2", "--ckpt_path=last")
    a, b = checkpoint(whole), checkpoint(part)
    for name, value in a["state_dict"].items():
        torch.testing.assert_close(b["state_dict"][name], value, rtol=1e-3, atol=1e-4)
    rows = [(run / "completions.jsonl").read_text().splitlines() for run in (whole, part)]
    assert [row.split('"completion"')[0] for row in rows[0]] == [row.split('"completion"')[0] for row in rows[1]]
    assert a["epoch"] == b["epoch"]


def test_no_run_to_continue(rlif, small_fit, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        rlif("fit", *small_fit, "--runs", "runs", "--ckpt_path=last")
    assert ended.value.code == 2
    assert "no checkpoint to continue" in capsys.readouterr().err
    assert not Path(tmp_path, "runs").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--data.train.limit=9"], "place in the training data"),
        (["--rollout.prompts_per_step=4"], "place in the training data"),
        (["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1"], "another optimiser"),
        (LORA, "other trainable weights"),
    ],
    ids=["data", "prompts", "optimiser", "lora"],
)
def test_what_cannot_be_continued_is_refused(fit, capsys, settings, message):
    run = fit("runs", "--trainer.max_steps=2")
    before = {name: (run / name).read_bytes() for name in ("metrics.csv", "completions.jsonl", "config.yaml")}
    with pytest.raises(SystemExit) as ended:
        fit("runs", *settings, "--ckpt_path=last")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert before == {name: (run / name).read_bytes() for name in before}


@pytest.mark.parametrize("change", ["{r: 2}", "{r: 4, lora_alpha: 16, target_modules: [q_proj, v_proj]}", "null"])
def test_other_lora_settings_are_refused(fit, capsys, change):
    """Another alpha fits every weight and makes another policy; another r ended in torch's size mismatch."""
    fit("runs", *LORA, "--trainer.max_steps=1")
    with pytest.raises(SystemExit):
        fit("runs", "--model.lora", change, "--ckpt_path=last")
    assert "other trainable weights" in capsys.readouterr().err


def test_lora_dropout_may_change(fit):
    fit("runs", *LORA, "--trainer.max_steps=1")
    settings = ["--model.lora={r: 4, lora_alpha: 8, target_modules: [v_proj, q_proj]}", "--trainer.max_steps=2"]
    assert checkpoint(fit("runs", *settings, "--ckpt_path=last"))["global_step"] == 2


def test_the_checkpoint_of_another_model_is_refused(fit, model_folder, capsys):
    fit("runs", "--trainer.max_steps=1")
    with pytest.raises(SystemExit):
        fit("runs", "--model.name", model_folder("qwen2", seed=1), "--ckpt_path=last")
    assert "belongs to another model" in capsys.readouterr().err


def test_a_fit_within_an_epoch_must_hold_whole_rollouts(fit, capsys):
    with pytest.raises(SystemExit):
        fit("runs", "--trainer.limit_train_batches=3")
    assert "middle of a rollout" in capsys.readouterr().err


class OwnMetric(Callback):
    """As a user writes it: Lightning logs it at the end of the step, after our evaluation of the next one."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("own/twice", 2.0 * trainer.global_step)


def test_a_users_own_metrics_land_in_the_row_of_their_step(fit, monkeypatch):
    """The evaluation's row was there already, and the late metric ended the run with a ValueError."""
    callbacks = RLIFCLI.instantiate_trainer

    def with_own(self, **kwargs):
        self.config_init[self.subcommand].trainer.callbacks = [OwnMetric(), LearningRateMonitor()]
        return callbacks(self, **kwargs)

    monkeypatch.setattr(RLIFCLI, "instantiate_trainer", with_own)
    settings = ["--evaluation.every=1", "--trainer.max_steps=5"]
    whole = fit("whole", *settings)
    own = {int(row["step"]): row["own/twice"] for row in table(whole) if row["own/twice"]}
    assert own == {step: repr(2.0 * (step + 1)) for step in range(5)}
    part = fit("part", *settings, kill_at=6)
    fit("part", *settings, "--ckpt_path=last")
    assert_same_run(whole, part)


def test_killed_right_after_going_back(fit):
    """The logs were cut to the older checkpoint, last.ckpt was still the newer one: rows went missing."""
    whole = fit("whole", "--checkpoint.keep=null")
    part = fit("part", "--checkpoint.keep=null", "--checkpoint.every=2")
    older = part / "checkpoints" / "step=2.ckpt"
    fit("part", "--checkpoint.every=8", "--ckpt_path", older, kill_at=4)  # dies in step 3, before any save
    assert sorted(p.name for p in older.parent.glob("*.ckpt")) == ["last.ckpt", "step=2.ckpt"]
    fit("part", "--ckpt_path=last")
    assert_same_run(whole, part)


def test_another_seed_on_resume_is_said(fit):
    fit("runs", "--trainer.max_steps=2")
    with pytest.warns(UserWarning, match="continues with seed 7 and began with seed 0"):
        fit("runs", "--seed_everything=7", "--ckpt_path=last")


def test_a_finished_run_is_left_alone(fit, caplog):
    """Repeating the command with --ckpt_path last used to cut the last evaluation out of metrics.csv."""
    run = fit("runs", "--trainer.max_steps=4")
    before = (run / "metrics.csv").read_bytes()
    with pytest.raises(SystemExit) as ended:
        fit("runs", "--trainer.max_steps=4", "--ckpt_path=last")
    assert ended.value.code == 0 and "is complete at step 4" in caplog.text
    assert (run / "metrics.csv").read_bytes() == before


def test_the_settings_of_the_steps_so_far_are_kept_and_changes_are_said(fit, caplog):
    run = fit("runs", "--trainer.max_steps=2", "--checkpoint.keep=null")
    before = (run / "config.yaml").read_bytes()
    changed = ["--checkpoint.keep=null", "--model.kl_coefficient=0.5", "--rollout.rewards=Random"]
    fit("runs", *changed, "--model.optimizer.lr=0.006", "--trainer.max_steps=4", "--ckpt_path=last")
    kept = run / "config.until-step-2.yaml"
    assert kept.read_bytes() == before != (run / "config.yaml").read_bytes()
    (said,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Changed since")]
    settings = dict.fromkeys(part.split(" ")[0] for part in said.removeprefix("Changed since step 2: ").split(", "))
    assert sorted(settings) == ["model.kl_coefficient", "model.optimizer.lr", "rollout.rewards", "trainer.max_steps"]
    assert "model.kl_coefficient 0.01 -> 0.5" in said and "model.optimizer.lr 0.003 -> 0.006" in said

    fit("runs", *changed, "--trainer.max_steps=5", "--ckpt_path=last")
    caplog.clear()
    older = run / "checkpoints" / "step=1.ckpt"  # of the steps before anything was changed
    fit("runs", *changed, "--trainer.max_steps=2", "--ckpt_path", older)
    (said,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Changed since")]
    assert said.startswith("Changed since step 1: ") and "model.kl_coefficient 0.01 -> 0.5" in said
    assert "lr" not in said and sorted(p.name for p in run.glob("config.*")) == [
        "config.until-step-1.yaml", "config.yaml",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("was", "now", "expected"),
    [
        ({"a": {"b": 1, "c": None}}, {"a": {"b": 2, "c": True}}, ["a.b 1 -> 2", "a.c null -> true"]),
        ({"ckpt_path": None, "runs": "a"}, {"ckpt_path": "x", "runs": "b"}, []),
        ({"a": [{"class_path": "m.A", "init_args": {"w": 1}}]}, {"a": [{"class_path": "m.A", "init_args": {"w": 2}}]},
         ["a[0].w 1 -> 2"]),
        ({"a": {"class_path": "A", "init_args": {"x": 1}}}, {"a": {"class_path": "B"}}, ["a A -> B"]),
        ({"a": None}, {"a": {"r": 4}}, ['a null -> {"r": 4}']),
        ({"a": [1, 2]}, {"a": [1]}, ["a [1, 2] -> [1]"]),
        ({"a": "x"}, {"a": "x", "new": 3}, ["new null -> 3"]),
    ],
)  # fmt: skip
def test_changed_settings(was, now, expected):
    assert list(changed_settings(was, now)) == expected


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (
            lambda rows: [*rows[:5], *({**r, "answer": "#### 9"} for r in rows[5:])],
            [],
            "2 of 7 differ, the first is n",
        ),
        (lambda rows: [*rows[:4], {**rows[4], "question": "Is it so?"}, *rows[5:]], [], "number 5: 'Is it so? '"),
        (lambda rows: rows[::-1], [], "the same ones in another order"),
        (lambda rows: rows, ["--data.template={prompt}="], "7 of 7 differ"),
    ],
    ids=["answers", "question", "order", "template"],
)
def test_other_problems_are_refused_before_anything_is_loaded(fit, capsys, monkeypatch, tmp_path, problems_file,
                                                              change, settings, message):  # fmt: skip
    """As many rows as before, with other content: the run went on and its curves jumped."""
    rows = [json.loads(line) for line in problems_file.read_text().splitlines()[:7]]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--data.train.path", path]
    run = fit("runs", *data, "--trainer.max_steps=1")
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    before = {f.relative_to(run): f.read_bytes() for f in run.rglob("*") if f.is_file()}
    monkeypatch.setattr(RLIFModule, "configure_model", None)
    with pytest.raises(SystemExit) as ended:
        fit("runs", *data, *settings, "--ckpt_path=last")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "trained on other problems" in error and message in error
    assert before == {name: (run / name).read_bytes() for name in before}


def test_a_checkpoint_without_marks_goes_on(fit, caplog):
    run = fit("runs", "--trainer.max_steps=1")
    path = run / "checkpoints" / "last.ckpt"
    old = torch.load(path, weights_only=True)
    del old["callbacks"]["RolloutCheckpoint"]["problems"]
    torch.save(old, path)
    fit("runs", "--trainer.max_steps=2", "--ckpt_path=last")
    assert caplog.text.count("does not say on which problems") == 1
    assert len(checkpoint(run)["callbacks"]["RolloutCheckpoint"]["problems"]) == 7
