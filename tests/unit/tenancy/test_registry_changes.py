"""Changes of the registry: versions, traffic, deletion, idempotency."""

import threading

import pytest

from loramux_server.errors import Conflict, FailedPrecondition, InvalidRequest, NotFound, Reason
from loramux_server.tenancy.idempotency import KEEP_SECONDS
from loramux_server.tenancy.records import AdapterRecord, VersionState
from loramux_server.tenancy.registry import Registry
from tests.support.lifecycle_doubles import digest_of, new_version
from tests.support.registry_terms import Clock, T, idem, promote, target, version


def test_a_first_version_creates_its_adapter_without_traffic(registry: Registry) -> None:
    change = registry.commit_version(new_version(), labels={"team": "x"})
    adapter = registry.get_adapter(T, "bot")
    assert change.result.state is VersionState.READY
    assert change.revision == adapter.revision == change.result.revision == 1
    assert (adapter.traffic, adapter.serving, adapter.previous, adapter.labels) == ((), "", "", {"team": "x"})
    assert change.state is not None and change.state.versions == (change.result,)


def test_equal_bytes_are_the_same_version(registry: Registry) -> None:
    first = registry.commit_version(new_version()).result
    again = registry.commit_version(new_version())
    assert again.result == first and again.revision == 1


def test_serving_and_previous_follow_the_traffic(registry: Registry) -> None:
    for content in ("v1", "v2", "v3"):
        registry.commit_version(new_version(content=content))
    assert promote(registry, "v1").previous == ""
    assert promote(registry, "v2").previous == digest_of("v1")
    split = registry.update_adapter(T, "bot", traffic=[target("v2", 1), target("v3", 9)]).result
    assert (split.serving, split.previous) == (digest_of("v3"), digest_of("v2"))
    cleared = registry.update_adapter(T, "bot", traffic=[]).result
    assert (cleared.serving, cleared.previous) == ("", digest_of("v3"))
    assert promote(registry, "v3").previous == ""


def test_the_first_of_equal_weights_serves(registry: Registry) -> None:
    for content in ("v1", "v2"):
        registry.commit_version(new_version(content=content))
    record = registry.update_adapter(T, "bot", traffic=[target("v2", 5), target("v1", 5)]).result
    assert record.serving == digest_of("v2")


def test_a_stale_etag_is_refused_and_changes_nothing(registry: Registry) -> None:
    for content in ("v1", "v2"):
        registry.commit_version(new_version(content=content))
    etag = registry.get_adapter(T, "bot").etag
    promote(registry, "v1", etag=etag)
    with pytest.raises(Conflict) as caught:
        promote(registry, "v2", etag=etag)
    assert caught.value.reason is Reason.VERSION_CONFLICT
    assert registry.get_adapter(T, "bot").serving == digest_of("v1")


