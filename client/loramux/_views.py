"""What both clients have in common: views on one connection, and what a generation is made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

from loramux._connection import View, checked_id, checked_timeout
from loramux._prompt_types import Prompt, SamplingFields, SamplingParams
from loramux._requests import generate_request, invalid, merge_sampling
from loramux.v1 import generation_pb2 as pb


class Target(Protocol):
    """What a view needs of its transport."""

    @property
    def target(self) -> str:
        """Where it connects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A checked generation that has not been sent.

    Attributes:
        request: The message.
        view: Whose it is, with the adapter that it names.
        timeout: Seconds for all of it; None for no limit.
        request_id: Correlation id; None mints one.
        n: Sequences.
    """

    request: pb.GenerateRequest
    view: View
    timeout: float | None
    request_id: str | None
    n: int


class ClientViews:
    """A client as a view on its connection."""

    _transport: Target
    _generate_timeout: float | None
    _view: View
    _owner: bool

    def _begin(self, *, tenant: str | None, adapter: str | None) -> None:
        """Become the owner of the connection."""
        self._owner = True
        self._view = View(
            tenant=None if tenant is None else checked_id("tenant", tenant),
            adapter=None if adapter is None else checked_id("adapter", adapter),
        )

    def __repr__(self) -> str:
        """Show where it connects and for whom; never the token."""
        return f"{type(self).__name__}({self._transport.target!r}{self._view.shown()})"

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Refuse to be pickled or copied: a connection belongs to its process."""
        raise TypeError(f"{type(self).__name__} cannot be pickled or copied; make one in each process")

    def _with(self, view: View) -> Self:
        """Return a client with another view on the same connection."""
        other = object.__new__(type(self))
        other._transport = self._transport
        other._generate_timeout = self._generate_timeout
        other._view = view
        other._owner = False
        return other

    def for_tenant(self, tenant: str) -> Self:
        """Return a view that acts for a tenant."""
        return self._with(replace(self._view, tenant=checked_id("tenant", tenant)))

    def with_adapter(self, adapter: str | None) -> Self:
        """Return a view whose generations use an adapter; None goes back to the tenant's default.

        Args:
            adapter: `{a}`, `{a}@{v}`, `tenants/{t}/adapters/{a}` or a full version name.
        """
        return self._with(replace(self._view, adapter=None if adapter is None else checked_id("adapter", adapter)))

    def with_min_revision(self, revision: int) -> Self:
        """Return a view that reads its own writes: replicas wait until they have seen a registry revision.

        Args:
            revision: For example `Adapter.revision` of the answer to a change.
        """
        if isinstance(revision, bool) or not isinstance(revision, int) or not 0 <= revision < 2**64:
            raise invalid("revision", f"is {revision!r}; it must be an unsigned 64-bit number")
        return self._with(replace(self._view, min_revision=revision))

    def _generation(
        self,
        prompt: Prompt,
        *,
        adapter: str | None,
        sampling: SamplingParams | None,
        timeout: float | None,
        add_special_tokens: bool | None,
        request_id: str | None,
        fields: SamplingFields,
    ) -> Generation:
        """Check the arguments of `generate` and build what it sends.

        Raises:
            InvalidRequest: The request can never be served.
        """
        params = merge_sampling(sampling, fields)
        request = generate_request(
            prompt,
            adapter=self._view.adapter if adapter is None else adapter,
            sampling=params,
            add_special_tokens=add_special_tokens,
        )
        return Generation(
            request=request,
            view=replace(self._view, adapter=request.adapter if request.HasField("adapter") else None),
            timeout=checked_timeout(timeout, self._generate_timeout),
            request_id=None if request_id is None else checked_id("request_id", request_id),
            n=1 if params is None or params.n is None else params.n,
        )
