from loramux_server.engine.adapter_version import Room
from loramux_server.engine.messages import Completed, Event, VersionSpec, VersionState
from loramux_server.engine.residency import AdapterResidency
from tests.support.engine_driver import version
from tests.support.fake_runner import FakeSlab

NOW = 0.0


class Slab:
    """A residency over a fake slab; versions are `a`, `b`, ... of one rank unit unless told."""

    def __init__(
        self, *, rank_units: int = 4, max_slots: int = 8, units: dict[str, int] | None = None, host_size: int = 0
    ) -> None:
        sizes = {f"/{name}": size for name, size in (units or {}).items()}
        self.fake = FakeSlab(rank_units=rank_units, max_slots=max_slots, units=sizes, host_size=host_size)
        self.events: list[Event] = []
        self.forgotten: list[str] = []
        self.residency = AdapterResidency(self.fake, emit=self.events.append, on_forget=self.forgotten.append)
        for name in "abcdef":
            self.residency.put(version(name))

    def load(self, *names: str) -> None:
        for name in names:
            assert self.residency.want(name) is Room.LOADING
            assert self.residency.poll(NOW) == []
            assert self.residency.want(name) is Room.READY
            self.residency.end_of_pass()

    def resident(self) -> set[str]:
        return {path.removeprefix("/") for path in self.fake.resident.values()}


def test_a_fresh_load_is_not_evicted_before_its_request_had_its_turn() -> None:
    slab = Slab(rank_units=1)
    assert slab.residency.want("a") is Room.LOADING
    slab.residency.poll(NOW)
    assert slab.residency.want("b") is Room.NONE
    slab.residency.end_of_pass()
    assert slab.residency.want("b") is Room.LOADING
    assert slab.resident() == {"b"} and slab.residency.evictions == 1


def test_room_that_appears_is_noticed() -> None:
    slab = Slab(rank_units=2, units={"c": 2})
    slab.load("a", "b")
    slots = [slab.residency.acquire("a"), slab.residency.acquire("b")]
    assert len(set(slots)) == 2
    assert slab.residency.want("c") is Room.NONE and slab.residency.want("d") is Room.NONE
    slab.residency.release("a")
    assert slab.residency.want("c") is Room.NONE
    slab.residency.check_integrity(references={}, uses={"b": 1})
    slab.residency.release("b")
    assert slab.residency.want("c") is Room.LOADING
    slab.residency.check_integrity(references={}, uses={})


def test_a_reservation_keeps_newcomers_out_of_its_window_only() -> None:
    slab = Slab(rank_units=3, units={"b": 2, "c": 2})
    slab.load("a", "b")
    slab.residency.acquire("a")
    for _ in range(3):
        slab.residency.acquire("a")
    slab.residency.acquire("b")
    assert slab.residency.want("c") is Room.NONE
    slab.residency.reserve("c")
    assert slab.residency.want("b", newcomer=True) is Room.NONE
    assert slab.residency.want("b") is Room.READY
    assert slab.residency.want("a", newcomer=True) is Room.READY
    slab.residency.release("b")
    assert slab.residency.want("d", newcomer=True) is Room.NONE
    assert slab.residency.want("c") is Room.LOADING
    slab.residency.reserve(None)
    assert slab.residency.want("b", newcomer=True) is Room.NONE


def test_a_reservation_follows_what_older_requests_load() -> None:
    slab = Slab(rank_units=2, units={"c": 2})
    slab.load("a")
    slab.residency.acquire("a")
    assert slab.residency.want("c") is Room.NONE
    slab.residency.reserve("c")
    assert slab.residency.want("b") is Room.LOADING
    slab.residency.poll(NOW)
    slab.residency.acquire("b")
    slab.residency.reserve("c")
    assert slab.residency.want("a", newcomer=True) is Room.NONE
    assert slab.residency.want("b", newcomer=True) is Room.NONE


def test_events_tell_every_change_of_residency() -> None:
    slab = Slab(rank_units=1)
    slab.load("a")
    slab.residency.bind("a")
    slab.residency.drop("a")
    slab.residency.want("b")
    slab.residency.unbind("a")
    states = [(e.version, e.residency, e.references, e.dropped) for e in slab.events if isinstance(e, VersionState)]
    assert states == [("a", "gpu", 0, False), ("a", "gpu", 1, False), ("a", "store", 1, False), ("a", "store", 0, True)]
    assert slab.forgotten == ["a"]


def references(events: list[Event]) -> list[tuple[str, int]]:
    return [(event.version, event.references) for event in events if isinstance(event, VersionState)]


def test_references_are_told_at_once_then_in_bulk() -> None:
    slab = Slab()
    for _ in range(3):
        slab.residency.bind("a")
    slab.residency.bind("b")
    assert references(slab.events) == [("a", 1), ("b", 1)]
    slab.residency.unbind("a")
    slab.residency.unbind("b")
    slab.events.clear()
    slab.residency.report_references()
    assert references(slab.events) == [("a", 2), ("b", 0)]
    slab.events.clear()
    slab.residency.report_references()
    assert slab.events == []
    slab.residency.unbind("a")
    slab.residency.unbind("a")
    assert slab.events == []
    slab.residency.drop("a")
    assert references(slab.events) == [("a", 0)], "the last word on a dropped version is not delayed"
    slab.residency.report_references()
    assert len(slab.events) == 1


