"""Memory that runs out on purpose: what ``rlif fit`` says, and what it exits with."""

import io
import resource
from contextlib import redirect_stderr

import torch

from benchmarks.clock import memory_mb
from benchmarks.gpu.day import Day
from benchmarks.gpu.rows import Row, judged
from rlif_lightning.main import main

LEFT = {"cuda": 3 * 2**30, "cpu": 2**30}  # bytes: room for the model, not for the batch
TOLD = {"auto": "The longest batch that there can be does not fit into memory", "off": "The device's memory ran out"}


def leave(device: str) -> None:
    """Let this process have so much of the device, or of this machine."""
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(LEFT[device] / torch.cuda.get_device_properties(0).total_memory)
    else:
        most = int(memory_mb("VmSize") * 2**20) + LEFT[device]
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def message(day: Day, check: str) -> list[Row]:
    """Of a run that is too large, with the memory check or without it."""
    work, said, code = day.work("0.5B"), io.StringIO(), 0
    rows, tokens = (64, 2_500_000) if day.tiny else (64, 512)  # of a tiny model only the rollout can be large
    action = "try" if check == "auto" and day.device == "cpu" else check
    leave(day.device)
    arguments = [
        "--model.name", work.folder, "--model.lora", "{r: 16, target_modules: all-linear}",
        "--data.train.path", f"{work.folder}/prompts.jsonl", "--data.train.answer", "null",
        "--data.template", "{prompt}",
        "--rollout.prompts_per_step", str(rows // 8), "--rollout.group_size", "8",
        "--rollout.micro_batch_size", str(rows), "--rollout.max_new_tokens", str(tokens),
        "--memory_check.action", action, "--trainer.precision", "bf16-mixed", "--trainer.max_steps", "1",
        "--trainer.accelerator", "gpu" if day.device == "cuda" else "cpu", "--trainer.devices", "1",
        "--runs", str(day.folder / "runs"), "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip
    with redirect_stderr(said):
        try:
            main(["fit", *arguments])
        except SystemExit as end:
            code = int(end.code or 0)
    text = said.getvalue()
    print(text)
    told = next((line for line in text.splitlines() if line.startswith("error:")), "no message")
    return [
        judged(
            f"out of memory, memory_check.action {check}",
            f"exit code {code}; {told}",
            f"exit code 2, '{TOLD[check]}', no traceback",
            code == 2 and TOLD[check] in told and "Traceback" not in text,
        )
    ]
