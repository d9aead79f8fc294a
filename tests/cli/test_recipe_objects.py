"""Commands without a Trainer of their own: the settings of fit, its errors, its objects."""

import pytest
import torch
import yaml

from rlif_lightning.cli.recipe_objects import RecipeObjects
from rlif_lightning.errors import UserError
from rlif_lightning.models.precision import autocast


def options(parser):
    parser.add_argument("--count", type=int, default=3, help="How many.")


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """``loaded("--config", ...)``: the objects of a command."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: RecipeObjects("diagnose", [str(a) for a in args], options)


@pytest.fixture
def no_weights(monkeypatch):
    from transformers import AutoModelForCausalLM

    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def test_recipes_overlays_and_own_options_become_objects(loaded, small_fit, no_weights, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "rollout: {group_size: 4, temperature: 0.5}\ncount: 5\ntrainer: {devices: 4, strategy: ddp}"
    )
    objects = loaded("--config", "token_entropy", "--config", "own.yaml", *small_fit, "--rollout.group_size=3")
    assert [r.name for r in objects.collector.rewards] == ["token_entropy"]
    assert (objects.collector.plan.group_size, objects.collector.sampling.temperature) == (3, 0.5)
    assert objects.evaluation.attempts.sampling.max_new_tokens == 8
    assert objects.options.count == 5
    assert objects.recipe == "token_entropy+own"
    assert objects.device == torch.device("cpu") and objects.precision == "32-true"
    prompts = objects.prompts()
    assert len(prompts) == 40
    assert objects.module.tokenizer.decode(prompts[0].ids) == "What is 0 + 0? "
    assert not (tmp_path / "runs").exists()


def test_the_policy_is_that_of_the_recipe(loaded, small_fit):
    objects = loaded(*small_fit, "--model.lora={r: 2, target_modules: all-linear}", "--trainer.precision=bf16-mixed")
    policy = objects.policy(training=True).model
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.device for p in policy.parameters()} == {objects.device}
    with autocast(objects.precision, objects.device):
        out = policy(torch.tensor([[5, 6]])).logits
    assert out.dtype == torch.bfloat16


def test_only_training_keeps_full_precision(loaded, small_fit):
    kinds = {}
    for training in (False, True):
        policy = loaded(*small_fit, "--trainer.precision=bf16-mixed").policy(training=training).model
        kinds[training] = {p.dtype for p in policy.parameters()}
    assert kinds == {False: {torch.bfloat16}, True: {torch.float32}}


def test_weights_of_a_checkpoint_and_the_config_of_its_run(rlif, small_fit, loaded, tmp_path):
    """The config.yaml of a fit is a recipe here as well, its ckpt_path included."""
    run = rlif("fit", *small_fit) / "runs/run/1"
    start = loaded(*small_fit).policy().model.state_dict()
    last = loaded("--config", run / "config.yaml", "--ckpt_path", run).policy().model.state_dict()
    stored = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(stored[f"model.{name}"], last[name]) for name in last if f"model.{name}" in stored)
    assert any(not torch.equal(start[name], last[name]) for name in last)
    with pytest.raises(UserError, match="belongs to another model"):
        loaded("--config", "quickstart", "--ckpt_path", run).policy()
    with pytest.raises(UserError, match="does not exist"):
        loaded(*small_fit, "--ckpt_path", "nowhere")


def test_the_output_folder_is_new_each_time_and_holds_the_settings(loaded, small_fit, tmp_path):
    objects = loaded("--config", "token_entropy", *small_fit, "--count", "7")
    folders = [objects.output(), objects.output(), objects.output("mine/here")]
    assert [str(f) for f in folders] == [
        "runs/token_entropy/diagnose/1",
        "runs/token_entropy/diagnose/2",
        "mine/here",
    ]
    for folder in folders:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert (config["count"], config["rollout"]["group_size"]) == (7, 4)
    assert loaded("--config", folders[0] / "config.yaml").options.count == 7
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="output folder can't be made"):
        objects.output("file")


def test_print_config_and_help_load_nothing(loaded, no_weights, capsys):
    for args in (["--help"], ["--config", "quickstart", "--model.name", "/nowhere", "--print_config"]):
        with pytest.raises(SystemExit) as exit_:
            loaded(*args)
        assert exit_.value.code == 0
    helped, _, printed = capsys.readouterr().out.partition("# lightning.pytorch")
    assert helped.startswith("usage: rlif diagnose [--config RECIPE ...] [--setting VALUE ...]\n\nFind out whether")
    assert "--rollout.group_size" not in helped and "the settings of rlif fit" in helped
    assert "How many." in helped
    config = yaml.safe_load(printed.partition("\n")[2])
    assert (config["model"]["name"], config["count"], config["rollout"]["group_size"]) == ("/nowhere", 3, 8)


MISTAKES = {
    "own option": (["--coun", "4"], "'--coun'", "--count?"),
    "own value": (["--count", "four"], "count can't be 'four'", "a whole number"),
    "setting": (["--rollout.group_sise", "4"], "'--rollout.group_sise'", "--rollout.group_size?"),
    "room": (["--rolout.group_size=4"], "'--rolout.group_size'", "--rollout.group_size?"),
    "source": (["--data.train.pth", "x"], "data.train", "path?"),
    "number": (["--rollout.group_size", "eight"], "rollout.group_size can't be 'eight'", "a whole number"),
    "choice": (["--model.loss", "grpoo"], "grpo, dapo, bnpo, dr_grpo", "did you mean grpo?"),
    "class": (["--rollout.rewards=[SelfCertanty]"], "'SelfCertanty'", "rlif_lightning.rewards.SelfCertainty?"),
    "recipe": (["--config", "quickstar"], "'quickstar'", "'quickstart'"),
    "word": (["quickstart"], "'quickstart'", "--config quickstart?"),
    "key in a file": (["--config", "a.yaml"], "a.yaml, line 2", "rollout.group_size?"),
    "room in a file": (["--config", "b.yaml"], "b.yaml, line 2", "rollout.group_size?"),
    "device": (["--trainer.accelerator=cppu"], "The Trainer refuses its settings", "--trainer"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_as_fit_answers_it(mistake, loaded, no_weights, tmp_path):
    (tmp_path / "a.yaml").write_text("rollout:\n  group_sise: 4\n")
    (tmp_path / "b.yaml").write_text("rolout:\n  group_size: 4\n")
    args, *parts = MISTAKES[mistake]
    with pytest.raises(UserError) as error:
        loaded("--model.name", "/nowhere", *args)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) <= 3


def test_a_missing_model_is_named(loaded):
    with pytest.raises(UserError, match=r"The setting --model\.name is missing"):
        loaded("--count", "4")
