"""Models of real size: memory against plan, a step against the matrix rate, decoding against the bandwidth."""

import statistics
from dataclasses import replace
from functools import partial

import torch

from benchmarks import our_side
from benchmarks.bar import SkipError
from benchmarks.gpu.day import KINDS, Day, fit, make_module
from benchmarks.gpu.rows import Row, judged
from benchmarks.result import short, spread
from benchmarks.shapes import Work, read_prompts
from rlif_lightning.callbacks.plan_settings import plan_settings
from rlif_lightning.functional.seeds import completion_seeds
from rlif_lightning.planning.devices import USABLE
from rlif_lightning.planning.memory import GIB, Memory, memory
from rlif_lightning.planning.weights import Weights
from rlif_lightning.sampling import NativeSampler, Sampling
from rlif_lightning.sampling.kv_cache import bytes_per_token

REPEATS = 3


def training(day: Day, size: str, kind: str) -> list[Row]:
    """Steps of 8 prompts x 8 completions in bf16-mixed, with KL term and self-certainty."""
    work, optimizer = replace(day.work(size), steps=1 + REPEATS), None
    if kind == "NF4":
        import bitsandbytes

        optimizer = partial(bitsandbytes.optim.PagedAdamW8bit, lr=work.learning_rate)
    prompt = len(read_prompts(work.folder, "ids")[0])
    module, rollout = make_module(work, KINDS[kind], optimizer), our_side.make_rollouts(work)
    settings = plan_settings(module, rollout.collector, precision=work.precision, prompt_tokens=prompt)
    free = torch.cuda.mem_get_info()[0] if day.device == "cuda" else None
    plan = memory(settings, free, day.device)
    if free is not None and plan.peak > USABLE * free:
        raise SkipError(f"the plan is {plan.peak / GIB:.1f} GiB, {free / GIB:.1f} are free")
    rate = day.matrix_rate(work.precision)
    columns = fit(work, KINDS[kind], optimizer=optimizer).columns
    title = f"{size}, {kind}"
    update = columns["time/update"][1:]
    floor = operations(plan.weights, work, prompt, kind) / rate
    share = floor / statistics.median(update)
    products = f"its products take {short(floor)} at the measured {rate / 1e12:,.3g} TFLOP/s, {share:.0%}"
    return [
        peak_row(title, plan, columns["memory/peak"][-1] * 2**20, day.device),
        Row(f"{title}: update", f"{spread(update)} s; {products}"),
        *(Row(f"{title}: {name}", f"{spread(columns[f'time/{name}'][1:])} s") for name in ("rollout", "reference")),
    ]


def peak_row(title: str, plan: Memory, found: float, device: str) -> Row:
    """The plan's peak; on a CPU resident memory holds libraries too, so nothing is asked for."""
    unit, word = (GIB, "GiB") if plan.peak >= GIB else (2**20, "MiB")
    value = f"plan {plan.peak / unit:.1f} {word} in the phase '{plan.worst}', measured {found / unit:.1f}"
    if device == "cpu":
        return Row(f"{title}: peak memory", value)
    return judged(f"{title}: peak memory", value, "within 20 %", abs(plan.peak / found - 1) <= 0.2)


def operations(weights: Weights, work: Work, prompt: int, kind: str) -> float:
    """Of the products of one update, each prompt computed once and nothing again; attention's own are left out.

    A forward has 2 per weight and token, a backward as many for activations, and again for weights that train.
    """
    completed = work.rows * work.new_tokens
    forward = 2 * (weights.body * (completed + work.prompts * prompt) + weights.head * completed)
    return forward * (3 if kind == "full" else 2)


def decoding(day: Day, size: str) -> list[Row]:
    """64 completions at a time from bfloat16 weights, statistics included; the prompts' forward counts as well."""
    model, bandwidth = day.new_model(size), day.bandwidth()
    prompts, tokens, group = (2, 8, 4) if day.tiny else (8, 128, 8)
    rows, end = prompts * group, model.config.eos_token_id
    texts = [[(7 * i + p) % 50 for i in range(64)] for p in range(prompts)]
    sampler, seeds, drawn = NativeSampler(rows), completion_seeds(0, [(0, p) for p in range(prompts)], group), []
    sampler.update(model, [end], end)

    def sample() -> None:
        with day.autocast("bf16-mixed"):
            samples = sampler.sample(texts, group, seeds, Sampling(tokens))
        drawn.append(int(samples.lengths.sum()))

    taken = day.seconds(sample, REPEATS)
    speeds = [count / seconds for count, seconds in zip(drawn[1:], taken, strict=True)]
    embedding = model.get_input_embeddings().weight
    tied = embedding is model.get_output_embeddings().weight
    read = sum(p.nbytes for p in model.parameters()) - (0 if tied else embedding.nbytes)
    cached = rows * (64 + tokens / 2) * bytes_per_token(model.config, torch.bfloat16)
    floor = rows * bandwidth / (read + cached)
    share = statistics.median(speeds) / floor
    value = f"{spread(speeds)} tokens/s; weights and cache read at the measured {bandwidth / 1e9:,.0f} GB/s "
    return [Row(f"{size}, {rows} rows: decoding", value + f"would allow {short(floor)}, {share:.0%}")]
