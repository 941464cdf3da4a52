"""Whose turn it is: the order in which fairness keys are admitted, and what each has been served."""

import dataclasses
from collections.abc import Iterable
from typing import Protocol


class FairnessPolicy(Protocol):
    """Order between fairness keys. Keys are opaque; order within a key is the waiting queue's."""

    def activate(self, key: str, weight: float) -> None:
        """A key has a request waiting or running; called for every request."""
        ...

    def deactivate(self, key: str) -> None:
        """A key has no request any more: forget it."""
        ...

    def pick(self, keys: Iterable[str]) -> str:
        """The key whose turn it is, among at least one."""
        ...

    def admitted(self, key: str) -> None:
        """A request of the key was admitted."""
        ...

    def charge(self, key: str, tokens: int) -> None:
        """Tokens were computed for the key."""
        ...

    def served(self, key: str) -> float:
        """Service of the key so far in tokens per weight; the most served is preempted first."""
        ...


@dataclasses.dataclass(slots=True, kw_only=True)
class _Account:
    weight: float
    turn: int
    served: float


class RoundRobin:
    """Keys take turns; a new key goes last, and is counted as served as little as the least served one."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._turns = 0

    def activate(self, key: str, weight: float) -> None:
        """See `FairnessPolicy`."""
        account = self._accounts.get(key)
        if account is None:
            self._turns += 1
            floor = min((other.served for other in self._accounts.values()), default=0.0)
            self._accounts[key] = _Account(weight=weight, turn=self._turns, served=floor)
        else:
            account.weight = weight

    def deactivate(self, key: str) -> None:
        """See `FairnessPolicy`."""
        self._accounts.pop(key, None)

    def pick(self, keys: Iterable[str]) -> str:
        """See `FairnessPolicy`."""
        return min(keys, key=lambda key: self._accounts[key].turn)

    def admitted(self, key: str) -> None:
        """See `FairnessPolicy`."""
        self._turns += 1
        self._accounts[key].turn = self._turns

    def charge(self, key: str, tokens: int) -> None:
        """See `FairnessPolicy`."""
        account = self._accounts[key]
        account.served += tokens / account.weight

    def served(self, key: str) -> float:
        """See `FairnessPolicy`."""
        return self._accounts[key].served
