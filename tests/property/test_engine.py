"""Random histories of commands and steps: every request ends once, with the tokens it gives alone; nothing leaks."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from loramux_server.engine.messages import Abort, DropAlias, DropVersion, Preload, Shutdown, Unload
from tests.support.engine_driver import Driver, make_driver

VERSIONS = ["v0", "v1", "v2", "v3", "v4", "v5"]
ALIASES = ["a", "b"]
UNITS = {f"/{name}": units for name, units in zip(VERSIONS, [1, 1, 2, 3, 4, 9], strict=True)}

names = st.sampled_from(VERSIONS)
aliases = st.sampled_from(ALIASES)


class EngineMachine(RuleBasedStateMachine):
    requests = Bundle("requests")

    driver: Driver
    count: int = 0
    revision: int = 0
    operations: int = 0

    @initialize(
        pages=st.integers(5, 14),
        page_size=st.sampled_from([1, 2, 4]),
        max_running=st.integers(2, 6),
        batch=st.integers(3, 24),
        chunk=st.integers(1, 9),
        cache=st.booleans(),
        slots=st.integers(1, 4),
        delay=st.integers(0, 3),
        reading=st.integers(0, 2),
        ahead=st.booleans(),
    )
    def start(
        self,
        pages: int,
        page_size: int,
        max_running: int,
        batch: int,
        chunk: int,
        cache: bool,
        slots: int,
        delay: int,
        reading: int,
        ahead: bool,
    ) -> None:
        self.driver = make_driver(
            pages=pages * 4 // page_size,
            page_size=page_size,
            rank_units=4,
            max_slots=slots,
            units=UNITS,
            delay=delay,
            reading=reading,
            max_running=max_running,
            max_batch_tokens=batch,
            prefill_chunk=chunk,
            prefix_cache=cache,
            schedule_ahead=ahead,
        )
        self.driver.put(*VERSIONS)
        self.driver.alias("a", ("v0", 1.0), ("v2", 1.0))

    @rule(
        target=requests,
        stem=st.sampled_from([[], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9, 9, 9, 9, 9, 9, 9, 9]]),
        tail=st.lists(st.integers(0, 3), min_size=1, max_size=6),
        output=st.integers(1, 9),
        n=st.integers(1, 3),
        seed=st.integers(0, 2),
        adapter=st.one_of(st.none(), names, st.sampled_from(["alias a", "alias b"])),
        key=st.sampled_from(["x", "y"]),
        priority=st.integers(0, 1),
        stop_ids=st.sampled_from([[], list(range(0, 64, 9))]),
        min_tokens=st.integers(0, 3),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        salt=st.sampled_from([b"s", b"t"]),
    )
    def add(
        self,
        stem: list[int],
        tail: list[int],
        output: int,
        n: int,
        seed: int,
        adapter: str | None,
        key: str,
        priority: int,
        stop_ids: list[int],
        min_tokens: int,
        prompt_logprobs: int | None,
        salt: bytes,
    ) -> str:
        self.count += 1
        request_id = f"r{self.count}"
        alias = adapter.removeprefix("alias ") if adapter is not None and adapter.startswith("alias ") else None
        self.driver.add(
            request_id,
            stem + tail,
            max_tokens=output,
            n=n,
            seed=seed,
            alias=alias,
            version=None if alias is not None else adapter,
            fairness_key=key,
            priority=priority,
            eos_token_ids=stop_ids,
            min_tokens=min_tokens,
            prompt_logprobs=prompt_logprobs,
            salt=salt,
        )
        return request_id

    @rule(count=st.integers(1, 8))
    def steps(self, count: int) -> None:
        self.driver.step(count)

    @rule(request_id=requests)
    def abort(self, request_id: str) -> None:
        self.driver.engine.handle([Abort(request_id=request_id)])

    @rule(request_id=requests, again=st.integers(1, 3))
    def repeat_add(self, request_id: str, again: int) -> None:
        self.driver.engine.handle([self.driver.requests[request_id].add] * again)

    @rule(request_id=requests, index=st.integers(0, 2), tokens=st.integers(1, 8))
    def stop(self, request_id: str, index: int, tokens: int) -> None:
        self.driver.stop(request_id, index, tokens)

    @rule(alias=aliases, split=st.lists(st.tuples(names, st.sampled_from([0.5, 1.0, 4.0])), max_size=3))
    def point(self, alias: str, split: list[tuple[str, float]]) -> None:
        self.revision += 1
        self.driver.alias(alias, *split, revision=self.revision + 1)

    @rule(alias=aliases)
    def drop_alias(self, alias: str) -> None:
        self.revision += 1
        self.driver.engine.handle([DropAlias(alias=alias, revision=self.revision + 1)])

    @rule(name=names)
    def drop_version(self, name: str) -> None:
        self.driver.engine.handle([DropVersion(version=name)])

    @rule(name=names)
    def put_version(self, name: str) -> None:
        self.driver.put(name)

    @rule(name=names, load=st.booleans())
    def operate(self, name: str, load: bool) -> None:
        self.operations += 1
        kind = Preload if load else Unload
        self.driver.engine.handle([kind(operation_id=f"o{self.operations}", version=name)])

    @rule(name=names, failing=st.booleans())
    def break_load(self, name: str, failing: bool) -> None:
        slab = self.driver.runner.slab
        if failing:
            slab.failing[f"/{name}"] = OSError("gone")
        else:
            slab.failing.pop(f"/{name}", None)

    @rule(name=names, bad=st.booleans())
    def break_numerics(self, name: str, bad: bool) -> None:
        paths = self.driver.runner.non_finite_paths
        if bad:
            paths.add(f"/{name}")
        else:
            paths.discard(f"/{name}")

    @rule(capacity=st.sampled_from([None, 1, 2, 5]))
    def shrink_device(self, capacity: int | None) -> None:
        self.driver.runner.token_capacity = capacity

    @rule(seconds=st.sampled_from([0.1, 20.0]))
    def wait(self, seconds: float) -> None:
        self.driver.clock.now += seconds

    @invariant()
    def integrity(self) -> None:
        if hasattr(self, "driver"):
            self.driver.engine.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "driver"):
            return
        driver = self.driver
        driver.clock.now += 20.0
        driver.run()
        driver.judge()
        driver.assert_at_rest()
        assert len(driver.completed) == self.operations
        driver.engine.handle([DropVersion(version=name) for name in VERSIONS])
        driver.run()
        assert driver.runner.slab.resident == {}
        driver.engine.handle([Shutdown()])
        driver.run()
        driver.assert_at_rest()


EngineMachine.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestEngine = EngineMachine.TestCase
