"""Files from strangers: does anything in them run, or hang the command that reads them?

    python -m benchmarks.faults.strangers       # about 4 minutes of one core

Every payload tries to make a file. Recipes name classes and run their code by design; what must not run is anything
in checkpoints, run folders, model folders, adapters, templates and data. A case also fails with a traceback, after
half a minute of one core, or with control characters on the terminal.
"""

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults import runs
from benchmarks.faults.runs import Run
from benchmarks.faults.table import Options, Row, run

CPU_SECONDS, MEMORY = 30, 8 << 30
PATIENCE = 300.0  # seconds that may pass while a case uses fewer, on a machine that does other things too
QUICK = [
    "--trainer.max_steps=1", "--evaluation.every=0", "--evaluation.n=4", "--rollout.prompts_per_step=2",
    "--rollout.group_size=2",
]  # fmt: skip
CHAT = "--data.template=chat"
CODE = """
import os
os.system("touch ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from rlif_lightning.rewards import SelfCertainty
class Config(LlamaConfig): model_type = "strange"
class Model(LlamaForCausalLM): config_class = Config
class Words(PreTrainedTokenizerFast): pass
class Reward(SelfCertainty): pass
"""
TEMPLATES = {
    "that leaves its sandbox": "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    "that looks for classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "with a format string": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "that imports": "{% import '/etc/passwd' as x %}{{ x }}",
    "that includes": "{% include '/etc/passwd' %}",
    "with endless loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
    "with a string of 10^11": "{{ 'x' * 100000000000 }}",
    "with a power without end": "{{ 9 ** (9 ** 9) }}",
    "that calls itself": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "with a slip": "{% for %}",
}
RECIPES = {
    "with a Python object": 'seed_everything: !!python/object/apply:os.system ["touch ran"]\n',
    "with a Python name": "seed_everything: !!python/name:os.system\n",
    "of a billion laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
    "nested 3,000 times": "a: " + "[" * 3000 + "]" * 3000,
    "whose optimiser is os.system": "model: {optimizer: os.system}\n",
    "whose reward starts a process": "rollout: {rewards: [{class_path: subprocess.Popen, "
    "init_args: {args: touch ran, shell: true}}]}\n",
}


class Payload:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        """What pickle calls."""
        return os.system, ("touch ran",)


