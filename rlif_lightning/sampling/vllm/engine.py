"""vLLM in this process as the engine of rollouts; see docs/vllm.md."""

import importlib.util
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlif_lightning.errors import UserError, check_ranges
from rlif_lightning.models.stop_strings import StopStrings
from rlif_lightning.rollout import Samples, pad_left
from rlif_lightning.runs.signals import Stopped, look
from rlif_lightning.sampling.protocol import Progress, Sampling, diverged
from rlif_lightning.sampling.vllm.merged_weights import merged_weights
from rlif_lightning.sampling.vllm.start import check_head_size, merged_config, start_engine, undisturbed

CPU_CACHE = 2**30  # bytes of keys and values on a CPU, where gpu_memory_utilization would be a share of all memory
HOTTEST = 2.0  # temperature that vLLM's SamplingParams takes

_ENGINES: dict[str, Any] = {}  # one per model shape and settings: rollouts and evaluations share it


class VLLMSampler:
    """Samples with vLLM, in this process and with the policy's current weights.

    The engine is made from the policy's configuration at the first update and takes its weights before each rollout:
    LoRA merged on the way, 4-bit matrices unpacked. It returns tokens and their log-probabilities; all statistics
    and the policy's own log-probabilities come from one scoring pass of the policy.

    With top-k, top-p or min-p the engine's log-probabilities are those of what is left by them: they are then not
    returned, the mismatch is not measured and not corrected.

    Args:
        gpu_memory_utilization: Share of the GPU's memory for the engine, including its copy of the weights. On a CPU
            the key-value cache takes 1 GiB; ``engine: {kv_cache_memory_bytes: ...}`` sets another size.
        max_model_len: Longest prompt and completion together, in tokens; null: the longest that the model supports.
        sleep: Free the engine's memory between rollouts (on a GPU only).
        engine: Further arguments of ``vllm.LLM``, such as ``dtype``, by default that of the policy's forward pass, or
            ``enforce_eager`` (neither compile nor use CUDA graphs), by default true only on a CPU.

    Raises:
        UserError: An argument is out of range, or not the user's to choose. Only :meth:`check` needs vLLM itself.
    """

    OWN = frozenset({
        "model", "tokenizer", "skip_tokenizer_init", "generation_config", "hf_overrides", "load_format",
        "logprobs_mode", "quantization", "enable_lora", "enable_sleep_mode", "distributed_executor_backend",
        "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
    })  # fmt: skip
    """Arguments of vllm.LLM that are not the user's to choose."""

    def __init__(
        self,
        gpu_memory_utilization: float = 0.3,
        max_model_len: int | None = None,
        sleep: bool = True,
        engine: dict[str, Any] | None = None,
    ) -> None:
        share = gpu_memory_utilization
        check_ranges("", ("gpu_memory_utilization", share, 0 < share <= 1, "above 0, at most 1"))
        taken = sorted(self.OWN & (engine or {}).keys())
        if taken:
            wrong = "The sampler's engine has arguments that VLLMSampler sets itself"
            raise UserError(wrong, got=", ".join(taken), do="leave them out of rollout.sampler.engine")
        self.gpu_memory_utilization, self.max_model_len = gpu_memory_utilization, max_model_len
        self.sleep, self.engine = sleep, engine or {}
        self.end_ids: list[int] = []
        self.pad_id = 0
        self.stop: StopStrings | None = None
        self._llm: Any = None
        self._device = torch.device("cpu")

    def check(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, device: torch.device | None, processes: int = 1
    ) -> None:
        """Refuse what vLLM can't do; see :class:`~rlif_lightning.sampling.protocol.Sampler`."""
        if not is_installed():
            raise UserError(
                "VLLMSampler needs vLLM, which is not installed",
                do="pip install 'rlif-lightning[vllm]' on a GPU machine (docs/vllm.md says how on a CPU), or leave "
                "rollout.sampler out",
            )
        if sampling.temperature > HOTTEST:
            raise UserError(
                "The temperature is above what vLLM takes",
                got=sampling.temperature,
                expected=f"at most {HOTTEST:g}",
                do="lower it, or leave rollout.sampler out",
            )
        if self.max_model_len is not None:
            _check_room(max(map(len, prompts), default=0), sampling, self.max_model_len)
        if device is None:
            raise UserError(
                "VLLMSampler needs the whole policy in each process, and trainer.strategy cuts it into shards",
                do="use --trainer.strategy ddp, or leave rollout.sampler out",
            )
        if processes == 1 and device.type == "cuda" and device.index:
            raise UserError(
                "vLLM takes the first GPU that it sees where there is one process, and training would take another",
                got=f"trainer.devices [{device.index}]",
                do=f"set CUDA_VISIBLE_DEVICES={device.index} and --trainer.devices 1, or leave rollout.sampler out",
            )

    def update(self, policy: nn.Module, end_ids: Sequence[int], pad_id: int, stop: StopStrings | None = None) -> None:
        """Copy this module's current weights into the engine and forget every cached prompt."""
        self.end_ids, self.pad_id, self.stop = sorted(end_ids), pad_id, stop
        tokenizer = None if stop is None else stop.tokenizer
        self._device = next(policy.parameters()).device
        config, settings = merged_config(policy), self._settings(policy)
        with undisturbed(self._device):
            if self._device.type == "cpu":
                check_head_size(config.get_text_config())
            key = json.dumps([config.to_dict(), settings, tokenizer is None], sort_keys=True, default=str)
            if key not in _ENGINES:
                _ENGINES[key] = start_engine(config, settings, self._device, tokenizer)
            self._llm = _ENGINES[key]
            self._wake("weights")
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": merged_weights(policy)})
            self._wake("kv_cache")
            self._llm.reset_prefix_cache()  # it holds keys and values of the old weights

    def release(self) -> None:
        """Give the engine's memory back until the next update, where it can."""
        if self._llm is not None and self._sleeps and not self._llm.llm_engine.is_sleeping():
            self._llm.sleep(level=2)  # frees weights and cache: the next update brings the weights

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        seeds: Tensor,
        sampling: Sampling,
        progress: Progress | None = None,
    ) -> Samples:
        """Draw completions; see :class:`~rlif_lightning.sampling.protocol.Sampler`."""
        assert self._llm is not None, "call update() before sample()"
        _check_room(max(map(len, prompts)), sampling, self._llm.llm_engine.model_config.max_model_len)
        rows = [p for p in prompts for _ in range(group_size)]
        measured = sampling.temperature > 0 and not sampling.filtered
        with undisturbed(self._device):
            done = self._generate(rows, [self._parameters(sampling, seed, measured) for seed in seeds.tolist()])
        if progress is not None:
            progress(sampling.max_new_tokens, sampling.max_new_tokens)
        drawn = [x.outputs[0] for x in done]
        counts, stopped = zip(*map(self._end, drawn), strict=True)
        lengths = torch.tensor(counts)
        mask = torch.arange(int(lengths.max())) < lengths[:, None]  # [N, T]
        tokens = torch.tensor([token for x, n in zip(drawn, counts, strict=True) for token in x.token_ids[:n]])
        ids = torch.full(mask.shape, self.pad_id).masked_scatter(mask, tokens)
        prompt_ids, prompt_mask = pad_left(rows, self.pad_id, self._device)
        last = ids.gather(1, lengths[:, None] - 1).squeeze(1)
        return Samples(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion_ids=ids.to(self._device),
            completion_mask=mask.to(self._device),
            ended=(torch.isin(last, torch.tensor(self.end_ids)) | torch.tensor(stopped)).to(self._device),
            engine_logprob=_logprobs(drawn, counts, mask).to(self._device) if measured else None,
        )

    def _generate(self, prompts: Sequence[Sequence[int]], parameters: list[Any]) -> list[Any]:
        """What vLLM makes of the prompts; a signal ends it between two steps of the engine, of a token each."""
        engine = self._llm.llm_engine

        def step() -> Any:
            look()
            return type(engine).step(engine)

        engine.step = step
        try:
            return self._llm.generate([{"prompt_token_ids": list(p)} for p in prompts], parameters, use_tqdm=False)
        except Stopped:
            _ENGINES.clear()  # the engine would go on with these requests
            raise
        finally:
            del engine.step

    def _end(self, drawn: Any) -> tuple[int, bool]:
        """How many tokens of what vLLM drew belong to the completion, and whether a stop string has ended it.

        vLLM sees a text grow by whole characters, so half a character after the string makes it stop a token late.
        """
        found = None if self.stop is None else self.stop.find(drawn.token_ids)[0]
        return found or len(drawn.token_ids), found is not None or isinstance(drawn.stop_reason, str)

    def _parameters(self, sampling: Sampling, seed: int, measured: bool) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=seed,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=self.end_ids,
            ignore_eos=True,  # our end tokens are the whole list
            logprobs=0 if measured else None,  # of the sampled token alone
            stop=None if self.stop is None else list(self.stop.strings),
            include_stop_str_in_output=True,
            detokenize=self.stop is not None,
        )

    def _settings(self, policy: nn.Module) -> dict[str, Any]:
        """Arguments of the engine."""
        on_cpu = self._device.type == "cpu"
        own: dict[str, Any] = {
            "dtype": _forward_dtype(policy, self._device),
            "enforce_eager": on_cpu,
            "max_model_len": self.max_model_len,
            "enable_sleep_mode": self._sleeps,
            "gpu_memory_utilization": self.gpu_memory_utilization,
        }
        if on_cpu:
            own["kv_cache_memory_bytes"] = CPU_CACHE
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            own["distributed_executor_backend"] = "external_launcher"  # take the processes as they are
        return {**own, **self.engine}

    @property
    def _sleeps(self) -> bool:
        return self.sleep and self._device.type == "cuda"

    def _wake(self, what: str) -> None:
        if self._sleeps and self._llm.llm_engine.is_sleeping():
            self._llm.wake_up(tags=[what])


