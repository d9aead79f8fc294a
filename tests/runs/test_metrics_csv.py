import math
import random

import pytest

from rlif_lightning.errors import UserError
from rlif_lightning.runs.metrics_csv import MetricsCSV, read_metrics

STEPS, EVERY = 7, 2


def calls(first, last):
    """What a run logs: (step, values), the evaluation of a step's weights before its rollout and update."""
    for step in range(first, last + 1):
        if step % EVERY == 0:
            draw = random.Random(f"evaluation {step}")
            yield step, {"val/accuracy": draw.random(), "val/accuracy_sampled": draw.random()}
        if step == last:
            return
        draw = random.Random(f"rollout {step}")
        rollout = {"rollout/reward": draw.gauss(0, 1), "rollout/entropy": draw.random()}
        if step >= 3:
            rollout["rollout/accuracy"] = float(step)  # a column that appears late
        yield step, rollout
        yield step, {"train/loss": draw.gauss(0, 1e-9)}
        if step == 5:
            yield step, {"train/grad_norm": math.inf}


def log_all(path, rows):
    table = MetricsCSV(path)
    for step, values in rows:
        table.log(step, values)


def test_a_row_is_the_union_of_what_was_logged_for_its_step(tmp_path):
    table = MetricsCSV(tmp_path / "metrics.csv")
    assert table.last_step is None
    table.log(0, {"val/accuracy": 0.5})
    table.log(0, {"rollout/reward": 0.1, "val/accuracy": 0.25})
    table.log(3, {"rollout/reward": 2})
    table.log(3, {"val/accuracy": 1e-300})
    assert table.last_step == 3
    assert (tmp_path / "metrics.csv").read_bytes() == (
        b"step,val/accuracy,rollout/reward\n0,0.25,0.1\n3,1e-300,2.0\n"
    )


def test_a_shorter_value_leaves_nothing_of_the_longer_one(tmp_path):
    table = MetricsCSV(tmp_path / "m.csv")
    table.log(0, {"a": 0.123456789})
    table.log(0, {"a": 1})
    table.log(1, {"a": 2})
    assert (tmp_path / "m.csv").read_text() == "step,a\n0,1.0\n1,2.0\n"


def test_numbers_read_back_exactly(tmp_path):
    values = {"a": 0.1 + 0.2, "b": math.nan, "c": -math.inf, "d": 5e-324, "e,\u00e9": 1 / 3}
    table = MetricsCSV(tmp_path / "m.csv")
    table.log(4, values)
    table.log(5, {"a": 1.0})
    read = read_metrics(tmp_path / "m.csv")
    assert list(read) == list(values)
    assert math.isnan(read.pop("b")[4])
    assert read == {
        "a": {4: 0.1 + 0.2, 5: 1.0},
        "c": {4: -math.inf},
        "d": {4: 5e-324},
        "e,\u00e9": {4: 1 / 3},
    }


def test_a_late_value_goes_to_the_row_of_its_step(tmp_path):
    """A user's own metric of a step, logged by Lightning after the next step's evaluation, ended the run."""
    path = tmp_path / "m.csv"
    table = MetricsCSV(path)
    table.log(0, {"a": 1.0})
    table.log(2, {"a": 2.0})
    table.log(0, {"lr": 0.5})  # a new column as well
    table.log(1, {"lr": 0.25})  # a row that was not there
    table.log(0, {"a": 3.0})
    assert table.last_step == 2
    table.log(2, {"lr": 0.125})
    table.log(3, {"a": 4.0})
    assert path.read_text() == "step,a,lr\n0,3.0,0.5\n1,,0.25\n2,2.0,0.125\n3,4.0,\n"
    MetricsCSV(path).log(1, {"a": 5.0})
    assert read_metrics(path)["a"] == {0: 3.0, 1: 5.0, 2: 2.0, 3: 4.0}


def test_the_step_is_no_metric(tmp_path):
    with pytest.raises(ValueError, match="first column"):
        MetricsCSV(tmp_path / "m.csv").log(2, {"step": 1.0})


def test_nothing_logged_makes_no_row_and_no_file(tmp_path):
    MetricsCSV(tmp_path / "m.csv").log(0, {})
    assert not (tmp_path / "m.csv").exists()


