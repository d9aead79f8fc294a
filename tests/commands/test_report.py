import json
import re
import subprocess
import sys

import pytest
from matplotlib.colors import to_hex

from rlif_lightning.commands.report import main
from rlif_lightning.errors import UserError
from rlif_lightning.runs import curves as drawing
from rlif_lightning.runs.curves import curves_figure, draw_curves
from rlif_lightning.runs.held_out import load_held_out
from rlif_lightning.runs.metrics_csv import MetricsCSV
from rlif_lightning.runs.story import headline
from rlif_lightning.runs.summary import summary_table

pytestmark = pytest.mark.pictures

ACCURACY = {0: 0.3, 2: 0.7, 4: 0.5, 6: 0.1}


def make_run(folder, labels=True, steps=6, shift=0.0, rewards=("self_certainty",), kl=False):
    folder.mkdir(parents=True)
    table = MetricsCSV(folder / "metrics.csv")
    for step in range(steps + 1):
        if labels and step in ACCURACY:
            table.log(step, {"val/accuracy": 1.0, "val/accuracy_sampled": ACCURACY[step] + shift})
        if step == steps:
            break
        values = {"rollout/reward": step + shift, **{f"rollout/reward/{name}": step**2 for name in rewards}}
        values |= {"rollout/reward_std": 7.0, "rollout/self_certainty": 2.0 * step, "rollout/entropy": 1 / (step + 1)}
        values |= {"rollout/completion_tokens": 150.25, "rollout/truncated_fraction": 0.5, "rollout/agreement": 0.5}
        if labels:
            values["rollout/accuracy"] = 0.4
        if kl:
            values["rollout/kl"] = 0.1 * step
        table.log(step, values)
        table.log(step, {"train/loss": 0.0})
    return folder


def write_report(run):
    return drawing.write_report(run, summary_table(run))


def panels(figure):
    return {ax.get_title(): ax for ax in figure.axes if ax.get_title()}


def curves(ax):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_every_panel_shows_what_was_logged(tmp_path):
    shown = panels(curves_figure([make_run(tmp_path / "q" / "1", labels=False, kl=True)]))
    assert list(shown) == [
        "reward",
        "entropy (nats per token)",
        "agreement in a group",
        "completion length (tokens)",
        "KL to the reference (nats)",
    ]
    steps = list(range(6))
    assert curves(shown["reward"]) == [(steps, steps), (steps, [step**2 for step in steps])]
    assert legend(shown["reward"]) == ["reward", "self-certainty"]
    assert curves(shown["entropy (nats per token)"]) == [(steps, [1 / (step + 1) for step in steps])]
    assert curves(shown["completion length (tokens)"]) == [(steps, [150.25] * 6)]
    assert curves(shown["agreement in a group"]) == [(steps, [0.5] * 6)]


def test_the_truncated_share_has_its_own_axis(tmp_path):
    figure = curves_figure([make_run(tmp_path / "q" / "1", labels=False)])
    (right,) = [ax for ax in figure.axes if not ax.get_title()]
    assert curves(right) == [(list(range(6)), [0.5] * 6)]
    assert legend(panels(figure)["completion length (tokens)"]) == ["tokens", "truncated share (right)"]


def test_one_run_with_held_out_problems_tells_its_story(tmp_path):
    run = make_run(tmp_path / "q" / "1", kl=True)
    answers(run, {0: False, 2: True, 6: False})
    figure = curves_figure([run])
    ax = figure.axes[0]
    assert ax.get_title(loc="left") == "The reward rises; the accuracy rises, then falls below its start"
    start, accuracy, reward = curves(ax)
    assert accuracy == (list(ACCURACY), list(ACCURACY.values()))
    assert start[1] == [0.3, 0.3]
    assert reward[0] == list(range(6)) and reward[1] == pytest.approx([0.12 + 0.72 * n / 5 for n in range(6)])
    spans = {text.get_text(): round(text.get_position()[0], 3) for text in ax.texts if "training" in text.get_text()}
    assert spans == {"training helps": 1.0, "training hurts": 4.0}
    labels = [text.get_text() for text in ax.texts]
    assert "accuracy\n0.100" in labels and "reward\n(own scale)\n5.000" in labels
    told = [[text.get_text() for text in cell.texts] for cell in figure.axes[1:4]]
    assert [cell[0] for cell in told] == [
        "before training (step 0)",
        "at the best step (step 2)",
        "at the end (step 6)",
    ]
    assert [cell[1] for cell in told] == ["✗ $1 + <b>? → #0 $x$", "✓ $1 + <b>? → #2 $x$", "✗ $1 + <b>? → #6 $x$"]
    assert list(panels(figure))[-4:] == [
        "entropy (nats per token)",
        "agreement in a group",
        "completion length (tokens)",
        "KL to the reference (nats)",
    ]
    draw_curves([run], tmp_path / "x.png")  # dollars are no formulas


