"""The job script for SLURM, with another ``srun``: it was never run on a cluster."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "slurm.sbatch"


@pytest.fixture
def submit(tmp_path):
    """``submit("intuitor configs/my.yaml", *settings)``: the words that the script gives to srun."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    slurm = {"SLURM_CPUS_PER_TASK": "4", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}

    def run(recipe, *settings):
        environment = {**os.environ, **slurm, "RECIPE": recipe, "PATH": f"{srun.parent}:{os.environ['PATH']}"}
        words = ["bash", SCRIPT, *settings]
        done = subprocess.run(words, cwd=tmp_path, env=environment, text=True, capture_output=True, check=True)
        return done.stdout.split()

    return run


@pytest.mark.parametrize("recipes", [["intuitor"], ["intuitor", "intuitor_7b"], ["intuitor", "configs/my.own.yaml"]])
def test_a_job_goes_on_where_its_recipes_stopped(submit, recipes):
    recipe = " ".join(recipes)
    words = submit(recipe, "--seed", "3")
    assert words[1:3] == ["rlif", "fit"] and words[-2:] == ["--seed", "3"]
    assert [words[i + 1] for i, word in enumerate(words) if word == "--config"] == recipes
    assert words[words.index("--trainer.num_nodes") + 1] == "2" and words[words.index("--trainer.devices") + 1] == "8"
    assert words[words.index("--ckpt_path") + 1] == "auto"
