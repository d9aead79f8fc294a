"""vLLM in this process, on a CPU with one thread; log-probabilities of the sampled tokens are asked for.

Compiled, which is its default.
"""

import os

from benchmarks.gate import Gate
from benchmarks.shapes import Work, read_prompts

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CONFIGURE_LOGGING": "0",
}


def run(work: Work, gate: Gate, eager: bool = False) -> None:
    """Sample ``steps`` rollouts, each of other prompts."""
    own = dict.fromkeys(("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"), f"{work.folder}/cache")
    os.environ.update({**SETTINGS, **own})
    from vllm import LLM, SamplingParams

    prompts = read_prompts(work.folder, "ids")
    engine = LLM(
        work.folder,
        dtype="bfloat16" if work.precision == "bf16-mixed" else "float32",
        max_model_len=len(prompts[0]) + work.new_tokens,
        max_num_seqs=work.rows,
        enforce_eager=eager,
        seed=0,
        **({"gpu_memory_utilization": 0.4} if work.device == "cuda" else {}),  # the other side needs some, too
    )
    law = SamplingParams(n=work.group, temperature=1.0, top_p=1.0, top_k=0, max_tokens=work.new_tokens, logprobs=0)
    for step in range(work.steps):
        places = [(step * work.prompts + i) % len(prompts) for i in range(work.prompts)]
        inputs = [{"prompt_token_ids": prompts[p]} for p in places]
        gate.arrive()
        done = engine.generate(inputs, law, use_tqdm=False)
        gate.note(tokens=sum(len(o.token_ids) for r in done for o in r.outputs))
    gate.finish()
