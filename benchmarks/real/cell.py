"""One cell of the matrix: a model, what trains, a precision; by the commands that users have.

    python -m benchmarks.real.cell FOLDER lora bf16-mixed --out cell.json

A fit of two steps; the second step again, from the checkpoint of the first; the export, loaded by plain transformers.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import memory, result
from benchmarks.clock import memory_mb
from benchmarks.real import PRECISIONS, TOKENS, TRAININGS
from benchmarks.real_model import QUESTIONS
from benchmarks.shapes import LORA
from rlif_lightning.main import main as rlif

ASKED = 4  # questions
BASE_TEMPLATE = "Question: {prompt}\nAnswer:"  # for models without a chat template
UNCOMPARED = ("time/", "memory/", "rollout/tokens_per_second")


def run(model: Path, training: str, precision: str, folder: Path, tokens: int = TOKENS) -> dict[str, Any]:
    """Everything that a cell measures; the folder is for the run and the export."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    chat = tokenizer.chat_template is not None
    words = [*_settings(model, training, precision, chat, folder), f"--rollout.max_new_tokens={tokens}"]
    times = [time.process_time()]
    _command("fit", *words, *_watched("SamplerWatch", folder / "sampler.json"))
    resident = memory_mb("VmHWM")
    trained = folder / "runs" / "run" / "1"
    rows, marks = _metrics(trained), _marks(trained)
    times.append(time.process_time())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        again = ("--ckpt_path", str(trained / "checkpoints" / "step=1.ckpt"))
        _command("fit", *words, *_watched("MemoryWatch", folder / "memory.json"), *again)
    times.append(time.process_time())
    said = _command("export", str(trained))
    times.append(time.process_time())
    texts, leads = _texts(model, training, chat, tokenizer, trained, tokens)
    times.append(time.process_time())
    return {
        "model": model.name,
        "training": training,
        "precision": precision,
        "steps": len(rows),
        "grad_norm": float(rows[0]["train/grad_norm"]),
        "kl": float(rows[0]["train/kl"]),
        "ratio": float(rows[0]["train/ratio_mean"]),
        **json.loads((folder / "sampler.json").read_text()),
        **_memory(recorded, json.loads((folder / "memory.json").read_text())),
        "resident_mb": resident,
        "same_weights": _marks(trained) == marks,
        "same_metrics": _metrics(trained) == rows,
        "export": [line for line in said.splitlines() if line.startswith(("not in", "Read again"))],
        "texts": texts,
        "leads": leads,
        "cpu_seconds": dict(zip(("start", "fit", "resume", "export", "texts"), _between(times), strict=True)),
        "setting": result.setting("python -m benchmarks.real.matrix", 1, 0),
    }


def _between(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise([0.0, *times])]


def _settings(model: Path, training: str, precision: str, chat: bool, folder: Path) -> list[str]:
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": q}) + "\n" for q in QUESTIONS[:ASKED]))
    own = [] if training == "full" else [f"--model.lora={json.dumps(LORA)}", "--model.optimizer.lr=1e-4"]
    own += ["--model.quantization=nf4"] if training == "nf4" else []
    own += [] if chat else [f"--data.template={BASE_TEMPLATE}"]
    return [
        f"--model.name={model.resolve()}", "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-6",
        "--model.kl_coefficient=0.01", f"--data.train.path={questions}", "--data.train.prompt=question",
        "--data.train.answer=null", "--rollout.prompts_per_step=2", "--rollout.group_size=4",
        "--rollout.micro_batch_size=4",
        "--checkpoint.every=1", "--checkpoint.keep=null",
        "--trainer.accelerator=cpu", f"--trainer.precision={precision}", "--trainer.max_steps=2",
        "--trainer.gradient_clip_val=1.0", "--trainer.enable_progress_bar=false", f"--runs={folder / 'runs'}", *own,
    ]  # fmt: skip


def _watched(name: str, out: Path) -> list[str]:
    callback = {"class_path": f"benchmarks.real.watch.{name}", "init_args": {"out": str(out)}}
    return [f"--trainer.callbacks={json.dumps([callback])}"]


