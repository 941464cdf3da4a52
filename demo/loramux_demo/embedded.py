"""What the wheel embeds: checked before use, and brought onto a server once."""

from pathlib import Path

from loramux import AdapterNotFound, AdapterVersion, AsyncClient, VersionState
from loramux_base.adapter import version_digest
from loramux_demo.paths import EMBEDDED_ADAPTERS
from loramux_demo.tour_errors import TourError


def check_embedded(base: Path, adapters: Path) -> None:
    """Check that base and adapters are there.

    Args:
        base: Model directory.
        adapters: A directory a data set.

    Raises:
        TourError: They are not.
    """
    if not (base / "config.json").is_file():
        raise TourError(
            f"there is no base model in {base}; `python -m loramux_demo.train_base --out DIR` makes one, and --base "
            "DIR/nf4 takes it"
        )
    for name in EMBEDDED_ADAPTERS:
        if not (adapters / name / "adapter_config.json").is_file():
            raise TourError(
                f"there is no adapter in {adapters / name}; `python -m loramux_demo.train_tenants --base {base} --out "
                "DIR` makes all of them, and --adapters DIR takes them"
            )


async def publish_embedded(client: AsyncClient, adapters: Path) -> dict[str, AdapterVersion]:
    """Upload what the server does not have yet; traffic that somebody has set stays as it is.

    Args:
        client: Of the server.
        adapters: A directory a data set.

    Returns:
        The versions by data set.
    """
    versions: dict[str, AdapterVersion] = {}
    for data_set, name in EMBEDDED_ADAPTERS.items():
        directory = adapters / data_set
        digest = version_digest(directory)
        found: AdapterVersion | None = None
        serving = False
        try:
            serving = (await client.adapters.get(name)).serving_version is not None
            async for version in client.adapters.versions(name, states=[VersionState.READY]):
                if version.digest == digest:
                    found = version
        except AdapterNotFound:
            serving = False
        if found is None:
            found = await client.adapters.upload(directory, name=name)
        if not serving:
            await client.adapters.promote(name, found)
        versions[data_set] = found
    return versions
