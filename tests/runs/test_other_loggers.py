"""Loggers besides the run's own, by name: offline, against what each of them stores."""

import json
import sqlite3
from pathlib import Path

import pytest

from rlif_lightning.callbacks.log_settings import flat
from rlif_lightning.errors import UserError
from rlif_lightning.runs import other_loggers
from rlif_lightning.runs.metrics_csv import read_metrics
from rlif_lightning.runs.trackio_logger import TrackioLogger

KEPT = {"metrics.csv", "completions.jsonl", "held_out.jsonl", "curves.png", "summary.txt", "config.yaml"}
SETTINGS = {"rollout.rewards": "self_certainty", "model.optimizer.lr": 0.02, "model.lora": "null"}
FIRES = [
    "--guard.signals=[similarity]", "--guard.warmup=0", "--guard.patience=1", "--guard.smoothing=1",
    "--model.optimizer.lr=0.02", "--trainer.max_steps=8",
]  # fmt: skip


@pytest.fixture
def fit(rlif, small_fit, problems_file):
    """``fit("wandb")``: eight steps with evaluations, in which the guard fires; returns the run folder."""
    data = ["--data.val.path", problems_file, "--data.val.gold", r"[#]{4}\s*(.+)", "--evaluation.n=5"]
    steps = ["--evaluation.every=4", "--guard.drop=0.2", *FIRES]

    def run(*loggers):
        rlif("fit", *small_fit, *data, *steps, *(f"--trainer.logger={logger}" for logger in loggers))
        return max(Path("runs/run").iterdir(), key=lambda path: int(path.name)).absolute()

    return run


def held_out(run):
    return [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]


def decision(run):
    return json.loads((run / "guard.json").read_text())["fired"]


def last(run):
    """The final value of each metric that was logged."""
    return {name: curve[max(curve)] for name, curve in read_metrics(run / "metrics.csv").items()}


@pytest.mark.parametrize("word", ["none", "false", "[none]", "true"])
def test_every_run_has_its_folder(fit, word):
    """``--trainer.logger false`` wrote no run folder, no table and no picture, without a word."""
    run = fit(word)
    assert {path.name for path in run.iterdir()} >= KEPT
    assert bool(list(run.glob("events*"))) == (word == "true")


