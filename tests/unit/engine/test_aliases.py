from collections import Counter

from loramux_server.engine.aliases import AliasTable
from loramux_server.engine.messages import AliasSpec


def table(*targets: tuple[str, float], revision: int = 1) -> AliasTable:
    aliases = AliasTable()
    aliases.put(AliasSpec(alias="a", targets=list(targets), revision=revision))
    return aliases


def choices(aliases: AliasTable, count: int = 2000) -> dict[str, str]:
    chosen: dict[str, str] = {}
    for number in range(count):
        target = aliases.resolve("a", split_key=f"user{number}", seed=0)
        assert target is not None
        chosen[f"user{number}"] = target[0]
    return chosen


def test_shares_follow_the_weights() -> None:
    shares = Counter(choices(table(("v", 3.0), ("w", 1.0))).values())
    assert 0.71 < shares["v"] / 2000 < 0.79


def test_raising_a_weight_moves_keys_one_way_only() -> None:
    before = choices(table(("v", 9.0), ("w", 1.0), ("x", 2.0)))
    after = choices(table(("v", 9.0), ("w", 4.0), ("x", 2.0)))
    moved = {key for key in before if before[key] != after[key]}
    assert moved and all(after[key] == "w" for key in moved)


def test_removing_a_version_moves_only_its_keys() -> None:
    before = choices(table(("v", 1.0), ("w", 1.0), ("x", 1.0)))
    after = choices(table(("w", 1.0), ("x", 1.0)))
    assert all(before[key] == after[key] for key in before if before[key] != "v")


def test_choice_does_not_depend_on_order_or_revision() -> None:
    assert choices(table(("v", 1.0), ("w", 1.0))) == choices(table(("w", 1.0), ("v", 1.0), revision=9))


def test_without_a_key_the_seed_draws() -> None:
    aliases = table(("v", 1.0), ("w", 1.0))
    drawn = [aliases.resolve("a", split_key="", seed=seed) for seed in range(200)]
    assert drawn == [aliases.resolve("a", split_key="", seed=seed) for seed in range(200)]
    assert 60 < drawn.count(("v", 1)) < 140
    assert any(aliases.resolve("a", split_key=str(seed), seed=0) != drawn[seed] for seed in range(200))


def test_an_older_revision_changes_nothing() -> None:
    aliases = table(("v", 1.0), revision=5)
    aliases.put(AliasSpec(alias="a", targets=[("w", 1.0)], revision=4))
    aliases.drop("a", 4)
    assert aliases.resolve("a", split_key="", seed=0) == ("v", 5)
    aliases.drop("a", 6)
    aliases.put(AliasSpec(alias="a", targets=[("w", 1.0)], revision=5))
    assert aliases.resolve("a", split_key="", seed=0) is None
    aliases.put(AliasSpec(alias="a", targets=[("w", 1.0)], revision=7))
    assert aliases.resolve("a", split_key="", seed=0) == ("w", 7)


def test_an_alias_without_targets_serves_nothing() -> None:
    assert table().resolve("a", split_key="", seed=0) is None
    assert AliasTable().resolve("a", split_key="", seed=0) is None
