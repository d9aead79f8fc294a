"""A plain answer to the question of ``rlif diagnose``, with its evidence and no more than that."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlif_lightning.diagnosis.association import Estimate

Target = Literal["correct", "agreement"]
Level = Literal["start", "try with care", "don't"]

# Where these come from: few models, so they are landmarks and no laws. On the toy (mixtures of base and tuned
# weights, token entropy as reward, two seeds) entropy per token, agreement and the gain in accuracy went together:
#   0.40 nats, 0.35: gain 0.5;  0.13, 0.70: 0.15;  0.04, 0.90: 0.03;  0.01, 0.97: 0.
ENTROPY_ROOM = 0.4
"""Nats per token. Reported (arXiv 2506.17219, mixtures of one base and one instruction-tuned model): gains at initial
entropies of 0.81 and 0.71, little or none at 0.44 and 0.38. Other tokenizers and averages move it: the toy gains most
at 0.4."""
ENTROPY_NONE = 0.05
"""Nats per token: the toy's gain has vanished."""
AGREEMENT_ROOM = 0.7
"""Mean agreement of a group, below which the toy gained 0.15 and more."""
AGREEMENT_SATURATED = 0.9
"""Mean agreement of a group, from which the toy gained 0.03 at most."""
ANSWERED_LEAST = 0.5
"""Share of completions with an answer, below which agreement says more of the format than of the content (ours)."""
TRUNCATED_MOST = 0.3
"""Share of completions cut off, above which length limits decide what is rewarded (ours)."""
GATED_MOST = 0.5
"""Share of groups without a spread to learn from (ours)."""
MAJORITY_LEAST = 0.05
"""Gain of the majority over a sample, below which it speaks for nothing (ours)."""
SOLVED_LEAST = 0.1
"""Share of problems that one of the group solves, below which the task or its format is out of reach (ours)."""
PROMPTS_LEAST = 32
"""Fewer prompts give intervals too wide, and percentile bootstraps too narrow, to say 'start' (ours)."""
GROUPS_LEAST = 16
"""Groups in which reward and target both vary, below which their correlation is left out of account (ours)."""


@dataclass
class Verdict:
    """The answer."""

    level: Level
    reward: str | None  # the one to begin with; None where nothing speaks for any
    reasons: list[str] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)  # each holds back a "start"
    notes: list[str] = field(default_factory=list)
    against: Target | None = None  # what the rewards were held against


def verdict(
    policy: Mapping[str, Any],
    rewards: Mapping[str, Mapping[str, Any]],
    *,
    internal: Mapping[str, bool],
    group_size: int,
    statistics_temperature: float = 1.0,
    differs: Callable[[str, str, str], bool] | None = None,
) -> Verdict:
    """Weigh the evidence.

    Args:
        policy: As :func:`rlif_lightning.diagnosis.measures.describe` gives it.
        rewards: As :func:`rlif_lightning.diagnosis.measures.compare` gives it.
        internal: Of the rewards that may be chosen: whether it is made of the answers' agreement itself, so that
            agreement can't speak for it.
        group_size: G.
        statistics_temperature: At which entropy was taken.
        differs: (one, other, target): whether the data tell the two rewards' correlations apart; null: never asked.
    """
    out = Verdict("try with care", None)
    entropy, agreement = policy["entropy"], policy["agreement"]
    answers = policy["answered_fraction"].value >= ANSWERED_LEAST
    _caution(out, policy, group_size, statistics_temperature)
    room = _room(out, entropy, agreement if answers else None)
    majority = _majority(out, policy, group_size)
    helps = _reward(out, rewards, internal, answers, differs)
    if room == "none" or majority == "hurts" or helps == "none":
        out.level = "don't"
    elif room == "yes" and helps == "yes" and majority != "unclear":
        out.level = "try with care" if out.cautions else "start"
    if out.level == "don't":
        out.reward = None
    return out


def _caution(out: Verdict, policy: Mapping[str, Any], group_size: int, temperature: float) -> None:
    prompts, truncated, answered = policy["entropy"].groups, policy["truncated_fraction"], policy["answered_fraction"]
    if prompts < PROMPTS_LEAST:
        out.cautions.append(f"only {prompts} prompts; take {PROMPTS_LEAST} or more to be told to start")
    if truncated.value > TRUNCATED_MOST:
        out.cautions.append(
            f"{truncated.value:.0%} of the completions are cut off: raise rollout.max_new_tokens, or check "
            "model.end_tokens"
        )
    if answered.value < ANSWERED_LEAST:
        out.cautions.append(
            f"only {answered.value:.0%} of the completions state an answer that can be read: agreement is left "
            "out of account; check data.answers and the prompt"
        )
    solved = policy.get(f"pass@{group_size}")
    if solved is not None and solved.high < SOLVED_LEAST:
        out.cautions.append(
            f"hardly any problem is solved in {group_size} tries ({solved}): first look at completions.jsonl, the "
            "prompt and data.answers"
        )
    if temperature != 1.0:
        out.notes.append(f"entropy was taken at temperature {temperature:g}; the thresholds are those of 1")