def answers(run, correct):
    rows = [
        {"step": step, "problem": "$1 + <b>?", "completion": f"#{step} $x$", "gold": "7", "correct": right}
        for step, right in correct.items()
    ]
    (run / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 8, "pro')


@pytest.mark.parametrize(
    ("values", "course"),
    [
        ([0.3, 0.7, 0.1], "rises, then falls below its start"),
        ([0.3, 0.7, 0.5], "rises, then falls"),
        ([0.3, 0.5, 0.7], "rises"),
        ([0.3, 0.2, 0.1], "falls"),
        ([0.3, 0.31, 0.29], "does not rise"),
        ([float("nan"), 0.3, 0.7], "rises"),
    ],
)
def test_the_headline_says_what_happened(values, course):
    assert headline({"val/accuracy": dict(enumerate(values))}) == f"The accuracy {course}"


def test_the_page_needs_nothing_else_and_hostile_texts_do_nothing(tmp_path):
    run = make_run(tmp_path / "q" / "1")
    answers(run, {0: False, 6: True})
    (run / "config.yaml").write_text("name: <script>alert(1)</script>\n")
    page = write_report(run)[2].read_text()
    assert (
        "<script" not in page
        and "&lt;script&gt;" in page
        and "&lt;b&gt;" in page
        and "http" not in page.split("img")[2]
    )
    assert page.count('<tr class="wrong">') == page.count('<tr class="right">') == 1
    assert "data:image/png;base64," in page and "rose from 0.300 to 0.700 at step 2" in page


def test_the_page_and_the_picture_show_the_same_answers(tmp_path):
    run = make_run(tmp_path / "q" / "1")
    answers(run, dict.fromkeys(range(7), True))
    decided = {"fired": {"step": 4}, "handed_back_step": 3, "weights": None, "accuracy": {}}
    for decision, between in ((None, "at the best step (step 2)"), (decided, "handed back (step 3)")):
        if decision:
            (run / "guard.json").write_text(json.dumps(decision))
        shown = ["before training (step 0)", between, "at the end (step 6)"]
        assert [cell.texts[0].get_text() for cell in curves_figure([run]).axes[1:4]] == shown
        page = re.findall(r"<h3>Step (\d+), (.*?)</h3>", write_report(run)[2].read_text())
        assert [f"{when} (step {step})" for step, when in page] == shown


ROW = {"step": 0, "problem": "p", "completion": "c", "gold": "1", "correct": True}


@pytest.mark.parametrize(
    "damage",
    [
        {"correct": "yes"}, {"correct": [1]}, {"problem": 5}, {"completion": None}, {"completion": ["a"]},
        {"problem": "\udcff"}, {"step": float("inf")}, {"step": None},
    ],
)  # fmt: skip
def test_damaged_answers_are_left_out(damage, tmp_path):
    run = make_run(tmp_path / "q" / "1")
    lines = [json.dumps({**ROW, **damage}), json.dumps(ROW), json.dumps({**ROW, "gold": "\ud800"}), "[" * 100_000]
    (run / "held_out.jsonl").write_text("\n".join(lines))
    assert load_held_out(run) == {0: [ROW, {**ROW, "gold": "\ud800"}]}
    write_report(run)


def test_answers_in_any_script_are_drawn_without_a_word(tmp_path, recwarn):
    run = make_run(tmp_path / "q" / "1")
    (run / "held_out.jsonl").write_text(json.dumps({**ROW, "completion": "\x00\x1b[31m\x07 \u202e \u9f98"}))
    write_report(run)
    assert not recwarn.list


FIRED = {"fired": {"step": 4}, "handed_back_step": 2, "weights": None, "accuracy": {}}


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{}", '"x"', '{"fired": {}, "accuracy": {}}', json.dumps({**FIRED, "accuracy": None}),
        json.dumps({**FIRED, "handed_back_step": None}), json.dumps({**FIRED, "weights": 3}),
        json.dumps({**FIRED, "accuracy": {"handed_back": {"val/accuracy": "<b>"}}}),
    ],
)  # fmt: skip
def test_a_damaged_decision_of_the_guard_is_named(text, tmp_path):
    run = make_run(tmp_path / "q" / "1")
    (run / "guard.json").write_text(text)
    with pytest.raises(UserError, match=r"guard\.json is damaged"):
        write_report(run)