def is_installed() -> bool:
    """Whether there is a vLLM; it is not imported to know."""
    return importlib.util.find_spec("vllm") is not None


def _check_room(longest: int, sampling: Sampling, most: int) -> None:
    if longest + sampling.max_new_tokens > most:
        raise UserError(
            "The engine has no room for the longest prompt and its completion",
            got=f"{longest} + {sampling.max_new_tokens} tokens",
            expected=f"at most {most}",
            do="shorten them, or raise max_model_len of rollout.sampler where the model allows it",
        )


def _forward_dtype(policy: nn.Module, device: torch.device) -> str:
    """The precision in which the policy's matrices are multiplied."""
    dtype = next((p.dtype for p in policy.parameters() if p.is_floating_point()), torch.float32)
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return str(dtype).removeprefix("torch.")


def _logprobs(drawn: Sequence[Any], counts: Sequence[int], mask: Tensor) -> Tensor:
    """Log-probabilities [N, T] in nats of vLLM's completions, 0 outside the mask."""
    kept = [(x.logprobs[:n], x.token_ids[:n]) for x, n in zip(drawn, counts, strict=True)]
    values = [p[t].logprob for logprobs, ids in kept for p, t in zip(logprobs, ids, strict=True)]
    logprob = torch.zeros(mask.shape).masked_scatter(mask, torch.tensor(values))
    if not logprob.isfinite().all():
        raise diverged()
    return logprob
