import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError

from loramux_server.errors import (
    Conflict,
    FailedPrecondition,
    InvalidRequest,
    LoramuxServerError,
    NotFound,
    Reason,
    ResourceExhausted,
)
from loramux_server.tenancy import schema
from loramux_server.tenancy.changes import RegistryLimits
from loramux_server.tenancy.idempotency import KEEP_SECONDS, IdempotencyKey
from loramux_server.tenancy.names import AdapterReference
from loramux_server.tenancy.records import AdapterRecord, TargetRecord, VersionState
from loramux_server.tenancy.registry import Registry
from tests.support.lifecycle_doubles import digest_of, new_version, tensors_record

T = "default"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path: Path, clock: Clock) -> Iterator[Registry]:
    made = Registry(tmp_path / "registry.sqlite", clock=clock)
    yield made
    made.check_integrity()
    made.close()


def target(content: str, weight: int = 1) -> TargetRecord:
    return TargetRecord(digest=digest_of(content), weight=weight)


def version(content: str, adapter: str = "bot", tenant: str = T) -> AdapterReference:
    return AdapterReference(tenant=tenant, adapter=adapter, version=digest_of(content))


def idem(key: str = "k", payload: bytes = b"p", method: str = "UpdateAdapter", tenant: str = T) -> IdempotencyKey:
    return IdempotencyKey(tenant=tenant, method=method, key=key, payload_hash=payload)


def promote(registry: Registry, content: str, **options: object) -> AdapterRecord:
    return registry.update_adapter(T, "bot", traffic=[target(content)], **options).result  # type: ignore[arg-type]


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


def test_tenants_do_not_see_each_other(registry: Registry) -> None:
    registry.commit_version(new_version(tenant="acme"))
    with pytest.raises(NotFound):
        registry.get_adapter(T, "bot")
    assert registry.list_adapters(T, limit=10)[0] == []
    file = tensors_record(b"v1")
    assert registry.find_tensors(T, file) is None
    assert registry.find_tensors("acme", file) == digest_of("v1")
    assert registry.find_tensors("acme", msgspec.structs.replace(file, size=3)) is None
    registry.delete_version(version("v1", tenant="acme"))
    registry.commit_version(new_version())
    assert registry.finish_drain("acme", "bot", digest_of("v1")) is True


def test_sixteen_digits_find_a_version_unless_two_share_them(registry: Registry, tmp_path: Path) -> None:
    registry.commit_version(new_version())
    short = AdapterReference(tenant=T, adapter="bot", version=digest_of("v1")[:16])
    assert registry.get_version(short).digest == digest_of("v1")
    registry.commit_version(msgspec.structs.replace(new_version(), digest=digest_of("v1")[:16] + "0" * 48))
    with pytest.raises(InvalidRequest, match="ambiguous"):
        registry.get_version(short)
    assert registry.get_version(version("v1")).digest == digest_of("v1")


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


def test_adapters_are_listed_by_name_prefix_and_labels(registry: Registry) -> None:
    for name in ("b", "a", "a%", "a_x", "ab"):
        if name != "a%":
            registry.commit_version(new_version(adapter=name), labels={"team": name[0], "tier": "1"})
    listed = [record.adapter for record in registry.list_adapters(T, limit=10)[0]]
    assert listed == ["a", "a_x", "ab", "b"]
    assert [r.adapter for r in registry.list_adapters(T, limit=2, after="a")[0]] == ["a_x", "ab"]
    assert [r.adapter for r in registry.list_adapters(T, limit=9, prefix="a_")[0]] == ["a_x"]
    assert [r.adapter for r in registry.list_adapters(T, limit=9, labels={"team": "b"})[0]] == ["b"]
    assert registry.list_adapters(T, limit=9, labels={"team": "b", "tier": "2"})[0] == []


def test_versions_are_listed_newest_first_by_state(registry: Registry) -> None:
    for content in ("v1", "v2", "v3"):
        registry.commit_version(new_version(content=content))
    registry.delete_version(version("v2"))
    registry.finish_drain(T, "bot", digest_of("v2"))
    listed, revision = registry.list_versions(T, "bot", limit=10)
    assert [item.digest for item in listed] == [digest_of("v3"), digest_of("v1")]
    assert revision == 4
    older, _ = registry.list_versions(T, "bot", limit=10, before=listed[0].revision)
    assert [item.digest for item in older] == [digest_of("v1")]
    deleted, _ = registry.list_versions(T, "bot", limit=10, states=[VersionState.DELETED])
    assert [item.digest for item in deleted] == [digest_of("v2")]


