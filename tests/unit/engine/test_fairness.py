from loramux_server.engine.fairness import RoundRobin


def active(*keys: str) -> RoundRobin:
    policy = RoundRobin()
    for key in keys:
        policy.activate(key, 1.0)
    return policy


def test_the_key_admitted_longest_ago_is_next() -> None:
    policy = active("a", "b", "c")
    order = []
    for _ in range(6):
        key = policy.pick({"a", "b", "c"})
        policy.admitted(key)
        order.append(key)
    assert order == ["a", "b", "c", "a", "b", "c"]


def test_a_new_key_goes_last_and_cannot_jump_the_queue_by_leaving() -> None:
    policy = active("a", "b")
    policy.admitted("a")
    policy.deactivate("a")
    policy.activate("a", 1.0)
    assert policy.pick(["a", "b"]) == "b"


def test_service_is_counted_by_weight_and_a_new_key_starts_at_the_least() -> None:
    policy = active("a", "b")
    policy.activate("b", 4.0)
    policy.charge("a", 100)
    policy.charge("b", 200)
    assert (policy.served("a"), policy.served("b")) == (100.0, 50.0)
    policy.activate("c", 1.0)
    assert policy.served("c") == 50.0
