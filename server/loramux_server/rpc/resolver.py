"""Adapters of requests: provisional resolution, and pinning of an alias to one version for a whole batch."""

import dataclasses
import random

from loramux_server.errors import NotFound, Reason
from loramux_server.lora.adapter_table import AdapterTable
from loramux_server.lora.engine_link import ResolvedAdapter
from loramux_server.tenancy.names import parse_reference, version_key


class TableResolver:
    """Resolves against the table of adapters that the engine follows."""

    def __init__(self, table: AdapterTable) -> None:
        """Create the resolver.

        Args:
            table: Not owned.
        """
        self._table = table

    def resolve(self, tenant: str, adapter: str | None, *, field: str = "adapter") -> ResolvedAdapter:
        """Resolve provisionally; see `AdapterTable.resolve`."""
        return self._table.resolve(tenant, adapter, field=field)

    def pin(self, resolved: ResolvedAdapter) -> ResolvedAdapter:
        """Bind an alias to one version of its traffic now, drawn by weight; anything else stays as it is.

        Raises:
            NotFound: ADAPTER_NOT_FOUND, nothing of it serves any more.
        """
        if resolved.alias is None:
            return resolved
        reference = parse_reference(resolved.alias, resolved.tenant.name, "adapter")
        state = self._table.adapters.get((reference.tenant, reference.adapter))
        traffic = () if state is None else state.adapter.traffic
        if not traffic:
            raise NotFound(
                Reason.ADAPTER_NOT_FOUND,
                f"adapter {reference.adapter!r} has no version in its traffic; put one there by UpdateAdapter",
                field="adapter",
            )
        (target,) = random.choices(traffic, weights=[target.weight for target in traffic])
        return dataclasses.replace(
            resolved,
            alias=None,
            version=version_key(reference.tenant, reference.adapter, target.digest),
            digest=target.digest,
        )
