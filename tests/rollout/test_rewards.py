"""The pool: bombs cost themselves only, a broken pool repairs itself, a wrong verifier stops the run."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_ext.rollout.rewards import reward_pool, worker_pool
from megatron_ext.rollout.rewards.outcome import Outcome
from megatron_ext.rollout.rewards.reward_pool import (
    Question,
    RewardPool,
    VerifierError,
    outcome_counts,
)
from megatron_ext.rollout.rewards.worker import READY
from megatron_ext.rollout.rewards.worker_pool import Program
from megatron_ext.types import Problem, Reward, Sample


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(2, deadline_s=20) as pool:
        yield pool


def integers(count: int, *, start: int = 0) -> list[tuple[Problem, str]]:
    """Right answers to different problems."""
    return [(Problem(str(n), "", str(n)), rf"It is \boxed{{{n}}}.") for n in range(start, start + count)]


def bombs(*answers: str) -> list[tuple[Problem, str]]:
    return [(Problem("bomb", "", "4"), rf"\boxed{{{answer}}}") for answer in answers]


def all_right(scored: list[Reward]) -> bool:
    return all(reward.value == 1.0 and reward.outcome == Outcome.CORRECT for reward in scored)


def test_rewards_come_in_order_with_their_reason():
    countdown = Problem("c", "", "9", "countdown", (1, 2, 3))
    cases = [
        (Problem("a", "", "7"), r"\boxed{7}", Reward(1.5, "correct", "7")),
        (Problem("a", "", "7"), r"\boxed{8}", Reward(-1.0, "wrong", "8")),
        (Problem("a", "", "7"), "seven", Reward(-1.0, "no_answer", None)),
        (Problem("b", "", "8"), r"\boxed{8}", Reward(1.5, "correct", "8")),
        (Problem("b", "", "8"), r"\boxed{7=8}", Reward(-1.0, "contradiction", "7=8")),
        (countdown, r"\boxed{(1+2)*3}", Reward(1.5, "correct", "(1+2)*3")),
        (countdown, r"\boxed{9}", Reward(-1.0, "wrong_numbers", "9")),
        (Problem("a", "", "7"), r"\boxed{7}", Reward(1.5, "correct", "7")),
        (Problem("a", "", "7"), '\\boxed{\n"\ud800\\frac{14}{2}}', Reward(-1.0, "wrong", '"\ud800\\frac{14}{2}')),
    ]
    with RewardPool(2, deadline_s=20, correct=1.5, wrong=-1.0) as pool:
        scored = pool.score([(problem, response) for problem, response, _ in cases])
    assert scored[:-1] == [expected for *_, expected in cases][:-1]
    assert scored[-1].value == -1.0  # any text at all gets through the pipe
    counts = outcome_counts(scored[:-1])
    assert counts["correct"] == 4 and counts["no_answer"] == 1 and counts["timeout"] == 0
    assert set(counts) == set(Outcome) and sum(counts.values()) == len(cases) - 1


def test_bombs_cost_themselves_and_nothing_else():
    answers = (
        "(2^{31})!",
        r"\sin(7^{e^{e^{e^{10e}}}}+1)",
        r"(1+\sqrt2)^{10^7}",
        "(" * 3000 + "4" + ")" * 3000,
        "(" * 450 + "4" + ")" * 450,
    )
    good = integers(500)
    with RewardPool(2, deadline_s=3, max_timeout_share=0.05) as pool:
        pool.check_canaries()
        started = time.monotonic()
        scored = pool.score(good[:250] + bombs(*answers) + good[250:])
        elapsed = time.monotonic() - started
        assert all_right(pool.score(good[:20]))  # with the replaced workers
    assert all_right(scored[:250] + scored[255:])
    bad = scored[250:255]
    assert [reward.value for reward in bad] == [0.0] * 5
    assert bad[0].outcome == Outcome.TIMEOUT
    assert bad[3].outcome == Outcome.TOO_LONG
    # how far the others get before the deadline depends on the machine, that they are never right does not
    assert {bad[1].outcome, bad[2].outcome, bad[4].outcome} <= {"timeout", "wrong", "unparsable", "crashed"}
    assert elapsed < 4 * 3 + 120  # four deadlines, and room for imports on a busy machine


def record_questions(monkeypatch: pytest.MonkeyPatch, asked: list[Question]) -> None:
    ask = worker_pool.Worker.ask

    def record(worker: worker_pool.Worker, question: Question, deadline_s: float) -> str:
        asked.append(question)
        return ask(worker, question, deadline_s)

    monkeypatch.setattr(worker_pool.Worker, "ask", record)


def test_identical_answers_are_asked_once(monkeypatch: pytest.MonkeyPatch):
    asked: list[Question] = []
    record_questions(monkeypatch, asked)
    with RewardPool(1, deadline_s=20) as pool:
        assert all_right(pool.score(integers(3) * 8))
    assert len(asked) == 3 + len(reward_pool.CANARIES)


def samples(answers: list[tuple[Problem, str]]) -> list[tuple[Problem, Sample]]:
    return [(problem, Sample((1,), (2,), (0.0,), text, False, 0)) for problem, text in answers]


def test_answers_are_scored_as_they_come_in_any_order_and_equal_ones_once_a_step(monkeypatch: pytest.MonkeyPatch):
    """Two rounds of a step. Of the first some answers come early, in a scrambled order; of the second none does."""
    asked: list[Question] = []
    record_questions(monkeypatch, asked)
    wrong = [(problem, r"\boxed{3.5}") for problem, _ in integers(4)]
    first = samples(integers(8) * 3 + wrong * 2 + [(integers(1)[0][0], "no answer")])
    second = samples(integers(12))
    with RewardPool(2, deadline_s=20) as pool:
        expected = [pool.score_samples(first), pool.score_samples(second)]
        for seed in range(3):
            early = random.Random(seed).sample(first, 20)
            replies: dict[Question, str] = {}
            asked.clear()
            with pool.scoring(len(first), replies) as scoring:
                for start in range(0, 20, 3):
                    scoring.submit(early[start : start + 3])
                assert scoring.score_samples(first) == expected[0]
            with pool.scoring(len(second), replies) as scoring:
                assert scoring.score_samples(second) == expected[1]
            questions = {question for each in first + second if (question := pool.question(*each)) is not None}
            known = {question for question, _ in reward_pool.CANARIES}
            assert Counter(question for question in asked if question not in known) == Counter(questions)


def test_an_answer_is_scored_while_others_are_awaited(pool: RewardPool):
    """Before the batch's last answer is known, and with nobody waiting for it."""
    replies: dict[Question, str] = {}
    answers = samples(integers(2))
    with pool.scoring(2, replies) as scoring:
        scoring.submit(answers[:1])
        end = time.monotonic() + 120
        while not replies and time.monotonic() < end:
            time.sleep(0.01)
        assert list(replies.values()) == [Outcome.CORRECT]
        assert all_right(scoring.score_samples(answers))


