"""The arithmetic of a rollout, and how its rows are dealt into windows and slices."""

import pytest
import torch

from rlif_lightning.data.batch_plan import BatchPlan
from rlif_lightning.errors import UserError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("sizes", "slices", "steps", "batches", "rows"),
    [
        ({"prompts_per_step": 4, "group_size": 8}, 1, 1, 1, 32),
        ({"prompts_per_step": 4, "group_size": 8, "micro_batch_size": 32}, 1, 1, 1, 32),
        ({"prompts_per_step": 4, "group_size": 8, "micro_batch_size": 1}, 32, 1, 32, 32),
        ({"prompts_per_step": 4, "group_size": 8, "micro_batch_size": 4, "world_size": 2}, 4, 1, 4, 16),
        (
            {
                "prompts_per_step": 4, "group_size": 8, "micro_batch_size": 4,
                "world_size": 2, "passes": 3, "steps_per_rollout": 2,
            },
            4, 6, 24, 16,
        ),
    ],
)  # fmt: skip
def test_sizes_follow_from_the_settings(sizes, slices, steps, batches, rows):
    plan = BatchPlan(**sizes)
    assert (plan.slices, plan.rollout_steps, plan.rollout_batches, plan.window_rows) == (slices, steps, batches, rows)
    assert plan.rollout_prompts == sizes["prompts_per_step"] * sizes.get("steps_per_rollout", 1)
    assert plan.rank_prompts * plan.world_size == plan.rollout_prompts
    assert plan.on_policy == (steps == 1)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"group_size": 1}, ["group_size is too small", "got: 1", "--rollout.group_size 8"]),
        ({"prompts_per_step": 0}, ["prompts_per_step is out of range", "got: 0"]),
        ({"passes": 0}, ["passes is out of range"]),
        ({"steps_per_rollout": -1}, ["steps_per_rollout is out of range"]),
        ({"prompts_per_step": 3, "world_size": 2}, ["3 prompts, 2 processes", "a multiple of 2"]),
        ({"micro_batch_size": 5}, ["16 completions per step", "(4 prompts x 4 / 1)", "one of 1, 2, 4, 8, 16"]),
        ({"micro_batch_size": 32}, ["micro_batch_size 32", "one of 1, 2, 4, 8, 16"]),
        ({"micro_batch_size": 16, "world_size": 2}, ["8 completions per step", "one of 1, 2, 4, 8"]),
        ({"micro_batch_size": 0}, ["micro_batch_size 0"]),
        ({"micro_batch_size": -4}, ["micro_batch_size -4"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(UserError) as error:
        BatchPlan(**{"prompts_per_step": 4, "group_size": 4, **sizes})
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("micro", [None, 6, 4, 1])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("passes", [1, 2])
def test_each_pass_holds_every_row_once_in_windows_of_whole_groups(passes, steps, micro):
    plan = BatchPlan(4, 3, micro, passes=passes, steps_per_rollout=steps)
    rows = plan.rollout_prompts * 3
    lengths = torch.randint(1, 9, (rows,), generator=generator(1))
    windows = plan.cut(lengths, generator())
    assert len(windows) == plan.rollout_steps
    for start in range(0, len(windows), steps):
        one_pass = torch.cat([x for w in windows[start : start + steps] for x in w])
        assert one_pass.sort().values.tolist() == list(range(rows))
    for window in windows:
        assert [len(x) for x in window] == [plan.window_rows // plan.slices] * plan.slices
        flat = torch.cat(window)
        assert (flat // 3).bincount(minlength=1).unique().tolist() in ([3], [0, 3])
        assert (lengths[flat].diff() <= 0).all()  # longest first
        ties = lengths[flat].diff() == 0
        assert (flat.diff()[ties] > 0).all()  # equal lengths keep their order: nothing is left to chance


def test_groups_are_dealt_by_the_generator_alone():
    plan = BatchPlan(4, 2, 4, passes=2, steps_per_rollout=4)
    lengths = torch.randint(1, 9, (32,), generator=generator(1))

    def cut(seed):
        return [x.tolist() for w in plan.cut(lengths, generator(seed)) for x in w]

    state = torch.random.get_rng_state()
    assert cut(0) == cut(0) != cut(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    windows = plan.cut(lengths, generator())
    first, second = ([set(torch.cat(w).tolist()) for w in windows[i : i + 4]] for i in (0, 4))
    assert first != second  # each pass deals anew


def test_lengths_do_not_move_groups_between_windows():
    """A window is a random set of groups: a window of long completions only would bias its step."""
    plan = BatchPlan(2, 2, steps_per_rollout=4)

    def windows(lengths):
        return [sorted(torch.cat(w).tolist()) for w in plan.cut(lengths, generator(3))]

    assert windows(torch.arange(1, 17)) == windows(torch.arange(16, 0, -1))


def test_one_line_says_the_arithmetic():
    plan = BatchPlan(8, 4, 4, passes=2, steps_per_rollout=3, world_size=2)
    assert plan.describe() == (
        "8 prompts x 4 completions = 32 completions per step (2 processes x 4 slices x 4 rows); "
        "6 steps per rollout (2 passes x 3)"
    )
    assert "per rollout" not in BatchPlan(8, 4).describe()
    assert "(1 processes x 1 slices x 32 rows)" in BatchPlan(8, 4).describe()
