"""What every server and both clients keep to in the life of an adapter."""

import uuid
from pathlib import Path
from typing import Any

import pytest

from loramux import AdapterEventKind, AdapterNotFound, Conflict, VersionState
from tests.contract.conftest import ContractServer


@pytest.fixture
def name() -> str:
    return f"bot-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def directories(contract_server: ContractServer, tmp_path: Path) -> list[Path]:
    found = []
    for seed in (1, 2):
        directory = tmp_path / str(seed)
        directory.mkdir()
        contract_server.write_adapter(directory, seed)
        found.append(directory)
    return found


async def test_upload_promote_roll_back(client: Any, name: str, directories: list[Path]) -> None:
    adapters = client.adapters
    first = await adapters.upload(directories[0], name=name, promote=True)
    assert first.state is VersionState.READY
    assert len(first.digest) == 64
    assert first.name == f"tenants/default/adapters/{name}/versions/{first.digest[:16]}"
    second = await adapters.upload(directories[1], name=name)
    assert second.name != first.name
    bot = client.with_adapter(name)
    assert (await bot.generate("Hi", max_tokens=1).result()).adapter_version == first.name

    promoted = await adapters.promote(name, second)
    assert (promoted.serving_version, promoted.previous_version) == (second.name, first.name)
    assert (await bot.generate("Hi", max_tokens=1).result()).adapter_version == second.name
    pinned = await client.generate("Hi", adapter=first.name, max_tokens=1).result()
    assert pinned.adapter_version == first.name

    rolled_back = await adapters.rollback(name)
    assert rolled_back.serving_version == first.name
    assert rolled_back.revision > promoted.revision
    assert (await bot.generate("Hi", max_tokens=1).result()).adapter_version == first.name


async def test_equal_bytes_are_one_version(client: Any, name: str, directories: list[Path]) -> None:
    first = await client.adapters.upload(directories[0], name=name)
    again = await client.adapters.upload(directories[0], name=name)
    assert first.name == again.name
    assert [version.name async for version in client.adapters.versions(name)] == [first.name]


async def test_a_version_in_traffic_stays(client: Any, name: str, directories: list[Path]) -> None:
    version = await client.adapters.upload(directories[0], name=name, promote=True)
    with pytest.raises(Conflict) as caught:
        await client.adapters.delete_version(name, version)
    assert caught.value.reason == "VERSION_IN_USE"


async def test_a_stale_etag(client: Any, name: str, directories: list[Path]) -> None:
    version = await client.adapters.upload(directories[0], name=name)
    etag = (await client.adapters.get(name)).etag
    await client.adapters.promote(name, version, etag=etag)
    with pytest.raises(Conflict) as caught:
        await client.adapters.promote(name, version, etag=etag)
    assert (caught.value.code, caught.value.reason) == ("ABORTED", "VERSION_CONFLICT")


async def test_list_and_delete(client: Any, name: str, directories: list[Path]) -> None:
    await client.adapters.upload(directories[0], name=name)
    assert [adapter.name async for adapter in client.adapters.list(prefix=name)] == [f"tenants/default/adapters/{name}"]
    await client.adapters.delete(name)
    assert [adapter async for adapter in client.adapters.list(prefix=name)] == []
    with pytest.raises(AdapterNotFound):
        await client.adapters.get(name)


async def test_watch(client: Any, name: str, directories: list[Path]) -> None:
    await client.adapters.upload(directories[0], name=name, promote=True)
    seen = []
    async with client.adapters.watch(prefix=name) as events:
        async for event in events:
            seen.append(event)
            if event.kind is AdapterEventKind.SNAPSHOT_COMPLETE:
                await client.adapters.delete(name)
            if event.kind is AdapterEventKind.DELETED:
                break
    assert [event.kind for event in seen if event.kind is not AdapterEventKind.CHANGED] == [
        AdapterEventKind.SNAPSHOT,
        AdapterEventKind.SNAPSHOT_COMPLETE,
        AdapterEventKind.DELETED,
    ]
    assert [event.revision for event in seen] == sorted(event.revision for event in seen)
