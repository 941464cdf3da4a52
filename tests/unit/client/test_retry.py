"""Decisions about retries, without calls and without sleeping."""

import pytest

from loramux import InvalidRequest, RetryPolicy
from loramux._retry import Attempts, RetryBudget
from loramux._status import Failure, error_from_status
from loramux.testing import FakeError


def failed(
    code: str,
    reason: str = "",
    *,
    retry_after: float | None = None,
    pushback: float | None = None,
    headers_seen: bool = False,
) -> Failure:
    error = error_from_status(FakeError(code, reason, retry_after=retry_after).status())
    return Failure(error=error, pushback=pushback, headers_seen=headers_seen)


def attempts(
    *,
    deadline: float | None = None,
    random: float = 0.0,
    policy: RetryPolicy | None = None,
    budget: RetryBudget | None = None,
) -> Attempts:
    return Attempts(
        policy or RetryPolicy(), budget or RetryBudget(), deadline=deadline, now=lambda: 100.0, random=lambda: random
    )


class TestWhich:
    @pytest.mark.parametrize(
        "failure",
        [
            failed("UNAVAILABLE"),
            failed("UNAVAILABLE", "ADAPTER_LOADING", retry_after=0.5),
            failed("UNAVAILABLE", "DRAINING"),
            failed("UNAVAILABLE", "A_REASON_OF_TOMORROW"),
            failed("RESOURCE_EXHAUSTED", "QUEUE_FULL", retry_after=0.5),
            failed("RESOURCE_EXHAUSTED", "TENANT_QUOTA", retry_after=0.5),
            failed("RESOURCE_EXHAUSTED", "TENANT_QUOTA", pushback=0.5),
        ],
    )
    def test_again(self, failure: Failure) -> None:
        assert attempts(deadline=110.0).wait_for(failure) is not None

    @pytest.mark.parametrize(
        "failure",
        [
            failed("UNAVAILABLE", headers_seen=True),
            failed("UNAVAILABLE", pushback=-1.0),
            failed("RESOURCE_EXHAUSTED"),
            failed("RESOURCE_EXHAUSTED", "QUEUE_FULL"),
            failed("RESOURCE_EXHAUSTED", "TENANT_QUOTA"),
            failed("RESOURCE_EXHAUSTED", "TENANT_QUOTA", retry_after=11.0),
            failed("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", retry_after=0.5),
            failed("RESOURCE_EXHAUSTED", "SLOW_READER", retry_after=0.5),
            failed("INTERNAL", "INTERNAL"),
            failed("UNKNOWN"),
            failed("DEADLINE_EXCEEDED"),
            failed("ABORTED", "VERSION_CONFLICT"),
            failed("INVALID_ARGUMENT", "INVALID_PARAMETER"),
            failed("CANCELLED"),
        ],
    )
    def test_not_again(self, failure: Failure) -> None:
        assert attempts(deadline=110.0).wait_for(failure) is None

    def test_a_wait_longer_than_the_policy_is_not_taken_without_a_deadline(self) -> None:
        assert attempts().wait_for(failed("UNAVAILABLE", "DRAINING", retry_after=31.0)) is None


class TestHowLong:
    def test_waits_double_and_are_bounded(self) -> None:
        policy = RetryPolicy(max_attempts=8, initial_backoff=1.0, max_backoff=5.0)
        calls = attempts(policy=policy, random=1.0)
        waits = [calls.wait_for(failed("UNAVAILABLE")) for _ in range(8)]
        assert waits == [1.0, 2.0, 4.0, 5.0, 5.0, 5.0, 5.0, None]

    def test_half_of_a_wait_is_random(self) -> None:
        policy = RetryPolicy(initial_backoff=1.0)
        low = attempts(policy=policy, random=0.0).wait_for(failed("UNAVAILABLE"))
        assert low == 0.5

    def test_the_server_knows_better(self) -> None:
        wait = attempts(random=0.5).wait_for(failed("UNAVAILABLE", "DRAINING", retry_after=4.0))
        assert wait == pytest.approx(4.2)
        wait = attempts(random=0.0).wait_for(failed("UNAVAILABLE", "DRAINING", retry_after=4.0, pushback=2.0))
        assert wait == 2.0

    def test_a_wait_past_the_deadline_is_not_begun(self) -> None:
        policy = RetryPolicy(initial_backoff=1.0)
        assert attempts(policy=policy, deadline=100.4).wait_for(failed("UNAVAILABLE")) is None
        assert attempts(policy=policy, deadline=100.6).wait_for(failed("UNAVAILABLE")) == 0.5

    def test_many_attempts_do_not_overflow(self) -> None:
        calls = attempts(policy=RetryPolicy(max_attempts=100, multiplier=1e9))
        assert calls.wait_for(failed("UNAVAILABLE")) is not None
        for _ in range(50):
            calls.wait_for(failed("UNAVAILABLE"))


class TestBudget:
    def test_stops_at_half(self) -> None:
        budget = RetryBudget()
        taken = 0
        while budget.take():
            taken += 1
        assert taken == 49
        assert attempts(budget=budget).wait_for(failed("UNAVAILABLE")) is None

    def test_successes_refill_up_to_the_capacity(self) -> None:
        budget = RetryBudget()
        for _ in range(60):
            budget.take()
        for _ in range(40):
            budget.succeed()
        assert budget.tokens == pytest.approx(52.0)
        assert budget.take()
        for _ in range(1000):
            budget.succeed()
        assert budget.tokens == 100.0

    def test_failures_that_are_never_retried_take_nothing(self) -> None:
        budget = RetryBudget()
        attempts(budget=budget).wait_for(failed("INTERNAL"))
        assert budget.tokens == 100.0


@pytest.mark.parametrize(
    "values",
    [
        {"max_attempts": 0},
        {"initial_backoff": 0.0},
        {"initial_backoff": 9.0},
        {"multiplier": 0.5},
        {"max_server_wait": -1},
    ],
)
def test_policy_refuses_nonsense(values: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(values))):
        RetryPolicy(**values)  # type: ignore[arg-type]
