"""One day at a device: its models, its short runs, and floors measured on it."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision

from benchmarks import our_side, shapes
from benchmarks.bar import SkipError
from benchmarks.shapes import LORA, Work
from rlif_lightning import RLIFModule
from rlif_lightning.planning.configs import known_config

HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"lora": LORA},
    "NF4": {"lora": LORA, "quantization": "nf4", "gradient_checkpointing": True},
}


@dataclass(frozen=True)
class Day:
    """What the checks are run with.

    Args:
        device: The first GPU; ``cpu`` only to see that everything runs.
        folder: For models and runs; it is emptied at the end.
        logs: For what the other sides print.
        tiny: A tiny model and few tokens everywhere.
    """

    device: Literal["cuda", "cpu"]
    folder: Path
    logs: Path
    tiny: bool = False

    def new_model(self, size: str, dtype: torch.dtype = torch.bfloat16) -> Any:
        """Random weights in the shape of Qwen2.5 of that size, made on the device."""
        from transformers import AutoModelForCausalLM

        config = shapes.make_config("tiny") if self.tiny else known_config(f"Qwen/Qwen2.5-{size}")
        assert config is not None
        config.eos_token_id = config.pad_token_id = config.vocab_size - 1
        try:
            with torch.device(self.device), torch.no_grad():
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
                model.get_output_embeddings().weight *= 4  # else all tokens are about equally likely
        except torch.OutOfMemoryError as error:
            raise SkipError(f"the weights do not fit: {error}") from None
        return model.eval()

    def work(self, size: str, **changes: Any) -> Work:
        """A step with that model, which is written when it is first asked for."""
        folder, prompt = self.folder / size, 6 if self.tiny else 64
        if not folder.exists():
            model, unfinished = self.new_model(size), self.folder / f"{size}.new"
            model.save_pretrained(unfinished)
            shapes.make_tokenizer(model.config.vocab_size).save_pretrained(unfinished)
            shapes.write_prompts(unfinished / "prompts.jsonl", 64, prompt)
            unfinished.rename(folder)
            del model
            if self.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        # An end token may come up by chance.
        work = Work(str(folder), 256, prompts=8, kl=0.04, reward="self_certainty", fixed_length=False)
        work = replace(work, precision="bf16-mixed", device=self.device, learning_rate=1e-4)
        tiny: dict[str, Any] = {"new_tokens": 8, "prompts": 2, "group": 4, "micro_batch": 4} if self.tiny else {}
        return replace(work, **{**tiny, **changes})

    def autocast(self, precision: str) -> torch.autocast:
        """A Trainer's precision, written out once more."""
        return torch.autocast(self.device, HALF.get(precision), enabled=precision in HALF)

    def seconds(self, done: Callable[[], object], repeats: int = 5) -> list[float]:
        """Of each repeat, after one to warm up; all work given to the device is waited for."""
        taken = []
        for _ in range(repeats + 1):
            start = self.clock()
            done()
            taken.append(self.clock() - start)
        return taken[1:]

    def clock(self) -> float:
        """Seconds, when the device has nothing to do any more."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def bandwidth(self) -> float:
        """Bytes per second of a copy within the device's memory, read and written ones."""
        source = torch.zeros(2**20 if self.tiny else 2**30, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / statistics.median(self.seconds(lambda: target.copy_(source)))

    def matrix_rate(self, precision: str) -> float:
        """Operations per second, sums and products, of a square matrix product in the dtype of that precision."""
        side = 256 if self.tiny else 8192
        left = torch.randn(side, side, device=self.device, dtype=HALF.get(precision, torch.float32))
        return 2 * side**3 / statistics.median(self.seconds(lambda: left @ left))


class Columns(Logger):
    """Keeps what a run logs: name -> a value per step."""

    name, version = "columns", "0"

    def __init__(self) -> None:
        super().__init__()
        self.columns: dict[str, list[float]] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Each value behind those before."""
        for name, value in metrics.items():
            self.columns.setdefault(name, []).append(float(value))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Run:
    """A training that has ended."""

    module: RLIFModule
    columns: dict[str, list[float]]

    def weights(self) -> torch.Tensor:
        """All that train, in one row."""
        return torch.cat([p.detach().flatten().cpu() for p in self.module.parameters() if p.requires_grad])


def fit(
    work: Work,
    model: dict[str, Any],
    callbacks: list[pl.Callback] | None = None,
    optimizer: Any = None,
    resume: Path | None = None,
    **trainer: Any,
) -> Run:
    """Train through the real Trainer, with settings of the model and of the Trainer besides the work's."""
    pl.seed_everything(0, verbose=False)
    module, columns = make_module(work, model, optimizer), Columns()
    if work.precision == "16-mixed" and work.device == "cpu":  # a Trainer would take bfloat16 in its place
        trainer |= {"precision": None, "plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    callbacks = [our_side.make_rollouts(work), *(callbacks or [])]
    made = our_side.make_trainer(work, callbacks, logger=columns, **trainer)
    made.fit(module, our_side.make_data(work), ckpt_path=resume)
    return Run(module, columns.columns)


def make_module(work: Work, model: dict[str, Any], optimizer: Any = None) -> RLIFModule:
    """The policy and its update; AdamW where no other optimiser is given."""
    adamw = partial(torch.optim.AdamW, lr=work.learning_rate, weight_decay=0.0)
    return RLIFModule(work.folder, kl_coefficient=work.kl, optimizer=optimizer or adamw, **model)