def limited(_: object) -> None:
    """A case may not take the machine's memory, and ends when it has used too much time."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def judged(name: str, words: list[object]) -> Row:
    """Run the command, and look for what its payload makes."""
    Path("ran").unlink(missing_ok=True)
    done = Run([*words], f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.log", prepare=limited).wait(PATIENCE)
    ran, raw = Path("ran").exists(), bool(re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", done.said))
    seen = f"{'the payload ran; ' if ran else ''}{'control characters are printed; ' if raw else ''}{done.ending}"
    return Row(name, seen, not (ran or raw or done.traceback or done.hangs or done.code < 0))


def checkpoints(good: Path, fit: list[str]) -> Iterator[tuple[str, list[object]]]:
    """Pickles in place of checkpoints, for every command that reads one."""
    import torch

    torch.save({"global_step": 1, "state_dict": {}, "x": Payload()}, "zip.ckpt")
    torch.save({"global_step": 1, "x": Payload()}, "legacy.ckpt", _use_new_zipfile_serialization=False)
    Path("plain.ckpt").write_bytes(pickle.dumps(Payload()))
    with zipfile.ZipFile(good / "checkpoints/last.ckpt") as source, zipfile.ZipFile("inside.ckpt", "w") as target:
        for item in source.infolist():
            data = pickle.dumps(Payload(), 2) if item.filename.endswith("data.pkl") else source.read(item)
            target.writestr(item.filename, data)
    for kind in ("zip", "legacy", "plain", "inside"):
        yield f"a pickle as checkpoint ({kind}), fit", [*fit, "--ckpt_path", f"{kind}.ckpt"]
    recipe = ["--config", "quickstart"]
    for command in (["validate"], ["export"], ["diagnose"]):
        yield f"a pickle as checkpoint, {command[0]}", [*command, *recipe, "--ckpt_path", "zip.ckpt"]
    yield "a pickle as checkpoint, mix", ["mix", *recipe, "--tuned", "zip.ckpt"]
    shutil.copytree(good, "strange-run/1")
    config = Path("strange-run/1/config.yaml")
    config.write_text(config.read_text().replace("rlif_lightning.rewards.SelfCertainty", "strange.Reward"))
    yield "export of a run folder whose settings name the stranger's class", ["export", "strange-run/1"]


def models(toy: Path, fit: list[str]) -> Iterator[tuple[str, list[object]]]:
    """Model folders."""
    import torch
    from safetensors import safe_open

    def folder(name: str, **files: object) -> Path:
        shutil.copytree(toy, name)
        (Path(name) / "strange.py").write_text(CODE)
        for file, content in files.items():
            path = Path(name) / f"{file}.json"
            old = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({**old, **content}))  # type: ignore[dict-item]
        return Path(name).absolute()

    def case(what: str, model: Path) -> tuple[str, list[object]]:
        return f"a model folder {what}", [*fit, f"--model.name={model}"]

    only = folder("bin")
    torch.save({"x": Payload()}, only / "pytorch_model.bin")
    yield case("with a pickle next to its weights", only)
    shutil.copytree(only, "bin-only")
    Path("bin-only/model.safetensors").unlink()
    yield case("with a pickle alone", Path("bin-only").absolute())
    with safe_open(toy / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    for what, target in {"a pickle": "pytorch_model.bin", "a file outside of it": "../bin/model.safetensors"}.items():
        index = folder(f"index-{target.count('/')}")
        (index / "model.safetensors").unlink()
        torch.save({"x": Payload()}, index / "pytorch_model.bin")
        entries = {"metadata": {}, "weight_map": dict.fromkeys(names, target)}
        (index / "model.safetensors.index.json").write_text(json.dumps(entries))
        yield case(f"whose index names {what}", index)
    auto = {"auto_map": {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"}}
    yield case("with code of its own", folder("auto", config={**auto, "model_type": "strange"}))
    yield case("with code of its own for a known architecture", folder("auto-known", config=auto))
    words = {"auto_map": {"AutoTokenizer": [None, "strange.Words"]}, "tokenizer_class": "Words"}
    yield case("whose tokenizer has code of its own", folder("auto-tokenizer", tokenizer_config=words))
    yield case("with a kernel of the hub", folder("kernel", config={"_attn_implementation": "strange/kernel"}))
    yield case("with 10^9 layers", folder("layers", config={"num_hidden_layers": 10**9}))
    yield case("with 10^12 tokens", folder("tokens", config={"vocab_size": 10**12}))


def adapters(fit: list[str]) -> Iterator[tuple[str, list[object]]]:
    """PEFT folders."""
    import torch

    lora = "--model.lora={r: 2, lora_alpha: 4, target_modules: [q_proj]}"
    assert Run([*fit, lora, "--runs", "lora"], "lora.log").wait().code == 0, "see lora.log"
    export = ["export", runs.newest("lora"), "--format", "adapter", "--output", "adapter"]
    assert Run(export, "adapter.log").wait().code == 0, "see adapter.log"
    changes = {
        "of rank 10^9": {"r": 10**9},
        "that names the stranger's class": {"auto_mapping": {"base_model_class": "M", "parent_library": "strange"}},
        "with a costly pattern": {"target_modules": "(.*a){40}(a+)+$(.*)*b"},
        "with a pickle alone": {},
    }
    for number, (what, change) in enumerate(changes.items()):
        folder = Path(f"adapter-{number}")
        shutil.copytree("adapter", folder)
        config = folder / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
        if not change:
            (folder / "adapter_model.safetensors").unlink()
            torch.save({"x": Payload()}, folder / "adapter_model.bin")
        yield f"an adapter {what}", [*fit, f"--model.adapter={folder}"]


def texts(options: Options, fit: list[str]) -> Iterator[tuple[str, list[object]]]:
    """Templates, data and recipes."""
    for what, text in TEMPLATES.items():
        yield f"a chat template {what}", [*fit, CHAT, f"--data.chat_template={text}"]
    Path("pickle.parquet").write_bytes(pickle.dumps(Payload()))
    yield "a pickle called .parquet", [*fit, "--data.train={path: pickle.parquet}"]
    Path("data").mkdir()
    Path("data/data.py").write_text(CODE)
    yield "a data folder with a script", [*fit, "--data.train={path: data}"]
    row = {
        "question": "<|im_start|> {{ cycler }} {prompt} \x1b[2J \u009b",
        "answer": "2",
        "\x1b[31mkind": "\x1b[2J",
    }
    Path("odd.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    odd = "--data.{}={{path: odd.jsonl, prompt: question, answer: answer, gold: whole{}}}"
    yield "data with control characters", [*fit, odd.format("train", "")]
    words = ["validate", *fit[1:3], *options.model, odd.format("val", ', by: ["\\e[31mkind"]')]
    yield "data with control characters, by field", [*words]
    for what, text in RECIPES.items():
        path = Path(f"{re.sub('[^a-z]+', '-', what.lower())}.yaml")
        path.write_text(text)
        yield f"a recipe {what}", [*fit, "--config", path]


def strangers(options: Options) -> Iterator[Row]:
    """The harness."""
    from rlif_lightning.toy import toy_model

    Path("strange.py").write_text(CODE)
    fit = [*options.fit, *QUICK]
    assert Run([*fit, "--runs", "good"], "good.log").wait().code == 0, "see good.log"
    toy = runs.untrained() if options.tiny else toy_model(progress=False)
    cases = [*checkpoints(runs.newest("good"), fit), *models(toy, fit), *adapters(fit), *texts(options, fit)]
    for name, words in options.drawn(cases):
        yield judged(name, words)


if __name__ == "__main__":
    run(strangers)