def test_csv_and_mlflow(fit, monkeypatch, recwarn):
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install .[loggers]")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.delenv(name, raising=False)
    run = fit("[mlflow,csv]")
    assert not any("has not logged everything" in str(warning.message) for warning in recwarn)
    assert (run / "csv/version_0/hparams.yaml").read_text().count("model.optimizer.lr: 0.02")
    assert "guard/fired" in (run / "csv/version_0/metrics.csv").read_text()
    from mlflow.tracking import MlflowClient

    client = MlflowClient(Path("runs/mlruns").absolute().as_uri())
    experiment = client.get_experiment_by_name("rlif")
    (stored,) = client.search_runs([experiment.experiment_id])
    assert (stored.info.run_name, stored.info.status) == ("run/1", "FINISHED")
    assert {name: stored.data.params[name] for name in SETTINGS} == {name: str(x) for name, x in SETTINGS.items()}
    assert stored.data.metrics == pytest.approx(last(run))
    artifacts = Path("runs/mlruns", experiment.experiment_id, stored.info.run_id, "artifacts")
    rows = []
    for step in (0, 4, 8):
        table = json.loads((artifacts / f"samples/held_out_{step}.json").read_text())
        rows += [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert rows == held_out(run) and len(rows) == 3 * 4
    rollouts = json.loads((artifacts / "samples/rollout_4.json").read_text())
    assert {"correct", "advantage", "reward/self_certainty"} <= {*rollouts["columns"]}
    event = json.loads((artifacts / f"guard/decision_{decision(run)['step']}.json").read_text())
    assert event["data"][0][0] == decision(run)["step"] and decision(run)["reason"] in event["data"][0][1]


def test_wandb(fit, monkeypatch, recwarn):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install .[loggers]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    try:
        run = fit("wandb")
        assert not any("has not logged everything" in str(warning.message) for warning in recwarn)
        stored = wandb.run
        assert (stored.name, stored.project) == ("run/1", "rlif")
        assert {name: stored.config[name] for name in SETTINGS} == SETTINGS
        assert {name: stored.summary[name] for name in last(run)} == pytest.approx(last(run))
        wandb.finish()
        (files,) = run.glob("wandb/offline-run-*/files")
        tables = files.glob("media/table/samples/held_out_*.json")
        newest = max(tables, key=lambda path: int(path.name.split("_")[2]))
        table = json.loads(newest.read_text())
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        assert rows == held_out(run)[-4:]
        (event,) = files.glob("media/table/guard/decision_*.json")
        assert json.loads(event.read_text())["data"][0][0] == decision(run)["step"]
    finally:
        wandb.teardown()


def test_trackio(fit, monkeypatch, tmp_path, recwarn):
    pytest.importorskip("trackio", reason="Trackio is not installed: pip install .[loggers]")
    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    run = fit("trackio")
    assert not any("has not logged everything" in str(warning.message) for warning in recwarn)
    with sqlite3.connect(tmp_path / "trackio/rlif.db") as stored:
        ((name, config),) = stored.execute("select run_name, config from configs")
        logged = [(step, json.loads(row)) for step, row in stored.execute("select step, metrics from metrics")]
    settings = json.loads(config)
    assert name == "run/1" and {name: settings[name] for name in SETTINGS} == SETTINGS
    numbers = {(step, name): x for step, row in logged for name, x in row.items() if not isinstance(x, dict)}
    table = {(s, name): x for name, curve in read_metrics(run / "metrics.csv").items() for s, x in curve.items()}
    assert numbers == pytest.approx(table)
    tables = [(step, name, x["_value"]) for step, row in logged for name, x in row.items() if isinstance(x, dict)]
    assert [row for _, name, rows in tables if name == "samples/held_out" for row in rows] == held_out(run)
    ((step, rows),) = [(step, rows) for step, name, rows in tables if name == "guard/decision"]
    assert step == rows[0]["step"] == decision(run)["step"]


@pytest.mark.parametrize("word", ["wandb", "mlflow", "trackio", "[csv,trackio]"])
def test_a_missing_package_is_one_paragraph_before_anything_is_loaded(word, rlif, small_fit, monkeypatch, capsys):
    monkeypatch.setattr(other_loggers, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        rlif("fit", *small_fit, "--model.name=nowhere", f"--trainer.logger={word}")
    package = word.strip("[]").split(",")[-1]
    said = capsys.readouterr().err
    assert end.value.code == 2 and f"needs the package {package}" in said and f"pip install {package}" in said
    assert "Traceback" not in said and not Path("runs").exists()


def test_a_logger_that_can_not_begin_is_one_paragraph(rlif, small_fit, monkeypatch, capsys):
    """That of wandb without a key was a traceback."""
    monkeypatch.setattr(other_loggers, "_made", lambda *_: NoKey())
    with pytest.raises(SystemExit) as end:
        rlif("fit", *small_fit, "--model.name=nowhere", "--trainer.logger=csv")
    said = capsys.readouterr().err
    assert end.value.code == 2 and "trainer.logger csv can't begin" in said and "no key" in said
    assert "Traceback" not in said and not Path("runs").exists()


class NoKey:
    @property
    def experiment(self):
        raise RuntimeError("no key")


def test_a_table_that_a_logger_refuses_ends_nothing(fit, monkeypatch):
    def refuse(*_):
        raise OSError("no route")

    monkeypatch.setattr("rlif_lightning.callbacks.logging.other_table", refuse)
    with pytest.warns(UserWarning, match="CSVLogger has not logged everything: OSError: no route"):
        run = fit("csv")
    assert (run / "summary.txt").exists()


def test_texts_can_be_stored_anywhere():
    """A control character acts on a terminal, and a lone surrogate can't be encoded."""
    taken = {}

    class Table(TrackioLogger):
        def log_table(self, name, rows, step):
            taken[name] = rows

    other_loggers.other_table(Table(), "t", [{"a": "\x1b[31m \ud800", "b": None}], 0)
    assert taken == {"t": [{"a": r"\u001b[31m \ud800", "b": None}]}


def test_settings_are_flat():
    settings = {
        "model": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}}, "lora": {"r": 4}},
        "rollout": {"group_size": 8, "top_p": None},
    }
    assert flat(settings, "model.optimizer.lr") == 0.1 and flat(settings, "rollout.group_size") == 8
    assert flat(settings, "model.lora") == '{"r": 4}'
    assert flat(settings, "rollout.top_p") == flat(settings, "model.optimizer.lr.x") == "null"


@pytest.mark.parametrize(
    ("setting", "asked"),
    [(None, []), (True, []), (False, ["none"]), ("csv", ["csv"]), (["csv", "none"], ["csv", "none"])],
)
def test_what_is_asked_for(setting, asked):
    assert other_loggers.asked_loggers(setting) == asked


def test_a_package_that_is_there_is_not_refused(monkeypatch):
    monkeypatch.setattr(other_loggers, "find_spec", lambda name: name != "wandb" or None)
    other_loggers.check_packages(["mlflow", "csv", "none"])
    with pytest.raises(UserError, match="wandb"):
        other_loggers.check_packages(["mlflow", "wandb"])


def test_a_test_is_a_run_of_its_own(rlif, small_fit, problems_file):
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install .[loggers]")
    data = ["--data.test.path", problems_file, "--data.test.gold", r"[#]{4}\s*(.+)", "--data.test.limit=3"]
    rlif("test", *small_fit[:2], *data, "--data.template={prompt} ",
         "--evaluation.max_new_tokens=8", "--trainer.accelerator=cpu", "--trainer.logger=mlflow")  # fmt: skip
    from mlflow.tracking import MlflowClient

    client = MlflowClient(Path("runs/mlruns").absolute().as_uri())
    (stored,) = client.search_runs([client.get_experiment_by_name("rlif").experiment_id])
    assert stored.info.run_name == "run/test/1" and "test/accuracy" in stored.data.metrics