def test_a_version_being_read_takes_no_room_and_holds_up_nobody() -> None:
    slab = Slab(rank_units=1)
    slab.fake.reading = 2
    slab.fake.asked["/b"] = 2
    assert slab.residency.want("a") is Room.LOADING
    assert slab.residency.rank_units_used == 0 and slab.fake.started == []
    slab.load("b")
    assert slab.residency.want("a") is Room.LOADING and slab.resident() == {"b"}
    assert slab.residency.want("a") is Room.LOADING and slab.resident() == {"a"}


def test_a_preload_waits_for_its_version_to_be_read() -> None:
    slab = Slab()
    slab.fake.reading = 2
    slab.residency.preload("p", "a", NOW)
    while slab.residency.pending:
        slab.residency.poll(NOW)
        slab.residency.check_integrity(references={}, uses={})
    assert [event.error for event in slab.events if isinstance(event, Completed)] == [None]
    assert slab.resident() == {"a"}


def test_operations_are_answered_once() -> None:
    slab = Slab()
    slab.residency.preload("p1", "a", NOW)
    slab.residency.preload("p2", "a", NOW)
    slab.residency.poll(NOW)
    slab.residency.acquire("a")
    slab.residency.unload("u1", "a")
    slab.residency.unload("u2", "a")
    assert slab.residency.want("a") is Room.NONE
    slab.residency.release("a")
    slab.residency.unload("u3", "a")
    answered = [event.operation_id for event in slab.events if isinstance(event, Completed)]
    assert answered == ["p1", "p2", "u1", "u2", "u3"]
    assert slab.resident() == set()


class TestHost:
    """Host memory between store and slab."""

    def levels(self, slab: Slab) -> list[tuple[str, str]]:
        slab.residency.check_integrity(references={}, uses={})
        told = [(event.version, event.residency) for event in slab.events if isinstance(event, VersionState)]
        slab.events.clear()
        return told

    def test_the_nearest_place_is_told(self) -> None:
        slab = Slab(rank_units=1, host_size=1)
        slab.residency.expect("a")
        assert self.levels(slab) == []
        slab.residency.poll(NOW)
        assert self.levels(slab) == [("a", "host")]
        slab.load("a")
        assert self.levels(slab) == [("a", "gpu")]
        slab.fake.lose("/a")
        slab.residency.poll(NOW)
        assert self.levels(slab) == [], "it is nearer than that"
        slab.load("b")
        assert self.levels(slab) == [("a", "store"), ("b", "gpu")]
        slab.residency.unload("u", "b")
        slab.residency.poll(NOW)
        assert self.levels(slab) == [("b", "host")]
        slab.fake.lose("/b")
        slab.residency.poll(NOW)
        assert self.levels(slab) == [("b", "store")]

    def test_a_failed_copy_leaves_the_rows_on_the_host(self) -> None:
        slab = Slab(host_size=1)
        slab.fake.failing["/a"] = RuntimeError("the device failed")
        assert slab.residency.want("a") is Room.LOADING
        assert [version for version, _ in slab.residency.poll(NOW)] == ["a"]
        assert self.levels(slab) == [("a", "host")]

    def test_what_finds_no_room_is_read_meanwhile(self) -> None:
        slab = Slab(rank_units=1)
        slab.load("a")
        slab.residency.acquire("a")
        assert slab.residency.want("b") is Room.NONE
        assert slab.fake.hinted == ["/b"]
        assert slab.residency.want("a") is Room.READY
        slab.residency.expect("a")
        assert slab.fake.hinted == ["/b"], "what is in the slab needs no hint"

    def test_a_dropped_version_is_forgotten_with_its_last_reference(self) -> None:
        slab = Slab(host_size=1)
        slab.load("a")
        slab.residency.bind("a")
        slab.residency.drop("a")
        assert slab.fake.forgotten == []
        slab.residency.unbind("a")
        assert slab.fake.forgotten == ["/a"] and slab.fake.host == set()

    def test_versions_of_one_directory_share_what_is_kept(self) -> None:
        slab = Slab(host_size=1)
        for name in ("x", "y"):
            slab.residency.put(VersionSpec(version=name, digest="d", path="/shared"))
        slab.residency.expect("x")
        slab.residency.poll(NOW)
        assert sorted(self.levels(slab)) == [("x", "host"), ("y", "host")]
        slab.residency.drop("x")
        assert slab.fake.forgotten == [] and slab.fake.host == {"/shared"}
        slab.residency.drop("y")
        assert slab.fake.forgotten == ["/shared"]

    def test_a_path_that_a_version_left_is_forgotten(self) -> None:
        slab = Slab(host_size=1)
        slab.residency.put(version("a"))
        assert slab.fake.forgotten == [], "the same one again"
        slab.residency.put(VersionSpec(version="a", digest="d", path="/moved"))
        assert slab.fake.forgotten == ["/a"]
        slab.load("a")
        slab.residency.check_integrity(references={}, uses={})
