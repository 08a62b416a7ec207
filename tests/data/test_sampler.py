"""The order of the data: permutations by seed, stages by step, resumed where it was."""

from __future__ import annotations

import json

import pytest

from megatron_ext.config.errors import ConfigError
from megatron_ext.data.sampler import DataOrder


def one_stage(num_problems: int, seed: int) -> DataOrder:
    return DataOrder([range(num_problems)], seed=seed)


def steps(order: DataOrder, count: int, num: int, first: int = 0) -> list[list[int]]:
    return [order.take(count, step=step) for step in range(first, first + num)]


@pytest.mark.parametrize(("num_problems", "count"), [(10, 2), (10, 3), (7, 7), (5, 12), (1, 3)])
def test_every_epoch_is_a_permutation(num_problems: int, count: int) -> None:
    order = one_stage(num_problems, seed=3)
    taken = steps(order, count, 4 * num_problems)
    assert {len(step) for step in taken} == {count}
    stream = [index for step in taken for index in step]
    epochs = [stream[start : start + num_problems] for start in range(0, len(stream), num_problems)]
    assert all(sorted(epoch) == list(range(num_problems)) for epoch in epochs)
    assert order.epoch == 4 * count
    if num_problems >= 7:
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_how_much_is_taken_at_once_does_not_change_the_order() -> None:
    whole, parts = one_stage(20, seed=5), one_stage(20, seed=5)
    assert whole.take(24, step=0) == [i for count in (7, 1, 0, 16) for i in parts.take(count, step=0)]


def test_order_depends_on_the_seed_alone() -> None:
    assert steps(one_stage(100, 1), 30, 10) == steps(one_stage(100, 1), 30, 10) != steps(one_stage(100, 2), 30, 10)


@pytest.mark.parametrize("done", [0, 1, 3, 10, 11])
@pytest.mark.parametrize("stages", [[range(20)], [range(0, 20, 2), range(1, 20, 2)]])
def test_order_resumes_where_it_was(done: int, stages: list) -> None:
    starts = [0, 5][: len(stages)]
    order = DataOrder(stages, seed=5, starts=starts)
    steps(order, 6, done)
    state = json.loads(json.dumps(order.state_dict()))
    resumed = DataOrder(stages, seed=5, starts=starts)
    resumed.load_state_dict(state)
    assert steps(resumed, 6, 20, first=done) == steps(order, 6, 20, first=done)


def test_stages_are_taken_one_after_the_other() -> None:
    easy, hard = [4, 2, 9], [1, 7, 3, 5]
    order = DataOrder([easy, hard], seed=0, starts=[0, 3])
    taken = steps(order, 2, 7)
    assert all(set(step) <= set(easy) for step in taken[:3])
    assert sorted(taken[0] + taken[1][:1]) == sorted(easy)  # an epoch of the stage
    assert sorted(taken[3] + taken[4]) == sorted(taken[5] + taken[6]) == sorted(hard)
    assert order.stage == 1


def test_a_checkpoint_keeps_its_stage_boundaries() -> None:
    """train.steps may change on a resume, and with it where the stages of a new run would begin."""
    order = DataOrder([[0, 1], [2, 3]], seed=0, starts=[0, 3])
    steps(order, 2, 2)
    longer = DataOrder([[0, 1], [2, 3]], seed=0, starts=[0, 50])
    longer.load_state_dict(order.state_dict())
    assert [sorted(step) for step in steps(longer, 2, 2, first=2)] == [[0, 1], [2, 3]]


def test_order_refuses_another_run() -> None:
    state = one_stage(20, seed=5).state_dict()
    with pytest.raises(ConfigError, match="data.train is 21, the checkpoint's is 20"):
        one_stage(21, seed=5).load_state_dict(state)
    with pytest.raises(ConfigError, match="train.seed is 6, the checkpoint's is 5"):
        one_stage(20, seed=6).load_state_dict(state)
    with pytest.raises(ConfigError, match="order of the problems by data.curriculum is"):
        DataOrder([range(10), range(10, 20)], seed=5, starts=[0, 1]).load_state_dict(state)
    with pytest.raises(
        ConfigError,
        match="content of data.train .prompts in the model's tokens, .* in their order. is b, the check",
    ):
        DataOrder([range(20)], seed=5, problems="b").load_state_dict(state | {"content": "a"})
    older = {key: value for key, value in state.items() if key != "content"}
    DataOrder([range(20)], seed=5, problems="b").load_state_dict(older)
    for stages, starts in (([[]], [0]), ([], []), ([[1]], [0, 1]), ([[1]], [1])):
        with pytest.raises(ValueError, match="stages of at least one problem"):
            DataOrder(stages, seed=5, starts=starts)
