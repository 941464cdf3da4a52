"""The adapter service: its methods, names, reads and watches."""

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from loramux.v1 import adapter_pb2 as pb
from loramux.v1 import common_pb2
from loramux_server.errors import InvalidRequest, NotServedYet, Reason
from loramux_server.rpc.adapter_service import SERVICE, AdapterService
from tests.support.adapter_calls import ACME, BOT, CALL, Served, start, target, update, version_name
from tests.support.lifecycle_doubles import digest_of

# --- the table of methods --------------------------------------------------------------------------------------------


def test_every_rpc_of_the_service_has_a_handler_of_its_arity(tmp_path: Path) -> None:
    service = AdapterService(None, replica_id="r")  # type: ignore[arg-type]
    descriptor = pb.DESCRIPTOR.services_by_name["AdapterService"]
    methods = service.methods()
    assert set(methods) == {f"/{SERVICE}/{method.name}" for method in descriptor.methods}
    for method in descriptor.methods:
        found = methods[f"/{SERVICE}/{method.name}"]
        assert found.request_type.DESCRIPTOR is method.input_type
        kind = "stream" if method.client_streaming else "unary"
        assert found.kind == f"{kind}_{'stream' if method.server_streaming else 'unary'}"


@pytest.mark.parametrize(
    ("request_", "what"),
    [
        (pb.CreateGrantRequest(), "CreateGrant"),
        (pb.ListGrantsRequest(), "ListGrants"),
        (pb.DeleteGrantRequest(), "DeleteGrant"),
        (pb.GetTenantUsageRequest(), "GetTenantUsage"),
        (pb.ListAdaptersRequest(include_granted=True), "include_granted"),
        (pb.PreloadAdapterRequest(name="bot", level=common_pb2.RESIDENCY_LEVEL_HOST), "HOST"),
        (update("bot", ["pin"]), "pin"),
        (update("bot", ["labels", "pin"]), "pin"),
    ],
)
async def test_what_is_not_served_yet_names_itself(served: Served, request_: Any, what: str) -> None:
    error = await served.refused(request_, Reason.NOT_SERVED_YET)
    assert isinstance(error, NotServedYet) and what in error.message


async def test_watching_granted_adapters_is_not_served_yet(served: Served) -> None:
    with pytest.raises(NotServedYet, match="include_granted"):
        await anext(served.service.WatchAdapters(pb.WatchAdaptersRequest(include_granted=True), CALL))


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "../bot", "/bot", "bot\0", "böt", "a" * 300, "bot@0123456789abcdef"])
async def test_hostile_adapter_names_are_refused_everywhere(served: Served, name: str) -> None:
    requests = [
        start(b"x", name),
        pb.GetAdapterRequest(name=name),
        pb.ListAdapterVersionsRequest(adapter=name),
        update(name, ["labels"]),
        pb.DeleteAdapterRequest(name=name),
    ]
    for request in requests:
        await served.refused(request, Reason.INVALID_PARAMETER)


async def test_a_foreign_adapter_answers_like_an_unknown_one(served: Served) -> None:
    await served.upload("v1")
    version = f"tenants/{{}}/adapters/bot/versions/{digest_of('v1')[:16]}"

    def requests(tenant: str) -> list[Any]:
        adapter = f"tenants/{tenant}/adapters/bot"
        return [
            pb.GetAdapterRequest(name=adapter),
            pb.ListAdapterVersionsRequest(adapter=adapter),
            pb.GetAdapterVersionRequest(name=version.format(tenant)),
            update(adapter, ["labels"]),
            pb.DeleteAdapterRequest(name=adapter),
            pb.DeleteAdapterVersionRequest(name=version.format(tenant)),
            pb.PreloadAdapterRequest(name=adapter),
            pb.UnloadAdapterRequest(name=adapter),
        ]

    for foreign, unknown in zip(requests("default"), requests("acme"), strict=True):
        told = [
            (await served.refused(request, Reason.ADAPTER_NOT_FOUND, ACME)).message for request in (foreign, unknown)
        ]
        assert told[0] == told[1]
    await served.refused(start(b"x", BOT), Reason.ADAPTER_NOT_FOUND, ACME)


# --- reads -----------------------------------------------------------------------------------------------------------


