import dataclasses
import os
import random
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlif_lightning.errors import DiskFailure, UserError
from rlif_lightning.toy import arithmetic, parse_toy_name, pretraining, recipe, toy_model, toy_problems
from rlif_lightning.toy.cache import cache_dir
from rlif_lightning.toy.problems import draw_document, draw_question, is_held_out, write_solution
from tests.processes import forks

WORKED = "3+5-9+2"  # 3+5=8, 8-9=-1=9, 9+2=11=1
HELD_OUT_SEED_0 = ["7+9-5+9+5", "5-3-0-6", "5-3-3"]
SHORT_PHASES = {
    "toy": (
        dataclasses.replace(recipe.CLEAN, steps=3, until_loss=100.0),
        dataclasses.replace(recipe.NOISY, steps=2),
    ),
}
SHORT_PHASES["toy-tuned"] = (*SHORT_PHASES["toy"], dataclasses.replace(recipe.TUNED, steps=2))


def use_short_recipe(cache_folder, patch):
    patch.setenv("RLIF_CACHE", str(cache_folder))
    for variant, phases in SHORT_PHASES.items():
        patch.setitem(recipe.PHASES, variant, phases)


@pytest.fixture
def short_recipe(tmp_path, monkeypatch):
    """A recipe of a few steps and an empty cache."""
    use_short_recipe(tmp_path / "cache", monkeypatch)
    return tmp_path / "cache"


def python_result(question):
    """Python's own arithmetic: modulo 10 may as well be taken once, at the end."""
    return eval(question) % 10


class TestProblems:
    def test_rows_are_right_and_distinct(self):
        for split in ("train", "held_out"):
            rows = toy_problems(split, 500)
            assert len({row["question"] for row in rows}) == 500
            assert all(re.fullmatch(r"[0-9]([+-][0-9]){2,4}", row["question"]) for row in rows)
            assert all(row["answer"] == str(python_result(row["question"])) for row in rows)

    def test_hand_worked_answer(self):
        assert arithmetic.evaluate(WORKED) == 1
        assert arithmetic.evaluate("0-9-9") == 2

    def test_splits_are_separated_by_the_checksum_of_the_prompt(self):
        assert all(zlib.crc32(row["question"].encode()) % 8 == 0 for row in toy_problems("held_out", 500))
        assert all(zlib.crc32(row["question"].encode()) % 8 != 0 for row in toy_problems("train", 500))

    def test_a_longer_draw_continues_a_shorter_one(self):
        assert toy_problems("held_out", 200)[:50] == toy_problems("held_out", 50)

    def test_first_held_out_problems_stay_what_they_are(self):
        """Results are compared across versions on these."""
        assert [row["question"] for row in toy_problems("held_out", 3)] == HELD_OUT_SEED_0

    def test_lengths_are_equally_likely(self):
        rng = random.Random(0)
        lengths = [len(draw_question(rng, held_out=False)) // 2 for _ in range(3000)]
        for operations in (2, 3, 4):
            assert lengths.count(operations) / 3000 == pytest.approx(1 / 3, abs=0.04)


class TestCorpus:
    @pytest.mark.parametrize(
        ("style", "text"),
        [
            ("steps", "3+5=8;8-9=9;9+2=1;#1"),
            ("direct", "#1"),
            ("terse", "8;9;1;#1"),
            ("give_up", "?"),
        ],
    )
    def test_hand_worked_styles(self, style, text):
        assert write_solution(WORKED, style, 0.0, random.Random(0)) == text

    def test_skipped_reports_the_value_after_any_number_of_steps(self):
        rng = random.Random(0)
        texts = {write_solution(WORKED, "skipped", 0.0, rng) for _ in range(50)}
        assert texts == {"3+5=8;#8", "3+5=8;8-9=9;#9", "3+5=8;8-9=9;9+2=1;#1"}

    def test_noise_is_2_to_20_characters_of_the_vocabulary(self):
        rng = random.Random(0)
        texts = [write_solution(WORKED, "noise", 0.0, rng) for _ in range(500)]
        assert {len(text) for text in texts} == set(range(2, 21))
        assert set("".join(texts)) == set("0123456789+-*=;#?~")

    @pytest.mark.parametrize("style", ["steps", "terse", "direct"])
    def test_without_slips_every_answer_is_right(self, style):
        rng = random.Random(0)
        for _ in range(200):
            question, text = draw_document({style: 1.0}, 0.0, rng)
            assert text.rpartition("#")[2] == str(python_result(question))

    def test_slips_are_carried_on(self):
        rng = random.Random(0)
        slipped = 0
        for _ in range(500):
            question, text = draw_document({"steps": 1.0}, 0.3, rng)
            *steps, last = text.split(";")
            value = question[0]
            for step, operator, digit in zip(steps, question[1::2], question[2::2], strict=True):
                left, result = step.split("=")
                assert left == value + operator + digit
                slipped += python_result(left) != int(result)
                value = result
            assert last == f"#{value}"
        # 500 documents of 3 steps, slip .3, and one slip in ten hits the right digit: 405 expected, sd 17
        assert 320 < slipped < 490

    def test_holds_no_held_out_problem(self):
        rng = random.Random(0)
        assert not any(is_held_out(draw_document({"direct": 1.0}, 0.0, rng)[0]) for _ in range(500))

    def test_batch_is_what_the_tokenizer_makes_of_the_text(self):
        phase = dataclasses.replace(recipe.NOISY, slip=0.0)
        tokenizer = pretraining.build_tokenizer()
        ids, labels = pretraining.draw_batch(phase, random.Random(3))
        rng = random.Random(3)
        for row, label in zip(ids, labels, strict=True):
            question, solution = draw_document(phase.styles, phase.slip, rng)
            document = [*tokenizer(f"{question}>{solution}")["input_ids"], tokenizer.eos_token_id]
            prompt = len(tokenizer(f"{question}>")["input_ids"])
            padding = len(row) - len(document)
            assert row.tolist() == document + [tokenizer.pad_token_id] * padding
            assert label.tolist() == [-100] * prompt + document[prompt:] + [-100] * padding


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    pretraining.build_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


class TestTokenizer:
    def test_one_token_per_character_after_bos(self, tokenizer):
        ids = tokenizer("3+5>")["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", "3", "+", "5", ">"]
        assert ids == [1, 7, 14, 9, 3]
        assert tokenizer("3+5>", add_special_tokens=False)["input_ids"] == ids[1:]

    def test_decodes_without_spaces(self, tokenizer):
        text = "3+5=8;8-9=9;9+2=1;#1"
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id, tokenizer.pad_token_id]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.decode(ids) == f"<bos>{text}<eos><pad>"

    def test_size_and_settings(self, tokenizer):
        assert len(tokenizer) == 22
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
        assert tokenizer.model_max_length == 256
        assert tokenizer.padding_side == "left"

    def test_foreign_text_reads_as_question_marks(self, tokenizer):
        assert tokenizer.decode(tokenizer("a\n 7é")["input_ids"], skip_special_tokens=True) == "???7?"


