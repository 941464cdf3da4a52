import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from loramux.v1 import adapter_pb2 as pb
from loramux.v1 import common_pb2
from loramux_server.engine.messages import VersionState as VersionStateEvent
from loramux_server.errors import (
    Conflict,
    FailedPrecondition,
    InvalidRequest,
    LoramuxServerError,
    NotFound,
    NotServedYet,
    Reason,
    ResourceExhausted,
)
from loramux_server.lora.lifecycle import AdapterLifecycle
from loramux_server.lora.upload_request import UploadLimits
from loramux_server.rpc.adapter_service import SERVICE, AdapterService
from loramux_server.rpc.call import Call
from loramux_server.tenancy.registry import Registry
from loramux_server.tenancy.store import LocalStore
from tests.support.lifecycle_doubles import CONFIG, FakeEngine, FakeValidator, digest_of

CALL = Call(tenant="default", principal="local", correlation_id="c", deadline=None)
ACME = Call(tenant="acme", principal="local", correlation_id="c", deadline=None)
BOT = "tenants/default/adapters/bot"


class Served:
    def __init__(self, root: Path) -> None:
        self.engine = FakeEngine()
        self.validator = FakeValidator()
        self.cycle = AdapterLifecycle(
            Registry(root / "registry.sqlite"),
            LocalStore(root / "store"),
            self.validator,
            self.engine,
            upload_limits=UploadLimits(chunk_bytes=64),
            allow_unverified=True,
            heartbeat=0.05,
        )
        self.service = AdapterService(self.cycle, replica_id="r1")

    async def call(self, request: Any, call: Call = CALL) -> Any:
        name = type(request).__name__.removesuffix("Request")
        return await self.service.methods()[f"/{SERVICE}/{name}"].handler(request, call)

    async def refused(self, request: Any, reason: Reason, call: Call = CALL) -> LoramuxServerError:
        with pytest.raises(LoramuxServerError) as caught:
            await self.call(request, call)
        assert caught.value.reason is reason, caught.value.message
        return caught.value

    async def write(self, messages: Iterable[pb.WriteAdapterUploadRequest], call: Call = CALL) -> Any:
        return await self.service.WriteAdapterUpload(streamed(messages), call)

    async def upload(self, content: str, adapter: str = "bot", **labels: str) -> pb.AdapterVersion:
        data = content.encode()
        started = await self.call(start(data, adapter, **labels))
        if started.upload.committed_bytes < len(data):
            await self.write(chunks(started.upload.upload_id, data))
        finished = await self.call(pb.FinishAdapterUploadRequest(upload_id=started.upload.upload_id))
        version: pb.AdapterVersion = finished.version
        return version

    async def move(self, *targets: pb.TrafficTarget, name: str = "bot", **options: Any) -> pb.Adapter:
        response = await self.call(update(name, ["traffic"], traffic=targets, **options))
        adapter: pb.Adapter = response.adapter
        return adapter


async def streamed(
    messages: Iterable[pb.WriteAdapterUploadRequest],
) -> AsyncIterator[pb.WriteAdapterUploadRequest]:
    for message in messages:
        yield message


def start(data: bytes, adapter: str = "bot", **labels: str) -> pb.StartAdapterUploadRequest:
    return pb.StartAdapterUploadRequest(
        adapter=adapter,
        adapter_config=CONFIG,
        files=[pb.AdapterFile(name="adapter_model.safetensors", size=len(data), sha256=digest_of(data))],
        labels=labels,
    )


def chunks(upload_id: str, data: bytes, size: int = 64) -> list[pb.WriteAdapterUploadRequest]:
    return [
        pb.WriteAdapterUploadRequest(
            upload_id=upload_id if offset == 0 else "", offset=offset, data=data[offset : offset + size]
        )
        for offset in range(0, len(data), size)
    ]


def update(name: str, paths: list[str], etag: str = "", **fields: Any) -> pb.UpdateAdapterRequest:
    own = {key: fields.pop(key) for key in ("warm", "idempotency_key") if key in fields}
    return pb.UpdateAdapterRequest(
        adapter=pb.Adapter(name=name, etag=etag, **fields), update_mask=FieldMask(paths=paths), **own
    )


def target(content: str, weight: int | None = None) -> pb.TrafficTarget:
    return pb.TrafficTarget(version=digest_of(content)[:16], weight=weight)


def version_name(content: str, name: str = BOT) -> str:
    return f"{name}/versions/{digest_of(content)[:16]}"


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    made = Served(tmp_path)
    await made.cycle.start()
    yield made
    made.cycle.table.check_integrity()
    await made.cycle.close()


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


# --- uploads ---------------------------------------------------------------------------------------------------------


