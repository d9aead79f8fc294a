"""Answer problems and say how well: greedily, and by samples at a temperature."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean

from rlif_lightning.data.prompts import Prompt
from rlif_lightning.functional.seeds import completion_seeds
from rlif_lightning.grading import Grader, maj_at_k, mean_interval, pass_at_k
from rlif_lightning.models.policy import Policy
from rlif_lightning.sampling import Sampler, Sampling
from rlif_lightning.sampling.protocol import up_to_date

# Told (problems answered, problems, tokens sampled so far, most tokens there can be).
EvaluationProgress = Callable[[int, int, int, int], None]
SEED = 20_250_519  # the same completions' seeds in every evaluation, whatever the seed of the run


@dataclass
class Attempt:
    """One completion of a problem."""

    text: str
    tokens: int
    ended: bool
    answer: str | None = None
    correct: bool | None = None  # None: the problem has no reference answer


@dataclass
class Answered:
    """A problem with its attempts."""

    index: int
    problem: str
    prompt: str
    gold: str | None
    greedy: list[Attempt] = field(default_factory=list)  # one, or none where it was not asked for
    samples: list[Attempt] = field(default_factory=list)
    by: dict[str, str] = field(default_factory=dict)  # field -> value, by which results are given apart


@dataclass(frozen=True)
class Attempts:
    """How a problem is attempted."""

    sampling: Sampling  # longest completion, and temperature of the samples
    samples: int = 1  # per problem at that temperature; 0: none
    greedy: bool = True  # whether to take the greedy completion as well
    batch_size: int = 64  # problems answered at the same time


def answer_problems(
    sampler: Sampler,
    policy: Policy,
    problems: Sequence[tuple[int, Prompt]],
    attempts: Attempts,
    grader: Grader,
    progress: EvaluationProgress | None = None,
) -> list[Answered]:
    """Complete each prompt greedily and by samples at the temperature, and grade every text.

    The index of each problem in the data seeds its samples. Where processes share the policy's weights out, to be
    called on all; the sampler takes the weights once.
    """
    results = [
        Answered(i, p.problem.text, p.text, p.problem.gold.text if p.problem.gold else None, by=p.problem.by)
        for i, p in problems
    ]
    rounds = [("greedy", 1, Sampling(attempts.sampling.max_new_tokens, temperature=0.0))] if attempts.greedy else []
    rounds += [("samples", attempts.samples, attempts.sampling)] if attempts.samples else []
    with up_to_date(sampler, policy):
        for start in range(0, len(problems), attempts.batch_size):
            part = problems[start : start + attempts.batch_size]
            tell = None if progress is None else partial(progress, start, len(problems))
            for kind, count, distribution in rounds:
                seeds = completion_seeds(SEED, [(i,) for i, _ in part], count)
                drawn = sampler.sample([p.ids for _, p in part], count, seeds, distribution, tell)
                facts = zip(drawn.texts(policy.decode), drawn.lengths.tolist(), drawn.ended.tolist(), strict=True)
                found = [Attempt(text, tokens, ended) for text, tokens, ended in facts]
                for n, (_, prompt) in enumerate(part):
                    own = found[n * count : (n + 1) * count]
                    _grade(own, prompt, grader)
                    getattr(results[start + n], kind).extend(own)
    return results


def _grade(attempts: list[Attempt], prompt: Prompt, grader: Grader) -> None:
    pairs = [(a.text, a.ended) for a in attempts]
    gold = prompt.problem.gold
    grades = [None] * len(pairs) if gold is None else grader.grade([(t, e, gold) for t, e in pairs])
    for attempt, answer, grade in zip(attempts, grader.extract_answers(pairs), grades, strict=True):
        attempt.answer, attempt.correct = answer, grade


def summarise(results: Sequence[Answered], intervals: bool = False) -> dict[str, float]:
    """Accuracy, where asked with its 95 % interval over problems, pass@k, maj@k, length, truncated share.

    Label-based numbers are left out where a problem has no reference answer. ``accuracy`` is greedy,
    ``accuracy_sampled`` the mean over all samples; k are powers of two up to the number of samples, and that number.
    """
    summary: dict[str, float] = {"n": len(results)}
    labelled = bool(results) and all(r.gold is not None for r in results)
    for kind, suffix in (("greedy", ""), ("samples", "_sampled")):
        attempts = [getattr(r, kind) for r in results]
        flat = [a for own in attempts for a in own]
        if not flat:
            continue
        if labelled:
            accuracy = [fmean(float(bool(a.correct)) for a in own) for own in attempts]
            summary[f"accuracy{suffix}"] = fmean(accuracy)
            if intervals:
                summary[f"accuracy{suffix}_low"], summary[f"accuracy{suffix}_high"] = mean_interval(accuracy)
        summary[f"mean_tokens{suffix}"] = fmean(a.tokens for a in flat)
        summary[f"truncated_fraction{suffix}"] = fmean(float(not a.ended) for a in flat)
    count = len(results[0].samples) if results else 0
    if labelled and count > 1:
        for k in sorted({2**p for p in range(count.bit_length()) if 2**p <= count} | {count}):
            right = [[bool(a.correct) for a in r.samples] for r in results]
            summary[f"pass@{k}"] = fmean(pass_at_k(count, sum(x), k) for x in right)
            answers = [[a.answer for a in r.samples] for r in results]
            if k > 1:  # the majority of one is the sample
                summary[f"maj@{k}"] = fmean(float(maj_at_k(a, x, k)) for a, x in zip(answers, right, strict=True))
    return summary


def summarise_by(results: Sequence[Answered]) -> dict[str, dict[str, dict[str, float]]]:
    """The summary, with intervals, of the problems that share a value: field -> value -> numbers.

    Values come in their order, numbers as numbers.
    """
    parts: dict[str, dict[str, dict[str, float]]] = {}
    for name in results[0].by if results else ():
        values = sorted({r.by[name] for r in results}, key=_order)
        parts[name] = {v: summarise([r for r in results if r.by[name] == v], intervals=True) for v in values}
    return parts


def _order(value: str) -> tuple[bool, int, str]:
    return (False, int(value), value) if value.isdecimal() and len(value) < 20 else (True, 0, value)