def test_only_the_last_row_is_touched_without_a_new_column(tmp_path, monkeypatch):
    table = MetricsCSV(tmp_path / "m.csv")
    table.log(0, {"a": 1.0, "b": 2.0})
    before = (tmp_path / "m.csv").stat().st_ino
    for step in range(1, 5):
        table.log(step, {"a": 1.0})
        table.log(step, {"b": 1.0})
    assert (tmp_path / "m.csv").stat().st_ino == before
    table.log(5, {"c": 1.0})
    assert (tmp_path / "m.csv").stat().st_ino != before  # replaced, never rewritten in place
    assert [p.name for p in tmp_path.iterdir()] == ["m.csv"]


def test_the_file_is_the_same_when_it_is_opened_again_for_every_row(tmp_path):
    rows = list(calls(0, STEPS))
    log_all(tmp_path / "once.csv", rows)
    for step, values in rows:
        MetricsCSV(tmp_path / "often.csv").log(step, values)
    assert (tmp_path / "once.csv").read_bytes() == (tmp_path / "often.csv").read_bytes()


def test_a_run_killed_anywhere_and_continued_ends_up_byte_identical(tmp_path):
    """Killed after any call or in the middle of a line, continued from any checkpoint before that."""
    whole, part = tmp_path / "whole.csv", tmp_path / "part.csv"
    table, states = MetricsCSV(whole), []
    for step, values in calls(0, STEPS):
        table.log(step, values)
        states.append((step, whole.read_bytes()))
    for reached, text in states:
        for torn in (0, 1, 4):
            # the row of the checkpoint's own step was complete before the checkpoint was written
            for saved in range(1, reached + (not torn)):
                part.write_bytes(text[: len(text) - torn])
                MetricsCSV.truncate(part, saved)
                log_all(part, calls(saved, STEPS))
                assert part.read_bytes() == states[-1][1], (reached, torn, saved)


def test_cutting_keeps_the_rows_before_the_checkpoint_only(tmp_path):
    path = tmp_path / "m.csv"
    table = MetricsCSV(path)
    table.log(1, {"val/accuracy": 0.5, "rollout/reward": 1.0})
    table.log(2, {"val/accuracy": 0.6, "rollout/reward": 2.0, "train/late": 1.0})
    table.log(3, {"val/accuracy": 0.7, "rollout/reward": 3.0})
    MetricsCSV.truncate(path, 2)
    assert path.read_text() == "step,val/accuracy,rollout/reward\n1,0.5,1.0\n"
    MetricsCSV.truncate(tmp_path / "missing.csv", 2)
    assert not (tmp_path / "missing.csv").exists()


def test_every_cut_of_a_growing_file_can_be_read_and_continued(tmp_path):
    path = tmp_path / "m.csv"
    log_all(path, calls(0, STEPS))
    text = path.read_bytes()
    last_line = text.rindex(b"\n", 0, -1) + 1
    for end in range(last_line, len(text)):
        path.write_bytes(text[:end])
        assert all(STEPS not in curve for curve in read_metrics(path).values())
        MetricsCSV(path).log(STEPS, {"val/accuracy": 1.0})
        assert read_metrics(path)["val/accuracy"][STEPS] == 1.0


def test_the_rest_of_an_overwritten_row_is_dropped(tmp_path):
    """A kill between overwriting the last row and cutting the file leaves the old row's tail."""
    path = tmp_path / "m.csv"
    path.write_text("step,a,b\n0,1.0,2.0\n1,3.0,\n56789,\n")
    assert read_metrics(path) == {"a": {0: 1.0, 1: 3.0}, "b": {0: 2.0}}
    MetricsCSV(path)
    assert path.read_text() == "step,a,b\n0,1.0,2.0\n1,3.0,\n"


@pytest.mark.parametrize(
    ("text", "line"), [("a,b\n1,2\n", 1), ("step,a\n0,1\n1\n2,3\n", 3), ("step,a\n0,x\n1,2\n", 2)]
)
def test_a_file_that_is_no_table_is_refused_and_kept(tmp_path, text, line):
    path = tmp_path / "m.csv"
    path.write_text(text)
    for use in (read_metrics, MetricsCSV):
        with pytest.raises(UserError, match=f"line {line}"):
            use(path)
    assert path.read_text() == text
