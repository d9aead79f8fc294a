"""The toys that serve the study only.

    python benchmarks/study/toys.py addition --seed 1 --output toy-addition
    python benchmarks/study/toys.py narrow --seed 5 --output toy-narrow

``addition`` is a base model for another task, of addition.py, with its problems in train.jsonl and held_out.jsonl;
its recipe was made by analogy and not searched. ``narrow`` is ``toy:<seed>`` after some training on solutions that
always stop after two steps: hardly less sure than ``toy-tuned:<seed>``, and often wrong.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

sys.path.append(str(Path(__file__).parent))
import addition

from rlif_lightning.data.problems import TOY_HELD_OUT, TOY_TRAIN
from rlif_lightning.toy import arithmetic, pretraining, recipe, toy_model, toy_problems

# Direct answers of several digits stay a guess, so the loss cannot get as low; the steps themselves are learned.
ADDITION = (dataclasses.replace(recipe.CLEAN, steps=3000, until_loss=0.04), recipe.NOISY)
NARROW = (dataclasses.replace(recipe.TUNED, name="narrow"),)
FIRST_TWO_STEPS = SimpleNamespace(**{**vars(arithmetic), "count_steps": lambda question: 2})
PROBLEMS = {"train": "train.jsonl", "val": "held_out.jsonl", "test": "held_out.jsonl"}
"""Split -> file in the folder of ``addition``."""


def build(kind: str, seed: int, folder: Path, progress: bool = True) -> None:
    """Make a toy where it is not there yet; the folder appears complete or not at all.

    Args:
        kind: addition or narrow.
        seed: Of weights and corpus.
        folder: Where.
        progress: Whether to show a progress bar.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as work:
        made = Path(work) / "toy"
        made.mkdir()
        if kind == "narrow":
            base = toy_model(f"toy:{seed}", progress)
            pretraining.build_toy(made, NARROW, seed, task=FIRST_TWO_STEPS, base=base, progress=progress)
        else:
            pretraining.build_toy(made, ADDITION, seed, task=addition, progress=progress)
            for rows, split in ((toy_problems("train", TOY_TRAIN, addition), "train"),
                                (toy_problems("held_out", TOY_HELD_OUT, addition), "test")):  # fmt: skip
                (made / PROBLEMS[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        if not folder.exists():  # another process may have been faster
            made.rename(folder)


def main() -> None:
    """Make one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["addition", "narrow"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    build(options.kind, options.seed, options.output)


if __name__ == "__main__":
    main()
