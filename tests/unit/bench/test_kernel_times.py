import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from kernel_cases import GROUPS, Bench
from kernel_results import CARDS, H100, Work, card_of, layer_sums, result, table
from kernel_sizes import SEVEN_B, Sizes
from kernel_timer import Call, ClockTimer
from kernel_times import main, measure, print_results, save

TINY = Sizes(
    hidden=128,
    intermediate=192,
    heads=4,
    kv_heads=2,
    head_dim=32,
    vocab=300,
    slots=3,
    rows=(1, 10),
    chunk=24,
    contexts=(40,),
    linear_rows=(1, 5),
    cache_bytes=1,
)


def tiny() -> Bench:
    return Bench(sizes=TINY, device=torch.device("cpu"), dtype=torch.float32)


class CountingTimer:
    """Runs each call once and says that it took a microsecond."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, calls: Sequence[Call], *, graph: bool) -> float:
        with torch.inference_mode():
            for call in calls:
                call()
        self.calls.append(len(calls))
        return 1e-6


class TestWork:
    def test_the_floor_is_the_slower_of_both_ways(self) -> None:
        assert Work(moved=int(H100.bytes_per_s)).floor(H100) == pytest.approx(1.0)
        assert Work(moved=1, flops=int(2 * H100.flops_per_s)).floor(H100) == pytest.approx(2.0)
        assert (Work(moved=1).bound(H100), Work(moved=1, flops=10**6).bound(H100)) == ("memory", "flops")

    def test_the_floor_is_the_cards_own(self) -> None:
        cards = [card_of(name) for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA L4")]
        assert [card.name for card in cards] == ["H200", "H100", "H100"] and len(CARDS) == 2
        assert str(cards[0]) == "H200: 4.8 TB/s, 989 TFLOP/s"
        of = {"group": "lora", "case": "c", "rows": 1, "work": Work(moved=48 * 10**9), "seconds": 0.02, "graph": True}
        assert result(**of, card=cards[0]).floor_us == pytest.approx(10_000)
        assert result(**of).floor_us == pytest.approx(14_328, abs=1)

    def test_bytes_of_a_known_product(self) -> None:
        bench = Bench(sizes=SEVEN_B, device=torch.device("cpu"), dtype=torch.bfloat16)
        cases = {(case.name, case.rows): case for case in bench.linear()}
        one = cases["gate_up dequantize", 1].work
        assert one.moved == 3584 * 37888 // 2 + 3584 * 37888 // 64 * 4 + 2 * (3584 + 37888)
        assert one.flops == 2 * 3584 * 37888

    def test_bytes_and_products_of_known_attention(self) -> None:
        bench = Bench(sizes=SEVEN_B, device=torch.device("cpu"), dtype=torch.bfloat16)
        cases = {(case.name, case.rows): case for case in bench.attention()}
        work = cases["decode, context 512", 8].work
        assert work.moved == 8 * 512 * 2 * 4 * 128 * 2 + 2 * 8 * 28 * 128 * 2
        assert work.flops == 4 * 28 * 128 * 8 * 512
        assert cases["prefill, 4 x 512", 2048].work.flops == 4 * 28 * 128 * 4 * 512 * 513 // 2


class TestMeasure:
    @pytest.mark.parametrize("group", GROUPS)
    def test_every_case_runs_on_operands_of_its_own(self, group: str) -> None:
        timer = CountingTimer()
        results = measure(tiny(), [group], timer)
        assert len(results) == len({(one.case, one.rows) for one in results}) > 0
        assert all(one.us == pytest.approx(1.0) and one.floor_us > 0 for one in results)
        assert min(timer.calls) >= 2

    def test_the_limit_leaves_out_and_says_so(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert measure(tiny(), ["small"], CountingTimer(), limit_s=0) == []
        assert "cases not measured" in capsys.readouterr().out

    def test_the_clock_gives_a_time(self) -> None:
        assert ClockTimer()([lambda: sum(range(1000))] * 2, graph=True) > 0


class TestTables:
    def test_a_cell_has_the_time_and_its_multiple_of_the_floor(self) -> None:
        work = Work(moved=int(H100.bytes_per_s * 1e-5))
        results = [
            result(group="lora", case="qkv both", rows=8, work=work, seconds=3e-5, graph=True),
            result(group="lora", case="o both", rows=1, work=work, seconds=2e-4, graph=False),
        ]
        text = table(results)
        assert "| qkv both |  | 30.0 (3.0) |" in text
        assert "| o both | 200 (20.0) host |  |" in text

    def test_sums_need_all_products(self) -> None:
        work = Work(moved=1)
        results = [
            result(group="linear", case=f"{name} dense", rows=1, work=work, seconds=1e-6, graph=True)
            for name in ("qkv", "o", "gate_up", "down")
        ]
        assert [
            (case, rows, pytest.approx(us)) for case, rows, us, _ in layer_sums(results, group="linear", products=4)
        ] == [("dense", 1, 4.0)]
        assert layer_sums(results[:3], group="linear", products=4) == []

    def test_results_are_written(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        results = measure(tiny(), ["linear"], CountingTimer())
        print_results(results, "card")
        assert "four products of a layer, dense, 5 rows" in capsys.readouterr().out
        save(results, {"device": "card"}, json_path=tmp_path / "k.json", plot_path=None)
        assert len(json.loads((tmp_path / "k.json").read_text())["results"]) == len(results)


class TestCommand:
    def test_what_was_written_is_printed_and_drawn_without_a_card(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        results = measure(tiny(), ["linear", "small"], CountingTimer())
        save(results, {"device": "card"}, json_path=tmp_path / "k.json", plot_path=None)
        print_results(results, "card")
        printed = capsys.readouterr().out
        assert main(["--from", str(tmp_path / "k.json"), "--plot", str(tmp_path / "k.png")]) == 0
        out = capsys.readouterr().out
        assert out.startswith(printed)
        assert (tmp_path / "k.png").is_file() or "no plot: plots need matplotlib" in out
        assert main(["--from", str(tmp_path / "k.json"), "--only", "small"]) == 0
        assert "**linear**" not in capsys.readouterr().out

    def test_an_unknown_group_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["--only", "lora,magic"])
        assert "--only 'magic'" in capsys.readouterr().err

    def test_without_a_card_it_says_so_in_a_line(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main([]) == 2
        assert capsys.readouterr().err.count("\n") == 1
