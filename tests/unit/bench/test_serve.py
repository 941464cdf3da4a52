import json
import sys
from pathlib import Path

import pytest
import serve


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["serve.py", *flags])
    serve.main()


def test_one_process_measures_every_combination_on_engines_that_take_the_runner_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    run(
        monkeypatch,
        *("--work", str(tmp_path / "work"), "--skip", "grpc", "--concurrency", "1,3", "--prompt", "20", "--new", "4"),
        *("--adapters", "0,2,zipf", "--zipf-adapters", "5", "--zipf-slots", "2", "--adapter-files", "2"),
        *("--sampling", "greedy,logprobs", "--schedule-ahead", "both", "--adapter-times", "--json", str(file)),
    )
    found = json.loads(file.read_text())
    rows = found["rows"]
    # Two launch orders x two samplings x (two mixes x two concurrencies, and the closed Zipf loop).
    assert len(rows) == 2 * 2 * (2 * 2 + 1)
    assert {row["ahead"] for row in rows} == {False, True}
    assert all(row["output"] > 0 and row["resident_weight_bytes"] > 0 and row["parts"] for row in rows)
    assert all((row["mode"] == "closed") == row["adapters"].startswith("zipf") for row in rows)
    [engine] = found["engines"]
    times = engine["adapter_times"]
    assert times["samples"] == 4
    assert times["resident_ttft_ms"] > 0
    assert "| engine | nf4+shadow | on | logprobs | 2 | 3 |" in capsys.readouterr().out
    run(monkeypatch, "--from", str(file), "--plot", str(tmp_path / "rows.png"))
    drawn = (tmp_path / "rows.png").is_file()
    assert drawn or "no plot: plots need matplotlib" in capsys.readouterr().out


def test_a_run_past_its_limit_loads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--work", str(tmp_path / "work"), "--adapters", "0", "--limit-s", "0.000001")
    assert capsys.readouterr().out.count("not measured") == 2
