"""A diagnosis as files and as a table for the terminal."""

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlif_lightning.data.prompts import Prompt
from rlif_lightning.diagnosis.association import Estimate
from rlif_lightning.diagnosis.measures import CompletionStats
from rlif_lightning.errors import escaped
from rlif_lightning.rollout import Rollout
from rlif_lightning.runs.atomic import replacing, write_text
from rlif_lightning.runs.summary import aligned

WIDTH = 100
LIMITS = (
    "The thresholds come from few models: a reason to look, no forecast. All this is of the first step and says "
    "nothing about when to stop; on our toy, rewards that look alike here part later."
)
ROWS = {  # of the policy, in their order
    "entropy": "entropy (nats per token)",
    "logprob": "log-probability (nats per token)",
    "self_certainty": "self-certainty (nats per token)",
    "completion_tokens": "completion tokens",
    "truncated_fraction": "cut off",
    "answered_fraction": "with an answer",
    "agreement": "agreement in a group",
    "similarity": "similarity of texts in a group",
    "accuracy": "accuracy, sampled",
    "majority_gain": "majority minus sample",
}


def report_text(report: dict[str, Any]) -> str:
    """The report in lines: the policy, the rewards, the verdict."""
    policy, rewards, answer = report["policy"], report["rewards"], report["verdict"]
    where = f"{report['prompts']} prompts of data.{report['split']} x {report['group_size']} completions"
    lines = [f"{report['model']}: {where}; [95 % intervals over prompts]", ""]
    extra = {k: k for k in policy if k.startswith(("pass@", "maj@")) and k != "pass@1"}
    lines += [f"  {what:<34}{policy[key]}" for key, what in {**ROWS, **extra}.items() if key in policy]
    lines += ["", "Within groups: correlation of each reward, AUROC of pairs of one prompt"]
    lines += _reward_table(rewards, report["length"], labels="accuracy" in policy)
    values, gradients = report["equivalence"]["values"], report["equivalence"]["gradients"]
    lines += ["", "Correlation of the rewards within groups", *_matrix(list(rewards), values)]
    if gradients is not None:
        halves = gradients["between_halves"]
        rows = [[*own, halves[i][i]] for i, own in enumerate(gradients["cosines"])]
        title = "Cosine of their gradients; last: with itself on other prompts; as small as random's is noise"
        lines += ["", title, *_matrix(list(rewards), rows)]
    lines += ["", *textwrap.wrap(f"VERDICT: {answer['sentence']}", WIDTH)]
    for sign, key in (("-", "reasons"), ("!", "cautions"), ("*", "notes")):
        lines += [part for text in answer[key] for part in _wrap(text, sign)]
    return "\n".join([*lines, *_wrap(LIMITS, " ")])


def _reward_table(rewards: dict[str, Any], length: dict[str, Estimate], labels: bool) -> list[str]:
    known = ("with correctness", "AUROC") if labels else ()
    rows = [["reward", "spread", "gated", "with agreement", *known, "with length"]]
    for name, r in rewards.items():
        right = (f"{r['correct']['within']}", f"{r['correct']['auroc_within'].value:.2f}") if labels else ()
        numbers = (f"{r['spread']:.3g}", f"{r['gated_fraction']:.0%}", str(r["agreement"]["within"]))
        rows.append([name, *numbers, *right, str(r["tokens"]["within"])])
    right = (str(length["correct"]), "") if labels else ()
    rows.append(["(answer length)", "", "", str(length["agreement"]), *right, ""])
    return aligned([["", *row] for row in rows], others=str.ljust)


def _matrix(names: list[str], rows: list[list[float]]) -> list[str]:
    cells = [["    -" if math.isnan(v) else f"{v:5.2f}" for v in row] for row in rows]
    return aligned([["", name, *row] for name, row in zip(names, cells, strict=True)], others=str.ljust)


def _wrap(text: str, sign: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"  {sign} ", subsequent_indent="    ")


def write_json(path: Path, report: dict[str, Any]) -> None:
    """The whole report; an estimate is {value, low, high, groups}, what is not defined is null."""
    write_text(path, json.dumps(_plain(report), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_completions(path: Path, rollouts: Sequence[Rollout], prompts: Sequence[Prompt], m: CompletionStats) -> None:
    """One JSON object per completion: its text and every number about it."""
    texts = [(text, answer) for r in rollouts for text, answer in zip(r.texts, r.answers, strict=True)]
    with replacing(path) as file:
        for n, (text, answer) in enumerate(texts):
            p, g = divmod(n, m.tokens.shape[1])
            row = {
                "problem": prompts[p].problem.text,
                "completion": text,
                "tokens": int(m.tokens[p, g]),
                "ended": bool(m.ended[p, g]),
                "answer": answer,
                "majority": None if math.isnan(m.majority[p, g]) else bool(m.majority[p, g]),
                "correct": None if m.correct is None else bool(m.correct[p, g]),
                "entropy": float(m.sums["entropy"][p, g] / m.tokens[p, g]),
                "rewards": {name: float(v[p, g]) for name, v in m.values.items()},
            }
            line = escaped(json.dumps(_plain(row), ensure_ascii=False)) + "\n"
            file.write(line.encode(errors="backslashreplace"))