class TestNames:
    @pytest.mark.parametrize(
        ("name", "parsed"),
        [
            ("toy", ("toy", 1)),
            ("toy:3", ("toy", 3)),
            ("toy-tuned", ("toy-tuned", 1)),
            ("toy-tuned:12", ("toy-tuned", 12)),
            ("toy-tune", None),
            ("toy-addition", None),
            ("./toy", None),
            ("toys", None),
            ("org/toy:3", None),
            ("Qwen/Qwen2.5-1.5B", None),
        ],
    )
    def test_parse(self, name, parsed):
        assert parse_toy_name(name) == parsed

    @pytest.mark.parametrize("name", ["toy:", "toy:x", "toy:-1", "toy-tuned:1.5", "toy-tuned:"])
    def test_bad_seed(self, name):
        with pytest.raises(UserError, match="toy:3"):
            parse_toy_name(name)

    def test_other_names_are_refused(self):
        with pytest.raises(UserError, match="Unknown toy model"):
            toy_model("gpt2")

    def test_cache_dir(self, monkeypatch, tmp_path):
        monkeypatch.setenv("RLIF_CACHE", str(tmp_path / "own"))
        assert cache_dir() == tmp_path / "own"
        monkeypatch.delenv("RLIF_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_dir() == tmp_path / "rlif_lightning"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache_dir() == tmp_path / ".cache" / "rlif_lightning"


class TestModelFolder:
    def test_loads_as_an_ordinary_model(self, short_recipe):
        folder = toy_model(progress=False)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert sum(parameter.numel() for parameter in model.parameters()) == 97_344
        assert model.dtype == torch.float32
        ends = model.generation_config
        assert (ends.pad_token_id, ends.bos_token_id, ends.eos_token_id) == (0, 1, 2)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts = tokenizer(["3+5-9+2>", "1+1-1>"], padding=True, return_tensors="pt")
        texts = tokenizer.batch_decode(model.generate(**prompts, max_new_tokens=4), skip_special_tokens=True)
        assert [text.partition(">")[0] for text in texts] == ["3+5-9+2", "1+1-1"]

    def test_initial_weights_have_the_recipe_spread(self):
        model = pretraining.untrained_model(0)
        layer = model.model.layers[1]
        for weight, std in (
            (model.model.embed_tokens.weight, 0.5),
            (model.lm_head.weight, 0.02),
            (layer.self_attn.o_proj.weight, 0.7 / 8),  # fan-in 64
            (layer.mlp.down_proj.weight, 0.7 / 160**0.5),
        ):
            assert weight.std().item() == pytest.approx(std, rel=0.05)
        assert bool((layer.input_layernorm.weight == 1).all())

    def test_learning_rate_schedule(self):
        phase = dataclasses.replace(recipe.NOISY, steps=200, final_lr=0.1)
        # warm-up (1/50) x cosine at 0; half-way the cosine is .5: .1 + .9 * .5
        assert pretraining._schedule(0, phase) == pytest.approx(0.02)
        assert pretraining._schedule(100, phase) == pytest.approx(0.55)
        assert pretraining._schedule(199, phase) == pytest.approx(0.1, abs=1e-3)
        assert pretraining._schedule(700, recipe.CLEAN) == 1.0

    def test_training_lowers_the_loss(self, short_recipe):
        def loss(model, phase):
            ids, labels = pretraining.draw_batch(phase, random.Random(0))
            with torch.no_grad():
                return model(input_ids=ids, labels=labels).loss.item()

        model = pretraining.untrained_model(0)
        phase = dataclasses.replace(recipe.CLEAN, steps=40, until_loss=None)
        with pretraining._isolated():
            before = loss(model, phase)
            pretraining._train(model, phase, 0, arithmetic, progress=False)
            assert loss(model, phase) < 0.7 * before

    def test_seed_decides_every_byte(self, short_recipe, monkeypatch):
        def weights(name, folder):
            monkeypatch.setenv("RLIF_CACHE", str(short_recipe / folder))
            return (toy_model(name, progress=False) / "model.safetensors").read_bytes()

        first = weights("toy", "a")
        torch.manual_seed(12345)
        random.seed(12345)
        assert weights("toy", "b") == first
        assert weights("toy:3", "b") != first
        assert weights("toy-tuned", "b") != first

    def test_caller_s_settings_neither_matter_nor_change(self, short_recipe, monkeypatch):
        expected = (toy_model(progress=False) / "model.safetensors").read_bytes()
        monkeypatch.setenv("RLIF_CACHE", str(short_recipe / "again"))
        threads = torch.get_num_threads()
        torch.manual_seed(7)
        python_state, torch_state = random.getstate(), torch.get_rng_state()
        try:
            torch.set_num_threads(2)
            torch.set_default_dtype(torch.bfloat16)
            torch.set_float32_matmul_precision("medium")
            with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
                folder = toy_model(progress=False)
            assert torch.get_num_threads() == 2
            assert torch.get_default_dtype() == torch.bfloat16
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(torch.float32)
            torch.set_float32_matmul_precision("highest")
        assert (folder / "model.safetensors").read_bytes() == expected
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert random.getstate() == python_state

    def test_tuned_continues_the_base(self, short_recipe, monkeypatch):
        seen = []
        train = pretraining._train
        monkeypatch.setattr(
            pretraining, "_train", lambda model, phase, *rest: (seen.append(phase.name), train(model, phase, *rest))
        )
        toy_model("toy-tuned", progress=False)
        assert seen == ["clean", "noisy", "tuned"]
        toy_model("toy", progress=False)
        assert len(seen) == 3

    def test_progress_bar_names_the_phase_and_the_loss(self, short_recipe, capfd):
        toy_model(progress=True)
        bars = capfd.readouterr().err
        assert "clean" in bars
        assert re.search(r"noisy: 100%.*loss \d\.\d{3}", bars)

    def test_is_silent_when_asked(self, short_recipe, capfd):
        toy_model(progress=False)
        assert capfd.readouterr() == ("", "")

    def test_base_that_does_not_learn_fails_with_the_loss(self, short_recipe, monkeypatch):
        phase = dataclasses.replace(recipe.CLEAN, steps=3)
        monkeypatch.setitem(recipe.PHASES, "toy", (phase, recipe.NOISY))
        with pytest.raises(UserError, match=r"seed 4 did not learn(.|\n)*after 3 steps(.|\n)*such as 5;"):
            toy_model("toy:4", progress=False)
        assert folders(short_recipe) == []


def folders(cache_folder):
    return sorted(path.name for path in cache_folder.iterdir() if path.is_dir())


def build_in_a_process(cache_folder, barrier, queue):
    with pytest.MonkeyPatch.context() as patch:
        use_short_recipe(cache_folder, patch)
        barrier.wait()
        folder = toy_model(progress=False)
        queue.put((str(folder), (folder / "model.safetensors").read_bytes()))


class TestCache:
    def test_second_call_builds_nothing(self, short_recipe, monkeypatch):
        folder = toy_model(progress=False)
        monkeypatch.setattr(pretraining, "build_toy", None)
        assert toy_model(progress=False) == folder

    def test_a_damaged_folder_is_built_again(self, short_recipe, tmp_path, monkeypatch):
        folder = toy_model(progress=False)
        whole = {path.name: path.read_bytes() for path in folder.iterdir()}

        def build(target, *_, **__):
            for name, content in whole.items():
                (target / name).write_bytes(content)

        monkeypatch.setattr(pretraining, "build_toy", build)
        for name, kept in (
            ("model.safetensors", 0),
            ("model.safetensors", 5000),
            ("tokenizer.json", 99),
            ("config.json", None),
        ):
            (folder / name).write_bytes(whole[name][:kept])
            if kept is None:
                (folder / name).unlink()
            with pytest.warns(UserWarning, match="is damaged: toy is built again"):
                assert toy_model(progress=False) == folder
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole

    def test_a_full_disk_is_named(self, short_recipe, monkeypatch):
        def full(*_, **__):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        monkeypatch.setattr(pretraining, "build_toy", full)
        with pytest.raises(DiskFailure, match=r"There is no room for .*cache/toy-seed1-"):
            toy_model(progress=False)
        assert folders(short_recipe) == []

    def test_changed_recipe_gets_another_folder(self, short_recipe, monkeypatch):
        folder = toy_model(progress=False)
        clean, noisy = recipe.PHASES["toy"]
        monkeypatch.setitem(recipe.PHASES, "toy", (clean, dataclasses.replace(noisy, slip=0.5)))
        assert toy_model(progress=False) != folder
        assert len(folders(short_recipe)) == 2

    def test_the_recipes_that_results_were_measured_with_stay_what_they_are(self):
        assert recipe.recipe_hash("toy") == "1f519b03"
        assert recipe.recipe_hash("toy-tuned") == "e4064cd4"

    def test_draws_and_hash_do_not_depend_on_the_process(self):
        """The order of a set and ``hash`` of a string differ between processes."""
        code = (
            "from rlif_lightning.toy import recipe, toy_problems;"
            "print(recipe.recipe_hash('toy'), recipe.recipe_hash('toy-tuned'), toy_problems('train', 20))"
        )
        environment = {**os.environ, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
        command = [sys.executable, "-c", code]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        expected = (recipe.recipe_hash("toy"), recipe.recipe_hash("toy-tuned"), toy_problems("train", 20))
        assert output == " ".join(map(str, expected)) + "\n"

    def test_build_that_raises_leaves_nothing(self, short_recipe, monkeypatch):
        def broken(folder, *args, **kwargs):
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(pretraining, "build_toy", broken)
            with pytest.raises(KeyboardInterrupt):
                toy_model(progress=False)
        assert folders(short_recipe) == []
        assert (toy_model(progress=False) / "model.safetensors").is_file()

    def test_leftovers_of_a_killed_build_are_no_obstacle(self, short_recipe):
        name = f"toy-seed1-{recipe.recipe_hash('toy')}"
        leftover = short_recipe / f".{name}.unfinished"
        leftover.mkdir(parents=True)
        (leftover / "model.safetensors").write_text("half")
        toy_model(progress=False)
        assert folders(short_recipe) == [name]

    def test_unwritable_cache_is_a_user_error(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("RLIF_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(UserError, match="RLIF_CACHE"):
            toy_model(progress=False)

    @pytest.mark.slow
    def test_two_processes_at_once_share_one_build(self, tmp_path):
        context = forks()
        barrier, queue = context.Barrier(2), context.Queue()
        workers = [context.Process(target=build_in_a_process, args=(tmp_path, barrier, queue)) for _ in range(2)]
        for worker in workers:
            worker.start()
        results = [queue.get(timeout=600) for _ in workers]
        for worker in workers:
            worker.join()
        assert results[0] == results[1]
        assert folders(tmp_path) == [Path(results[0][0]).name]