async def test_an_upload_in_chunks_becomes_a_version(served: Served) -> None:
    data = b"x" * 150
    started = (await served.call(start(data))).upload
    assert (started.adapter, started.committed_bytes, started.total_bytes) == (BOT, 0, 150)
    assert started.replica_id == "r1" and started.expire_time.seconds > 0
    written = await served.write(chunks(started.upload_id, data))
    assert written.upload.committed_bytes == 150
    got = await served.call(pb.GetAdapterUploadRequest(upload_id=started.upload_id))
    assert got.upload == written.upload
    finished = await served.call(pb.FinishAdapterUploadRequest(upload_id=started.upload_id))
    version = finished.version
    assert version.name == f"{BOT}/versions/{digest_of(data)[:16]}" and version.digest == digest_of(data)
    assert version.state == pb.ADAPTER_VERSION_STATE_READY and not version.HasField("failure")
    assert [file.name for file in version.files] == ["adapter_config.json", "adapter_model.safetensors"]
    assert (version.max_rank, list(version.target_modules), version.slab_units) == (8, ["q_proj"], 1)
    assert version.residency.level == common_pb2.RESIDENCY_LEVEL_STORE
    assert finished.revision == 1
    adapter = (await served.call(pb.GetAdapterRequest(name="bot"))).adapter
    assert (adapter.name, adapter.serving_version, list(adapter.traffic)) == (BOT, "", [])


async def test_a_stream_that_breaks_keeps_its_bytes(served: Served) -> None:
    data = b"y" * 200
    upload = (await served.call(start(data))).upload

    async def broken() -> AsyncIterator[pb.WriteAdapterUploadRequest]:
        yield chunks(upload.upload_id, data)[0]
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await served.service.WriteAdapterUpload(broken(), CALL)
    resumed = (await served.call(start(data))).upload
    assert (resumed.upload_id, resumed.committed_bytes) == (upload.upload_id, 64)


async def test_a_stream_with_a_bad_piece_is_refused(served: Served) -> None:
    upload = (await served.call(start(b"z" * 200))).upload
    good = chunks(upload.upload_id, b"z" * 200)
    other = pb.WriteAdapterUploadRequest(upload_id="other", offset=64, data=b"z")
    skipped = pb.WriteAdapterUploadRequest(offset=100, data=b"z")
    cases: list[tuple[list[pb.WriteAdapterUploadRequest], type[LoramuxServerError]]] = [
        ([pb.WriteAdapterUploadRequest(upload_id="nope", offset=0, data=b"z"), *good], NotFound),
        ([pb.WriteAdapterUploadRequest(offset=0, data=b"z"), *good], NotFound),
        ([pb.WriteAdapterUploadRequest(upload_id=upload.upload_id, data=b"z" * 65), *good], InvalidRequest),
        ([pb.WriteAdapterUploadRequest(upload_id=upload.upload_id), *good], InvalidRequest),
        ([good[0], other, *good], InvalidRequest),
        ([pb.WriteAdapterUploadRequest(upload_id=upload.upload_id, offset=64, data=b"z"), skipped], InvalidRequest),
        ([], InvalidRequest),
    ]
    for messages, kind in cases:
        with pytest.raises(kind):
            await served.write(messages)
    with pytest.raises(NotFound):
        await served.write(good, ACME)


async def test_start_is_bound_to_its_idempotency_key(served: Served) -> None:
    request = start(b"data")
    request.idempotency_key = "k"
    first = await served.call(request)
    assert await served.call(request) == first
    other = start(b"other")
    other.idempotency_key = "k"
    await served.refused(other, Reason.IDEMPOTENCY_MISMATCH)
    for key in ("", "k" * 129, "é" * 65):
        other.idempotency_key = key
        assert (await served.refused(other, Reason.INVALID_PARAMETER)).field == "idempotency_key"


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


# --- changes ---------------------------------------------------------------------------------------------------------


async def test_promote_split_and_roll_back(served: Served) -> None:
    await served.upload("v1")
    await served.upload("v2")
    one = await served.move(target("v1"))
    assert (one.serving_version, one.previous_version) == (version_name("v1"), "")
    assert [(item.version, item.weight) for item in one.traffic] == [(version_name("v1"), 1)]
    split = await served.move(target("v1", 90), pb.TrafficTarget(version=f"bot@{digest_of('v2')}", weight=10))
    assert [item.weight for item in split.traffic] == [90, 10] and split.serving_version == version_name("v1")
    two = await served.move(pb.TrafficTarget(version=version_name("v2")), etag=split.etag)
    assert (two.serving_version, two.previous_version) == (version_name("v2"), version_name("v1"))
    assert two.revision > split.revision and two.etag != split.etag
    back = await served.move(pb.TrafficTarget(version=two.previous_version), etag=two.etag)
    assert back.serving_version == version_name("v1")
    assert (await served.move()).serving_version == ""


async def test_an_update_sets_what_its_mask_names(served: Served) -> None:
    await served.upload("v1", team="x")
    await served.move(target("v1"))
    changed = (await served.call(update("bot", ["labels"], labels={"team": "y"}))).adapter
    assert dict(changed.labels) == {"team": "y"} and changed.serving_version == version_name("v1")
    both = (await served.call(update(BOT, ["traffic", "labels"]))).adapter
    assert not both.labels and not both.traffic


