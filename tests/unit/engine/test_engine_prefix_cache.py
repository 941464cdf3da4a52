"""Whose cached prefix a request finds, and what leaves the cache."""

from loramux_server.engine.messages import DropVersion
from tests.support.engine_driver import Driver, finish, make_driver


class TestPrefixCache:
    PROMPT = list(range(10))

    def cached(self, driver: Driver, name: str, **fields: object) -> int:
        request = driver.add(name, self.PROMPT, max_tokens=1, **fields)
        driver.run()
        assert request.started is not None
        return request.started.cached_tokens

    def test_only_the_same_tenant_adapter_and_version_hits(self) -> None:
        driver = make_driver(page_size=4)
        driver.put("v", "w")
        keys: list[dict[str, object]] = [
            {"salt": b"s"},
            {"salt": b"t"},
            {"salt": b"s", "version": "v"},
            {"salt": b"s", "version": "w"},
            {"salt": b"t", "version": "v"},
            {"salt": b"digest-v"},
        ]
        assert [self.cached(driver, f"cold{index}", **key) for index, key in enumerate(keys)] == [0] * 6
        assert [self.cached(driver, f"warm{index}", **key) for index, key in enumerate(keys)] == [8] * 6
        finish(driver)

    def test_the_last_prompt_token_is_always_computed(self) -> None:
        driver = make_driver(page_size=5)
        assert self.cached(driver, "cold") == 0
        assert self.cached(driver, "warm") == 5
        assert self.cached(driver, "many", n=3) == 5
        finish(driver)

    def test_output_is_reused_by_the_next_turn(self) -> None:
        driver = make_driver(page_size=4)
        first = driver.add("first", [1, 2, 3], max_tokens=6)
        driver.run()
        turn = driver.add("turn", [1, 2, 3, *first.tokens[0], 9], max_tokens=1)
        finish(driver)
        assert turn.started is not None and turn.started.cached_tokens == 8

    def test_off_means_off(self) -> None:
        driver = make_driver(prefix_cache=False)
        assert [self.cached(driver, name) for name in ("a", "b")] == [0, 0]
        assert driver.engine.stats().kv_pages_cached == 0

    def test_a_dropped_version_leaves_slab_and_cache(self) -> None:
        driver = make_driver(page_size=4)
        driver.put("v")
        assert self.cached(driver, "cold", version="v") == 0
        assert driver.engine.stats().kv_pages_cached > 0
        driver.engine.handle([DropVersion(version="v")])
        driver.run()
        assert driver.engine.stats().kv_pages_cached == 0 and driver.runner.slab.resident == {}
        assert (driver.states[-1].dropped, driver.states[-1].residency) == (True, "store")
        driver.put("v")
        assert self.cached(driver, "again", version="v") == 0

    def test_freed_pages_are_poisoned(self) -> None:
        driver = make_driver(prefix_cache=False)
        driver.add("r", list(range(10)), max_tokens=1)
        finish(driver)
        assert driver.runner.poisoned == 3
