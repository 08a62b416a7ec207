"""splitmix64 against its published outputs."""

from __future__ import annotations

import torch

from megatron_ext.hashing import GAMMA, mix

FROM_SEED_0 = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)  # what java.util.SplittableRandom(0) draws


def test_the_first_outputs_from_seed_0_are_the_published_ones() -> None:
    counter = torch.arange(1, 4) * GAMMA
    assert tuple(value % 2**64 for value in mix(counter).tolist()) == FROM_SEED_0
