import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util import tensor_util

from rlif_lightning.runs.descriptions import DESCRIPTIONS
from rlif_lightning.runs.logger import OVERVIEW, RunLogger
from rlif_lightning.runs.metrics_csv import MetricsCSV, read_metrics
from tests.events import curves, events, scalars

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("exists and is not empty", "dataloader is not resumable", "treespec, LeafSpec")
]


@pytest.fixture
def clock(monkeypatch):
    """TensorBoard orders the event files of a run by the second of their creation."""
    from tensorboard.summary.writer import event_file_writer

    class Clock:
        now = 1.7e9

        def time(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(event_file_writer, "time", clock)
    return clock


def log_step(logger, step):
    if step % 2 == 0:
        logger.log_metrics({"val/accuracy": 0.5 + step, "epoch": 0}, step)
    logger.log_metrics({"rollout/reward": torch.tensor(0.25 * step), "epoch": 0}, step)
    logger.log_text("samples", f"text {step}", step)
    logger.log_histogram("advantage", torch.tensor([step, 1.0, torch.nan, torch.inf]), step)


def test_tensorboard_and_the_table_hold_the_same_scalars_at_once(tmp_path):
    """Read while the logger is still open: who watches sees every step."""
    logger = RunLogger(tmp_path / "quickstart" / "1")
    for step in range(3):
        log_step(logger, step)
    expected = {"val/accuracy": {0: 0.5, 2: 2.5}, "rollout/reward": {0: 0.0, 1: 0.25, 2: 0.5}}
    assert scalars(logger.log_dir) == expected
    assert read_metrics(tmp_path / "quickstart" / "1" / "metrics.csv") == expected
    logger.finalize("success")
    accumulator = events(logger.log_dir)
    assert [(h.step, h.histogram_value.num) for h in accumulator.Histograms("advantage")] == [
        (0, 2),
        (1, 2),
        (2, 2),
    ]
    texts = accumulator.Tensors("samples/text_summary")
    assert [tensor_util.make_ndarray(t.tensor_proto)[0] for t in texts] == [b"text 0", b"text 1", b"text 2"]
    assert sorted(path.name.split(".")[0] for path in logger.folder.iterdir()) == ["events", "metrics"]


def test_a_histogram_without_finite_values_is_left_out(tmp_path):
    logger = RunLogger(tmp_path / "1")
    logger.begin()
    logger.log_histogram("h", torch.full((3,), torch.nan), 0)
    logger.log_histogram("h", torch.zeros(0), 0)
    logger.finalize("success")
    assert events(tmp_path / "1").Tags()["histograms"] == []


def test_values_may_come_late_or_without_a_step(tmp_path):
    logger = RunLogger(tmp_path / "1")
    logger.log_metrics({"a": 1.0}, 5)
    logger.log_metrics({"b": 2.0})  # without a step: the current one
    logger.log_metrics({"a": 3.0}, 4)
    expected = {"a": {4: 3.0, 5: 1.0}, "b": {5: 2.0}}
    assert scalars(tmp_path / "1") == read_metrics(tmp_path / "1" / "metrics.csv") == expected


def test_the_first_page_of_tensorboard_tells_the_story(tmp_path):
    """It showed histograms first. Tags are sorted, capitals before small letters; no number is written twice."""
    logger = RunLogger(tmp_path / "1")
    logger.log_histogram("distribution/advantage", torch.ones(2), 0)
    logger.log_metrics({"rollout/reward": 1.0, "guard/fired": 0.0, "val/accuracy": 0.25, "guard/best_step": 0.0}, 0)
    logger.log_metrics({"val/accuracy_sampled": 0.5, "train/loss": 0.0}, 0)
    tags = sorted([*curves(tmp_path / "1"), *events(tmp_path / "1").Tags()["histograms"]])
    assert tags == [
        "Overview/1 val/accuracy_sampled", "Overview/2 val/accuracy", "Overview/3 rollout/reward",
        "Overview/4 guard/fired", "distribution/advantage", "guard/best_step", "train/loss",
    ]  # fmt: skip
    assert {"val/accuracy", "guard/fired"} < {*read_metrics(tmp_path / "1/metrics.csv")}


def test_curves_have_units_and_descriptions_which_are_written_once(tmp_path):
    logger = RunLogger(tmp_path / "1")
    for step in range(2):
        logger.log_metrics({"val/accuracy": 0.5, "rollout/reward/own": 1.0, "users/own": 1.0}, step)
    found = events(tmp_path / "1")
    said = {tag: found.SummaryMetadata(tag).summary_description for tag in found.Tags()["tensors"]}
    assert said["Overview/2 val/accuracy"] == DESCRIPTIONS["val/accuracy"]
    assert said["rollout/reward/own"] == DESCRIPTIONS["rollout/reward/<name>"] and said["users/own"] == ""
    (file,) = (tmp_path / "1").glob("events*")
    assert file.read_bytes().count(DESCRIPTIONS["val/accuracy"].encode()) == 1


def test_settings_stand_in_a_table_with_the_newest_metrics(tmp_path):
    """As TensorBoard reads it: its columns, those first that people change, and the tags of the values."""
    logger = RunLogger(tmp_path / "1")
    settings = dict.fromkeys(("z", "y", "x", "w", "v", "a"), 0.5) | {"model.lora": "null"}
    logger.log_hyperparams(settings)
    logger.finalize("success")
    found = {
        tag: HParamsPluginData.FromString(events(tmp_path / "1").SummaryMetadata(tag).plugin_data.content)
        for tag in ("_hparams_/experiment", "_hparams_/session_start_info")
    }
    row = found["_hparams_/session_start_info"].session_start_info.hparams
    assert {name: value.number_value for name, value in row.items()} == settings | {"model.lora": 0.0}
    assert row["model.lora"].string_value == "null"
    table = found["_hparams_/experiment"].experiment
    assert [column.name for column in table.hparam_infos if column.differs] == ["z", "y", "x", "w", "v"]
    assert {metric.display_name: metric.name.tag for metric in table.metric_infos} == {
        name: OVERVIEW[name] for name in ("val/accuracy_sampled", "val/accuracy", "rollout/reward", "guard/fired")
    }


def test_a_picture_is_kept_as_it_is(tmp_path):
    logger = RunLogger(tmp_path / "1")
    (tmp_path / "curves.png").write_bytes(b"\x89PNG any bytes")
    logger.log_picture("Overview/story", tmp_path / "curves.png", 7)
    logger.finalize("success")
    (picture,) = events(tmp_path / "1").Images("Overview/story")
    assert (picture.step, picture.encoded_image_string) == (7, b"\x89PNG any bytes")


def test_without_tensorboard_there_is_the_table_alone(tmp_path):
    logger = RunLogger(tmp_path / "1")
    logger.tensorboard = False
    log_step(logger, 0)
    logger.log_hyperparams({"a": 1.0})
    logger.log_picture("Overview/story", Path(__file__), 0)
    logger.finalize("success")
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["metrics.csv"]


def interrupted(folder, clock, until=5):
    logger = RunLogger(folder)
    for step in range(until):
        log_step(logger, step)
    logger.finalize("failed")
    rows = [json.dumps({"step": step}) + "\n" for step in range(until)]
    (folder / "completions.jsonl").write_text("".join(rows))
    clock.now += 10


def test_a_resumed_run_goes_back_to_its_checkpoint(tmp_path, clock):
    """TensorBoard ignores a run's first purge mark: a run resumed for the first time showed its old points."""
    interrupted(tmp_path, clock)
    logger = RunLogger(tmp_path, resume_step=2)
    logger.log_metrics({"val/accuracy": 2.5}, 2)
    logger.log_metrics({"rollout/reward": -1.0}, 2)
    expected = {"val/accuracy": {0: 0.5, 2: 2.5}, "rollout/reward": {0: 0.0, 1: 0.25, 2: -1.0}}
    assert read_metrics(tmp_path / "metrics.csv") == expected
    assert scalars(tmp_path) == expected  # steps 3 and 4 are gone
    assert (tmp_path / "completions.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'
    logger.log_metrics({"rollout/reward": -2.0}, 3)
    logger.finalize("success")
    assert scalars(tmp_path)["rollout/reward"] == {0: 0.0, 1: 0.25, 2: -1.0, 3: -2.0}
    pages = plugin_event_accumulator.EventAccumulator(str(tmp_path)).Reload()  # what TensorBoard serves
    assert [t.step for t in pages.Tensors("samples/text_summary")] == [0, 1]
    assert [t.step for t in pages.Tensors("advantage")] == [0, 1]
    assert [t.step for t in pages.Tensors(OVERVIEW["val/accuracy"])] == [0, 2]


@pytest.mark.parametrize("seconds", [0, 1, -3600])
def test_events_follow_each_other_whatever_the_clock_says(tmp_path, clock, seconds):
    """Files of the same second were read in the order "10", "9": a continued run showed its beginning only."""
    for step in range(12):
        logger = RunLogger(tmp_path, resume_step=step)
        log_step(logger, step)
        logger.finalize("failed")
        clock.now += seconds
    assert scalars(tmp_path)["rollout/reward"] == {step: 0.25 * step for step in range(12)}
    assert len(list(tmp_path.glob("events.*"))) == 12


def test_resuming_is_done_once(tmp_path, clock):
    interrupted(tmp_path, clock)
    logger = RunLogger(tmp_path, resume_step=3)
    logger.log_text("t", "x", 3)
    with (tmp_path / "completions.jsonl").open("a") as file:
        file.write('{"step": 3}\n')
    logger.log_metrics({"rollout/reward": 1.0}, 3)
    logger.finalize("success")
    assert (tmp_path / "completions.jsonl").read_text().endswith('{"step": 2}\n{"step": 3}\n')


class Tiny(LightningModule):
    def __init__(self, fail=False):
        super().__init__()
        self.layer = torch.nn.Linear(3 if fail else 2, 1)

    def on_train_batch_start(self, batch, batch_idx):
        def write():
            with open(f"{self.logger.log_dir}/completions.jsonl", "a") as file:
                file.write(json.dumps({"step": self.global_step}) + "\n")

        self.logger.attempt(write)  # before anything is logged

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(50, 2))


def fit(folder, steps, resume_step=None, fail=False):
    logger = RunLogger(folder, resume_step)
    keep = ModelCheckpoint(every_n_train_steps=2, save_last=True)
    trainer = Trainer(
        max_steps=steps,
        logger=logger,
        callbacks=[keep],
        log_every_n_steps=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    assert trainer.log_dir == str(folder)
    checkpoint = None if resume_step is None else folder / "checkpoints" / "last.ckpt"
    trainer.fit(Tiny(fail), ckpt_path=checkpoint)


def test_a_real_fit_continues_in_its_folder_as_if_it_had_not_been_interrupted(tmp_path, clock):
    torch.manual_seed(0)
    fit(tmp_path / "whole", 6)
    torch.manual_seed(0)
    fit(tmp_path / "run", 4)
    table = MetricsCSV(tmp_path / "run" / "metrics.csv")
    table.log(4, {"train/loss": 9.0, "train/other": 9.0})  # it had continued beyond its checkpoint
    with (tmp_path / "run" / "completions.jsonl").open("a") as file:
        file.write('{"step": 4}\n{"step"')
    clock.now += 10
    fit(tmp_path / "run", 6, resume_step=4)
    for name in ("metrics.csv", "completions.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    losses = scalars(tmp_path / "run")
    assert list(losses) == ["train/loss"]
    assert list(losses["train/loss"]) == [0, 1, 2, 3, 4, 5]
    assert losses == scalars(tmp_path / "whole")
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    assert not list(tmp_path.rglob("hparams.yaml"))


@pytest.mark.parametrize("after_setup", [False, True])
@pytest.mark.parametrize("seconds", [10, 0])
def test_a_checkpoint_that_does_not_fit_costs_the_run_folder_nothing(
    tmp_path, clock, monkeypatch, seconds, after_setup
):
    """FSDP2 loads the checkpoint after Lightning has asked the logger for its hyperparameters and graph."""
    fit(tmp_path / "run", 4)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    clock.now += seconds
    monkeypatch.setattr(SingleDeviceStrategy, "restore_checkpoint_after_setup", after_setup)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fit(tmp_path / "run", 6, resume_step=2, fail=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_other_processes_than_the_first_write_nothing(tmp_path, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = RunLogger(tmp_path / "1", resume_step=0)
    log_step(logger, 0)
    logger.begin()
    logger.save()
    logger.finalize("success")
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize("folder", [".", "runs/q/1"])
def test_the_folder_is_the_log_dir(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    logger = RunLogger(folder)
    logger.log_metrics({"a": 1.0}, 0)
    assert (tmp_path / folder / "metrics.csv").exists()
    assert (tmp_path / folder).samefile(logger.log_dir)
    assert list((tmp_path / folder).glob("events*"))
