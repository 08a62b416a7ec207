"""How runs follow their targets, and the sharpening tax, by hand and by exact arithmetic."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import comb

import pytest

from megatron_ext.methods.base import Controller
from tests.tools.lab.test_claims import result, seed
from tools.lab.following import overshoot, settling_step, tracking_error
from tools.lab.league import following, scalability, sharpening_tax

# --- targets ---


def test_following_a_fixed_target_by_hand() -> None:
    measured, target = [0.5, 0.4, 0.3, 0.2, 0.22, 0.27, 0.26, 0.24, 0.25], [0.25] * 9
    assert tracking_error(measured, target) == pytest.approx((0.01 + 0.01 + 0) / 3 / 0.25)  # the last three
    assert overshoot(measured, target) == pytest.approx(0.05 / 0.25)  # .2, below: it came from above
    assert settling_step(measured, target) == 6
    assert settling_step([*measured[:8], 0.3], target) is None  # the last step is outside
    assert settling_step([*[0.5] * 6, 0.25, 0.25, 0.25], target) == 7  # the whole last third
    assert settling_step([*[0.5] * 7, 0.25, 0.25], target) is None  # crossed at the end
    assert overshoot([0.1, 0.2, 0.26, 0.24, 0.3], [0.25] * 5) == pytest.approx(0.2)  # from below
    assert overshoot([0.5, 0.4, 0.3], [0.25] * 3) is None  # never reached
    assert overshoot([0.25, 0.4, 0.1], [0.25] * 3) is None  # from neither side
    assert overshoot([0.27, 0.4, 0.1], [0.25] * 3) is None  # 8 % off: chance decided the side
    assert overshoot([0.3, 0.25, 0.26], [0.25] * 3) == 0.0
    assert tracking_error([None] * 3, [0.25] * 3) is None and settling_step([None, None], [0.25] * 2) is None
    assert settling_step([0.1, None, 0.25], [0.25] * 3) == 3
    assert settling_step([0.1, 0.25, None, 0.25, None, 0.25], [0.25] * 6) == 2


def test_a_moving_target_is_read_step_by_step() -> None:
    target = [0.5, 0.45, 0.4, 0.35, 0.3, 0.25]
    measured = [0.6, 0.5, 0.37, 0.35, 0.312, 0.25]
    assert overshoot(measured, target) == pytest.approx(0.075)  # .37 where .4 was asked; beside .25 there is none
    assert tracking_error(measured, target) == pytest.approx((0.04 + 0) / 2)
    assert settling_step(measured, target) == 3  # .5 is 11 % above .45
    moving = Controller(measured="h", target="goal")
    run = result("x", seed(0, h=measured, goal=target), seed(1, h=target, goal=target), controller=moving)
    assert run.target_curves == [target, target]
    grpo = result("grpo", seed(0, entropy__full=[0.6] * 4 + [0.36, 0.25]), seed(2, entropy__full=[0.6] * 6))
    assert following(run, grpo)[1] == "-"  # it measures another entropy
    both = (seed(i, h=own, goal=target, entropy__full=own) for i, own in enumerate((measured, target)))
    run = result("x", *both, controller=moving)
    error, without, beyond, settles = following(run, grpo)
    assert (error, beyond, settles) == ("1.0 ± 1.4", "7.5 (1 of 2 seeds)", "2 ± 1")
    assert without == "10.0"  # .36 where .3 was asked, and .25: of the seed that both have
    fixed = result("y", seed(0, h=[0.5, 0.2]), controller=Controller(measured="h", target=0.25))
    assert fixed.target_curves == [[0.25, 0.25]] and following(fixed, None)[1] == "-" == following(run, run)[1]
    assert following(result("z", seed(0, h=[1.0])), grpo) == ["-"] * 4


def test_overshoot_and_settling_are_of_means_over_a_twelfth_of_the_run() -> None:
    """A step's noise of a fifth around the target settles nothing step by step, and is nothing over five steps."""
    target = [0.25] * 60
    noise = [0.05 * (-1) ** i for i in range(60)]
    measured = [0.5 - 0.25 * min(1, i / 20) + noise[i] for i in range(60)]
    assert settling_step(measured, target) == 21  # windows begin at 1, 6, 11, 16 (means .275 and more), 21
    excess = overshoot(measured, target)
    assert excess is not None and excess == pytest.approx(0.01 / 0.25)  # of five alternating steps one is left over
    assert tracking_error(measured, target) == pytest.approx(0.2)
    assert settling_step([*measured[:55], *[0.3] * 5], target) is None
    small = [value for value in measured for _ in range(4)]  # four times the steps: the same windows
    assert settling_step(small, [0.25] * 240) == 81 and overshoot(small, [0.25] * 240) == pytest.approx(excess)


# --- the sharpening tax ---


def test_scalability_is_the_paper_s_by_exact_arithmetic() -> None:
    counts, n = [0, 1, 3, 16], 16

    def passed(k: int) -> Fraction:
        return sum((1 - Fraction(comb(n - c, k), comb(n, k)) for c in counts), Fraction()) / len(counts)

    area = sum((passed(n) - passed(k) for k in range(1, n)), Fraction())
    own = seed(0, counts, n)
    assert scalability(own) == pytest.approx(float(area / ((n - 1) * (1 - passed(1)))), abs=1e-12)
    assert scalability(seed(0, [16, 16], 16)) is None  # nothing is left to solve
    sharp = seed(1, [0, 0, 16, 16], 16)  # always or never: further tries are worth nothing
    assert scalability(sharp) == 0.0
    assert sharpening_tax(result("x", sharp), own) == pytest.approx([scalability(own)])
    silent = seed(2, [0, 0, 0, 0], 16)  # its tax would be the untrained model's whole S(K)
    assert sharpening_tax(result("x", sharp, silent), own) == pytest.approx([scalability(own)])
    other = result("x", sharp)
    other = replace(other, run=replace(other.run, set=('model.path="recipes/tiny/moe"',)))
    assert sharpening_tax(other, own) == [] == sharpening_tax(result("x", sharp), None)
