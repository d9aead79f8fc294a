"""The order of prompts: a function of seed and epoch, one order for any number of processes."""

import pytest

from rlif_lightning.data.batch_plan import BatchPlan
from rlif_lightning.data.loaders import EvaluationLoader, PromptLoader
from rlif_lightning.errors import UserError

COUNT = 23


def loader(seed=0, rank=0, count=COUNT, **changes):
    sizes = {"prompts_per_step": 4, "group_size": 2, "micro_batch_size": 2, "steps_per_rollout": 2, "passes": 3}
    return PromptLoader(count, BatchPlan(**{**sizes, **changes}), rank, seed)


def epochs(source, count):
    return [list(source) for _ in range(count)]


def places(batches):
    """Prompts of each rollout in order."""
    return [tuple(zip(b["rows"], b["positions"], strict=True)) for b in batches if b["slice"] == 0]


def test_every_rollout_is_yielded_once_per_slice_window_and_pass():
    source = loader()
    batches = list(source)
    assert len(source) == len(batches) == 2 * 4 * 2 * 3  # rollouts x slices x windows x passes
    assert [b["slice"] for b in batches] == [*range(24), *range(24)]
    assert all(b["rows"] == batches[0]["rows"] for b in batches[:24])
    assert len(batches[0]["rows"]) == 8


def test_an_epoch_holds_no_prompt_twice_and_drops_what_does_not_fill_a_rollout():
    for epoch in epochs(loader(), 3):
        prompts = [p for rollout in places(epoch) for p, _ in rollout]
        assert len(prompts) == len(set(prompts)) == 16


def test_the_order_depends_on_seed_and_epoch_only():
    one, same, other = (epochs(loader(seed), 3) for seed in (5, 5, 6))
    assert one == same
    assert places(one[0]) != places(other[0])
    orders = [[p for rollout in places(epoch) for p, _ in rollout] for epoch in one]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert [{e for rollout in places(epoch) for _, (e, _) in rollout} for epoch in one] == [{0}, {1}, {2}]
    # Slices and passes cut rollouts, they do not reorder prompts.
    assert places(epochs(loader(5, micro_batch_size=None, passes=1), 1)[0]) == places(one[0])


@pytest.mark.parametrize("world", [2, 4])
def test_processes_take_disjoint_parts_of_the_order_of_one(world):
    alone = epochs(loader(), 2)
    parts = [epochs(loader(rank=rank, world_size=world), 2) for rank in range(world)]
    for epoch in range(2):
        together = [sum(rollouts, ()) for rollouts in zip(*(places(p[epoch]) for p in parts), strict=True)]
        assert together == places(alone[epoch])


@pytest.mark.parametrize("taken", [0, 1, 24, 31, 47, 48, 49, 96])
def test_a_loader_goes_on_where_another_stopped(taken):
    """In the middle and at the edge of an epoch; the edge belongs to the next one."""
    whole = [b for epoch in epochs(loader(), 3) for b in epoch]
    first = loader()
    seen = []
    while len(seen) < taken:
        for batch in first:
            seen.append(batch)
            if len(seen) == taken:
                break
    state = first.state_dict()
    again = loader()
    again.load_state_dict(state)
    rest = [b for epoch in epochs(again, 3) for b in epoch]
    assert seen + rest[: len(whole) - taken] == whole


def test_a_place_is_found_again_with_other_slices_and_processes():
    before = loader()
    batches = iter(before)
    for _ in range(24):
        next(batches)
    after = loader(micro_batch_size=None, passes=1, world_size=2)
    after.load_state_dict(before.state_dict())
    (rollout,) = places(list(after))
    assert rollout == places(epochs(loader(), 1)[0])[1][:4]


@pytest.mark.parametrize("changed", [{"count": COUNT - 1}, {"prompts_per_step": 2}, {"steps_per_rollout": 1}])
def test_the_place_in_other_data_is_refused(changed):
    with pytest.raises(UserError, match="place in the training data"):
        loader(**changed).load_state_dict(loader().state_dict())


def test_too_few_prompts():
    with pytest.raises(UserError, match="smaller than one rollout") as error:
        loader(count=7)
    assert "7 prompts" in str(error.value) and "at least 8" in str(error.value)
    assert len(loader(count=8)) == 24


@pytest.mark.parametrize("count", [1, 7, 8, 9, 12])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_process_gets_a_batch_and_no_problem_comes_twice(count, world):
    """Where weights are sharded, a process without problems must still take part."""
    batches = [list(EvaluationLoader(count, rank, world)) for rank in range(world)]
    assert {len(own) for own in batches} == {1}
    assert sorted(row for (rows,) in batches for row in rows) == list(range(count))
