"""What would end completions that were cut off: a setting to change, found in the completions themselves."""

import json
from collections import Counter
from collections.abc import Sequence

from rlif_lightning.data.prompts import Prompt
from rlif_lightning.models.policy import Policy
from rlif_lightning.rollout import Rollout

LONGER = "raise rollout.max_new_tokens"


def mostly_cut_off(
    fraction: float, rollout: Rollout, prompts: Sequence[Prompt], policy: Policy, most: int
) -> str | None:
    """A warning where more than half of the first completions were cut off at ``most`` tokens; else None."""
    if fraction <= 0.5:
        return None
    do = how_to_end([rollout], prompts, policy)
    return f"{fraction:.0%} of the completions were cut off at {most} tokens; {do}."


def how_to_end(rollouts: Sequence[Rollout], prompts: Sequence[Prompt], policy: Policy) -> str:
    """What to do about the completions that were cut off; the prompts are those of the rollouts, in their order.

    More than half of them may hold a special token that ends nothing yet, such as that of a chat template, or a line
    that begins like the problem's line in the prompt, because base models go on with a next question.
    """
    special = policy.tokenizer.added_tokens_decoder
    open_ids = {i for i, token in special.items() if token.special and i not in policy.end_ids}
    seen, cut = Counter[tuple[str, str]](), 0
    rest = iter(prompts)
    for rollout in rollouts:
        samples = rollout.samples
        rows = zip(samples.completion_ids.tolist(), samples.lengths.tolist(), samples.ended.tolist(), strict=True)
        for row, (ids, length, ended) in enumerate(rows):
            if row % rollout.group_size == 0:
                next_question = _beginning(next(rest))
            if ended:
                continue
            cut += 1
            seen.update(("model.end_tokens", special[i].content) for i in open_ids.intersection(ids[:length]))
            if next_question is not None and next_question in rollout.texts[row]:
                seen["rollout.stop", next_question] += 1
    for (setting, text), count in seen.most_common(1):
        if count > cut / 2:
            return f"add {json.dumps(text)} to {setting}, which {count / cut:.0%} of these hold, or {LONGER}"
    return LONGER


def _beginning(prompt: Prompt) -> str | None:
    """A line break and what stands before the problem in its line of the prompt; None if nothing does."""
    if not prompt.problem.text:
        return None
    words = prompt.text.rpartition(prompt.problem.text)[0].rpartition("\n")[2].strip()
    return f"\n{words}" if words else None
