"""Which problems each step takes: seeded permutations, epoch after epoch, stage after stage of a curriculum."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any

from megatron_ext.config.errors import ConfigError


class DataOrder:
    """Every epoch is a permutation of the present stage's problems, seeded by the seed and the epoch's number.

    ``stages`` are lists of problem numbers, ``starts`` the first step of each (steps count from 0); without a
    curriculum there is one stage with all problems. A request that reaches the end of an epoch goes on with the
    next one, so every problem comes once per epoch and none is dropped; only such a request, or one for more
    problems than the stage has, can hold a problem twice. A stage that ends drops the rest of its epoch. ``problems``
    identifies what the numbers stand for.
    """

    def __init__(
        self, stages: Sequence[Sequence[int]], *, seed: int, starts: Sequence[int] = (0,), problems: str = ""
    ) -> None:
        if not stages or not all(stages) or len(stages) != len(starts) or starts[0] != 0:
            raise ValueError(
                f"DataOrder: expected stages of at least one problem and as many starts, the first 0; found "
                f"{[len(stage) for stage in stages]} problems starting at {list(starts)}"
            )
        self.stages, self.starts, self.seed = [list(stage) for stage in stages], list(starts), seed
        self.problems = problems
        self._enter(stage=0, epoch=0, position=0)

    @property
    def epoch(self) -> int:
        """The epoch of the next problem, counted from 0 over all stages."""
        return self._epoch

    @property
    def stage(self) -> int:
        return self._stage

    def begins_stage(self, step: int) -> bool:
        """Whether the problems of step ``step`` are the first of a later stage than those taken so far."""
        return self._stage + 1 < len(self.starts) and step >= self.starts[self._stage + 1]

    def take(self, count: int, *, step: int) -> list[int]:
        """The next ``count`` problems, for step ``step``."""
        while self.begins_stage(step):
            self._enter(self._stage + 1, self._epoch + 1, 0)
        taken: list[int] = []
        while len(taken) < count:
            end = self._position + count - len(taken)
            taken += self._order[self._position : end]
            if end < len(self._order):
                self._position = end
            else:
                self._enter(self._stage, self._epoch + 1, 0)
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {
            "stage": self._stage,
            "epoch": self._epoch,
            "position": self._position,
            "starts": list(self.starts),
            "stages": hashlib.sha256(json.dumps(self.stages).encode()).hexdigest(),
            "num_problems": sum(map(len, self.stages)),
            "content": self.problems,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken, with its stages' starts.

        Raises ``ConfigError`` if it belongs to other data, another curriculum or another seed.
        """
        names = {
            "num_problems": "number of usable problems in data.train",
            "stages": "order of the problems by data.curriculum",
            "content": "content of data.train (prompts in the model's tokens, answers, verifiers, in their order)",
            "seed": "train.seed",
        }
        own = self.state_dict()
        for key, name in names.items():
            if state.get(key, own[key]) != own[key]:  # an older checkpoint does not know the problems
                raise ConfigError(
                    f"resume: the {name} is {own[key]}, the checkpoint's is {state[key]}: the order of the data would "
                    "not continue. Resume with the checkpoint's data, curriculum and seed, or start a new run"
                )
        self.starts = list(state["starts"])
        self._enter(state["stage"], state["epoch"], state["position"])

    def _enter(self, stage: int, epoch: int, position: int) -> None:
        self._stage, self._epoch, self._position = stage, epoch, position
        self._order = list(self.stages[stage])
        random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
