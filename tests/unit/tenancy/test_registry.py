"""What the registry holds: reads, quotas, recovery, invariants under random changes."""

import sqlite3
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError

from loramux_server.errors import InvalidRequest, LoramuxServerError, NotFound, Reason, ResourceExhausted
from loramux_server.tenancy import schema
from loramux_server.tenancy.changes import RegistryLimits
from loramux_server.tenancy.names import AdapterReference
from loramux_server.tenancy.records import VersionState
from loramux_server.tenancy.registry import Registry
from tests.support.lifecycle_doubles import digest_of, new_version, tensors_record
from tests.support.registry_terms import T, target, version


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
