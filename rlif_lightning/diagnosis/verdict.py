"""A plain answer to the question of ``rlif diagnose``, with its evidence and no more than that."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlif_lightning.diagnosis.association import Estimate
from rlif_lightning.runs.pictures import in_words
from rlif_lightning.training.cut_off import LONGER

Rewards = Mapping[str, Mapping[str, Any]]  # by name, as measures.compare gives them
Differs = Callable[[str, str, str], bool]  # (one, other, target): whether the data tell two correlations apart
Target = Literal["correct", "agreement"]
WORDS: dict[Target, str] = {"correct": "correctness", "agreement": "being in the group's majority"}
SIDES: dict[Target, tuple[str, str]] = {  # completions that a reward should be higher for, and the others
    "correct": ("right completions", "wrong completions"),
    "agreement": ("the majority's answers", "the minority's answers"),
}

# Where these come from: few models, so they are landmarks and not limits. On the toy (mixtures of base and tuned
# weights, docs/study.md) entropy per token, agreement and the gain in accuracy went together:
#   0.40 nats, 0.35: gain 0.4;  0.13, 0.70: 0.15;  0.04, 0.90: 0.01;  0.01, 0.97: 0.
# Reported (arXiv 2506.17219, mixtures of one base and one instruction-tuned model): gains at initial entropies of
# 0.81 and 0.71, little or none at 0.44 and 0.38. Other tokenizers and averages move it: the toy gains most at 0.4.
ENTROPY_ROOM = 0.4  # nats per token
ENTROPY_NONE = 0.05  # nats per token: the toy's gain has vanished
AGREEMENT_ROOM = 0.7  # mean agreement of a group, below which the toy gained 0.15 and more
AGREEMENT_SATURATED = 0.9  # ... from which the toy gained 0.01 at most
# The others are ours, without a source.
ANSWERED_LEAST = 0.5  # share of completions with an answer, below which agreement says more of format than of content
TRUNCATED_MOST = 0.3  # share of completions cut off, above which length limits decide what is rewarded
GATED_MOST = 0.5  # share of groups without a spread to learn from
MAJORITY_LEAST = 0.05  # gain of the majority over a sample, below which it speaks for nothing
SOLVED_LEAST = 0.1  # share of problems solved by one of the group, below which task or format is out of reach
PROMPTS_LEAST = 32  # fewer prompts give intervals too wide, and percentile bootstraps too narrow, to say "start"
GROUPS_LEAST = 16  # groups in which reward and target both vary, below which their correlation is left out


@dataclass
class Verdict:
    """The answer."""

    level: Literal["start", "try with care", "don't"]
    reward: str | None  # the one to begin with; None where nothing speaks for any
    sentence: str = ""  # the answer and what decides it, in plain words
    reasons: list[str] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)  # each holds back a "start"
    notes: list[str] = field(default_factory=list)
    against: Target | None = None  # what the rewards were held against
    compared: list[str] = field(default_factory=list)  # what it chose from, the best first


def verdict(
    policy: Mapping[str, Any],
    rewards: Rewards,
    *,
    internal: Mapping[str, bool],
    group_size: int,
    differs: Differs,
    statistics_temperature: float = 1.0,
    when_cut_off: str = LONGER,
) -> Verdict:
    """Weigh the evidence on a policy, as measures.describe gives it, and its rewards.

    ``internal``: rewards that may be chosen, and whether each is made of the answers' agreement itself, so that
    agreement can't speak for it. The temperature is that of the entropy. ``when_cut_off`` is what would help where
    many completions are cut off.
    """
    out = Verdict("try with care", None)
    answers = policy["answered_fraction"].value >= ANSWERED_LEAST
    _add_cautions(out, policy, group_size, statistics_temperature, when_cut_off)
    room = _judge_room(out.reasons, policy["entropy"], policy["agreement"] if answers else None)
    majority = _judge_majority(out.reasons, policy, group_size)
    fit = _judge_rewards(out, rewards, internal, answers, differs)
    if room == "none" or majority == "hurts" or fit == "none":
        out.level, out.reward = "don't", None
    elif room == "yes" and fit == "yes" and majority != "unclear" and not out.cautions:
        out.level = "start"
    out.sentence = f"{_say_level(out)}. {_say_why(out, room, majority, fit)}."
    return out


def _say_level(out: Verdict) -> str:
    reward = None if out.reward is None else in_words(out.reward)
    if out.level == "don't":
        return "Don't train on internal rewards here"
    if out.level == "start":
        return f"Start with {reward}"
    return f"Try {reward} with care" if reward else "Try with care"


def _say_why(out: Verdict, room: str, majority: str, fit: str) -> str:
    """What decides the answer, the gravest of it."""
    better, worse = SIDES[out.against or "correct"]
    found = {
        "The completions of a prompt hardly differ": room == "none",
        "A prompt's most frequent answer is worse than a single sample": majority == "hurts",
        f"Every internal reward is higher for {worse}": fit == "none",
        "Too few groups differ to say which reward goes with what is right": fit == "unknown",
        f"No internal reward is clearly higher for {better}": fit == "unclear",
        "Initial entropy is low": room == "little",
        "It is not clear that there is room to improve": room == "unclear",
        "A prompt's most frequent answer is not clearly better than a single sample": majority == "unclear",
        **{caution[0].upper() + caution[1:]: True for caution in out.cautions},
        f"It is higher for {better}, and there is room to improve": True,
    }
    return next(text for text, holds in found.items() if holds)


def _add_cautions(
    out: Verdict, policy: Mapping[str, Any], group_size: int, temperature: float, when_cut_off: str
) -> None:
    prompts, truncated, answered = policy["entropy"].groups, policy["truncated_fraction"], policy["answered_fraction"]
    if prompts < PROMPTS_LEAST:
        out.cautions.append(f"only {prompts} prompts; take {PROMPTS_LEAST} or more to be told to start")
    if truncated.value > TRUNCATED_MOST:
        out.cautions.append(f"{truncated.value:.0%} of the completions are cut off: {when_cut_off}")
    if answered.value < ANSWERED_LEAST:
        out.cautions.append(f"only {answered.value:.0%} of the completions state an answer that can be read: "
                            "agreement is left out of account; check data.answers and the prompt")  # fmt: skip
    solved = policy.get(f"pass@{group_size}")
    if solved is not None and solved.high < SOLVED_LEAST:
        out.cautions.append(f"hardly any problem is solved in {group_size} tries ({solved}): first look at "
                            "completions.jsonl, the prompt and data.answers")  # fmt: skip
    if temperature != 1.0:
        out.notes.append(f"entropy was taken at temperature {temperature:g}; the thresholds are those of 1")


def _judge_room(reasons: list[str], entropy: Estimate, agreement: Estimate | None) -> str:
    """Whether there is something left to sharpen: none, little, unclear or yes."""
    little = "where mixtures on our toy gained 0.01 at most"
    if agreement is not None and agreement.low > AGREEMENT_SATURATED:
        reasons.append(f"agreement {agreement} is saturated (above {AGREEMENT_SATURATED}, {little}): the completions "
                       "of a prompt already give one answer")  # fmt: skip
        return "none"
    if entropy.high < ENTROPY_NONE:
        reasons.append(f"initial entropy {entropy} nats is next to none (below {ENTROPY_NONE}, {little}); "
                       "instruction-tuned models are reported to gain little (arXiv 2506.17219)")  # fmt: skip
        return "none"
    differ = agreement is not None and agreement.high < AGREEMENT_ROOM
    if agreement is not None:
        unclear = f"leaves little room or can't be told from {AGREEMENT_ROOM}"
        much = f"leaves room (below {AGREEMENT_ROOM})" if differ else unclear
        reasons.append(f"agreement {agreement} {much}; our toy gained 0.4 at 0.35, 0.15 at 0.7, 0.01 at 0.9")
    if entropy.high < ENTROPY_ROOM:
        reasons.append(f"initial entropy {entropy} nats is low: reported gains vanished at about {ENTROPY_ROOM} and "
                       "below (arXiv 2506.17219, one family of models; tokenizer and task move it)")  # fmt: skip
        return "little"
    clear = entropy.low >= ENTROPY_ROOM
    much = "leaves room" if clear else f"can't be told from the landmark {ENTROPY_ROOM}"
    reasons.append(f"initial entropy {entropy} nats {much} (reported gains at 0.7 to 0.8, none at {ENTROPY_ROOM})")
    return "yes" if differ or (clear and agreement is None) else "unclear"


def _judge_majority(reasons: list[str], policy: Mapping[str, Any], group_size: int) -> str:
    """Whether the most frequent answer, to which sharpening leads, is better than a sample: helps, hurts, unclear."""
    if "majority_gain" not in policy:
        return "unknown"
    gain, accuracy, majority = (policy[k] for k in ("majority_gain", "accuracy", f"maj@{group_size}"))
    found = ("unclear", "no sign that the most frequent answer is better than a sample")
    if 0 <= gain.high < MAJORITY_LEAST:
        found = ("unclear", "making the frequent answer more frequent would change little")
    elif gain.low > 0:
        found = ("helps", "making the frequent answer more frequent would help")
    elif gain.high < 0:
        found = ("hurts", "internal rewards are reported to end at the majority (arXiv 2603.08660), which is worse "
                 "here than a sample")  # fmt: skip
    facts = f"majority of {group_size} against a single sample: {majority.value:.2f} - {accuracy.value:.2f} = {gain}"
    reasons.append(f"{facts}: {found[1]}")
    return found[0]


def _judge_rewards(
    out: Verdict, rewards: Rewards, internal: Mapping[str, bool], answers: bool, differs: Differs
) -> str:
    """Choose the reward nearest to what is right, or to what the group agrees on: unknown, none, unclear or yes."""
    out.against, fits = _correlations(rewards, internal, answers)
    if out.against is None:
        out.reasons.append("nothing to hold the rewards against: too few groups differ in answers or in correctness")
        return "unknown"
    target, what = out.against, WORDS[out.against]
    ranking = sorted(fits, key=lambda n: -fits[n].value)
    best, out.compared = ranking[0], ranking
    if fits[best].low <= 0:
        worst = all(e.high < 0 for e in fits.values())
        sign = "each runs against it" if worst else "the interval of the best includes 0"
        out.reasons.append(f"no internal reward goes with {what} within groups: {best} {fits[best]}; {sign}")
        return "none" if worst else "unclear"
    out.reward = best
    out.reasons.append(
        f"{best} goes with {what} within groups: correlation {fits[best]}, {fits[best].groups} groups "
        f"(best of {len(fits)}, the interval does not account for choosing)"
    )
    alike = [n for n in ranking[1:] if fits[n].low > 0 and not differs(best, n, target)]
    if alike:
        out.reasons.append(f"not told apart from it: {', '.join(alike)}")
    against = [f"{n} {fits[n]}" for n in ranking if fits[n].high < 0]
    if against:
        out.notes.append(f"runs against {what}: {', '.join(against)}")
    _add_doubts(out, rewards, best, fits[best])
    return "yes"


def is_sure(fit: Estimate) -> bool:
    """Whether enough groups speak for a correlation to be taken into account."""
    return fit.groups >= GROUPS_LEAST and fit.low == fit.low  # no nan


def _correlations(
    rewards: Rewards, internal: Mapping[str, bool], answers: bool
) -> tuple[Target | None, dict[str, Estimate]]:
    """What the rewards are held against, correctness where it is known, and how strongly each goes with it."""
    targets: list[Target] = ["correct", "agreement"] if answers else ["correct"]
    for target in targets:
        candidates = [n for n in internal if n in rewards and not (target == "agreement" and internal[n])]
        fits = {n: rewards[n][target]["within"] for n in candidates if target in rewards[n]}
        fits = {n: e for n, e in fits.items() if is_sure(e)}
        if fits:
            return target, fits
    return None, {}


def _add_doubts(out: Verdict, rewards: Rewards, best: str, fit: Estimate) -> None:
    """What speaks against trusting the choice: chance, missing spread, length."""
    assert out.against is not None
    chance = rewards["random"][out.against]["within"] if "random" in rewards else None
    if chance is not None and chance.excludes_zero():
        out.notes.append(f"even the random reward's interval excludes 0 ({chance}): one in twenty does by chance, so "
                         "trust no correlation of that size")  # fmt: skip
    gated, length = rewards[best]["gated_fraction"], rewards[best]["tokens"]["within"]
    if gated > GATED_MOST:
        out.cautions.append(f"{gated:.0%} of the groups have no spread of {best} to learn from")
    if length.excludes_zero() and abs(length.value) > abs(fit.value):
        longer = "longer" if length.value > 0 else "shorter"
        out.notes.append(
            f"{best} goes with {longer} completions ({length}) more than with {WORDS[out.against]}: watch the length"
        )
