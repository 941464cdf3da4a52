"""A decode step by kernel: sums, overlaps, gaps; and the command from a run to the plot."""

import json
import sys
from pathlib import Path

import profile_step
import pytest
from step_profile import Kernel, StepProfile, part_of, step_profile

# Two steps of 100 us; the expand overlaps the product, 20 us of each step are empty.
KERNELS = [
    *(Kernel(name="nvjet_product", begin=begin, end=begin + 60) for begin in (0.0, 100.0)),
    *(Kernel(name="_expand", begin=begin, end=begin + 40) for begin in (40.0, 140.0)),
]


def found(step_s: float = 100e-6) -> StepProfile:
    return step_profile(KERNELS, steps=2, step_s=step_s, rows=64, adapters=32, weights="nf4")


class TestSums:
    def test_overlaps_count_once_in_busy_and_twice_in_the_sum(self) -> None:
        step = found()
        assert (step.kernel_ms, step.busy_ms) == (pytest.approx(0.100), pytest.approx(0.080))
        assert step.parts == {"LoRA": pytest.approx(0.040), "dense product": pytest.approx(0.060)}
        assert step.kernels == [("nvjet_product", 1.0, pytest.approx(0.06)), ("_expand", 1.0, pytest.approx(0.04))]
        assert step.launches == 2

    def test_gaps_are_what_no_kernel_fills(self) -> None:
        step = found()
        assert (step.gap_ms, step.gap_share) == (pytest.approx(0.020), pytest.approx(0.2))
        assert step.timeline_gap_share == pytest.approx(20 / 180)
        assert found(step_s=82e-6).gap_share == pytest.approx(2 / 82)
        assert found(step_s=70e-6).gap_ms == 0.0

    def test_a_profile_of_nothing_is_refused(self) -> None:
        with pytest.raises(ValueError, match="saw no kernel"):
            step_profile([], steps=2, step_s=1.0, rows=1, adapters=0, weights="nf4")

    def test_parts_by_name(self) -> None:
        names = ("_shrink", "_attend_0d", "kgemm_4bit_inference", "Memcpy DtoH", "mystery")
        assert [part_of(name) for name in names] == ["LoRA", "attention", "NF4 product", "copies", "other"]


def test_the_report_holds_the_sum_against_the_step() -> None:
    text = found().report()
    assert "64 rows, 32 adapters, nf4: 0.10 ms a step" in text
    assert "kernels: 0.10 ms in 2 launches = 100.0% of the step; busy 0.08 ms" in text
    assert "gaps: 0.02 ms = 20.0% of the step, MORE THAN the 5% allowed; 11.1% of the profiled timeline" in text
    assert "within the 5% allowed" in found(step_s=82e-6).report()
    assert "2 others" in found().report(most=0) and "1 other" in found().report(most=1)


def test_from_a_run_to_the_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["profile_step.py", *flags])
        profile_step.main()
        return capsys.readouterr().out

    file = tmp_path / "profile.json"
    monkeypatch.setattr(profile_step, "CLOCKED_STEPS", 2)
    printed = run(
        *("--work", str(tmp_path / "work"), "--random", "tiny", "--device", "cpu", "--concurrency", "2"),
        *("--adapters", "2", "--prompt", "20", "--json", str(file)),
    )
    steps = json.loads(file.read_text())["steps"]
    assert [(step["rows"], step["adapters"], step["weights"]) for step in steps] == [
        (2, 0, "nf4+shadow"),
        (2, 2, "nf4+shadow"),
    ]
    for step in steps:
        assert 0 < step["busy_ms"] <= step["kernel_ms"] + 1e-9
        assert step["kernel_ms"] == pytest.approx(sum(step["parts"].values()))
        assert step["gap_share"] == pytest.approx(max(0, 1 - step["busy_ms"] / step["step_ms"]))
    again = run("--from", str(file), "--plot", str(tmp_path / "profile.png"))
    assert again.startswith(printed)
    assert (tmp_path / "profile.png").is_file() or "no plot: plots need matplotlib" in again
