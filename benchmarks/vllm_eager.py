"""vLLM without compilation."""

from functools import partial

from benchmarks import vllm_side

run = partial(vllm_side.run, eager=True)
