"""What the adapter service changes: uploads, traffic, deletion, residency."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from loramux.v1 import adapter_pb2 as pb
from loramux.v1 import common_pb2
from loramux_server.engine.messages import VersionState as VersionStateEvent
from loramux_server.errors import (
    Conflict,
    FailedPrecondition,
    InvalidRequest,
    LoramuxServerError,
    NotFound,
    Reason,
    ResourceExhausted,
)
from tests.support.adapter_calls import ACME, BOT, CALL, Served, chunks, start, target, update, version_name
from tests.support.lifecycle_doubles import digest_of

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
