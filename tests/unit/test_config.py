"""Settings: sources and their order, bounds, near misses, and the command line around them."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from loramux_server import run
from loramux_server.cli import main
from loramux_server.config import OPTIONS, ConfigError, ServerConfig, is_loopback, load_config
from loramux_server.engine.config import EngineConfig
from loramux_server.engine_process import engine_config


def load(flags: dict[str, Any] | None = None, file: Path | None = None, **environment: str) -> ServerConfig:
    return load_config({"model": "m", **(flags or {})}, environment=environment, file=file)


def test_the_table_and_the_class_agree() -> None:
    assert [option.name for option in OPTIONS] == [field.name for field in dataclasses.fields(ServerConfig)]
    assert all(option.name in (ServerConfig.__doc__ or "") for option in OPTIONS)


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("port: 1\nmax_queued: 7\nprefix_cache: false\nshadow: true\n")
    other = {"LORAMUX_TOKEN": "t", "LORAMUX_KERNEL_CACHE": "/k", "LORAMUX_KERNEL_OVERLAP": "0", "HOME": "/"}
    config = load({"port": "3"}, file, LORAMUX_PORT="2", LORAMUX_MAX_SLOTS="9", **other)
    assert (config.port, config.max_queued, config.max_slots, config.max_rank) == (3, 7, 9, 64)
    assert config.prefix_cache is False and config.shadow is True and config.batch_invariant is False
    file.write_text("adapters: from-file\n")
    assert load({}, file).adapters == "from-file" and load().adapters is None
    assert load({}, file, LORAMUX_ADAPTERS="from-environment").adapters == "from-environment"
    assert load({"adapters": "flag"}, file, LORAMUX_ADAPTERS="from-environment").adapters == "flag"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"port": "65536"}, ["--port", "65536", "0 to 65535"]),
        ({"port": "x"}, ["--port", "'x'", "whole number"]),
        ({"grace": "nan"}, ["--grace", "nan"]),
        ({"grace": "-1"}, ["--grace", "-1"]),
        ({"host_adapter_gib": "-1"}, ["--host-adapter-gib", "-1", "0 to 65536"]),
        ({"weights": "int8"}, ["--weights", "int8", "nf4, bf16, fp32"]),
        ({"max_rank": "17"}, ["--max-rank", "17", "multiple of 16"]),
        ({"max_rank": "1024", "rank_units": "8"}, ["--max-rank", "--rank-units 8", "64"]),
        ({"probe": "9090"}, ["--probe", "9090", "HOST:PORT"]),
        ({"host": "0.0.0.0"}, ["--host 0.0.0.0", "--allow-plaintext", "--no-auth"]),
        ({"host": "0.0.0.0", "no_auth": True}, ["no TLS", "--allow-plaintext", "--tls-cert"]),
        ({"host": "0.0.0.0", "tls_cert": "c", "tls_key": "k"}, ["no credentials", "--tls-client-ca", "--no-auth"]),
        ({"tls_cert": "c"}, ["--tls-cert", "without --tls-key"]),
        ({"tls_key": "k"}, ["--tls-key", "without --tls-cert"]),
        ({"tls_client_ca": "a"}, ["--tls-client-ca", "without --tls-cert"]),
        ({"tls_cert": "c", "tls_key": "k", "allow_plaintext": True}, ["--tls-cert", "--allow-plaintext", "leave one"]),
        ({"max_output_tokens": "64", "max_model_len": "64"}, ["--max-output-tokens", "64"]),
        ({"gpu_memory_utilization": "1.5"}, ["--gpu-memory-utilization", "0.05 to 0.99"]),
        ({"model": ""}, ["--model"]),
        ({"otlp_endpoint": "localhost:4317"}, ["--otlp-endpoint", "localhost:4317", "http://"]),
        ({"probe": "127.0.0.1:\u00b2"}, ["--probe", "HOST:PORT"]),
        ({"store": "a\0b"}, ["--store", "'a\\x00b'", "control character"]),
        ({"model_name": "\udcff"}, ["--model-name", "control character"]),
        ({"model_name": "m" * 257}, ["--model-name", "257", "256"]),
        ({"model": "m" * 5000}, ["--model", "(5002 characters)", "4096"]),
        ({"replica_id": "a b"}, ["--replica-id", "'a b'", "letters, digits"]),
        ({"replica_id": "r" * 64}, ["--replica-id", "1 to 63"]),
        ({"port": "9" * 5000}, ["--port", "whole number"]),
        ({"engine_timeout": "0"}, ["--engine-timeout", "1 to 86400"]),
    ],
)
def test_a_bad_value_names_flag_value_and_way_out(flags: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(flags)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_quued: 3\n", ["server.yaml:1", "`max_quued`", "did you mean `max_queued`"]),
        ("port: 1\n\nport: 2\n", ["server.yaml:3", "twice"]),
        ("port: true\n", ["server.yaml:1", "port"]),
        ("port: [1]\n", ["server.yaml:1", "port"]),
        ("port: 1.5\n", ["server.yaml:1", "1.5"]),
        ("reflection: maybe\n", ["server.yaml:1", "reflection", "true or false"]),
        ("port:\n", ["server.yaml:1", "port", "empty"]),
        ("- port\n", ["mapping"]),
        ("a: b: c\n", ["not YAML"]),
        ("port: .inf\n", ["server.yaml:1", "port is inf", "whole number"]),
        ("port: 2026-13-45\n", ["not YAML", "month"]),
        ("port: " + "[" * 20_000 + "\n", ["nested too deeply"]),
    ],
)
def test_a_bad_file_names_the_line(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(file=file)
    assert all(word in str(error.value) for word in words), error.value


def test_unknown_variables_are_refused_with_the_near_one() -> None:
    with pytest.raises(ConfigError, match="LORAMUX_MAX_QUEUE.*LORAMUX_MAX_QUEUED"):
        load(LORAMUX_MAX_QUEUE="1")
    with pytest.raises(ConfigError, match="--model is missing"):
        load_config({}, environment={})


@pytest.mark.parametrize(
    "flags",
    [
        {"allow_plaintext": True, "no_auth": True},
        {"tls_cert": "c", "tls_key": "k", "no_auth": True},
        {"tls_cert": "c", "tls_key": "k", "tls_client_ca": "a"},
    ],
)
def test_what_lets_other_machines_in(flags: dict[str, Any]) -> None:
    assert load({"host": "0.0.0.0", **flags}).host == "0.0.0.0"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, "every caller on this machine"),
        ({"host": "0.0.0.0", "allow_plaintext": True, "no_auth": True}, "without TLS and without credentials"),
        ({"host": "0.0.0.0", "tls_cert": "c", "tls_key": "k", "no_auth": True}, "listening on 0.0.0.0 without cred"),
        ({"tls_cert": "c", "tls_key": "k", "tls_client_ca": "a"}, "whoever holds a certificate of --tls-client-ca a"),
    ],
)
def test_the_log_says_who_gets_in(flags: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture) -> None:
    run._warn_about_access(load(flags))
    assert words in caplog.text


def test_loopback() -> None:
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("127.8.9.1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("::") and not is_loopback("no-such-host.invalid")


def test_the_engine_gets_bytes_and_may_write_into_the_store() -> None:
    engines = [engine_config(load(flags), Path("m")) for flags in ({}, {"host_adapter_gib": "0.5"})]
    engines.append(engine_config(load(LORAMUX_HOST_ADAPTER_GIB="0"), Path("m")))
    assert [engine.host_adapter_bytes for engine in engines] == [None, 2**29, 0]
    assert all(engine.serving_blobs for engine in engines) and not EngineConfig(model="m").serving_blobs


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().port = 1  # type: ignore[misc]


class TestCommandLine:
    def test_check_and_show(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert main(["config", "check", "--model", "m", "--no-prefix-cache"]) == 0
        assert "valid" in capsys.readouterr().out
        assert main(["config", "show", "--model", "m", "--no-prefix-cache", "--port", "7", "--adapters", "dir"]) == 0
        shown = capsys.readouterr().out
        assert "port: 7\n" in shown and "adapters: dir\n" in shown and "prefix_cache: false\n" in shown
        file = tmp_path / "shown.yaml"
        file.write_text("\n".join(line for line in shown.splitlines() if not line.endswith("null")))
        assert main(["config", "check", "--config", str(file)]) == 0

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["serve", "--model", "/no/such/dir"], ["--model /no/such/dir", "does not exist"]),
            (["serve", "--port", "1"], ["--model is missing"]),
            (["serve", "--model", "m", "--weights", "int4"], ["--weights", "int4"]),
            (["config", "check", "--config", "/no/such/file"], ["--config /no/such/file"]),
            (["quantize", "/no/such/dir", "out"], ["SRC /no/such/dir"]),
        ],
    )
    def test_what_the_operator_got_wrong_is_one_line_and_two(
        self, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.chdir(tmp_path)
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("loramux-server: ") and error.count("\n") == 1 and "Traceback" not in error
        assert all(word in error for word in words), error

    def test_usage_errors_and_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments, code in ((["--version"], 0), (["nonsense"], 2), ([], 2), (["serve", "--modle", "x"], 2)):
            with pytest.raises(SystemExit) as ended:
                main(arguments)
            assert ended.value.code == code
        assert "loramux-server " in capsys.readouterr().out

    def test_a_directory_without_a_checkpoint(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert main(["serve", "--model", str(tmp_path), "--store", str(tmp_path / "store")]) == 2
        assert "no config.json" in capsys.readouterr().err
        (tmp_path / "config.json").write_text("{}")
        assert main(["serve", "--model", str(tmp_path), "--store", str(tmp_path / "store")]) == 2
        assert "no tokenizer.json" in capsys.readouterr().err

    def test_a_hub_id_without_a_network(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert main(["serve", "--model", "nobody/no-such-model", "--store", str(tmp_path / "store")]) == 2
        assert "could not be fetched from the hub" in capsys.readouterr().err


def test_the_help_tells_every_default(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    entries = re.split(r"\n  (?=--)", capsys.readouterr().out.partition("options:")[2])
    told = {entry.split()[0] for entry in entries if "(default" in entry}
    assert told == {option.flag for option in OPTIONS if option.name != "model" and option.default is not False}
