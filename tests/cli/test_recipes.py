"""Every shipped recipe is parsed, instantiated and run for a moment with a tiny model and tiny data."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from rlif_lightning.cli.recipes import shipped_recipes
from rlif_lightning.cli.strict_yaml import compose
from rlif_lightning.data.problems import Source, read_problems
from rlif_lightning.grading import AnswerFormat, Grader

OVERLAYS = ("self_certainty", "token_entropy", "trajectory_entropy", "verifiable", "majority_vote")
TRAINING = ("gsm8k", "intuitor")
MATH_OVERLAYS = ("card_8gb", "card_16gb", "card_24gb", "card_t4", "full_80gb", "intuitor_7b", "no_free_lunch")
SEVERAL_GPUS = ("ddp", "fsdp2", "two_nodes")  # planned here; strategies have tests of their own
PLANNED = [
    (overlay, *found)
    for overlay in (*MATH_OVERLAYS, *SEVERAL_GPUS)
    for found in re.findall(r"^# +([\d.]+) GiB  (--.*)$", Path(shipped_recipes()[overlay]).read_text(), re.MULTILINE)
]
ROWS = {  # two rows in each data set's own format
    "gsm8k": [
        {"question": "What is 2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
        {"question": "What is 900 + 900?", "answer": "It is\n#### 1,800"},
    ],
    "math": [
        {
            "problem": "What is $1/2$?",
            "solution": r"It is $\boxed{\frac{1}{2}}$.",
            "answer": r"\frac{1}{2}",
            "subject": "Algebra",
            "level": 2,
        },
        {
            "problem": "Name a point.",
            "solution": r"So \boxed{(3, 4)}.",
            "answer": "(3, 4)",
            "subject": "Geometry",
            "level": 1,
        },
    ],
    "aime24": [{"id": 1, "problem": "Count.", "answer": "025"}, {"id": 2, "problem": "Count on.", "answer": "204"}],
    "amc23": [{"problem": "How far?", "answer": 27.0}, {"problem": "How long?", "answer": 1.5}],
    "minerva_math": [
        {"problem": "Find it.", "solution": r"\boxed{1.6} \mathrm{~cm}"},
        {"problem": "Find them.", "solution": r"so \boxed{4.49e33}"},
    ],
    "olympiadbench": [
        {"question": "Both?", "final_answer": ["$1$, $2$"], "unit": None, "error": None},
        {"question": "Speed?", "final_answer": ["31"], "unit": "km/h", "error": "1e-1"},
    ],
    "mmlu_pro": [
        {
            "question_id": 70,
            "question": "Which?",
            "options": ["one", "two", "three"],
            "answer": "C",
            "answer_index": 2,
            "cot_content": "",
            "category": "business",
            "src": "ori_mmlu-business_ethics",
        },
        {
            "question_id": 71,
            "question": "Why?",
            "options": [f"because {i}" for i in range(10)],
            "answer": "J",
            "answer_index": 9,
            "cot_content": "",
            "category": "law",
            "src": "stemez-Law",
        },
    ],
    "cruxeval_o": [
        {"code": "def f(x):\n    return {x: [x]}", "input": "'=='", "output": "{'==': ['==']}", "id": "sample_0"},
        {"code": "def f(x, y):\n    return x, y", "input": "True, 2.5", "output": "(True, 2.5)", "id": "sample_1"},
    ],
    "alpaca_eval": [
        {"instruction": "Name a fruit.", "output": "Pear.", "generator": "text_davinci_003", "dataset": "koala"},
        {"instruction": "Sing, {x}!", "output": "La.", "generator": "text_davinci_003", "dataset": "vicuna"},
    ],
}
EVALUATIONS = ("math500", "aime24", "amc23", "minerva_math", "olympiadbench", "mmlu_pro", "cruxeval_o")
TINY = [
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    "--evaluation.max_new_tokens=4",
]  # fmt: skip
TINY_FIT = [
    "--trainer.max_steps=2", "--rollout.prompts_per_step=2", "--rollout.group_size=4",
    "--rollout.micro_batch_size=4", "--rollout.max_new_tokens=4", "--evaluation.every=1", "--evaluation.n=2",
]  # fmt: skip


@pytest.fixture
def data(tmp_path):
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows * 2))
    train = [ROWS["gsm8k"][0]] * 6 + [
        {"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(500)
    ]
    (tmp_path / "gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    return tmp_path


def rows_of(recipe):
    return {"gsm8k": "gsm8k", "intuitor": "math", "math500": "math"}.get(recipe, recipe)


def paths_to(recipe, data):
    """The settings with which a training recipe takes its data from files: as its header says."""
    train, test = ("gsm8k_train", "gsm8k") if recipe == "gsm8k" else ("math", "math")
    files = {"train": train, "val": train, "test": test}
    return [f"--data.{part}.path={data / name}.jsonl" for part, name in files.items()]


def test_no_recipe_is_forgotten_here():
    """A new recipe must be added to one of the lists below, or nothing runs it."""
    evaluations = {*EVALUATIONS, "alpaca_eval"}
    shipped = {"quickstart", "lora", "nf4", *OVERLAYS, *TRAINING, *evaluations}
    shipped |= {*MATH_OVERLAYS, *SEVERAL_GPUS, "frozen_annotator", "deterministic"}
    assert set(shipped_recipes()) == shipped


def test_no_recipe_says_anything_twice():
    assert all(compose(Path(path).read_text()) for path in shipped_recipes().values())


@pytest.mark.parametrize("recipe", TRAINING)
def test_training_recipe(recipe, rlif, model_folder, data):
    model = ["--model.name", model_folder("qwen2", chat=True)]
    folder = rlif("fit", "--config", recipe, *model, *paths_to(recipe, data), *TINY, *TINY_FIT)
    run = folder / "runs" / recipe / "1"
    config = yaml.safe_load((run / "config.yaml").read_text())
    shipped = yaml.safe_load(Path(shipped_recipes()[recipe]).read_text())
    assert config["model"]["optimizer"]["init_args"]["lr"] == shipped["model"]["optimizer"]["init_args"]["lr"]
    assert len((run / "metrics.csv").read_text().splitlines()) == 4  # header, two steps, the last evaluation
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert all(shipped["data"]["system_prompt"] in r["prompt"] and r["prompt"].endswith("assistant\n") for r in rows)


def test_no_step_is_chosen_on_the_test_set(data, capsys):
    """GSM8K's curves used to be those of its test set; training, validation and test share no problem now."""
    sources = settings_of(capsys, "--config", "gsm8k", *paths_to("gsm8k", data))["data"]
    problems = {
        part: {p.text for p in read_problems(Source(**{**sources[part], "answers": None}), part)}
        for part in ("train", "val", "test")
    }
    assert [len(problems[part]) for part in ("train", "val", "test")] == [1, 500, 2]
    assert problems["val"] == {f"What is {n} + 1?" for n in range(500)}
    assert not problems["val"] & (problems["train"] | problems["test"])
    assert [sources[part]["split"] for part in ("train", "val", "test")] == ["train[:-500]", "train[-500:]", "test"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_replaces_the_reward(overlay, rlif, model_folder, data):
    file = data / "gsm8k.jsonl"
    paths = [f"--data.{part}.path={file}" for part in ("train", "val", "test")]
    paths += [f"--data.{part}.gold=[#]{{4}}\\s*(.+)" for part in ("train", "val")]
    paths += ["--data.answers.completion=(.)", "--data.answers.unfinished_is_wrong=false"]  # something to vote on
    folder = rlif(
        "fit", "--config", "quickstart", "--config", overlay, "--model.name", model_folder(), *paths, *TINY, *TINY_FIT
    )  # fmt: skip
    lines = (folder / f"runs/quickstart+{overlay}/1/completions.jsonl").read_text().splitlines()
    assert {tuple(json.loads(line)["rewards"]) for line in lines} == {(overlay,)}


def test_deterministic_overlay(rlif, model_folder, data, monkeypatch):
    """Twice the same bits; and torch was asked for its deterministic algorithms, which outlive the run."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    file, weights = data / "gsm8k.jsonl", []
    paths = [f"--data.{part}.path={file}" for part in ("train", "val", "test")]
    paths += [f"--data.{part}.gold=[#]{{4}}\\s*(.+)" for part in ("train", "val")]
    model = ["--model.name", model_folder(), "--model.optimizer.lr=0.01"]
    recipes = ["--config", "quickstart", "--config", "deterministic"]
    try:
        for run in ("1", "2"):
            folder = rlif("fit", *recipes, *model, *paths, *TINY, *TINY_FIT)
            assert torch.get_deterministic_debug_mode() == 1  # to warn
            stored = folder / "runs" / "quickstart+deterministic" / run / "checkpoints" / "last.ckpt"
            weights.append(torch.load(stored, weights_only=True)["state_dict"])
    finally:
        torch.use_deterministic_algorithms(False)
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(values, weights[1][name]) for name, values in weights[0].items())


@pytest.mark.parametrize("overlay", [*MATH_OVERLAYS, "frozen_annotator"])
def test_overlay_over_the_settings_of_a_paper(overlay, rlif, model_folder, data):
    paths = [f"--data.{part}.path={data / 'math.jsonl'}" for part in ("train", "val", "test")]
    model = ["--model.name", model_folder("qwen2", chat=True), "--trainer.precision", "bf16-mixed"]
    folder = rlif("fit", "--config", "intuitor", "--config", overlay, *model, *paths, *TINY, *TINY_FIT)
    run = folder / f"runs/intuitor+{overlay}/1"
    assert len((run / "metrics.csv").read_text().splitlines()) == 4
    config = yaml.safe_load((run / "config.yaml").read_text())
    shipped = yaml.safe_load(Path(shipped_recipes()["intuitor"]).read_text())
    assert config["data"]["system_prompt"] == shipped["data"]["system_prompt"]
    rewards = config["rollout"]["rewards"]
    assert [r["init_args"]["annotator"] for r in rewards] == [
        "reference" if overlay == "frozen_annotator" else "policy"
    ]


def test_settings_of_the_paper_for_7b(capsys):
    """arXiv 2505.19590: learning rate 1e-6, 64 x 14, KL 0.01; the rest as for 1.5B."""
    from rlif_lightning.main import main

    with pytest.raises(SystemExit):
        main(["fit", "--config", "intuitor", "--config", "intuitor_7b", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    own = config["model"]["optimizer"]["init_args"]
    assert own["lr"] == 1e-6 and own["betas"] == [0.9, 0.999] and config["model"]["kl_coefficient"] == 0.01
    rollout = config["rollout"]
    assert (rollout["prompts_per_step"], rollout["group_size"], rollout["temperature"]) == (64, 14, 0.9)
    assert config["trainer"]["max_steps"] == 117 == 7500 // 64


@pytest.mark.parametrize(
    ("overlay", "gigabytes", "arguments"),
    [pytest.param(*p, marks=[] if p[0] == "full_80gb" else pytest.mark.slow) for p in PLANNED],
)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_headers_figures_are_those_of_rlif_plan(overlay, gigabytes, arguments):
    from rlif_lightning.commands.plan import read_recipe
    from rlif_lightning.planning.devices import parse_device, usable
    from rlif_lightning.planning.memory import GIB, memory

    settings, options = read_recipe(arguments.split())
    size = 80 if options.device is None else parse_device(options.device)
    peak = memory(settings, usable(size)).peak
    assert f"{peak / GIB:.1f}" == gigabytes
    assert peak <= usable(size)


def test_every_hardware_recipe_has_figures():
    assert {overlay for overlay, *_ in PLANNED} == {*MATH_OVERLAYS, *SEVERAL_GPUS} - {"intuitor_7b"}


@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_an_adapter_in_4_bits_over_a_recipe_of_full_training(rlif, model_folder, data):
    """The optimiser's class is another, its settings stay those of the recipe."""
    paths = [f"--data.{part}.path={data / 'math.jsonl'}" for part in ("train", "val", "test")]
    model = ["--model.name", model_folder("qwen2", chat=True)]
    folder = rlif(
        "fit", "--config", "intuitor", "--config", "lora", "--config", "nf4", *model, *paths, *TINY, *TINY_FIT
    )
    run = folder / "runs" / "intuitor+lora+nf4" / "1"
    settings = yaml.safe_load((run / "config.yaml").read_text())["model"]
    shipped = yaml.safe_load(Path(shipped_recipes()["intuitor"]).read_text())["model"]
    assert settings["quantization"] == "nf4" and settings["lora"]["r"] == 32 and settings["gradient_checkpointing"]
    assert settings["optimizer"]["class_path"] == "bitsandbytes.optim.PagedAdamW8bit"
    own = settings["optimizer"]["init_args"]
    assert {name: own[name] for name in shipped["optimizer"]["init_args"]} == shipped["optimizer"]["init_args"]
    stored = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert stored["rlif"]["quantization"] == "nf4" and all("lora_" in name for name in stored["state_dict"])


@pytest.mark.parametrize("recipe", [*EVALUATIONS, "intuitor", "gsm8k"])
def test_evaluation_recipe(recipe, rlif, model_folder, data):
    folder = rlif(
        "test", "--config", recipe, "--model.name", model_folder("qwen2", chat=True),
        f"--data.test.path={data / rows_of(recipe)}.jsonl", *TINY, "--evaluation.samples=2",
    )  # fmt: skip
    results = json.loads((folder / f"runs/{recipe}/test/1/results.json").read_text())
    assert results["n"] == 4  # all of them: evaluation.n is for fit
    assert {"accuracy", "accuracy_sampled", "pass@2", "maj@2"} <= set(results)


@pytest.mark.parametrize("recipe", [*EVALUATIONS, "intuitor", "gsm8k"])
def test_recipe_grades_its_data_sets_own_answers_right(recipe, data):
    """The mapping of fields finds the reference answers, and an answer written like them is right."""
    settings = yaml.safe_load(Path(shipped_recipes()[recipe]).read_text())["data"]
    source = Source(**{**settings["test"], "path": str(data / f"{rows_of(recipe)}.jsonl")})
    grader = Grader(AnswerFormat(**(settings["test"].get("answers") or settings["answers"])))
    golds = [p.gold for p in read_problems(source)]
    assert grader.grade([(rf"So \boxed{{{g.text}}}.", True, g) for g in golds]) == [True] * len(golds)
    assert grader.grade([(r"So \boxed{777}.", True, g) for g in golds]) == [False] * len(golds)


@pytest.mark.parametrize("recipe", EVALUATIONS)
def test_evaluation_recipe_over_a_training_recipe(recipe, capsys):
    """What a training recipe says of its own test set used to leak into the next one's: gold, subset, answers."""

    def settings(*configs):
        config = settings_of(capsys, *[word for c in configs for word in ("--config", c)])
        evaluation = {k: v for k, v in config["evaluation"].items() if k not in ("every", "n", "batch_size")}
        return config["data"]["test"], evaluation

    alone = settings(recipe)
    for training in (*TRAINING, "quickstart"):
        assert settings(training, recipe) == alone, training
    assert None not in alone[0]["answers"].values()  # or data.answers of the training recipe would hold


def settings_of(capsys, *words):
    from rlif_lightning.main import main

    with pytest.raises(SystemExit):
        main(["fit", *words, "--model.name", "x", "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_a_recipe_that_names_another_path_replaces_the_source_and_nothing_else(capsys, tmp_path):
    own = tmp_path / "own.yaml"

    def sources(text, *words):
        own.write_text(f"data: {{test: {text}}}")
        return settings_of(capsys, "--config", "gsm8k", "--config", str(own), *words)["data"]

    default = asdict(Source("x"))
    data = sources("{path: mine.csv, prompt: problem}")
    assert data["test"] == {**default, "path": "mine.csv", "prompt": "problem"}
    assert (data["val"]["subset"], data["answers"]["completion"]) == ("main", ["boxed", "last_number"])
    shipped = yaml.safe_load(Path(shipped_recipes()["gsm8k"]).read_text())["data"]["test"]
    assert sources("{path: openai/gsm8k, limit: 7}")["test"] == {**default, **shipped, "limit": 7}
    assert sources("{limit: 7}")["test"] == {**default, **shipped, "limit": 7}
    # On the command line a path is a copy of the same data.
    assert sources("{limit: 7}", "--data.test.path=x.csv")["test"] == {
        **default, **shipped, "limit": 7, "path": "x.csv"
    }  # fmt: skip


def test_last_checkpoint_of_the_training_recipe(rlif, model_folder, data):
    paths = paths_to("gsm8k", data)
    model = ["--model.name", model_folder("qwen2", chat=True)]
    rlif("fit", "--config", "gsm8k", *model, *paths, *TINY, *TINY_FIT)
    evaluation = ["--config", "math500", f"--data.test.path={data / 'math.jsonl'}"]
    folder = rlif("test", "--config", "gsm8k", *evaluation, *model, *TINY, "--ckpt_path", "last")
    results = json.loads((folder / "runs/gsm8k+math500/test/1/results.json").read_text())
    assert results["checkpoint"].endswith("runs/gsm8k/1/checkpoints/last.ckpt")


def test_results_are_given_apart_by_the_fields_that_a_recipe_names(rlif, model_folder, data):
    model = ["--model.name", model_folder("qwen2", chat=True), *TINY]
    file = f"--data.test.path={data / 'math.jsonl'}"
    folder = rlif("test", "--config", "math500", *model, file, "--evaluation.samples=2")
    by = json.loads((folder / "runs/math500/test/1/results.json").read_text())["by"]
    assert [(name, list(parts)) for name, parts in by.items()] == [
        ("subject", ["Algebra", "Geometry"]), ("level", ["1", "2"])
    ]  # fmt: skip
    for numbers in [part for parts in by.values() for part in parts.values()]:
        assert numbers["n"] == 2
        assert {"accuracy", "accuracy_low", "accuracy_high", "accuracy_sampled", "pass@2"} <= set(numbers)


def test_choices_reach_the_prompt_and_letters_the_grader(rlif, model_folder, data):
    model = ["--model.name", model_folder("qwen2", chat=True), *TINY, f"--data.test.path={data / 'mmlu_pro.jsonl'}"]
    folder = rlif("test", "--config", "mmlu_pro", *model)
    rows = [json.loads(line) for line in (folder / "runs/mmlu_pro/test/1/problems.jsonl").read_text().splitlines()]
    assert "user\nWhich?\n\nA. one\nB. two\nC. three\n\nThink step" in rows[0]["prompt"]
    assert "\nI. because 8\nJ. because 9\n\n" in rows[1]["prompt"]
    assert [(row["gold"], row["by"]) for row in rows[:2]] == [
        ("C", {"category": "business"}),
        ("J", {"category": "law"}),
    ]


def test_outputs_for_alpaca_eval(rlif, model_folder, data):
    """As `alpaca_eval --model_outputs` reads them: one list of instruction, output, generator, dataset."""
    (data / "alpaca_eval.json").write_text(json.dumps(ROWS["alpaca_eval"]))
    model = ["--model.name", model_folder("qwen2", chat=True), *TINY]
    folder = rlif("predict", "--config", "alpaca_eval", *model)  # finds the file of this name here
    rlif("predict", "--config", "alpaca_eval", *model, "--evaluation.predictions=rows")
    outputs = json.loads((folder / "runs/alpaca_eval/predict/1/model_outputs.json").read_text())
    lines = (folder / "runs/alpaca_eval/predict/2/predictions.jsonl").read_text().splitlines()
    texts = [json.loads(line)["greedy"][0]["text"] for line in lines]
    assert outputs == [
        {"instruction": row["instruction"], "output": text, "generator": str(model[1]), "dataset": row["dataset"]}
        for row, text in zip(ROWS["alpaca_eval"], texts, strict=True)
    ]


def test_the_commands_after_a_fit_name_shipped_recipes_as_they_were_given(rlif, caplog):
    """They once named the file of the recipe in the installed package."""
    rlif("fit", "--config", "quickstart", "--trainer.max_steps=1", "--evaluation.n=2", "--rollout.prompts_per_step=2")
    assert "rlif fit --config quickstart --config trajectory_entropy " in caplog.text
    assert "rlif sample runs/quickstart/1 7+9-5+9+5 " in caplog.text  # the first held-out problem
