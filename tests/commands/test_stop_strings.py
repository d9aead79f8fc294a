"""Stop strings from the recipe to the export: training, evaluation, diagnosis, and transformers' own generate."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.processes import used_by

STOP = ["e", "4", "\n"]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_stopped(text, ended):
    """A text holds no string but at its end, and then it has ended."""
    assert not any(s in text[: -len(s)] for s in STOP)
    assert ended or not any(s in text for s in STOP)


@pytest.fixture
def settings(small_fit, problems_file):
    return [
        *small_fit, f"--rollout.stop={json.dumps(STOP)}", "--rollout.max_new_tokens=24",
        "--rollout.mask_truncated=true", "--evaluation.max_new_tokens=24", "--evaluation.samples=2",
        "--data.val.path", str(problems_file), "--data.val.gold", r"[#]{4}\s*(.+)", "--data.val.limit=12",
    ]  # fmt: skip


def test_a_run_its_evaluation_and_its_export_stop_alike(rlif, settings, capsys):
    root = rlif("fit", *settings, "--completions.keep=8")
    run = root / "runs/run/1"
    drawn = rows(run / "completions.jsonl")
    for row in drawn:
        assert_stopped(row["completion"], row["ended"])
        assert row["ended"] or row["tokens"] == 24
        assert row["ended"] or row["advantage"] == 0  # mask_truncated leaves out what did not stop, and nothing else
    assert sum(row["ended"] for row in drawn) > len(drawn) / 2 and any(row["advantage"] for row in drawn)

    rlif("validate", *used_by("validate", settings), "--ckpt_path", run)
    answered = rows(root / "runs/run/validate/1/problems.jsonl")
    results = json.loads((root / "runs/run/validate/1/results.json").read_text())
    attempts = [attempt for row in answered for attempt in [*row["greedy"], *row["samples"]]]
    for attempt in attempts:
        assert_stopped(attempt["text"], attempt["ended"])
    cut = [not attempt["ended"] for row in answered for attempt in row["samples"]]
    assert results["truncated_fraction_sampled"] == pytest.approx(sum(cut) / len(cut)) and sum(cut) < len(cut) / 2
    assert results["stop"] == STOP

    capsys.readouterr()
    rlif("export", run)
    folder = run / "export/merged"
    assert GenerationConfig.from_pretrained(folder).stop_strings == STOP
    card = (folder / "README.md").read_text()
    assert "generate(**prompt, tokenizer=tokenizer, max_new_tokens=24)" in card and r'`"e"`, `"4"`, `"\n"`' in card
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for row in answered:
        chat = [{"role": "user", "content": row["problem"]}]
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            output = model.generate(**prompt, tokenizer=tokenizer, do_sample=False, max_new_tokens=24)
        said = output[0, prompt["input_ids"].shape[1] :]
        (own,) = row["greedy"]
        assert len(said) == own["tokens"] and tokenizer.decode(said, skip_special_tokens=True).startswith(own["text"])


def test_a_continued_run_says_that_its_strings_differ(rlif, settings, caplog):
    rlif("fit", *settings)
    with caplog.at_level("INFO"):
        rlif("fit", *settings, "--trainer.max_steps=4", "--rollout.stop=null", "--ckpt_path=last")
    assert f"rollout.stop {json.dumps(STOP)} -> null" in caplog.text


def test_an_export_without_strings_has_none(rlif, small_fit):
    root = rlif("fit", *small_fit)
    rlif("export", root / "runs/run/1")
    folder = root / "runs/run/1/export/merged"
    assert GenerationConfig.from_pretrained(folder).stop_strings is None
    assert "tokenizer=tokenizer" not in (folder / "README.md").read_text()


def test_diagnose_says_what_would_end_completions(rlif, small_fit, capsys, monkeypatch):
    """Every completion here holds the line that the prompt begins with."""
    monkeypatch.setattr(
        "rlif_lightning.models.policy.Policy.decode", lambda self, ids: [" 8\nQuestion: What is 1?"] * len(ids)
    )
    settings = [x for x in small_fit if not x.startswith(("--data.template", "--trainer.max_steps"))]
    rlif("diagnose", *settings, "--data.template=Question: {prompt}\nAnswer:", "--prompts=4", "--gradients=false")
    said = " ".join(capsys.readouterr().out.split())
    assert r'cut off: add "\nQuestion:" to rollout.stop, which 100% of these hold, or raise rollout' in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("Question", "expected: a list or null"),
        ('[""]', 'got: [""]'),
        ("[1]", "put it into quotes"),
        ('["a<|im_end|>"]', 'model.end_tokens: ["<|im_end|>"]'),
    ],
)
def test_mistakes_are_named_before_weights_are_loaded(rlif, small_fit, capsys, monkeypatch, given, said):
    monkeypatch.setattr("rlif_lightning.models.policy.load_model", None)
    with pytest.raises(SystemExit) as ended:
        rlif("fit", *small_fit, f"--rollout.stop={given}")
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_settings_of_the_page_for_base_models(rlif, small_fit, tmp_path):
    page = (Path(__file__).parents[2] / "docs/data.md").read_text().partition("## Base models")[2]
    (tmp_path / "base.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    settings = [x for x in small_fit if not x.startswith(("--data.template", "--data.answers"))]
    run = rlif("fit", "--config", tmp_path / "base.yaml", *settings) / "runs/base/1"
    assert yaml.safe_load((run / "config.yaml").read_text())["rollout"]["stop"] == ["\nQuestion:"]
    prompt = rows(run / "completions.jsonl")[0]["prompt"]
    assert prompt.count("\nAnswer:") == 2 and prompt.endswith("\nAnswer:")
