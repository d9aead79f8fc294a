"""TRL's GRPOTrainer at its better settings for a CPU: no gradient checkpointing; bfloat16 by autocast where asked."""

import math
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.gate import Gate
from benchmarks.shapes import LORA, Work, read_prompts, text_reward
from benchmarks.watch import Watch

TextReward = Callable[..., list[float]]


class Gatekeeper(TrainerCallback):
    """Waits at each optimiser step."""

    def __init__(self, gate: Gate) -> None:
        self.gate, self.watch = gate, Watch(gate)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called before the rollout, which the step's first micro-batch starts."""
        if state.global_step:
            self.watch.after_step(model)
        self.gate.arrive()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look at the gradients."""
        self.watch.before_step(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The last step is done."""
        self.watch.after_step(model)
        self.gate.finish()


class SelfCertainty:
    """KL(U || p) per token of the current policy: TRL's rewards see texts and ids, so it takes another forward.

    The leanest that we could write: the decoder on micro-batches of the update's size, the head one completion
    at a time, so that no more logits are held than one row's. In bfloat16 where the trainer computes in it.
    """

    __name__ = "self_certainty"

    def __init__(self, tokenizer: Any, micro_batch: int, bf16: bool) -> None:
        self.tokenizer, self.micro_batch, self.bf16 = tokenizer, micro_batch, bf16
        self.model: Any = None  # set when the trainer is there

    @torch.no_grad()
    def __call__(self, prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        """One number per completion."""
        starts = self.tokenizer(prompts)["input_ids"]
        rewards = []
        for i in range(0, len(prompts), self.micro_batch):
            rows = [p + c for p, c in zip(starts[i : i + self.micro_batch], completion_ids[i:], strict=False)]
            width = max(map(len, rows))
            device = next(self.model.parameters()).device
            ids = torch.tensor([r + [0] * (width - len(r)) for r in rows], device=device)  # padded behind, so unseen
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
            for row, h, prompt in zip(rows, hidden, starts[i:], strict=False):
                with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                    z = self.model.lm_head(h[len(prompt) - 1 : len(row) - 1])  # [T, V]
                z = z.float()
                certainty = z.logsumexp(-1) - z.mean(-1) - math.log(z.shape[-1])
                rewards.append(float(certainty.mean()))
        return rewards


def text(completions: list[str], **kwargs: Any) -> list[float]:
    """The reward that only reads."""
    return [text_reward(c) for c in completions]


def counted(gate: Gate, reward: TextReward) -> TextReward:
    """The reward, with a note of how many tokens it was given."""

    def count(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        gate.note(tokens=sum(map(len, completion_ids)))
        return reward(completion_ids=completion_ids, **kwargs)

    return count


def make_trainer(work: Work, gate: Gate, output: str) -> GRPOTrainer:
    """The trainer, with the same model, prompts, sizes and optimiser as ours."""
    tokenizer = AutoTokenizer.from_pretrained(work.folder)
    bf16 = work.precision == "bf16-mixed"
    certainty = SelfCertainty(tokenizer, work.micro_batch, bf16)
    config = GRPOConfig(
        output_dir=output,
        max_steps=work.steps,
        per_device_train_batch_size=work.micro_batch,
        gradient_accumulation_steps=work.rows // work.micro_batch,
        num_generations=work.group,
        max_completion_length=work.new_tokens,
        beta=work.kl,
        loss_type="grpo",
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=bf16,
        gradient_checkpointing=False,
        use_cpu=work.device == "cpu",
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    # Without this a PEFT model, whose generate() no autocast surrounds, would sample in float32.
    dtype = torch.bfloat16 if bf16 and work.lora else torch.float32
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(work.folder, dtype=dtype),
        reward_funcs=counted(gate, certainty if work.reward == "self_certainty" else text),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": read_prompts(work.folder, "question")}),
        processing_class=tokenizer,
        callbacks=[Gatekeeper(gate)],
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA) if work.lora else None,
    )
    certainty.model = trainer.model
    for model in filter(None, (trainer.model, trainer.ref_model)):
        for weight in model.parameters():
            weight.sum()  # the file is only mapped: what stands in memory at the start should be there
    return trainer


def run(work: Work, gate: Gate) -> None:
    """Train."""
    with tempfile.TemporaryDirectory() as output:
        make_trainer(work, gate, output).train()