def test_answers_before_the_guards_step_may_be_lost(tmp_path):
    run = make_run(tmp_path / "q" / "1")
    (run / "guard.json").write_text(json.dumps(FIRED))
    (run / "held_out.jsonl").write_text(json.dumps({**ROW, "step": 6}))
    (run / "config.yaml").write_bytes(b"\xff\xfe")
    assert "<h3>Step 6, at the end</h3>" in write_report(run)[2].read_text()


@pytest.mark.parametrize("step", ["-1", "99999999999999999999"])
def test_steps_that_are_none_are_named(step, tmp_path):
    run = make_run(tmp_path / "q" / "1")
    table = run / "metrics.csv"
    table.write_text(table.read_text().replace("\n1,", f"\n{step},"))
    with pytest.raises(UserError, match="line 3 does not fit"):
        write_report(run)


def test_panels_without_data_are_left_out_and_the_grid_has_no_holes(tmp_path):
    for n, (labels, kl) in enumerate([(True, True), (True, False), (False, True), (False, False)]):
        figure = curves_figure([make_run(tmp_path / "q" / str(n), labels=labels, kl=kl)])
        shown = panels(figure)
        assert ("KL to the reference (nats)" in shown, "reward" in shown) == (kl, not labels)
        cells = []
        for ax in shown.values():
            spec = ax.get_subplotspec()
            cells += [(r, c) for r in spec.rowspan for c in spec.colspan]
        grid = spec.get_gridspec()
        assert sorted(cells) == [(r, c) for r in range(grid.nrows) for c in range(grid.ncols)]


def test_several_runs_keep_their_colours_over_all_panels(tmp_path):
    runs = [make_run(tmp_path / "q" / "1"), make_run(tmp_path / "q" / "2", labels=False, shift=5.0)]
    runs.append(make_run(tmp_path / "r" / "1", shift=0.1, rewards=("verifiable", "format"), kl=True))
    figure = curves_figure(runs)
    (key,) = figure.legends
    names = [text.get_text() for text in key.get_texts()]
    colours = dict(zip(names, [to_hex(line.get_color()) for line in key.get_lines()], strict=True))
    assert list(colours) == ["q/1", "q/2", "r/1"]
    assert len(set(colours.values())) == 3
    assert len({line.get_marker() for line in key.get_lines()}) == 3  # told apart in grey as well
    shown = panels(figure)
    reward = shown["reward, each run on its own scale"].lines
    assert [line.get_marker() for line in reward] == [line.get_marker() for line in key.get_lines()]
    assert [to_hex(line.get_color()) for line in reward] == list(colours.values())
    assert [(min(line.get_ydata()), max(line.get_ydata())) for line in reward] == [(0.0, 1.0)] * 3
    assert {to_hex(line.get_color()) for line in shown["accuracy"].lines} == {colours["q/1"], colours["r/1"]}
    assert [to_hex(line.get_color()) for line in shown["KL to the reference (nats)"].lines] == [colours["r/1"]]
    assert legend(shown["accuracy"]) == ["held-out, sampled", "held-out, greedy", "rollouts"]


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path):
    runs = [make_run(tmp_path / root / "q" / "1") for root in ("a", "b")]
    (key,) = curves_figure(runs).legends
    assert [text.get_text() for text in key.get_texts()] == [str(run) for run in runs]