def _command(*words: str) -> str:
    """Run a command of the product; what it printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        rlif(list(words))
    return said.getvalue()


def _metrics(trained: Path) -> list[dict[str, str]]:
    """Of each step, what does not depend on the machine."""
    with (trained / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if not k.startswith(UNCOMPARED)} for row in csv.DictReader(file)]
    return [row for row in rows if row.get("train/loss")]


def _weights(trained: Path) -> dict[str, torch.Tensor]:
    stored = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True, mmap=True)
    return {name.removeprefix("model."): weight for name, weight in stored["state_dict"].items()}


def _marks(trained: Path) -> dict[str, str]:
    """Of each trained weight, bit by bit."""
    return {n: hashlib.sha256(w.contiguous().numpy().tobytes()).hexdigest() for n, w in _weights(trained).items()}


def _memory(recorded: profile, seen: dict[str, Any]) -> dict[str, Any]:
    """Bytes of each phase as planned and as measured: above the start of training, and what was held there."""
    measured = {phase: seen["held"] + above for phase, above in memory.peaks(recorded).items()}
    planned = {phase: sum(seen["planned"][phase].values()) for phase in measured}
    parts = seen["planned"][max(planned, key=planned.__getitem__)]
    return {"measured": measured, "planned": planned, "planned_parts": parts, "parameters": seen["parameters"]}


def _texts(
    model: Path, training: str, chat: bool, tokenizer: Any, trained: Path, tokens: int
) -> tuple[list[tuple[str, str]], list[float]]:
    """Greedy texts of the export, loaded by plain transformers, and of the policy as base, PEFT and checkpoint.

    And where they part, how far the policy's token leads before the export's there, in nats; else 0.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    export = trained / "export" / "merged"
    exported: Any = AutoModelForCausalLM.from_pretrained(export, dtype="auto")
    own: Any = AutoTokenizer.from_pretrained(export)
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS[:2]]
    as_turns = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    prompts = [own.apply_chat_template(turn, **as_turns)["input_ids"] for turn in turns]
    found = [_greedy(exported, ids, tokens) for ids in prompts]
    ends = exported.generation_config.eos_token_id
    del exported
    policy: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if training != "full":
        from peft import LoraConfig, get_peft_model

        policy = get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", **LORA))
    unknown = policy.load_state_dict(_weights(trained), strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"the checkpoint holds what the model has not: {unknown[:3]}")
    if chat:
        prompts = [tokenizer.apply_chat_template(turn, **as_turns)["input_ids"] for turn in turns]
    else:
        prompts = [tokenizer(BASE_TEMPLATE.format(prompt=q), return_tensors="pt")["input_ids"] for q in QUESTIONS[:2]]
    policy.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[0])  # no penalty of the base's
    expected = [_greedy(policy, ids, tokens) for ids in prompts]
    texts = [(own.decode(a), tokenizer.decode(b)) for a, b in zip(found, expected, strict=True)]
    return texts, [lead(policy, *each) for each in zip(prompts, expected, found, strict=True)]


@torch.no_grad()
def lead(policy: Any, prompt: torch.Tensor, expected: list[int], found: list[int]) -> float:
    """Log-probability (nats) of the policy's greedy token minus that of another text's, where the two first part."""
    for i, (own, other) in enumerate(zip(expected, found, strict=False)):
        if own != other:
            ids = torch.cat([prompt[0], torch.tensor(expected[:i], dtype=torch.long)])
            logits = policy(input_ids=ids[None]).logits[0, -1].float()
            return float(logits[own] - logits[other])
    return 0.0


def _greedy(model: Any, ids: torch.Tensor, tokens: int) -> list[int]:
    mask = torch.ones_like(ids)
    out = model.eval().generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens)
    return out[0, ids.shape[1] :].tolist()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a cell and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("training", choices=TRAININGS)
    parser.add_argument("precision", choices=PRECISIONS)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a completion")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.out.parent) as folder:
        found = run(options.model, options.training, options.precision, Path(folder), options.tokens)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