async def test_adapters_are_paged_with_filters(served: Served) -> None:
    for name in ("a1", "a2", "a3", "b1"):
        await served.upload("v", adapter=name, team=name[0])
    seen: list[str] = []
    token = ""
    while True:
        page = await served.call(pb.ListAdaptersRequest(page_size=2, page_token=token, name_prefix="a"))
        assert len(page.adapters) <= 2 and page.revision == 4
        seen += [adapter.name.rpartition("/")[2] for adapter in page.adapters]
        token = page.next_page_token
        if not token:
            break
    assert seen == ["a1", "a2", "a3"]
    found = await served.call(pb.ListAdaptersRequest(labels={"team": "b"}))
    assert [adapter.name for adapter in found.adapters] == ["tenants/default/adapters/b1"]
    first = await served.call(pb.ListAdaptersRequest(page_size=1, name_prefix="a"))
    for request in (
        pb.ListAdaptersRequest(page_token=first.next_page_token, name_prefix="b"),
        pb.ListAdaptersRequest(page_token=first.next_page_token, name_prefix="a", labels={"x": "y"}),
        pb.ListAdaptersRequest(page_token="garbage"),
        pb.ListAdaptersRequest(page_size=0),
        pb.ListAdaptersRequest(page_size=1001),
        pb.ListAdaptersRequest(name_prefix="x" * 64),
    ):
        await served.refused(request, Reason.INVALID_PARAMETER)
    await served.refused(
        pb.ListAdaptersRequest(page_token=first.next_page_token, name_prefix="a"), Reason.INVALID_PARAMETER, ACME
    )
    assert list((await served.call(pb.ListAdaptersRequest(), ACME)).adapters) == []


async def test_a_page_exactly_full_is_the_last(served: Served) -> None:
    for content in ("v1", "v2"):
        await served.upload(content)
    page = await served.call(pb.ListAdapterVersionsRequest(adapter="bot", page_size=2))
    assert len(page.versions) == 2 and page.next_page_token == ""


async def test_versions_are_paged_newest_first_by_state(served: Served) -> None:
    for content in ("v1", "v2", "v3"):
        await served.upload(content)
    await served.call(pb.DeleteAdapterVersionRequest(name=version_name("v2")))
    first = await served.call(pb.ListAdapterVersionsRequest(adapter="bot", page_size=1))
    rest = await served.call(
        pb.ListAdapterVersionsRequest(adapter="bot", page_size=5, page_token=first.next_page_token)
    )
    assert [version.digest for version in (*first.versions, *rest.versions)] == [
        digest_of(content) for content in ("v3", "v2", "v1")
    ]
    draining = await served.call(
        pb.ListAdapterVersionsRequest(adapter="bot", states=[pb.ADAPTER_VERSION_STATE_DRAINING])
    )
    assert [version.digest for version in draining.versions] == [digest_of("v2")]
    for state in (pb.ADAPTER_VERSION_STATE_VALIDATING, pb.ADAPTER_VERSION_STATE_FAILED):
        assert not (await served.call(pb.ListAdapterVersionsRequest(adapter="bot", states=[state]))).versions
    for bad in (0, 99):
        request = pb.ListAdapterVersionsRequest(adapter="bot")
        request.states.append(bad)  # type: ignore[arg-type]
        await served.refused(request, Reason.INVALID_PARAMETER)


@pytest.mark.parametrize("digits", [16, 64])
async def test_a_version_is_read_by_every_form_of_its_name(served: Served, digits: int) -> None:
    await served.upload("v1")
    text = digest_of("v1")[:digits]
    for name in (f"bot@{text}", f"{BOT}/versions/{text}", f"{BOT}@{text}"):
        got = await served.call(pb.GetAdapterVersionRequest(name=name))
        assert got.version.name == version_name("v1")
    for bad in ("bot", f"bot@{text[:8]}", ""):
        await served.refused(pb.GetAdapterVersionRequest(name=bad), Reason.INVALID_PARAMETER)


# --- watch -----------------------------------------------------------------------------------------------------------


async def test_a_watch_from_snapshot_to_deletion(served: Served) -> None:
    await served.upload("v1")
    async with aclosing(served.service.WatchAdapters(pb.WatchAdaptersRequest(), CALL)) as events:

        async def following(kind: str) -> pb.WatchAdaptersResponse:
            async with asyncio.timeout(5):
                while True:
                    event = await anext(events)
                    assert event.replica_id == "r1"
                    if event.WhichOneof("event") == kind:
                        return event

        snapshot = await anext(events)
        assert snapshot.snapshot.adapter.name == BOT and snapshot.revision == 1
        complete = await anext(events)
        assert complete.snapshot_complete.adapters == 1
        await served.move(target("v1"))
        changed = await following("changed")
        while changed.changed.adapter.serving_version != version_name("v1"):
            changed = await following("changed")
        assert changed.revision == 2
        assert changed.changed.residency[0].level == common_pb2.RESIDENCY_LEVEL_DEVICE
        await following("heartbeat")
        await served.call(pb.DeleteAdapterRequest(name="bot"))
        deleted = await following("deleted")
        assert (deleted.deleted.name, deleted.revision) == (BOT, 3)
    assert served.cycle.watches.watches == 0
    with pytest.raises(InvalidRequest):
        await anext(served.service.WatchAdapters(pb.WatchAdaptersRequest(name_prefix="x" * 64), CALL))
