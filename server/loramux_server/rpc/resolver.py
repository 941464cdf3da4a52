"""Adapters of requests: provisional resolution, and pinning of an alias to one version on the arrival of a batch."""

import dataclasses

from loramux_server.engine.aliases import AliasTable
from loramux_server.engine.messages import AliasSpec
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

    def pin(self, resolved: ResolvedAdapter, *, split_key: str, seed: int) -> ResolvedAdapter:
        """Bind an alias to one version of its traffic now, as the engine would; anything else stays as it is.

        Args:
            resolved: What `resolve` gave.
            split_key: Requests of one key stay on one version; empty = drawn from `seed`.
            seed: One for all that is pinned together, so that one adapter gets one version.

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
        by_key = {version_key(reference.tenant, reference.adapter, target.digest): target for target in traffic}
        aliases = AliasTable()
        targets = [(key, float(target.weight)) for key, target in by_key.items()]
        aliases.put(AliasSpec(alias=resolved.alias, targets=targets, revision=resolved.revision))
        chosen = aliases.resolve(resolved.alias, split_key=split_key, seed=seed)
        assert chosen is not None, "an alias with targets serves one"
        version, _ = chosen
        return dataclasses.replace(resolved, alias=None, version=version, digest=by_key[version].digest)