def _room(out: Verdict, entropy: Estimate, agreement: Estimate | None) -> Literal["none", "little", "unclear", "yes"]:
    """Whether there is something left to sharpen."""
    if agreement is not None and agreement.low > AGREEMENT_SATURATED:
        out.reasons.append(
            f"agreement {agreement} is saturated (above {AGREEMENT_SATURATED}, where mixtures on our toy gained "
            "0.03 at most): the completions of a prompt already give one answer"
        )
        return "none"
    if entropy.high < ENTROPY_NONE:
        out.reasons.append(
            f"initial entropy {entropy} nats is next to none (below {ENTROPY_NONE}, where mixtures on our toy gained "
            "0.03 at most); instruction-tuned models are reported to gain little (arXiv 2506.17219)"
        )
        return "none"
    differ = agreement is not None and agreement.high < AGREEMENT_ROOM
    if agreement is not None:
        much = (
            f"leaves room (below {AGREEMENT_ROOM})"
            if differ
            else f"leaves little room or can't be told from {AGREEMENT_ROOM}"
        )
        out.reasons.append(f"agreement {agreement} {much}; our toy gained 0.5 at 0.35, 0.15 at 0.7, 0.03 at 0.9")
    if entropy.high < ENTROPY_ROOM:
        out.reasons.append(
            f"initial entropy {entropy} nats is low: reported gains vanished at about {ENTROPY_ROOM} and below "
            "(arXiv 2506.17219, one family of models; tokenizer and task move it)"
        )
        return "little"
    clear = entropy.low >= ENTROPY_ROOM
    much = "leaves room" if clear else f"can't be told from the landmark {ENTROPY_ROOM}"
    out.reasons.append(
        f"initial entropy {entropy} nats {much} (reported gains at 0.7 to 0.8, none at {ENTROPY_ROOM})"
    )
    return "yes" if differ or (clear and agreement is None) else "unclear"


def _majority(
    out: Verdict, policy: Mapping[str, Any], group_size: int
) -> Literal["unknown", "helps", "unclear", "hurts"]:
    """Whether the answer that sharpening leads to, the most frequent one, is better than a sample."""
    if "majority_gain" not in policy:
        return "unknown"
    gain, accuracy, majority = (policy[k] for k in ("majority_gain", "accuracy", f"maj@{group_size}"))
    facts = f"majority of {group_size} against a single sample: {majority.value:.2f} - {accuracy.value:.2f} = {gain}"
    if gain.high < MAJORITY_LEAST and gain.high >= 0:
        out.reasons.append(f"{facts}: making the frequent answer more frequent would change little")
        return "unclear"
    if gain.low > 0:
        out.reasons.append(f"{facts}: making the frequent answer more frequent would help")
        return "helps"
    if gain.high < 0:
        out.reasons.append(f"{facts}: internal rewards are reported to end at the majority (arXiv 2603.08660), which "
                           "is worse here than a sample")  # fmt: skip
        return "hurts"
    out.reasons.append(f"{facts}: no sign that the most frequent answer is better than a sample")
    return "unclear"


def _reward(
    out: Verdict,
    rewards: Mapping[str, Mapping[str, Any]],
    internal: Mapping[str, bool],
    answers: bool,
    differs: Callable[[str, str, str], bool] | None,
) -> Literal["unknown", "none", "unclear", "yes"]:
    """The reward nearest to what is right, or to what the group agrees on."""
    target: Target
    for target in ("correct", "agreement"):
        fits = {
            name: rewards[name][target]["within"]
            for name, made_of_answers in internal.items()
            if name in rewards and target in rewards[name] and not (target == "agreement" and made_of_answers)
        }
        fits = {n: e for n, e in fits.items() if e.groups >= GROUPS_LEAST and e.low == e.low}
        if fits and (target == "correct" or answers):
            out.against = target
            break
    else:
        out.reasons.append("nothing to hold the rewards against: too few groups differ in answers or in correctness")
        return "unknown"
    what = "correctness" if target == "correct" else "being in the group's majority"
    ranking = sorted(fits, key=lambda n: -fits[n].value)
    best = ranking[0]
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
    alike = [n for n in ranking[1:] if fits[n].low > 0 and differs is not None and not differs(best, n, target)]
    if alike:
        out.reasons.append(f"not told apart from it: {', '.join(alike)}")
    against = [n for n in ranking if fits[n].high < 0]
    if against:
        out.notes.append(f"runs against {what}: " + ", ".join(f"{n} {fits[n]}" for n in against))
    chance = rewards["random"][target]["within"] if "random" in rewards else None
    if chance is not None and chance.excludes_zero():
        out.notes.append(
            f"even the random reward's interval excludes 0 ({chance}): one in twenty does by "
            "chance, so trust no correlation of that size"
        )
    gated = rewards[best]["gated_fraction"]
    if gated > GATED_MOST:
        out.cautions.append(f"{gated:.0%} of the groups have no spread of {best} to learn from")
    length = rewards[best]["tokens"]["within"]
    if length.excludes_zero() and abs(length.value) > abs(fits[best].value):
        out.notes.append(
            f"{best} goes with {'longer' if length.value > 0 else 'shorter'} completions ({length}) more than "
            f"with {what}: watch the length"
        )
    return "yes"
