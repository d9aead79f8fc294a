"""An engine of vLLM in this process: its configuration, its environment, and the process left as it was."""

import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from rlif_lightning.errors import UserError, said_by_python
from rlif_lightning.models.merging import unties

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's weights are reached from here: no other value does
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding would bind the training's threads too
    "VLLM_NO_USAGE_STATS": "1",  # nothing is sent anywhere
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def start_engine(config: Any, settings: dict[str, Any], device: torch.device, tokenizer: Any = None) -> Any:
    """Start an engine of this configuration, to stop at strings with a tokenizer; its weights are still to come."""
    os.environ.update({**ENVIRONMENT, **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    from vllm import LLM

    named = _named_as_by_torchrun(device) if "distributed_executor_backend" in settings else nullcontext()
    with tempfile.TemporaryDirectory(prefix="rlif-vllm-") as folder, named:
        config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        try:
            return LLM(
                folder,
                load_format="dummy",
                skip_tokenizer_init=tokenizer is None,
                generation_config="vllm",
                logprobs_mode="processed_logprobs",  # of softmax(z / temperature), not of softmax(z)
                seed=0,
                **settings,
            )
        except Exception as error:  # vLLM raises classes of its own, which change between versions
            raise UserError(
                "vLLM can't start an engine for this model",
                got=said_by_python(error),
                do="change gpu_memory_utilization, max_model_len or engine of rollout.sampler, or leave it out",
            ) from error


@contextmanager
def _named_as_by_torchrun(device: torch.device) -> Iterator[None]:
    """Name this process and its GPU as torchrun would, where vLLM reads them.

    Its LOCAL_RANK is the number of a device; Lightning's is a place in ``trainer.devices``, and SLURM sets none.
    """
    rank = str(torch.distributed.get_rank())
    local = str(device.index or 0) if device.type == "cuda" else os.environ.get("LOCAL_RANK", rank)
    before = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK") if name in os.environ}
    os.environ.update(RANK=rank, LOCAL_RANK=local)
    try:
        yield
    finally:
        del os.environ["RANK"], os.environ["LOCAL_RANK"]
        os.environ.update(before)


def merged_config(policy: Any) -> Any:
    """The policy's configuration as that of a model without adapters and in full precision."""
    model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # its matrices are unpacked on the way
    if unties(policy):
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    return config


def check_head_size(config: Any) -> None:
    """Refuse a text model whose attention heads vLLM's CPU build has no kernel for."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if size not in sizes:
        raise UserError(
            "vLLM's CPU build can't run attention heads of this size",
            got=f"{size} in a model of type '{config.model_type}'",
            expected=f"one of {', '.join(map(str, sizes))}",
            do="leave rollout.sampler out, or take another model",
        )


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Leave the process as it was: vLLM seeds the global generators, draws from them, replaces a function of torch.

    Autocast is off meanwhile: the engine has a dtype of its own.
    """
    threads, states = torch.set_num_threads, (random.getstate(), np.random.get_state())
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
    ):
        try:
            yield
        finally:
            torch.set_num_threads = threads
            random.setstate(states[0])
            np.random.set_state(states[1])