def test_no_worker_loads_gmpy2(pool: RewardPool):
    """It is installed, and SymPy and mpmath take it where they may: one call of it cannot be interrupted."""
    assert find_spec("gmpy2") is not None, "install the development tools: pip install -e '.[dev]'"
    assert all_right(pool.score([(Problem("a", "", r"\sqrt{8}"), r"\boxed{2\sqrt{2}}")]))
    loaded = [Path(f"/proc/{worker._process.pid}/maps").read_text() for worker in pool._workers]
    assert all("math" in maps and "gmpy2" not in maps for maps in loaded)


def test_two_threads_get_their_own_answers(pool: RewardPool):
    results: dict[int, list[Reward]] = {}
    right, wrong = integers(200, start=500), [(problem, r"\boxed{3}") for problem, _ in integers(200, start=500)]

    def score(number: int) -> None:
        results[number] = pool.score(wrong if number else right)

    threads = [threading.Thread(target=score, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all_right(results[0]) and {reward.outcome for reward in results[1]} == {"wrong"}


def test_from_threads_and_asyncio(pool: RewardPool):
    """math-verify's own timeouts would raise here: signals belong to the main thread."""
    results: dict[int, list[Reward]] = {}

    def score(start: int) -> None:
        results[start] = pool.score(integers(30, start=start))

    threads = [threading.Thread(target=score, args=(start,)) for start in (100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[reward.extracted for reward in results[start]] for start in (100, 200)] == [
        [str(n) for n in range(start, start + 30)] for start in (100, 200)
    ]
    assert all_right(results[100] + results[200])

    async def gather() -> list[list[Reward]]:
        inside = pool.score(integers(5))  # called straight from the event loop's thread
        beside = await asyncio.gather(*(asyncio.to_thread(pool.score, integers(30, start=n)) for n in (300, 400)))
        return [inside, *beside]

    assert all(all_right(scored) for scored in asyncio.run(gather()))


def test_a_pool_whose_workers_were_killed_scores_right(pool: RewardPool):
    for worker in pool._workers:
        os.kill(worker._process.pid, signal.SIGKILL)
    assert all_right(pool.score(integers(100)))


def test_a_worker_killed_in_the_middle_of_an_answer_costs_no_answer():
    with RewardPool(1, deadline_s=60) as pool:
        pool.check_canaries()
        victim = pool._workers[0]._process.pid
        os.kill(victim, signal.SIGSTOP)  # whatever it is asked now, it does not finish
        killer = threading.Timer(0.5, os.kill, (victim, signal.SIGKILL))
        killer.start()
        assert all_right(pool.score(integers(10)))
        killer.join()


@pytest.mark.parametrize("notice", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_notice_to_the_whole_job_leaves_the_workers_at_work(pool: RewardPool, notice: signal.Signals):
    pool.check_canaries()
    before = [worker._process.pid for worker in pool._workers]
    for pid in before:
        os.kill(pid, notice)
    assert all_right(pool.score(integers(20)))
    assert [worker._process.pid for worker in pool._workers] == before


def test_workers_that_cannot_start_stop_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    script = tmp_path / "broken.py"
    script.write_text("raise ImportError\n")
    run_instead(monkeypatch, script)
    with RewardPool(2) as pool, pytest.raises(VerifierError, match="did not start, twice"):
        pool.score(integers(3))


def run_instead(monkeypatch: pytest.MonkeyPatch, script: Path) -> None:
    """The workers of new pools run ``script``."""
    monkeypatch.setattr(Program, "of_module", lambda _: Program((sys.executable, str(script)), {}))


FAKE = """import json, os, sys
print({ready!r}, flush=True)
for line in sys.stdin:
    {body}
"""


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("print('wrong', flush=True)", "found wrong, expected correct"),  # what a stdlib pool does once it is broken
        ("print('correct', flush=True)", "found correct, expected wrong"),
        ("os._exit(1)", "found crashed, expected correct"),
    ],
)
def test_a_verifier_gone_wrong_stops_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, found: str):
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(ready=READY, body=body))
    run_instead(monkeypatch, script)
    with RewardPool(2, deadline_s=20) as pool, pytest.raises(VerifierError, match=found):
        pool.score(integers(3))


