import json
from pathlib import Path

import pytest
from measure import StreamTimes, line, parts_table, percentile, summarize, summarize_closed, table
from plot import decode_series, parse_reference, selected, series_labels, step_parts
from report import Report, versions_differ


def stream(begun: float, *arrivals: float, prompt: int = 10) -> StreamTimes:
    return StreamTimes(begun=begun, prompt_tokens=prompt, arrivals=[(at, 1) for at in arrivals])


class TestSummarize:
    def test_decode_counts_what_comes_after_the_last_first_token(self) -> None:
        row = summarize([stream(0.0, 1.0, 2.0, 3.0), stream(0.0, 2.0, 3.0, 4.0)], path="engine", adapters="base")
        assert row.decode == pytest.approx(3 / 2)  # 3.0, 3.0, 4.0 within (2, 4]
        assert row.step_ms == pytest.approx(1000 * 2 / 1.5)
        assert row.prefill == pytest.approx(20 / 2)
        assert row.output == pytest.approx(6 / 4)
        assert (row.ttft_p50, row.gap_p99) == (pytest.approx(1500), pytest.approx(1000))

    def test_one_token_each_has_no_decode_rate(self) -> None:
        row = summarize([stream(0.0, 1.0)], path="engine", adapters="base")
        assert (row.decode, row.step_ms, row.gap_p50) == (0.0, 0.0, 0.0)

    def test_a_closed_loop_has_output_and_latencies_only(self) -> None:
        streams = [stream(0.0, 1.0, 2.0), stream(2.0, 2.5, 3.0)]
        row = summarize_closed(streams, seconds=4.0, clients=1, path="grpc", adapters="2")
        assert (row.mode, row.output, row.decode, row.prefill) == ("closed", 1.0, 0.0, 0.0)
        assert "grpc closed" in line(row)

    def test_percentiles_interpolate(self) -> None:
        assert percentile([], 50) == 0.0
        assert percentile([3.0], 99) == 3.0
        assert percentile([1.0, 2.0, 3.0], 50) == 2.0

    def test_every_line_has_the_cells_of_the_head(self) -> None:
        rows = [
            summarize([stream(0.0, 1.0, 2.0)], path="engine", adapters="base"),
            summarize_closed([stream(0.0, 1.0, 2.0)], seconds=1, clients=1, path="grpc", adapters="1"),
        ]
        assert len({text.count("|") for text in table(rows).splitlines()}) == 1


def row(**fields: object) -> dict[str, object]:
    usual = summarize([stream(0.0, 1.0, 2.0)], path="engine", adapters="base")
    return {**{name: getattr(usual, name) for name in type(usual).__slots__}, **fields}


class TestReport:
    def test_what_is_saved_is_loaded(self, tmp_path: Path) -> None:
        made = summarize([stream(0.0, 1.0, 2.0)], path="engine", adapters="base")
        report = Report(environment={"device": "card"}, arguments={"work": tmp_path}, path=tmp_path / "r.json")
        report.add(made)
        assert json.loads((tmp_path / "r.json").read_text())["arguments"] == {"work": str(tmp_path)}
        again = Report.load(tmp_path / "r.json")
        assert again.rows == [made]
        other = Report(environment={"device": "another"}, arguments={})
        assert not versions_differ([report, again])
        assert versions_differ([report, other])


class TestSeries:
    def rows(self) -> list[object]:
        from measure import Row

        return [
            Row(**row(concurrency=4, adapters="base", ahead=True, decode=40.0, parts={"forward": 1.0})),
            Row(**row(concurrency=1, adapters="base", ahead=True, decode=10.0, parts={"forward": 2.0})),
            Row(**row(concurrency=1, adapters="8", ahead=True, decode=8.0)),
            Row(**row(concurrency=1, adapters="8", ahead=False, decode=7.0)),
            Row(**row(concurrency=1, adapters="8", ahead=True, sampling="sampled", decode=6.0)),
            Row(**row(concurrency=1, adapters="8", ahead=True, mode="closed", decode=0.0)),
        ]

    def test_one_sampling_ahead_and_bursts_are_drawn(self) -> None:
        series = decode_series(selected(self.rows()))
        labels = series_labels(list(series))
        named = {labels[key]: points for key, points in series.items()}
        assert named == {"base": [(1, 10.0), (4, 40.0)], "8 adapters": [(1, 8.0)]}

    def test_a_label_names_only_what_differs(self) -> None:
        keys = [("engine", "nf4", "base"), ("engine", "nf4+shadow", "1")]
        assert list(series_labels(keys).values()) == ["nf4, base", "nf4+shadow, 1 adapter"]

    def test_parts_are_of_the_largest_concurrency_or_of_a_profile(self) -> None:
        rows = self.rows()
        [(label, parts)] = step_parts(selected(rows), []).items()
        assert label.startswith("4 rows") and parts == {"forward": 1.0}
        profile = {"rows": 64, "adapters": 0, "weights": "nf4", "parts": {"LoRA": 2.0}, "gap_ms": 0.5}
        assert step_parts(rows, [profile]) == {"64 rows, base\nnf4": {"LoRA": 2.0, "gaps": 0.5}}

    def test_a_reference_is_a_line_of_its_own(self) -> None:
        assert parse_reference("vLLM 0.22=64:2125,1:135") == ("vLLM 0.22", [(1, 135.0), (64, 2125.0)])

    @pytest.mark.parametrize("text", ["", "vLLM", "=1:2", "vLLM=1", "vLLM=1:fast", "vLLM=0:5", "vLLM=1:nan", "v=1:-2"])
    def test_a_reference_that_is_none_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="LABEL=STREAMS:TOKENS_PER_S"):
            parse_reference(text)


class TestPartsTable:
    def test_rows_with_parts_are_shown_in_one_set_of_columns(self) -> None:
        from measure import Row

        rows = [
            Row(**row(adapters="base", parts={"forward": 1.5})),
            Row(**row(adapters="8", parts={"wait": 0.25})),
            Row(**row(adapters="32")),
        ]
        head, _, *lines = parts_table(rows).splitlines()
        assert head.endswith("| n | forward ms | wait ms |")
        assert [text.split(" | ")[-5:] for text in lines] == [
            ["greedy", "base", "1", "1.50", "0.00 |"],
            ["greedy", "8", "1", "0.00", "0.25 |"],
        ]
        assert parts_table(rows[2:]) == ""
