"""Hugging Face ``generate`` with its dynamic cache, as TRL calls it: no statistics are taken."""

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.gate import Gate
from benchmarks.shapes import Work, read_prompts


@torch.no_grad()
def run(work: Work, gate: Gate) -> None:
    """Sample ``steps`` rollouts, each of other prompts."""
    model = AutoModelForCausalLM.from_pretrained(work.folder, dtype=torch.float32).eval()
    prompts, end = read_prompts(work.folder, "ids"), model.config.eos_token_id
    config = GenerationConfig(
        max_new_tokens=work.new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=end,
        pad_token_id=end,
        bos_token_id=None,
        disable_compile=True,
    )
    torch.manual_seed(0)
    for step in range(work.steps):
        places = [(step * work.prompts + i) % len(prompts) for i in range(work.prompts)]
        ids = torch.tensor([prompts[p] for p in places for _ in range(work.group)])
        gate.arrive()
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        ends = (out[:, ids.shape[1] :] == end).long()
        alive = (ends.cumsum(1) - ends) == 0  # the first end token belongs to the completion
        gate.note(tokens=int(alive.sum()))
    gate.finish()
