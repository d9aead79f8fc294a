"""Lightning's own callbacks and settings next to ours: each works, or is refused by name before a model is loaded."""

import csv
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    SpikeDetection,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)

from rlif_lightning.errors import UserError
from rlif_lightning.models.checkpoints import read_checkpoint
from rlif_lightning.training.module import RLIFModule
from rlif_lightning.training.other_callbacks import check_trainer

RUN = Path("runs/run/1")
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}


def callback(name, **settings):
    """The word of the command line."""
    text = ", ".join(f"{key}: {value}" for key, value in settings.items())
    return f"--trainer.callbacks=[{{class_path: {name}, init_args: {{{text}}}}}]"


REFUSED = [
    (GradientAccumulationScheduler({0: 2}), "--rollout.micro_batch_size"),
    (StochasticWeightAveraging(0.001), "leave it out"),
    (WeightAveraging(), "leave it out"),
    (EMAWeightAveraging(), "leave it out"),
    (BackboneFinetuning(), "--model.lora"),
    (ModelPruning("l1_unstructured"), "leave it out"),
    (BatchSizeFinder(), "--rollout.micro_batch_size"),
    (LearningRateFinder(), "--model.optimizer.lr"),
    (SpikeDetection(), "the guard"),
    (OnExceptionCheckpoint("x"), "--checkpoint.every"),
    (ModelCheckpoint(save_last=True), "last.ckpt"),
    ({"fast_dev_run": True}, "--trainer.max_steps 1"),
    ({"overfit_batches": 1}, "--data.train.limit"),
    ({"reload_dataloaders_every_n_epochs": 1}, "dealt anew"),
    ({"val_check_interval": 0.5}, "--evaluation.every"),
    ({"check_val_every_n_epoch": 2}, "--evaluation.every"),
    ({"limit_val_batches": 0}, "--evaluation.n"),
    ({"limit_test_batches": 0.5}, "--limit"),
]


@pytest.mark.parametrize(
    ("other", "advice"), REFUSED, ids=lambda x: str(x if isinstance(x, dict) else type(x).__name__)
)
def test_what_does_not_go_with_rollouts_is_refused(other, advice):
    settings = other if isinstance(other, dict) else {"callbacks": [other]}
    with pytest.raises(UserError, match=r"rollouts|Two callbacks") as error:
        check_trainer(Trainer(**QUIET, **settings))
    assert advice in str(error.value)


def test_a_trainer_as_it_comes_goes_with_rollouts():
    keep = ModelCheckpoint("own", save_last=True)
    check_trainer(Trainer(**QUIET, callbacks=[keep, EarlyStopping("rollout/reward"), Timer("01:00:00:00")]))


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        (callback("StochasticWeightAveraging", swa_lrs=0.001), "leave it out"),
        (callback("EarlyStopping", monitor="val/accuracy"), "--data.val.path"),
        (callback("RichProgressBar"), "The Trainer refuses its settings"),
        ("--trainer.max_time=soon", "not a valid duration"),
    ],
)
def test_it_is_one_paragraph_before_a_model_is_loaded(rlif, small_fit, tmp_path, monkeypatch, capsys, word, advice):
    monkeypatch.setattr(RLIFModule, "configure_model", None)
    with pytest.raises(SystemExit) as ended:
        rlif("fit", *small_fit, word)
    error = capsys.readouterr().err
    message = error[error.rindex("error: ") :]
    assert ended.value.code == 2 and advice in message and len(message.splitlines()) <= 4, message
    assert not (tmp_path / "runs").exists()


# -- EarlyStopping ---------------------------------------------------------------------------------------------


def metric(column):
    """A column of metrics.csv."""
    with (RUN / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def test_early_stopping_looks_once_after_each_rollout(rlif, small_fit, caplog):
    """Lightning would ask it at the end of an epoch: never in a short run. Two passes: it ends between rollouts."""
    stop = callback("EarlyStopping", monitor="rollout/reward", mode="max", patience=2, min_delta=1000.0)
    settings = [*small_fit, stop, "--rollout.passes=2", "--trainer.max_steps=20"]
    rlif("fit", *settings)
    assert len(metric("rollout/reward")) == 3  # the first is the best, and two do not better it by 1000
    assert read_checkpoint(RUN / "checkpoints" / "last.ckpt")["global_step"] == 6
    assert "EarlyStopping ends the run after step 6: Monitored metric rollout/reward did not improve" in caplog.text


def test_early_stopping_on_evaluations_counts_evaluations(rlif, small_fit, problems_file):
    data = ["--data.val.path", problems_file, "--data.val.gold", r"[#]{4}\s*(.+)", "--evaluation.n=2"]
    stop = callback("EarlyStopping", monitor="val/mean_tokens", mode="max", patience=2, min_delta=1000.0)
    settings = [*small_fit, *data, stop, "--evaluation.every=2", "--checkpoint.every=1"]
    rlif("fit", *settings, "--trainer.max_steps=3")
    rlif("fit", *settings, "--trainer.max_steps=20", "--ckpt_path=last")  # continued: what has been seen counts once
    assert len(metric("rollout/reward")) == 6  # looks after steps 2, 4 and 6


def test_a_metric_that_is_not_logged_is_named(rlif, small_fit, capsys):
    with pytest.raises(SystemExit) as ended:
        rlif("fit", *small_fit, callback("EarlyStopping", monitor="val_loss"))
    error = capsys.readouterr().err
    message = error[error.rindex("error: ") :]
    assert ended.value.code == 2 and "monitor val_loss" in message and "rollout/reward" in message
    assert len(message.splitlines()) == 4


# -- others -----------------------------------------------------------------------------------------------------


def test_a_time_limit_ends_the_run_between_two_rollouts(rlif, small_fit, capsys):
    """Of the four steps of a rollout it would have ended the run after the first: nothing of it was saved."""
    rlif(
        "fit",
        *small_fit,
        callback("Timer", duration="{milliseconds: 1}"),
        "--rollout.passes=4",
        "--trainer.max_steps=8",
    )
    assert read_checkpoint(RUN / "checkpoints" / "last.ckpt")["global_step"] == 4


def test_a_second_checkpoint_stands_next_to_ours(rlif, small_fit):
    """Names with more than a step in them ended the run with a ValueError."""
    name = callback("ModelCheckpoint", every_n_train_steps=1, save_top_k=-1, filename='"{step}-{rollout/reward:.0f}"')
    rlif("fit", *small_fit, name, "--checkpoint.keep=1", "--checkpoint.every=1")
    names = sorted(path.name for path in (RUN / "checkpoints").rglob("*.ckpt"))
    assert {"last.ckpt", "step=2.ckpt"} < set(names) and len(names) == 4, names


@pytest.mark.parametrize("name", ["max_steps", "max_epochs", "limit_train_batches"])
def test_nothing_to_do_is_said(rlif, small_fit, name):
    with pytest.warns(UserWarning, match="Nothing was trained: the run ends at step 0"):
        rlif("fit", *small_fit, f"--trainer.{name}=0")


def test_fewer_steps_than_the_checkpoint_has_are_said(rlif, small_fit, caplog):
    rlif("fit", *small_fit)
    for steps in (0, 1):
        with pytest.raises(SystemExit) as ended:
            rlif("fit", *small_fit, f"--trainer.max_steps={steps}", "--ckpt_path=last")
        assert ended.value.code == 0
    assert caplog.text.count("is complete at step 2; raise --trainer.max_steps to train on") == 2
