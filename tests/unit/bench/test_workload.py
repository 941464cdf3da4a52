import argparse
from pathlib import Path

import pytest
import torch
from adapter_times import drop_page_cache
from drive import parts_between, random_prompts
from random_model import SHAPES
from settings import Settings, make_parser
from workload import Adapters, parse_adapters, slots_needed, write_adapters

from loramux_base.adapter import version_digest


def arguments(*flags: str) -> argparse.Namespace:
    return make_parser("").parse_args(list(flags))


class TestAdapters:
    def test_round_robin_and_base(self) -> None:
        assert Adapters(count=0).picks(3, seed=1) == [None] * 3
        assert Adapters(count=2).picks(5, seed=1) == [0, 1, 0, 1, 0]
        assert (Adapters(count=0).label, Adapters(count=2).label) == ("base", "2")

    def test_zipf_is_drawn_again_the_same_and_has_a_long_tail(self) -> None:
        run = Adapters(count=50, zipf=True, slots=8)
        picks = run.picks(4000, seed=3)
        assert picks == run.picks(4000, seed=3)
        assert picks.count(0) > 1.5 * picks.count(1) > picks.count(20) > 0
        assert run.label == "zipf50/8"

    def test_the_flag_is_read(self) -> None:
        runs = parse_adapters("0,8,zipf", zipf_adapters=200, zipf_slots=32)
        assert [run.label for run in runs] == ["base", "8", "zipf200/32"]
        assert slots_needed(runs) == 32
        assert slots_needed(runs[:2]) == 16
        with pytest.raises(ValueError, match="--adapters 'many'"):
            parse_adapters("many", zipf_adapters=2, zipf_slots=1)

    def test_links_are_versions_of_their_own(self, tmp_path: Path) -> None:
        device = torch.device("cpu")
        paths = write_adapters(tmp_path, SHAPES["tiny"], count=3, rank=4, files=1, device=device)
        assert len({version_digest(path) for path in paths}) == 3
        assert len({(path / "adapter_model.safetensors").stat().st_ino for path in paths}) == 1
        assert write_adapters(tmp_path, SHAPES["tiny"], count=3, rank=4, files=1, device=device) == paths


class TestSettings:
    def test_the_old_flags_still_mean_what_they_meant(self) -> None:
        settings = Settings.of(arguments("--no-shadow", "--sampled", "--concurrency", "8,64", "--adapters", "32"))
        assert settings.shadows == (False,)
        assert settings.aheads == (None,)
        assert settings.sampling == ["sampled"]
        assert (settings.concurrency, settings.slots) == ([8, 64], 32)
        assert Settings.of(arguments("--shadow")).shadows == (True,)
        assert arguments("--out", "rows.json").json == Path("rows.json")

    def test_both_is_off_then_on(self) -> None:
        settings = Settings.of(arguments("--shadow", "both", "--schedule-ahead", "both"))
        assert settings.shadows == settings.aheads == (False, True)

    @pytest.mark.parametrize(
        ("flags", "match"),
        [
            (("--sampling", "beam"), "--sampling 'beam'"),
            (("--shadow", "both", "--weights", "bf16"), "only nf4"),
            (("--concurrency", "0"), "from 1"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, flags: tuple[str, ...], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            Settings.of(arguments(*flags))

    def test_nothing_starts_after_the_limit(self, capsys: pytest.CaptureFixture[str]) -> None:
        settings = Settings.of(arguments("--limit-s", "0.000001"))
        assert not settings.time_left("engine")
        assert "engine not measured" in capsys.readouterr().out
        assert Settings.of(arguments()).time_left("engine")


def test_parts_are_those_between_two_readings() -> None:
    assert parts_between({"forward": 1.0}, 10, {"forward": 1.5, "wait": 0.1}, 20) == pytest.approx(
        {"forward": 50.0, "wait": 10.0}
    )


def test_prompts_are_drawn_again_the_same_and_hold_no_special_token() -> None:
    prompts = random_prompts(2, 50, vocab=9, seed=4)
    assert prompts == random_prompts(2, 50, vocab=9, seed=4)
    assert prompts[0] != prompts[1]
    assert {token for prompt in prompts for token in prompt} <= set(range(3, 9))


def test_the_page_cache_of_a_directory_is_counted(tmp_path: Path) -> None:
    assert drop_page_cache(tmp_path) == 0.0
    (tmp_path / "empty").touch()
    (tmp_path / "full").write_bytes(bytes(100_000))
    assert 0.0 <= drop_page_cache(tmp_path) <= 1.0
