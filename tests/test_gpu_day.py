"""The GPU day runs from end to end on a CPU with a tiny model; what it measures there means nothing."""

import json
import os
import time
from functools import partial
from pathlib import Path

import peft  # noqa: F401  once, for all forks
import pytest

from benchmarks import bar, result
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import rows, sides
from benchmarks.gpu.apart import apart
from benchmarks.gpu.parts import parts

ROOT = Path(__file__).parents[1]
TINY = ("--device", "cpu", "--tiny", "--out")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def nothing_beside_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither TRL nor vLLM, whose processes take longer than all the rest."""

    def need(name: str) -> None:
        raise bar.SkipError(f"{name} is left out")

    monkeypatch.setattr(sides, "need", need)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_beside_us")
def test_every_part_has_its_rows_and_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main([*TINY, str(tmp_path)])
    done = json.loads((tmp_path / "tiny.json").read_text())
    assert list(done) == [f"{part}/{name}" for part, checks in parts(True).items() for name in checks]
    verdicts = {row["name"]: row["verdict"] for record in done.values() for row in record["rows"]}
    assert {name for name, verdict in verdicts.items() if verdict == "not run"} == {
        "training/memory check", "trl/full", "trl/LoRA", "vllm/rollout"
    }  # fmt: skip
    assert set(verdicts.values()) == {"passed", "measured", "not run"}
    page = (tmp_path / "tiny.md").read_text()
    assert all(f"| {name} |" in page for name in verdicts) and "Not run yet" not in page
    before = (tmp_path / "tiny.json").read_bytes()
    capsys.readouterr()
    command.main([*TINY, str(tmp_path)])
    assert (tmp_path / "tiny.json").read_bytes() == before and len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.slow
def test_trl_in_turn(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is the other side")
    command.main([*TINY, str(tmp_path), "--part", "trl"])
    done = json.loads((tmp_path / "tiny.json").read_text())
    assert [row["verdict"] for record in done.values() for row in record["rows"]] == ["measured"] * 2


@pytest.mark.usefixtures("nothing_beside_us")
def test_what_is_missing_is_done_and_an_error_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(day: object) -> None:
        raise ValueError("a | in\nits message")

    checks = {"sampler": {"32-true": parts(True)["sampler"]["32-true"], "wrong": fails}, "later": {"too": fails}}
    monkeypatch.setattr(command, "parts", lambda tiny: checks)
    command.main([*TINY, str(tmp_path), "--part", "sampler"])
    first = json.loads((tmp_path / "tiny.json").read_text())
    assert [row["verdict"] for record in first.values() for row in record["rows"]] == ["passed", "failed"]
    page = (tmp_path / "tiny.md").read_text()
    assert r"| sampler/wrong | ValueError: a \| in its message |  | failed |" in page and "Not run yet: too." in page
    assert "its message" in (tmp_path / "logs" / "sampler, wrong.log").read_text()
    del first["sampler/wrong"]  # as if the command had been killed there
    (tmp_path / "tiny.json").write_text(json.dumps(first))
    command.main([*TINY, str(tmp_path)])
    second = json.loads((tmp_path / "tiny.json").read_text())
    assert list(second) == ["sampler/32-true", "sampler/wrong", "later/too"]
    assert second["sampler/32-true"] == first["sampler/32-true"]


def test_a_crash_and_a_hang_end_alone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="its process ended with 7"):
        apart(partial(os._exit, 7), tmp_path / "log", 60)
    with pytest.raises(RuntimeError, match="not done after 0 s"):
        apart(partial(time.sleep, 60), tmp_path / "log", 0.2)


def test_without_a_gpu_only_the_page_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From results that came from elsewhere."""
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    document, out = tmp_path / "docs" / "gpu.md", tmp_path / "out"
    document.parent.mkdir()
    document.write_text((ROOT / "docs" / "gpu.md").read_text())
    out.mkdir()
    row = vars(rows.judged("sampler", "0.5 nats", "at most 0.25 nats", False))
    how = {**result.setting("python -m benchmarks.gpu", 3, 1), "device": "a card", "commit": "abc"}
    (out / "gpu.json").write_text(json.dumps({"sampler/32-true": {"rows": [row], "seconds": 2.0, "setting": how}}))
    with pytest.raises(SystemExit, match="there is no GPU"):
        command.main(["--out", str(out)])
    text = document.read_text()
    assert "| sampler | 0.5 nats | at most 0.25 nats | MISSED |" in text and "- a card; " in text
    assert "Nothing has run" not in text