@pytest.mark.parametrize(
    "request_",
    [
        update("bot", []),
        update("bot", ["etag"]),
        update("bot", ["serving_version"]),
        update("bot", ["labels.team"]),
        update("bot", ["*"]),
        update("bot", ["traffic"], traffic=[target("v1", 0)]),
        update("bot", ["traffic"], traffic=[target("v1", 10_001)]),
        update("bot", ["traffic"], traffic=[pb.TrafficTarget()]),
        update("bot", ["traffic"], traffic=[pb.TrafficTarget(version="../x")]),
        update("bot", ["traffic"], traffic=[pb.TrafficTarget(version="0" * 1000)]),
        update("bot", ["traffic"], traffic=[target("v1")] * 2),
        update("bot", ["traffic"], traffic=[target("v1")] * 17),
        update("bot", ["labels"], labels={"": "x"}),
    ],
)
async def test_a_bad_update_changes_nothing(served: Served, request_: pb.UpdateAdapterRequest) -> None:
    await served.upload("v1")
    before = (await served.call(pb.GetAdapterRequest(name="bot"))).adapter
    await served.refused(request_, Reason.INVALID_PARAMETER)
    assert (await served.call(pb.GetAdapterRequest(name="bot"))).adapter == before


async def test_two_promotes_by_one_etag(served: Served) -> None:
    for content in ("v1", "v2"):
        await served.upload(content)
    etag = (await served.call(pb.GetAdapterRequest(name="bot"))).adapter.etag
    outcomes = await asyncio.gather(
        *(served.move(target(content), etag=etag) for content in ("v1", "v2")), return_exceptions=True
    )
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Adapter", "Conflict"]
    with pytest.raises(Conflict):
        await served.call(pb.DeleteAdapterRequest(name="bot", etag=etag))


async def test_replays_answer_as_the_first_time(served: Served) -> None:
    for content in ("v1", "v2"):
        await served.upload(content)
    etag = (await served.call(pb.GetAdapterRequest(name="bot"))).adapter.etag
    request = update("bot", ["traffic"], traffic=[target("v1")], etag=etag, idempotency_key="k")
    first = await served.call(request)
    await served.move(target("v2"))
    assert await served.call(request) == first
    request.adapter.traffic[0].weight = 7
    await served.refused(request, Reason.IDEMPOTENCY_MISMATCH)
    delete = pb.DeleteAdapterRequest(name="bot", idempotency_key="k")
    assert await served.call(delete) == await served.call(delete)
    await served.refused(pb.DeleteAdapterRequest(name="bot"), Reason.ADAPTER_NOT_FOUND)


async def test_deleting_versions(served: Served) -> None:
    for content in ("v1", "v2"):
        await served.upload(content)
    await served.move(target("v2"))
    error = await served.refused(pb.DeleteAdapterVersionRequest(name=version_name("v2")), Reason.VERSION_IN_USE)
    assert isinstance(error, FailedPrecondition)
    deleted = await served.call(pb.DeleteAdapterVersionRequest(name=f"bot@{digest_of('v1')}"))
    assert deleted.version.state == pb.ADAPTER_VERSION_STATE_DRAINING and deleted.revision == 4
    key = f"{BOT}/versions/{digest_of('v1')}"
    served.cycle.on_version_state(VersionStateEvent(version=key, residency="store", references=0, dropped=True))
    for _ in range(200):
        got = await served.call(pb.GetAdapterVersionRequest(name=version_name("v1")))
        if got.version.state == pb.ADAPTER_VERSION_STATE_DELETED:
            break
        await asyncio.sleep(0.01)
    assert got.version.state == pb.ADAPTER_VERSION_STATE_DELETED and not got.version.HasField("residency")


async def test_preload_and_unload(served: Served) -> None:
    await served.upload("v1")
    await served.move(target("v1"), warm=False)
    assert ("preload", f"{BOT}/versions/{digest_of('v1')}") not in served.engine.journal
    loaded = await served.call(pb.PreloadAdapterRequest(name="bot"))
    (residency,) = loaded.residency
    assert (residency.version, residency.level) == (version_name("v1"), common_pb2.RESIDENCY_LEVEL_DEVICE)
    assert residency.replica_id == "r1" and loaded.HasField("load_time")
    unloaded = await served.call(pb.UnloadAdapterRequest(name=version_name("v1")))
    assert [item.level for item in unloaded.residency] == [common_pb2.RESIDENCY_LEVEL_STORE]
    assert not (await served.call(pb.UnloadAdapterRequest(name="bot"))).residency
    for level in (common_pb2.RESIDENCY_LEVEL_STORE, common_pb2.RESIDENCY_LEVEL_UNSPECIFIED):
        await served.refused(pb.PreloadAdapterRequest(name="bot", level=level), Reason.INVALID_PARAMETER)
    served.engine.error = ResourceExhausted(Reason.ADAPTER_SLOTS_EXHAUSTED, "full")
    await served.refused(pb.PreloadAdapterRequest(name="bot"), Reason.ADAPTER_SLOTS_EXHAUSTED)


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
