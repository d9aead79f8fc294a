"""The study's pictures, from small made-up runs in the format of the real ones. Nothing here trains."""

import json
import sys

import pytest

from benchmarks.study import conditions, figures, guard, tables
from rlif_lightning.runs.metrics_csv import MetricsCSV

pytestmark = pytest.mark.pictures

STEPS = [*range(0, 120, 10), 120]
MEASURED = [*range(0, 120, 5), 119]


def make_run(folder, height):
    """A run as runs.py leaves it and accuracy.py measures it: accuracy rises to a height, and falls to 0."""
    folder.mkdir(parents=True)
    accuracy = {step: height * (step / 60 if step <= 60 else 2 - step / 60) for step in STEPS}
    rows = {step: {"a": value, "b": value, "greedy": value / 2} for step, value in accuracy.items()}
    (folder / "accuracy.json").write_text(json.dumps(rows))
    table = MetricsCSV(folder / "metrics.csv")
    with (folder / "completions.jsonl").open("w") as file:
        for step in range(120):
            table.log(step, {"rollout/entropy": 1 / (1 + step)})
            for answer in ("1", "2", "2", None) if step in MEASURED else ():
                text = {"completion": "1+1=2;#2" if answer else "?", "answer": answer, "tokens": step + 8}
                score = {"ended": step < 60, "rewards": {"r": height}, "correct": answer == "2"}
                file.write(json.dumps({"step": step, "prompt": "1+1>", **text, **score}) + "\n")


def titles(figure):
    """Titles of the panels that are shown, by the name of their row."""
    return {
        part.get_suptitle(): [ax.get_title() for ax in part.axes if ax.get_visible()] for part in figure.subfigs or []
    }


def test_every_condition_has_its_words_and_its_place():
    placed = [name for members in conditions.GROUPS.values() for name in members]
    assert len(placed) == len(set(placed))
    assert set(placed) == {*conditions.GUARD, *conditions.REWARDS, *conditions.ABLATIONS}
    names = set(placed)
    assert len({conditions.title(name) for name in names}) == len(names)
    assert not any("_" in conditions.title(name) for name in conditions.CONDITIONS)


def test_the_tables_and_pictures_of_a_study(tmp_path, monkeypatch, capsys):
    shown = ("self_certainty", "token_entropy", "frozen_self_certainty", "verifiable", "random", "kl_0", "slow")
    for n, name in enumerate(shown):
        for seed in (5, 6):
            make_run(tmp_path / "runs" / name / str(seed), 0.4 + 0.05 * n + 0.01 * (seed - 5))
    words = ["tables.py", "--runs", str(tmp_path / "runs"), "--seeds", "5", "6", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    tables.main()
    said = capsys.readouterr().out
    assert "| self-certainty, frozen annotator | 2 |" in said and "| KL 0 | 2 |" in said
    assert "| self-certainty | commonest answer | 0.500 | 0.500 |" in said
    for name in ("study-rewards.png", "study-settings.png", "study-behaviour.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    curves = tables.accuracy_curves(tmp_path / "runs", list(shown), [5, 6])
    figure = figures.accuracy_figure(curves)
    assert titles(figure) == {
        "Internal rewards": ["self-certainty", "token entropy"],
        "Another annotator or start": ["self-certainty, frozen annotator"],
        "Votes and labels": ["verifiable"],
        "Controls": ["random"],
        "KL to the reference": ["KL 0"],
        "Learning rate": ["learning rate 1e-4"],
    }
    *seeds, mean, greedy, start = figure.subfigs[0].axes[0].lines
    assert [list(line.get_xdata()) for line in (*seeds, mean, greedy)] == [STEPS] * 4
    assert [max(line.get_ydata()) for line in (*seeds, mean, greedy)] == pytest.approx([0.4, 0.41, 0.405, 0.2025])
    assert list(start.get_ydata()) == [0, 0]
    (legend,) = figure.legends
    assert legend.get_texts()[0].get_text() == "sampled, mean of 2 seeds"
    looks = [(line.get_linewidth(), line.get_linestyle()) for line in legend.get_lines()]
    assert len(set(looks)) == len(looks) == 4  # told apart without colours

    measured = tables.behaviour_curves(tmp_path / "runs", list(shown)[:5], [5, 6], MEASURED)
    figure = figures.behaviour_figure(measured)
    assert [ax.get_title() for ax in figure.axes[:4]] == [
        "Internal rewards",
        "Another annotator or start",
        "Votes and labels",
        "Controls",
    ]
    assert [ax.get_ylabel() for ax in figure.axes[::4]] == list(tables.BEHAVIOUR)
    length, cut = figure.axes[4], figure.axes[8]
    assert list(length.lines[0].get_ydata()) == [step + 8 for step in MEASURED]
    assert list(cut.lines[0].get_ydata()) == [float(step >= 60) for step in MEASURED]
    for ax in (length, cut):  # each line named at its end, in its colour, the names apart from each other
        assert [text.get_text() for text in ax.texts] == ["self-certainty", "token entropy"]
        assert [text.get_color() for text in ax.texts] == [line.get_color() for line in ax.lines]
        low, high = (text.xy[1] for text in ax.texts)
        assert high - low == pytest.approx(0.13) and high <= 1
        assert len({line.get_linestyle() for line in ax.lines}) == 2


def test_the_guard_is_marked_on_the_curve():
    curve = {0: 0.2, 10: 0.6, 20: 0.4, 30: 0.0}
    runs = [
        guard.Judged("self_certainty", 5, curve, 10, 0.6, 15, "agreement", 12, 0.55),
        guard.Judged("self_certainty", 6, curve, 10, 0.6, None, "", 10, 0.6),
        guard.Judged("random", 5, curve, 10, 0.6, 25, "agreement", 10, 0.6),
    ]
    figure = figures.guard_figure(runs)
    ax, other = figure.subfigs[0].axes
    assert (ax.get_title(), other.get_title()) == ("self-certainty", "random")
    marks = [(line.get_marker(), *map(float, (*line.get_xdata(), *line.get_ydata()))) for line in ax.lines if
             line.get_linestyle() == "None"]  # fmt: skip
    assert marks == [("D", 12, 0.55), ("x", 15, 0.5), ("o", 10, 0.6)]
    (legend,) = figure.legends
    named = dict(zip([t.get_text() for t in legend.get_texts()], legend.get_lines(), strict=True))
    assert named["the guard fires"].get_marker() == "x" and named["the weights it hands back"].get_marker() == "D"