def test_the_table_holds_start_best_and_end(tmp_path):
    run = make_run(tmp_path / "q" / "1")
    head, accuracy, reward, empty, columns, *rows = summary_table(run).splitlines()
    assert head == "q/1, last step 6" and not empty
    assert accuracy.startswith(
        "Accuracy on held-out problems (sampled) rose from 0.300 to 0.700 at step 2, then fell"
    )
    assert reward == "The reward rose from 0.000 to 5.000."
    assert columns.split() == ["start", "best", "at", "step", "end"]
    assert [row.split() for row in rows] == [
        ["val/accuracy_sampled", "0.300", "0.700", "2", "0.100"],
        ["val/accuracy", "1.000", "1.000", "0", "1.000"],
        ["rollout/agreement", "0.500", "0.500", "0", "0.500"],
        ["rollout/reward", "0.000", "5.000"],
        ["rollout/entropy", "1.000", "0.167"],
        ["rollout/completion_tokens", "150.2", "150.2"],
    ]
    assert len({len(row) for row in rows}) == 1


def test_a_run_that_diverged_says_so(tmp_path):
    run = make_run(tmp_path / "q" / "1", labels=False)
    table = MetricsCSV(run / "metrics.csv")
    table.log(6, {"rollout/agreement": float("nan"), "rollout/reward": float("inf")})
    rows = {row.split()[0]: row.split()[1:] for row in summary_table(run).splitlines() if "/" in row}
    assert rows["rollout/agreement"] == ["0.500", "0.500", "0", "nan"]
    assert rows["rollout/reward"] == ["0.000", "inf"]
    draw_curves([run], tmp_path / "x.png")


@pytest.mark.parametrize(("labels", "steps"), [(True, 1), (False, 1), (False, 6), (True, 0)])
def test_short_and_unlabelled_runs_are_reported(tmp_path, labels, steps):
    run = make_run(tmp_path / "q" / "1", labels=labels, steps=steps)
    picture, summary, _ = write_report(run)
    assert picture == run / "curves.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert summary.read_text() == summary_table(run)
    assert ("val/accuracy" in summary.read_text()) == labels
    if steps == 1 and not labels:
        assert panels(curves_figure([run]))["reward"].lines[0].get_marker() == "o"  # a point has no line


def test_nothing_logged_yet(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n0,1.0\n")
    with pytest.raises(UserError, match="nothing to draw"):
        curves_figure([tmp_path])


def test_the_command_redraws_one_run(tmp_path, capsys):
    run = make_run(tmp_path / "q" / "1")
    (run / "curves.png").write_text("old")
    main([str(run), "--output", str(tmp_path / "copies" / "one.pdf")])
    out = capsys.readouterr().out
    assert summary_table(run) in out
    assert (run / "summary.txt").read_text() == summary_table(run)
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "copies" / "one.pdf").read_bytes().startswith(b"%PDF")
    assert all(str(path) in out for path in (run / "curves.png", run / "summary.txt", tmp_path / "copies/one.pdf"))


def test_the_command_overlays_several_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [make_run(tmp_path / "q" / "1"), make_run(tmp_path / "q" / "2")]
    main([str(run) for run in runs])
    out = capsys.readouterr().out
    assert all(summary_table(run) in out for run in runs)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not any((run / "curves.png").exists() for run in runs)


def test_mistakes_are_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "q" / "1")
    for words, message in [
        ([], r"nothing[\s\S]*RUN\.\.\."),
        ([str(run), "--outptu", "x"], "--outptu"),
        ([str(run), "--out", "x"], "--out x"),  # no abbreviations
        (["none"], r"does not exist[\s\S]*none[\s\S]*do: "),
        (["q"], r"no metrics.csv[\s\S]*name one of q/1"),
        ([str(run), "none"], "does not exist"),
        ([str(run), str(run), "--output", "x.nonsense"], r"cannot be written[\s\S]*x.nonsense"),
        ([str(run), str(run), "--output", str(run / "metrics.csv" / "x.png")], "cannot be written"),
    ]:
        with pytest.raises(UserError, match=message):
            main(words)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["metrics.csv"]


def test_help_is_quick_because_nothing_heavy_is_imported(tmp_path):
    code = """
import sys, rlif_lightning.runs.curves
from rlif_lightning.commands.report import main
try:
    main(["--help"])
except SystemExit as stop:
    assert not stop.code
heavy = {"torch", "lightning", "matplotlib", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rlif report" in done.stdout
    assert "--output FILE" in done.stdout
