"""Sampled accuracy of the weights that runs.py has kept, on all 200 held-out problems.

    python benchmarks/study/accuracy.py runs-study/self_certainty/5 --every 5

Ten completions per problem at temperature 1 by default: 2,000 samples per step, in two halves of five per problem,
so that a best step can be chosen on one half and reported on the other. Results are kept in accuracy.json of the
run, step by step; what is there is not measured again.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parent))
from runs import WEIGHTS

from rlif_lightning.data.problems import Source, read_problems
from rlif_lightning.data.prompts import Prompt, Template
from rlif_lightning.evaluation.answering import Attempts, answer_problems
from rlif_lightning.grading import AnswerFormat, Grader
from rlif_lightning.models.loading import PolicySettings
from rlif_lightning.models.policy import Policy
from rlif_lightning.sampling import NativeSampler, Sampling

PROBLEMS, SAMPLES = 200, 10
FILE = "accuracy.json"


class Evaluator:
    """Evaluates weights of one base model."""

    def __init__(self, run: Path) -> None:
        config = yaml.safe_load((run / "config.yaml").read_text())
        self.run, self.path = run, run / FILE
        name, data = config["model"]["name"], config["data"]
        self.policy = Policy.load(PolicySettings(name))
        source = Source(**{**data["test"], "limit": PROBLEMS})
        template = Template(data["template"], None, None)
        problems = read_problems(source, "val")
        self.prompts: list[tuple[int, Prompt]] = [
            (row, template.encode(problem, self.policy.tokenizer)) for row, problem in enumerate(problems)
        ]
        self.grader = Grader(AnswerFormat(**(data["test"].get("answers") or data["answers"])))
        self.sampler = NativeSampler()
        self.attempts = Attempts(Sampling(config["rollout"]["max_new_tokens"]), SAMPLES)
        self.known: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def measure(self, steps: Sequence[int]) -> dict[str, Any]:
        """Accuracy of both halves, and of the greedy answers, at each step."""
        for step in steps:
            if str(step) in self.known:
                continue
            weights = load_file(self.run / WEIGHTS / f"{step}.safetensors")
            self.policy.model.load_state_dict(weights, strict=False)
            results = answer_problems(self.sampler, self.policy, self.prompts, self.attempts, self.grader)
            halves = [[bool(a.correct) for r in results for a in r.samples[part::2]] for part in (0, 1)]
            self.known[str(step)] = {
                "a": sum(halves[0]) / len(halves[0]),
                "b": sum(halves[1]) / len(halves[1]),
                "greedy": sum(bool(a.correct) for r in results for a in r.greedy) / len(results),
            }
        self.path.write_text(json.dumps(self.known))
        return self.known


def kept_steps(run: Path) -> list[int]:
    """Steps whose weights are there."""
    return sorted(int(f.stem) for f in (run / WEIGHTS).glob("*.safetensors"))


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--every", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for run in options.runs:
        steps = [s for s in kept_steps(run) if s % options.every == 0]
        known = Evaluator(run).measure(steps)
        curve = [round((known[str(s)]["a"] + known[str(s)]["b"]) / 2, 3) for s in steps]
        print(run, *curve, flush=True)


if __name__ == "__main__":
    main()
