"""`loramux-server plan`, as typed."""

from pathlib import Path

import pytest
import torch

from loramux_server.cli import main
from tests.support.tiny_models import make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plan") / "m")


def test_it_tells_what_fits(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", str(model), "--adapters", "32", "--rank", "20", "--context", "512", "--memory", "1"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "device cuda, 90 % of 1.0 GiB, weights nf4" in out
    assert "32 slots, 64 rank units" in out
    assert "128 requests of 512 tokens run at once (--max-running)" in out
    assert "--max-model-len 512 --max-slots 32 --rank-units 64" in out


def test_it_tells_what_the_host_keeps(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", str(model), "--memory", "1"]
    assert main([*arguments, "--host-adapter-gib", "0.5"]) == 0
    unit = 2 * 16 * 2 * (3 * 64 + 64 + 2 * 32 + 2 * 64 + 2 * (64 + 128) + 64 + 128)
    assert f"in the host's memory: 0.50 GiB, {2**29 // unit} rank units of adapters" in capsys.readouterr().out
    assert main([*arguments, "--host-adapter-gib", "0"]) == 0
    assert "host's memory" not in capsys.readouterr().out


def test_ranks_above_the_default_are_served_with_a_flag(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(model), "--adapters", "4", "--rank", "100", "--memory", "1"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("--max-slots 4 --rank-units 28 --max-rank 112")


def test_it_tells_when_nothing_fits(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(model), "--memory", "0.001"]) == 0
    assert "one request of 2048 tokens does not fit" in capsys.readouterr().out


@pytest.mark.parametrize("fixed", [["--kv-pages", "100000"], ["--device", "cpu", "--kv-pages", "100000"]])
def test_pages_that_are_asked_for_must_fit(model: Path, fixed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", str(model), "--context", "512", *fixed]
    assert main([*arguments, "--memory", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "more than the device has" in out and "serve with" not in out
    assert main([*arguments, "--memory", "64"]) == 0
    assert "serve with" in capsys.readouterr().out


def test_a_base_without_adapters_is_planned_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(make_checkpoint(tmp_path / "p", "phi3")), "--memory", "1"]) == 0
    assert "this base takes none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "4096"], "--context 4096: this model was made for sequences of up to 2048 tokens"),
        (["--memory", "nan"], "--memory nan: give the GiB of the device"),
        (["--memory", "0"], "--memory 0: give the GiB"),
        (["--max-slots", "0"], "max-slots"),
    ],
)
def test_what_is_wrong_is_one_line(
    model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", str(model), *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--adapters", "--rank", "--context"])
def test_counts_are_positive(model: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--model", str(model), flag, "0"])
    assert stopped.value.code == 2
    assert f"{flag}: '0' is no positive whole number" in capsys.readouterr().err


def test_cuda_elsewhere_needs_its_memory(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(model), "--device", "cuda"]) == 2
    assert "--memory is missing" in capsys.readouterr().err


def test_its_help_says_where_the_figures_are_met_again(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "`planned.*` and `actual.*`" in out and "over 5 % more than predicted" in out


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card to tune")
def test_tuning_needs_a_card(model: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--model", str(model), *flags]) == 2
    assert "tune needs a CUDA device" in capsys.readouterr().err
