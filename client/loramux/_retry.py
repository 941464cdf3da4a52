"""When a failed call is tried again: pure decisions, no sleeping and no gRPC.

A call is tried again only while no response headers have arrived, and by reason:

* UNAVAILABLE, whatever the reason;
* QUEUE_FULL and TENANT_QUOTA if the server named a wait that fits into the deadline. A client of several replicas
  reaches another one that way; with one address a full queue is given the time that the server asked for;
* nothing else: not INTERNAL, not OUT_OF_MEMORY, and no status without a reason other than UNAVAILABLE.

A negative pushback of the server forbids it. All calls of a client share one budget of tokens, so that an outage is not
answered with a multiple of the load.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from loramux._errors import InvalidRequest
from loramux._status import Failure

_WAIT_REASONS = frozenset({"QUEUE_FULL", "TENANT_QUOTA"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how fast calls are tried again.

    Attributes:
        max_attempts: Attempts in all, the first one included. 1 switches retries off.
        initial_backoff: Largest wait before the second attempt, in seconds; half of it is random.
        max_backoff: Largest wait between two attempts unless the server asks for more, in seconds.
        multiplier: Growth of the wait from attempt to attempt.
        max_server_wait: Longest wait that the server may ask for, in seconds; more than that is given to the caller as
            an error at once.

    Raises:
        InvalidRequest: A value is out of range.
    """

    max_attempts: int = 5
    initial_backoff: float = 0.2
    max_backoff: float = 5.0
    multiplier: float = 2.0
    max_server_wait: float = 30.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 1 <= self.max_attempts <= 100:
            raise InvalidRequest(f"max_attempts is {self.max_attempts}; it must be 1 to 100")
        if not 0 < self.initial_backoff <= self.max_backoff:
            raise InvalidRequest(
                f"initial_backoff is {self.initial_backoff}; "
                f"it must be above 0 and at most max_backoff {self.max_backoff}"
            )
        if self.multiplier < 1:
            raise InvalidRequest(f"multiplier is {self.multiplier}; it must be at least 1")
        if self.max_server_wait < 0:
            raise InvalidRequest(f"max_server_wait is {self.max_server_wait}; it must not be negative")


class RetryBudget:
    """Tokens that all calls of a client share; safe for threads.

    Each failure that could be retried takes one, each success gives 0.3 back; retries stop at half.
    """

    CAPACITY = 100.0
    REFILL = 0.3

    def __init__(self) -> None:
        self._tokens = self.CAPACITY
        self._lock = threading.Lock()

    @property
    def tokens(self) -> float:
        """Tokens left."""
        return self._tokens

    def succeed(self) -> None:
        """Give back for a call that went well."""
        with self._lock:
            self._tokens = min(self.CAPACITY, self._tokens + self.REFILL)

    def take(self) -> bool:
        """Take one for a failure; False if retries have to stop."""
        with self._lock:
            self._tokens = max(0.0, self._tokens - 1.0)
            return self._tokens > self.CAPACITY / 2


class Attempts:
    """The attempts of one call.

    Args:
        policy: Limits.
        budget: Shared tokens.
        deadline: Moment on `now`'s clock at which the call must be over; None for never.
        now: Monotonic clock in seconds.
        random: Uniform numbers in [0, 1).
    """

    def __init__(
        self,
        policy: RetryPolicy,
        budget: RetryBudget,
        *,
        deadline: float | None,
        now: Callable[[], float],
        random: Callable[[], float],
    ) -> None:
        self._policy = policy
        self._budget = budget
        self._deadline = deadline
        self._now = now
        self._random = random
        self._failures = 0

    def remaining(self) -> float | None:
        """Seconds to the deadline, never negative; None if there is none."""
        return None if self._deadline is None else max(0.0, self._deadline - self._now())

    def succeeded(self) -> None:
        """Tell that the call went well."""
        self._budget.succeed()

    def wait_for(self, failure: Failure) -> float | None:
        """Seconds to wait before the next attempt; None if the error is final."""
        self._failures += 1
        error = failure.error
        server_wait = failure.pushback if failure.pushback is not None else error.retry_after
        waits = error.reason in _WAIT_REASONS and server_wait is not None
        if failure.headers_seen or not (error.code == "UNAVAILABLE" or waits):
            return None
        if not self._budget.take() or self._failures >= self._policy.max_attempts:
            return None
        if server_wait is not None and not 0 <= server_wait <= self._policy.max_server_wait:
            return None
        policy = self._policy
        limit = policy.max_backoff
        # The power is bounded before it is taken: many attempts must not overflow a float.
        for_attempt = policy.initial_backoff * policy.multiplier ** min(self._failures - 1, 32)
        delay = min(for_attempt, limit) * (0.5 + 0.5 * self._random())
        if server_wait is not None:
            # Spread behind the asked moment, so that refused callers do not come back as one.
            delay = max(delay, server_wait * (1.0 + 0.1 * self._random()))
        remaining = self.remaining()
        return None if remaining is not None and delay >= remaining else delay
