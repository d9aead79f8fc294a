"""Mixed models: the weights against naive loops and merged models, what is refused, and ``rlif mix``."""

import csv
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlif_lightning.callbacks import Evaluation
from rlif_lightning.commands.mix import Mixing
from rlif_lightning.errors import UserError
from rlif_lightning.mixing.folder import save_mix
from rlif_lightning.mixing.results import read_rows, results_table, write_rows
from rlif_lightning.mixing.weights import Pair, check_ratios, interpolate, mix
from rlif_lightning.models.policy import Policy, PolicySettings
from rlif_lightning.models.trainable import save_trainable, trainable, trainable_weights
from tests.conftest import make_model, make_tokenizer


def weights(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def same(one, other, **tolerance):
    torch.testing.assert_close(weights(one), weights(other), **(tolerance or {"rtol": 0, "atol": 0}))


def folder_of(path, tokenizer=None, **settings):
    """A model folder with settings of its own."""
    tokenizer = tokenizer or make_tokenizer()
    make_model(**{"vocab_size": len(tokenizer), **settings}).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def pair(model_folder):
    return Pair(str(model_folder()), str(model_folder(seed=1)))


# -- weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.9])
def test_interpolates_as_a_naive_loop(ratio):
    base, tuned = make_model(seed=0), make_model(seed=1)
    start, end = ({k: v.double().clone() for k, v in weights(m).items()} for m in (base, tuned))
    mixed = weights(interpolate(base, tuned, ratio))
    assert mixed.keys() == start.keys()
    for name, weight in mixed.items():
        flat = zip(start[name].flatten().tolist(), end[name].flatten().tolist(), strict=True)
        expected = torch.tensor([b + ratio * (t - b) for b, t in flat], dtype=torch.float64)
        torch.testing.assert_close(weight.flatten().double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_are_exact_bit_by_bit(dtype):
    base, tuned = (make_model(seed=s).to(dtype) for s in (0, 1))
    for model, value in ((base, -0.0), (tuned, 0.0)):  # a sum with 0 * x would turn the first into the second
        model.model.norm.weight.data[:4] = value
    tuned.model.norm.weight.data[4] = math.inf  # ... and 0 * inf is nan
    for ratio, end in ((0, base), (1, tuned)):
        mixed = make_model(seed=0).to(dtype)
        mixed.load_state_dict(base.state_dict())
        interpolate(mixed, tuned, ratio)
        for name, weight in weights(mixed).items():
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            assert torch.equal(weight.view(bits), weights(end)[name].view(bits))


def test_the_tuned_model_shares_no_memory_with_the_mixture():
    base, tuned = make_model(seed=0), make_model(seed=1)
    before = {k: v.clone() for k, v in weights(tuned).items()}
    mixed = interpolate(base, tuned, 1)
    with torch.no_grad():
        for parameter in mixed.parameters():
            parameter.zero_()
    assert all(torch.equal(before[k], v) for k, v in weights(tuned).items())


def test_half_precision_is_rounded_once_and_a_float32_end_keeps_the_mixture_in_float32():
    start, end = (weights(make_model(seed=s).bfloat16()) for s in (0, 1))
    mixed = weights(interpolate(make_model(seed=0).bfloat16(), make_model(seed=1).bfloat16(), 0.3))
    for name, weight in mixed.items():
        exact = 0.7 * start[name].double() + 0.3 * end[name].double()
        assert weight.dtype == torch.bfloat16
        float32 = (start[name].abs() + end[name].abs()).double() * 2**-23  # where the two cancel
        assert ((weight.double() - exact).abs() <= exact.abs() * 2**-8 + float32).all()
    wide = interpolate(make_model(seed=0).bfloat16(), make_model(seed=1), 0.5)
    assert {p.dtype for p in wide.parameters()} == {torch.float32} == {wide.config.dtype}


def test_tied_weights_stay_tied():
    base, tuned = (make_model(seed=s, tie_word_embeddings=True) for s in (0, 1))
    expected = 0.5 * (base.lm_head.weight + tuned.lm_head.weight)
    mixed = interpolate(base, tuned, 0.5)
    assert mixed.lm_head.weight is mixed.model.embed_tokens.weight
    torch.testing.assert_close(mixed.lm_head.weight, expected)


@pytest.mark.parametrize("ratio", [-0.1, 1.01, math.nan])
def test_no_extrapolation(ratio, pair):
    with pytest.raises(UserError, match=r"from|0 \(base\) to 1"):
        mix(pair, ratio)


@pytest.mark.parametrize(("ratios", "message"), [([], "No ratio"), ([0, 0.5, 0.5], "twice"), ([0, 2], "share")])
def test_bad_lists_of_ratios(ratios, message):
    with pytest.raises(UserError, match=message):
        check_ratios(ratios)


def test_ratios_are_sorted():
    assert check_ratios([1, 0, 0.5]) == [0, 0.5, 1]


# -- what does not fit --------------------------------------------------------------------------------------


@pytest.fixture
def unloaded(monkeypatch):
    """Refused from configurations and tokenizers alone."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 64}, "hidden_size 64"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 3"),
        ({"vocab_size": 330}, "vocab_size 330"),
        ({"architecture": "llama"}, "model_type llama"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps 0.001"),  # the same shapes, another function
    ],
)
def test_another_architecture_size_or_function_is_refused(model_folder, tmp_path, unloaded, settings, message):
    other = folder_of(tmp_path / "other", **settings)
    with pytest.raises(UserError, match=message):
        mix(Pair(str(model_folder()), other), 0.5)


def test_harmless_settings_may_differ(model_folder, tmp_path):
    other = folder_of(tmp_path / "other", seed=1, max_position_embeddings=1024, use_cache=False)
    same(mix(Pair(str(model_folder()), other), 1).model, make_model(seed=1, vocab_size=len(make_tokenizer())))


def test_another_vocabulary_of_the_same_size_is_refused(model_folder, tmp_path, unloaded):
    other = Path(folder_of(tmp_path / "other"))
    text = (other / "tokenizer.json").read_text()
    file = json.loads(text)
    vocabulary = file["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(UserError, match=r"different vocabularies(.|\n)*is '[ab]'"):
        mix(Pair(str(model_folder()), str(other)), 0.5)


def test_a_token_that_only_one_has_is_no_obstacle(model_folder, tmp_path):
    tokenizer = make_tokenizer()
    other = folder_of(tmp_path / "other")
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(other)
    mix(Pair(str(model_folder()), other), 0.5)


def test_other_shapes_and_names_of_weights_are_refused():
    base, tuned = make_model(), make_model(hidden_size=64)
    with pytest.raises(UserError, match=r"not those of the base(.|\n)*\[320, 64\](.|\n)*\[320, 32\]"):
        interpolate(base, tuned, 0.5)
    with pytest.raises(UserError, match=r"12 missing, such as model\.layers\.2"):
        interpolate(make_model(num_hidden_layers=3), make_model(), 0.5)


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_a_missing_model(model_folder, which):
    names = {"base": str(model_folder()), "tuned": str(model_folder())} | {which: "/nowhere/at/all"}
    with pytest.raises(UserError, match="does not exist"):
        mix(Pair(**names), 0.5)


# -- adapters and checkpoints -------------------------------------------------------------------------------

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def with_lora(model, lora=LORA):
    from peft import LoraConfig, get_peft_model

    policy = get_peft_model(model, LoraConfig(**lora))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1, generator=generator)
    return policy


def delta(policy, name):
    """scale x B A of a weight by plain matrix products, 0 for weights without an adapter."""
    prefix = "base_model.model." + name.removesuffix(".weight")
    matrices = dict(policy.named_parameters())
    if f"{prefix}.lora_A.default.weight" not in matrices:
        return 0.0
    a, b = (matrices[f"{prefix}.lora_{x}.default.weight"].detach().double() for x in "AB")
    return 2.0 * b @ a  # lora_alpha / r = 2


def test_an_adapter_counts_as_the_base_with_it_merged(model_folder, tmp_path):
    base = model_folder()
    policy = with_lora(AutoModelForCausalLM.from_pretrained(base))
    policy.save_pretrained(tmp_path / "adapter")
    start = weights(AutoModelForCausalLM.from_pretrained(base))
    changed = 0
    for ratio in (0, 0.25, 1):
        for name, weight in weights(mix(Pair(str(base), str(tmp_path / "adapter")), ratio).model).items():
            expected = start[name].double() + ratio * delta(policy, name)
            changed += not torch.equal(expected, start[name].double())
            torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)
    assert changed == 2 * 2 * 3


def test_adapters_that_do_not_fit_are_refused(model_folder, tmp_path):
    with_lora(make_model(num_hidden_layers=1)).save_pretrained(tmp_path / "shallow")
    with_lora(make_model(hidden_size=64)).save_pretrained(tmp_path / "wide")
    with_lora(make_model()).save_pretrained(tmp_path / "pickled")
    adapter = tmp_path / "pickled" / "adapter_model.safetensors"
    torch.save(load_file(adapter), adapter.with_suffix(".bin"))
    adapter.unlink()
    for name, message in (
        ("shallow", r"does not fit the model(.|\n)*missing, such as .*layers\.1"),
        ("wide", r"does not fit the model(.|\n)*\[64, 4\](.|\n)*\[32, 4\]"),
        ("pickled", "not loaded"),
    ):
        with pytest.raises(UserError, match=message):
            mix(Pair(str(model_folder()), str(tmp_path / name)), 0.5)


@pytest.mark.parametrize("lora", [False, True])
def test_a_checkpoint_counts_as_the_base_with_its_weights(rlif, small_fit, model_folder, lora):
    settings = [f"--model.lora={json.dumps(LORA | {'lora_dropout': 0.1})}"] if lora else []
    runs = rlif("fit", *small_fit, *settings, "--trainer.max_steps=3", "--model.optimizer.lr=0.01")
    run = runs / "runs" / "run" / "1"
    base = str(model_folder())
    start = weights(AutoModelForCausalLM.from_pretrained(base))
    stored = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    if lora:
        policy = with_lora(AutoModelForCausalLM.from_pretrained(base))
        missed = policy.load_state_dict({k.removeprefix("model."): v for k, v in stored.items()}, strict=False)
        assert not missed.unexpected_keys
        end = {name: (weight.double() + delta(policy, name)).float() for name, weight in start.items()}
    else:
        end = {name: stored[f"model.{name}"] for name in start}
    for tuned in (run, run / "checkpoints" / "last.ckpt"):
        for ratio in (0.5, 1):
            for name, weight in weights(mix(Pair(base, str(tuned)), ratio).model).items():
                expected = (1 - ratio) * start[name].double() + ratio * end[name].double()
                torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(end[name], start[name]) for name in start)
    with pytest.raises(UserError, match="not trained from the base"):
        mix(Pair(str(model_folder(seed=1)), str(run)), 0.5)


def test_weights_that_the_guard_has_kept_count_as_a_checkpoint(model_folder, tmp_path):
    policy = Policy.load(PolicySettings(str(model_folder()), lora=LORA))
    with torch.no_grad():
        for weight in trainable(policy.model).values():
            weight.add_(0.1)
    kept = tmp_path / "weights.safetensors"
    save_trainable(trainable_weights(policy.model), kept, step=3, **policy.identity.to_facts())
    mixed = weights(mix(Pair(str(model_folder()), str(kept)), 1).model)
    start = weights(AutoModelForCausalLM.from_pretrained(model_folder()))
    for name, weight in mixed.items():
        expected = start[name].double() + delta(policy.model, name)
        torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(mixed[name], start[name]) for name in start)


def test_an_adapter_on_one_of_two_tied_embeddings_is_not_merged_into_both(tmp_path):
    """It was: the mixture was another model, without a word."""
    base = folder_of(tmp_path / "base", tie_word_embeddings=True)
    lora = LORA | {"target_modules": ["embed_tokens"]}
    with_lora(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=False
    )
    with pytest.raises(UserError, match=r"not those of the base(.|\n)*lm_head"):
        mix(Pair(base, str(tmp_path / "adapter")), 0.5)


# -- folders ------------------------------------------------------------------------------------------------


def test_a_saved_mixture_is_an_ordinary_folder(pair, tmp_path):
    folder = save_mix(pair, 0.25, tmp_path / "mixed" / "0.25")
    same(AutoModelForCausalLM.from_pretrained(folder), mix(pair, 0.25).model)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == make_tokenizer().get_vocab()
    assert (folder / "model.safetensors").is_file()
    assert json.loads((folder / "mix.json").read_text())["ratio"] == 0.25
    assert [p.name for p in folder.parent.iterdir()] == ["0.25"]


def test_a_mixture_ends_where_either_of_its_ends_does(pair, model_folder, tmp_path):
    tuned = tmp_path / "tuned"
    make_model(seed=1).save_pretrained(tuned)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(tuned)
    settings = json.loads((tuned / "generation_config.json").read_text())
    (tuned / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [5], "top_p": 0.5}))
    for name, ends in (("one", (pair.base, str(tuned))), ("other", (str(tuned), pair.base))):
        model = AutoModelForCausalLM.from_pretrained(save_mix(Pair(*ends), 0.5, tmp_path / name))
        assert model.generation_config.eos_token_id == [0, 2, 5]


def test_a_folder_is_made_once_and_never_taken_from_others(pair, tmp_path):
    folder = save_mix(pair, 0.5, tmp_path / "0.5")
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    save_mix(pair, 0.5, folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="something else"):
        save_mix(pair, 0.6, folder)
    with pytest.raises(UserError, match="something else"):
        save_mix(Pair(pair.tuned, pair.base), 0.5, folder)


# -- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def words(small_fit, model_folder, problems_file):
    """Arguments of a small ``rlif mix`` from one random model to another."""
    return [
        *small_fit,
        "--data.val.path", str(problems_file), "--data.val.gold", r"[#]{4}\s*(.+)", "--data.val.limit=7",
        "--evaluation.batch_size=4", "--evaluation.samples=2",
        "--tuned", str(model_folder(seed=1)), "--prompts=4", "--output=out",
    ]  # fmt: skip


def table(path):
    with (path / "mix.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def column(path, name):
    with path.open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_measures_what_a_fit_measures_before_its_first_step(rlif, words, small_fit, model_folder, tmp_path, capsys):
    rows = [json.dumps({"question": f"{n} + 0", "answer": str(n % 10)}) for n in range(40)]  # met by chance
    (tmp_path / "digits.jsonl").write_text("\n".join(rows))
    val = ["--data.val.path=digits.jsonl", "--data.val.gold=whole", "--data.val.limit=40", "--evaluation.samples=4"]
    out = rlif("mix", *words, *val, "--ratios", 1, 0, "--prompts=2", "--trainer.enable_progress_bar=true") / "out"
    printed, progress = capsys.readouterr()
    assert "ratio 1: sampling: 2/2 prompts" in progress and "ratio 1: answering: 40/40 problems" in progress
    rows = table(out)
    assert [row["ratio"] for row in rows] == [0, 1]
    for row, seed in zip(rows, (0, 1), strict=True):
        settings = [*small_fit, *val, "--model.name", model_folder(seed=seed), "--trainer.max_steps=1"]
        metrics = rlif("fit", *settings, "--runs", f"runs{seed}") / f"runs{seed}/run/1/metrics.csv"
        for name in ("entropy", "self_certainty", "agreement"):
            assert row[name] == pytest.approx(column(metrics, f"rollout/{name}")[0], rel=1e-5)
        for name in ("accuracy", "accuracy_sampled", "mean_tokens_sampled", "truncated_fraction_sampled"):
            assert row[name] == column(metrics, f"val/{name}")[0]
        assert row["accuracy_sampled_low"] <= row["accuracy_sampled"] <= row["accuracy_sampled_high"]
        assert (row["completions"], row["n"]) == (8, 40)
        assert "before" not in row
        assert f"{row['entropy']:.3f}" in printed
    assert rows[0]["entropy"] != rows[1]["entropy"]
    assert any(0 < row["accuracy_sampled"] < row["accuracy_sampled_high"] for row in rows)
    assert (out / "mix.png").stat().st_size > 5_000
    assert sorted(p.name for p in out.iterdir()) == ["config.yaml", "mix.csv", "mix.png"]


def test_steps_fit_each_mixture_in_a_folder_of_its_own(rlif, words, pair):
    out = rlif("mix", *words, "--ratios", 0.25, 1, "--steps=1", "--evaluation.every=1", "--save=kept") / "out"
    for row in table(out):
        name = f"{row['ratio']:g}"
        run = out / name / "fit" / "1"
        accuracy = column(run / "metrics.csv", "val/accuracy_sampled")
        assert len(accuracy) == 2
        assert (row["steps"], row["before"], row["after"]) == (1, *accuracy)
        assert row["before"] == row["accuracy_sampled"]
        assert row["best"] == max(accuracy) == accuracy[int(row["best_step"])]
        kept = out.parent / "kept" / name
        same(AutoModelForCausalLM.from_pretrained(kept), mix(pair, row["ratio"]).model)
        assert not (out / name / "model").exists()
        assert f"name: {kept}" in (run / "config.yaml").read_text()


def test_without_labels_entropy_is_left(rlif, words):
    out = rlif("mix", *words, "--ratios", 0.5, "--steps=1", "--data.train.answer=null", "--data.val.answer=null")
    (row,) = table(out / "out")
    assert row["entropy"] > 0
    assert not {"accuracy", "before", "best"} & row.keys()


def stopped(rlif, *args):
    with pytest.raises(SystemExit) as ended:
        rlif("mix", *args)
    assert ended.value.code == 130


def test_an_interrupted_mixing_goes_on_where_it_stopped(rlif, words, monkeypatch, tmp_path, capsys):
    ratios = ["--ratios", 0, 0.5, 1]
    whole = table(rlif("mix", *words, *ratios, "--output=whole") / "whole")
    measure, seen = Mixing._measure, []

    def interrupted(self, model, label):
        seen.append(label)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return measure(self, model, label)

    monkeypatch.setattr(Mixing, "_measure", interrupted)
    stopped(rlif, *words, *ratios)
    assert "--output out" in capsys.readouterr().err
    assert table(tmp_path / "out") == whole[:1]
    rlif("mix", *words, *ratios)
    assert seen == ["ratio 0", "ratio 0.5", "ratio 0.5", "ratio 1"]
    assert table(tmp_path / "out") == whole
    rlif("mix", *words, *ratios, "--ratios", 0.75)
    assert [row["ratio"] for row in table(tmp_path / "out")] == [0, 0.5, 0.75, 1]


def test_an_interrupted_fit_goes_on_where_it_stopped(rlif, words, monkeypatch, tmp_path):
    more = ["--ratios", 0.5, "--steps=3", "--evaluation.every=1"]
    whole = table(rlif("mix", *words, *more, "--output=whole") / "whole")
    evaluate = Evaluation.evaluate

    def interrupted(self, trainer, module):
        evaluate(self, trainer, module)
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "evaluate", interrupted)
        stopped(rlif, *words, *more)
    assert not (tmp_path / "out" / "mix.csv").exists()
    rlif("mix", *words, *more)
    assert table(tmp_path / "out") == whole
    assert [p.name for p in (tmp_path / "out/0.5/fit").iterdir()] == ["1"]
    one, other = ((tmp_path / x / "0.5/fit/1/metrics.csv") for x in ("out", "whole"))
    assert column(one, "rollout/reward") == column(other, "rollout/reward")


def test_a_fit_interrupted_before_it_began_says_how_to_go_on(rlif, words, monkeypatch, tmp_path, capsys):
    def interrupted(self, trainer, module):
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "on_train_start", interrupted)
        stopped(rlif, *words, "--ratios", 0.5, "--steps=1")
    signal.signal(signal.SIGINT, handler)  # the Trainer ignores it while it ends
    assert "--output out to continue" in capsys.readouterr().err
    rlif("mix", *words, "--ratios", 0.5, "--steps=1")
    assert [row["steps"] for row in table(tmp_path / "out")] == [1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ratios", "half"], "ratios"),
        (["--ratios", "0", "1.5"], "share of the tuned weights"),
        (["--ratios", "0.5", "0.5"], "twice"),
        (["--steps=3", "--rollout.steps_per_rollout=2"], "middle of a rollout"),
        (["--steps=-1"], "too small"),
        (["--tuned=nowhere/at/all"], "does not exist"),
        (["--tuned=toy-tuned:x"], "toy:3"),
        (["--tuned=toy-tuend"], "did you mean 'toy-tuned'"),
        (["--tuned=adapter"], "adapter's weights can't be read"),
        (["--tuned=bad.ckpt"], "bad.ckpt"),
        (["--tuned=other.ckpt"], "not written by rlif_lightning"),
        (["--base=toy:0"], "not of one architecture"),
        (["--stepps=3"], "steps"),
    ],
)
def test_mistakes_are_named_before_weights_are_loaded(rlif, words, capsys, unloaded, more, message, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("cut short")
    (tmp_path / "bad.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {}, "global_step": 3}, tmp_path / "other.ckpt")
    with pytest.raises(SystemExit) as ended:
        rlif("mix", *words, *more)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert message in error.partition("error: ")[2]
    assert not (tmp_path / "out").exists()


def test_the_tuned_model_must_be_named(rlif, small_fit, capsys):
    with pytest.raises(SystemExit):
        rlif("mix", *small_fit)
    assert "--tuned is missing" in capsys.readouterr().err


def test_results_of_other_settings_are_not_mixed_in(rlif, words, capsys):
    rlif("mix", *words, "--ratios", 0)
    for change in ("--rollout.temperature=0.5", "--steps=1", "--prompts=3"):
        with pytest.raises(SystemExit):
            rlif("mix", *words, "--ratios", 0, change)
        error = capsys.readouterr().err
        assert "other settings" in error
        assert change.strip("-").partition("=")[0] in error


def test_help(rlif, capsys):
    with pytest.raises(SystemExit):
        rlif("mix", "--help")
    assert "--ratios" in capsys.readouterr().out


@pytest.mark.slow
def test_on_the_toy_the_tuned_share_lowers_entropy_and_leaves_less_to_gain(rlif):
    arguments = [
        "mix",
        "--config",
        "quickstart",
        "--ratios",
        0,
        0.5,
        1,
        "--base=toy:0",
        "--trainer.gradient_clip_val=1",
    ]
    tuned = table(rlif(*arguments, "--tuned=toy-tuned:0", "--steps=5", "--output=tuned") / "tuned")
    entropy = [row["entropy"] for row in tuned]
    assert entropy == sorted(entropy, reverse=True)
    assert entropy[0] > 0.3
    assert entropy[-1] < 0.05
    assert [row["before"] for row in tuned] == [row["accuracy_sampled"] for row in tuned]
    assert tuned[0]["accuracy_sampled"] < 0.4 < 0.8 < tuned[1]["accuracy_sampled"] < tuned[2]["accuracy_sampled"]
    assert tuned[0]["best"] - tuned[0]["before"] > 0.1 > tuned[2]["best"] - tuned[2]["before"]


def test_table_and_file_of_results(tmp_path):
    rows = {
        1.0: {"ratio": 1.0, "entropy": 0.0125, "n": 200.0, "steps": 40.0,
              "before": 0.9, "best": 0.9, "best_step": 0.0, "after": 0.5},
        0.1: {"ratio": 0.1, "entropy": 1 / 3},
    }  # fmt: skip
    assert results_table(rows).splitlines() == [
        "ratio  entropy    n  steps  before  best @ step  after  gain at best  at end",
        "  0.1    0.333",
        "    1    0.013  200     40   0.900    0.900 @ 0  0.500        +0.000  -0.400",
    ]
    write_rows(tmp_path / "mix.csv", rows)
    assert read_rows(tmp_path / "mix.csv") == rows  # to the last digit
    assert (tmp_path / "mix.csv").read_text().splitlines()[1].startswith("0.1,0.3333333333333333,")
    assert read_rows(tmp_path / "none.csv") == {}
    (tmp_path / "mix.csv").write_text("ratio,entropy\n0.1,much\n")
    with pytest.raises(UserError, match="damaged"):
        read_rows(tmp_path / "mix.csv")