def test_quotas_of_adapters_and_versions(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r.sqlite", limits=RegistryLimits(adapters=1, versions=2, deleted_versions=1))
    registry.commit_version(new_version())
    with pytest.raises(ResourceExhausted) as caught:
        registry.commit_version(new_version(adapter="bot2"))
    assert caught.value.reason is Reason.TENANT_QUOTA
    registry.commit_version(new_version(content="v2"))
    registry.commit_version(new_version(content="v2"))
    with pytest.raises(ResourceExhausted):
        registry.commit_version(new_version(content="v3"))
    registry.commit_version(new_version(tenant="acme"))
    for content in ("v1", "v2"):
        registry.delete_version(version(content))
        registry.finish_drain(T, "bot", digest_of(content))
    deleted, _ = registry.list_versions(T, "bot", limit=10, states=[VersionState.DELETED])
    assert len(deleted) == 1
    registry.close()


def test_labels_of_an_existing_adapter_do_not_change_by_an_upload(registry: Registry) -> None:
    registry.commit_version(new_version(), labels={"a": "1"})
    registry.commit_version(new_version(content="v2"))
    registry.commit_version(new_version(content="v3"), labels={"a": "1"})
    with pytest.raises(InvalidRequest, match="other labels"):
        registry.commit_version(new_version(content="v4"), labels={"a": "2"})


def test_a_tenant_keeps_its_salt_and_hides_it(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r.sqlite")
    made = registry.ensure_tenant("default")
    other = registry.ensure_tenant("acme")
    assert len(made.salt) == 32 and made.salt != other.salt
    assert made.allow_base and made.default_adapter is None
    changed = registry.configure_tenant("default", weight=2.0, default_adapter="bot", allow_base=False)
    assert changed.salt == made.salt and not changed.allow_base
    registry.close()
    registry = Registry(tmp_path / "r.sqlite")
    assert registry.ensure_tenant("default") == changed
    assert repr(made.salt) not in repr(made)
    registry.close()


def test_the_snapshot_has_everything_and_survives_a_restart(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r.sqlite")
    registry.ensure_tenant(T)
    for content in ("v1", "v2"):
        registry.commit_version(new_version(content=content))
    change = registry.update_adapter(T, "bot", traffic=[target("v2")])
    before = registry.snapshot()
    registry.close()
    registry = Registry(tmp_path / "r.sqlite")
    after = registry.snapshot()
    assert after == before
    assert after.revision == 3 and after.adapters[T, "bot"] == change.state
    registry.close()


def test_recovery_names_what_the_registry_made_and_nothing_uses(registry: Registry) -> None:
    registry.commit_version(new_version())
    registry.commit_version(new_version(content="draining"))
    registry.delete_version(version("draining"))
    assert registry.begin_object(T, digest_of("crashed")) is False
    assert registry.begin_object(T, digest_of("v1")) is True
    assert set(registry.recover()) == {(T, digest_of("draining")), (T, digest_of("crashed"))}
    registry.forget_objects()
    assert registry.recover() == []
    assert registry.get_version(version("draining")).state is VersionState.DELETED


def test_an_object_is_noted_until_it_has_left_the_store(registry: Registry) -> None:
    registry.commit_version(new_version())
    registry.delete_version(version("v1"))
    assert registry.finish_drain(T, "bot", digest_of("v1")) is True
    assert registry.recover() == [(T, digest_of("v1"))]
    registry.abandon_object(T, digest_of("v1"))
    assert registry.recover() == []


@pytest.mark.parametrize("crash", [False, True])
def test_nothing_is_remembered_of_a_deleted_adapter(registry: Registry, crash: bool) -> None:
    registry.commit_version(new_version())
    registry.commit_version(new_version(content="v2"))
    registry.delete_version(version("v2"))
    registry.finish_drain(T, "bot", digest_of("v2"))
    registry.delete_adapter(T, "bot")
    if crash:
        assert (T, digest_of("v1")) in registry.recover()
    else:
        assert registry.finish_drain(T, "bot", digest_of("v1")) is True
    for content in ("v1", "v2"):
        with pytest.raises(NotFound):
            registry.get_version(version(content))


def test_a_bug_of_ours_is_not_reported_as_an_outage(registry: Registry) -> None:
    with pytest.raises(IntegrityError), registry._database.write() as connection:
        connection.execute(insert(schema.state).values(id=1, schema_version=1, revision=0))


def test_a_commit_settles_the_note_of_its_object(registry: Registry) -> None:
    registry.begin_object(T, digest_of("v1"))
    registry.commit_version(new_version())
    assert registry.recover() == []
    assert registry.begin_object(T, digest_of("x")) is False
    registry.abandon_object(T, digest_of("x"))
    assert registry.recover() == []


def test_the_file_is_private(tmp_path: Path) -> None:
    Registry(tmp_path / "r.sqlite").close()
    assert (tmp_path / "r.sqlite").stat().st_mode & 0o077 == 0


def test_it_writes_ahead(registry: Registry, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "registry.sqlite") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


class RegistryMachine(RuleBasedStateMachine):
    """Random changes keep the invariants, and revisions only grow."""

    contents = st.sampled_from(["v1", "v2", "v3"])
    adapters = st.sampled_from(["a", "b"])

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.registry = Registry(Path(self.directory.name) / "r.sqlite")
        self.revision = 0

    def attempt(self, work) -> None:  # type: ignore[no-untyped-def]
        try:
            change = work()
        except LoramuxServerError:
            return
        assert change.revision >= self.revision
        self.revision = change.revision

    @rule(adapter=adapters, content=contents)
    def commit(self, adapter: str, content: str) -> None:
        self.attempt(lambda: self.registry.commit_version(new_version(adapter=adapter, content=content)))

    @rule(adapter=adapters, contents=st.lists(contents, max_size=3, unique=True), weight=st.integers(1, 5))
    def move(self, adapter: str, contents: list[str], weight: int) -> None:
        targets = [target(content, weight + index) for index, content in enumerate(contents)]
        self.attempt(lambda: self.registry.update_adapter(T, adapter, traffic=targets))

    @rule(adapter=adapters, content=contents)
    def delete_version(self, adapter: str, content: str) -> None:
        self.attempt(lambda: self.registry.delete_version(version(content, adapter)))

    @rule(adapter=adapters)
    def delete_adapter(self, adapter: str) -> None:
        self.attempt(lambda: self.registry.delete_adapter(T, adapter))

    @rule(adapter=adapters, content=contents)
    def drained(self, adapter: str, content: str) -> None:
        self.registry.finish_drain(T, adapter, digest_of(content))

    @rule()
    def recover(self) -> None:
        self.registry.recover()
        self.registry.forget_objects()

    @invariant()
    def holds(self) -> None:
        self.registry.check_integrity()

    def teardown(self) -> None:
        self.registry.close()
        self.directory.cleanup()


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