def test_of_two_promotes_with_one_etag_exactly_one_wins(registry: Registry) -> None:
    for content in ("v1", "v2"):
        registry.commit_version(new_version(content=content))
    for _ in range(10):
        etag = registry.get_adapter(T, "bot").etag
        barrier = threading.Barrier(2)
        outcomes: list[str] = []

        def race(content: str, etag: str = etag, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                promote(registry, content, etag=etag)
                outcomes.append(content)  # noqa: B023 - joined below
            except Conflict:
                outcomes.append("conflict")  # noqa: B023

        threads = [threading.Thread(target=race, args=(content,)) for content in ("v1", "v2")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outcomes) == 2 and outcomes.count("conflict") == 1
        (winner,) = set(outcomes) - {"conflict"}
        assert registry.get_adapter(T, "bot").serving == digest_of(winner)


def test_traffic_to_an_unknown_or_deleted_version_is_refused(registry: Registry) -> None:
    for content in ("v1", "v2"):
        registry.commit_version(new_version(content=content))
    with pytest.raises(NotFound):
        promote(registry, "v9")
    registry.delete_version(version("v2"))
    with pytest.raises(FailedPrecondition, match="being deleted"):
        promote(registry, "v2")
    registry.finish_drain(T, "bot", digest_of("v2"))
    with pytest.raises(NotFound):
        promote(registry, "v2")


def test_a_version_in_traffic_cannot_be_deleted(registry: Registry) -> None:
    registry.commit_version(new_version())
    promote(registry, "v1")
    with pytest.raises(FailedPrecondition) as caught:
        registry.delete_version(version("v1"))
    assert caught.value.reason is Reason.VERSION_IN_USE


def test_a_deleted_version_drains_then_is_deleted_and_can_come_back(registry: Registry) -> None:
    for content in ("v1", "v2"):
        registry.commit_version(new_version(content=content))
    promote(registry, "v1")
    promote(registry, "v2")
    deletion = registry.delete_version(version("v1")).result
    assert deletion.versions[0].state is VersionState.DRAINING
    assert registry.get_adapter(T, "bot").previous == ""
    again = registry.delete_version(version("v1")).result
    assert again.versions[0].state is VersionState.DRAINING and again.revision == deletion.revision
    assert registry.finish_drain(T, "bot", digest_of("v1")) is True
    assert registry.get_version(version("v1")).state is VersionState.DELETED
    back = registry.commit_version(new_version(content="v1")).result
    assert back.state is VersionState.READY and back.revision > deletion.revision


def test_an_object_that_another_adapter_uses_stays(registry: Registry) -> None:
    registry.commit_version(new_version(adapter="bot"))
    registry.commit_version(new_version(adapter="bot2"))
    registry.delete_version(version("v1"))
    assert registry.finish_drain(T, "bot", digest_of("v1")) is False


def test_a_version_that_came_back_is_not_deleted_by_its_old_drain(registry: Registry) -> None:
    registry.commit_version(new_version())
    registry.delete_version(version("v1"))
    registry.commit_version(new_version())
    assert registry.finish_drain(T, "bot", digest_of("v1")) is False
    assert registry.get_version(version("v1")).state is VersionState.READY


def test_deleting_an_adapter_drains_all_versions(registry: Registry) -> None:
    for content in ("v1", "v2"):
        registry.commit_version(new_version(content=content))
    promote(registry, "v1")
    with pytest.raises(Conflict):
        registry.delete_adapter(T, "bot", etag="stale")
    change = registry.delete_adapter(T, "bot")
    assert change.state is None
    assert {item.state for item in change.result.versions} == {VersionState.DRAINING}
    with pytest.raises(NotFound):
        registry.get_adapter(T, "bot")
    with pytest.raises(NotFound):
        registry.list_versions(T, "bot", limit=1)


def test_a_replay_gets_the_first_answer_although_its_etag_is_stale(registry: Registry) -> None:
    for content in ("v1", "v2"):
        registry.commit_version(new_version(content=content))
    etag = registry.get_adapter(T, "bot").etag
    first = registry.update_adapter(T, "bot", etag=etag, traffic=[target("v1")], key=idem())
    promote(registry, "v2")
    replay = registry.update_adapter(T, "bot", etag=etag, traffic=[target("v1")], key=idem())
    assert replay.replayed and replay.result == first.result
    assert registry.get_adapter(T, "bot").serving == digest_of("v2")
    assert registry.recall(idem(), AdapterRecord) == first.result


def test_a_key_is_bound_to_its_payload_method_and_tenant(registry: Registry) -> None:
    registry.commit_version(new_version())
    registry.update_adapter(T, "bot", labels={"a": "1"}, key=idem())
    with pytest.raises(InvalidRequest) as caught:
        registry.update_adapter(T, "bot", labels={"a": "2"}, key=idem(payload=b"other"))
    assert caught.value.reason is Reason.IDEMPOTENCY_MISMATCH
    assert registry.recall(idem(method="DeleteAdapter", payload=b"other"), AdapterRecord) is None
    assert registry.recall(idem(tenant="acme", payload=b"other"), AdapterRecord) is None


def test_a_failed_mutation_leaves_its_key_free(registry: Registry) -> None:
    registry.commit_version(new_version())
    with pytest.raises(Conflict):
        registry.update_adapter(T, "bot", labels={"a": "1"}, etag="stale", key=idem())
    change = registry.update_adapter(T, "bot", labels={"a": "1"}, key=idem(payload=b"corrected"))
    assert not change.replayed and change.result.labels == {"a": "1"}


def test_a_key_is_forgotten_after_a_day(registry: Registry, clock: Clock) -> None:
    registry.commit_version(new_version())
    registry.update_adapter(T, "bot", labels={"a": "1"}, key=idem())
    clock.now += KEEP_SECONDS
    change = registry.update_adapter(T, "bot", labels={"a": "2"}, key=idem(payload=b"other"))
    assert not change.replayed


def test_a_claimed_key_refuses_another_payload(registry: Registry) -> None:
    registry.claim(idem(method="StartAdapterUpload"))
    registry.claim(idem(method="StartAdapterUpload"))
    with pytest.raises(InvalidRequest):
        registry.claim(idem(method="StartAdapterUpload", payload=b"other"))