def test_a_process_scores_known_answers_when_it_is_new_and_when_they_are_due(monkeypatch: pytest.MonkeyPatch):
    asked: list[Question] = []
    record_questions(monkeypatch, asked)
    known = {question for question, _ in reward_pool.CANARIES}

    def score() -> int:
        """How many known answers a batch costs."""
        asked.clear()
        assert all_right(pool.score(integers(3, start=500)))
        return len(known & set(asked))

    with RewardPool(1, deadline_s=20) as pool:
        assert [score(), score()] == [len(known), 0]
        monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + worker_pool.CHECK_EVERY_S)
        assert [score(), score()] == [len(known), 0]
        pool._workers[0]._replace()
        assert [score(), score()] == [len(known), 0]


def test_one_worker_gone_wrong_ends_the_batch_of_the_others(monkeypatch: pytest.MonkeyPatch):
    with RewardPool(2, deadline_s=20) as pool:
        bad, asked = pool._workers[1], []
        ask = worker_pool.Worker.ask

        def record(worker: worker_pool.Worker, question: Question, deadline_s: float) -> str:
            asked.append(question)
            return Outcome.TIMEOUT if worker is bad else ask(worker, question, deadline_s)

        monkeypatch.setattr(worker_pool.Worker, "ask", record)
        with pytest.raises(VerifierError, match="found timeout"):
            pool.score(integers(500))
    assert len(asked) < 100


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A verifier that finds every answer right, but never returns from 13 and dies of 17."""
    script = tmp_path / "fake.py"
    body = "a = json.loads(line)[0]; a == '13' and __import__('time').sleep(60); a == '17' and os._exit(1); "
    script.write_text(FAKE.format(ready=READY, body=body + "print('correct', flush=True)"))
    run_instead(monkeypatch, script)
    monkeypatch.setattr(reward_pool, "CANARIES", reward_pool.CANARIES[:1])


@pytest.mark.usefixtures("trusted")
def test_the_answer_that_kills_its_worker_twice_is_the_one_to_blame():
    with RewardPool(2, deadline_s=20) as pool:
        scored = pool.score(integers(10, start=14))
    assert [reward.outcome for reward in scored] == ["correct"] * 3 + ["crashed"] + ["correct"] * 6
    assert scored[3].value == 0.0


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("deadly", [13, 17])
def test_breaker(deadly: int):
    """The share counts answers, copies included, and only batches of at least 20."""
    with RewardPool(2, deadline_s=2, max_timeout_share=0.1) as pool:
        few = integers(17, start=18) + integers(1, start=deadly) * 2
        assert [reward.value for reward in pool.score(few)] == [1.0] * 17 + [0.0] * 2
        at_the_limit = integers(18, start=18) + integers(1, start=deadly) * 2
        assert [reward.value for reward in pool.score(at_the_limit)] == [1.0] * 18 + [0.0] * 2
        above = integers(17, start=18) + integers(1, start=deadly) * 3
        with pytest.raises(VerifierError, match=r"at least 3 of 20 answers got no verdict.*max_timeout_share = 0.1"):
            pool.score(above)
        assert all_right(pool.score(integers(5, start=18)))  # the pool itself is not harmed


@pytest.mark.usefixtures("trusted")
def test_breaker_counts_the_whole_batch_whatever_comes_first():
    """The two answers without a verdict are the first to come: a tenth of the batch, not all of what is there."""
    batch = samples(integers(18, start=18) + integers(1, start=17) * 2)
    with RewardPool(2, deadline_s=2, max_timeout_share=0.1) as pool:
        with pool.scoring(20) as scoring:
            scoring.submit(batch[18:])
            scoring.submit(batch[:5])
            assert [reward.value for reward in scoring.score_samples(batch)] == [1.0] * 18 + [0.0] * 2
        with pytest.raises(VerifierError, match="at least 3 of 20"), pool.scoring(20) as scoring:
            scoring.submit(batch[17:])
            scoring.score_samples(batch[1:] + batch[-1:])
        assert all_right(pool.score(integers(5, start=18)))


@pytest.mark.usefixtures("trusted")
def test_breaker_does_not_wait_for_the_rest(monkeypatch: pytest.MonkeyPatch):
    asked: list[Question] = []
    record_questions(monkeypatch, asked)
    different = [(Problem(str(n), "", str(n)), r"\boxed{13}") for n in range(40)]
    with RewardPool(2, deadline_s=2, max_timeout_share=0.1) as pool, pytest.raises(VerifierError):
        pool.score(different)
    assert len([question for question in asked if question.extracted == "13"]) <= 6  # 5 are a share above 0.1


def test_workers_do_not_see_the_secrets_of_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    with RewardPool(1) as fresh:
        assert fresh.score(integers(1))[0].value == 1.0
        environment = Path(f"/proc/{fresh._workers[0]._process.pid}/environ").read_bytes()
    assert b"SYMPY_GROUND_TYPES" in environment and b"a-secret" not in environment


def test_a_closed_pool_leaves_no_process_and_says_so():
    with RewardPool(2) as pool:
        processes = [worker._process for worker in pool._workers]
        assert all(process.poll() is None for process in processes)
    assert all(process.returncode is not None for process in processes)
    with pytest.raises(ValueError, match="the pool is closed"):
        pool.score(integers(1))


def test_a_pool_that_closes_does_not_wait_for_a_batch_of_another_thread():
    """One that generates for long beside a step that has failed, and a worker inside a bomb."""
    begun, generated, found = threading.Event(), threading.Event(), []

    def score() -> None:
        try:
            with pool.scoring(2, {}) as scoring:
                scoring.submit(samples(bombs("(2^{31})!")))
                begun.set()
                generated.wait(120)
                scoring.score_samples(samples(integers(2)))
        except ValueError as error:
            found.append(str(error))

    thread = threading.Thread(target=score, daemon=True)
    with RewardPool(2, deadline_s=120) as pool:
        processes = [worker._process for worker in pool._workers]
        thread.start()
        assert begun.wait(60)
        start = time.monotonic()
    assert time.monotonic() - start < 30
    assert [process.wait(30) for process in processes] == [-signal.SIGKILL] * 2
    generated.set()
    thread.join(60)
    assert found == [worker_pool.CLOSED] and not pool._workers
    with pytest.raises(ValueError, match="the pool is closed"):
        pool.score(integers(1))


def test_an_orphan_ends_itself():
    """The trainer may be killed while a worker is inside a bomb: the worker must not run for ever."""
    worker = worker_pool.Worker(Program.of_module(reward_pool.WORKER), orphan_s=1)
    try:
        worker._wait_until_ready()
        worker._stdin.write(b'["(2^{31})!", "4", "math", []]\n')
        assert worker._process.wait(60) == -signal.SIGALRM
    finally:
        worker.stop()
