"""Settings of the server: defaults < YAML file < LORAMUX_* environment < flags; frozen, each bound checked once.

`OPTIONS` is the one table: the fields of `ServerConfig`, their flags, variables and file keys are all derived from it.
Errors name the flag, the value and the way out.
"""

import dataclasses
import difflib
import ipaddress
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from loramux_server.option import REQUIRED, Option, convert, shown
from loramux_server.option import ConfigError as ConfigError

ENVIRONMENT_PREFIX = "LORAMUX_"
# Variables with our prefix that are no settings: of the SDK and its command line, of the engine's fault points and its
# compiled kernels.
_FOREIGN_VARIABLES = frozenset(
    {"ADDRESS", "TOKEN", "TOKEN_FILE", "CA", "FAULT", "CONFIG", "KERNEL_CACHE", "KERNEL_OVERLAP"}
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of one server.

    Attributes:
        model: Directory of the base checkpoint, a hub id, or `demo` for the base embedded in loramux-demo.
        weights: `nf4`, `bf16` or `fp32`.
        store: Directory of adapters and registry.
        adapters: Directory of adapters to serve, `<tenant>/<adapter>/`, followed while the server runs; None = none.
        host: Address of the gRPC listener.
        port: Its port; 0 picks one.
        probe: `HOST:PORT` of the probe listener; None = none.
        device: `auto`, `cpu` or `cuda`.
        model_name: Name in `GetModel` and telemetry; None = last part of `model`.
        max_model_len: Prompt and output in tokens; None = the model's own.
        max_output_tokens: Bound of max_tokens; None = `max_model_len`.
        max_prompt_bytes: Bytes of a prompt's text.
        max_queued: Requests that may wait.
        max_running: Sequences in one engine step.
        max_batch_tokens: Tokens in one engine step.
        kv_pages: KV pages; None = decided by the engine.
        gpu_memory_utilization: Share of device memory to use.
        rank_units: Adapter slab in units of 16 rank rows.
        max_slots: Adapters resident at once.
        max_rank: Largest adapter rank.
        host_adapter_gib: GiB of host memory for adapters; None = decided by the engine, 0 = none.
        schedule_ahead: Launch a step before the results of the one before are in; None = on CUDA.
        shadow: Keep dequantized weights; None = decided by the engine.
        prefix_cache: Reuse KV of equal prefixes.
        batch_invariant: Tokens do not depend on the batch.
        threads: torch threads of the engine on CPU; None = physical cores.
        self_test: Compare a small random model with the reference at start.
        allow_unverified_adapters: Take adapters without a manifest.
        reflection: Serve gRPC reflection.
        tls_cert: PEM file of the listener's certificate and its chain; None = plaintext.
        tls_key: PEM file of its private key.
        tls_client_ca: PEM file of the authorities whose clients are let in; None = no client certificate is asked for.
        allow_plaintext: Listen without TLS beyond loopback.
        no_auth: Accept every caller beyond loopback.
        otlp_endpoint: OTLP collector; None = none.
        grace: Seconds that running requests get after SIGTERM or SIGINT.
        drain_delay: Seconds between NOT_SERVING and refusing new requests, for load balancers.
        replica_id: Name of this replica; None = host name.
        log_level: `debug`, `info`, `warning` or `error`.
        slow_reader_seconds: Seconds without progress after which a stream is given up.
        engine_timeout: Seconds of silence after which the engine is taken for hung and replaced.
    """

    model: str
    weights: str
    store: str
    adapters: str | None
    host: str
    port: int
    probe: str | None
    device: str
    model_name: str | None
    max_model_len: int | None
    max_output_tokens: int | None
    max_prompt_bytes: int
    max_queued: int
    max_running: int
    max_batch_tokens: int
    kv_pages: int | None
    gpu_memory_utilization: float
    rank_units: int
    max_slots: int
    max_rank: int
    host_adapter_gib: float | None
    schedule_ahead: bool | None
    shadow: bool | None
    prefix_cache: bool
    batch_invariant: bool
    threads: int | None
    self_test: bool
    allow_unverified_adapters: bool
    reflection: bool
    tls_cert: str | None
    tls_key: str | None
    tls_client_ca: str | None
    allow_plaintext: bool
    no_auth: bool
    otlp_endpoint: str | None
    grace: float
    drain_delay: float
    replica_id: str | None
    log_level: str
    slow_reader_seconds: float
    engine_timeout: float

    @property
    def probe_address(self) -> tuple[str, int] | None:
        """Host and port of the probe listener."""
        return None if self.probe is None else split_address("--probe", self.probe)


_PORT = re.compile(r"[0-9]{1,5}")
# Of a resource attribute, of `Started` and of log lines.
_REPLICA_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,62}")
_MAX_MODEL_NAME = 256
_MILLION = 1_000_000

OPTIONS: tuple[Option, ...] = (
    Option(name="model", kind=str, default=REQUIRED, help="directory of the base, a hub id, or `demo`, embedded"),
    Option(name="weights", kind=str, default="nf4", choices=("nf4", "bf16", "fp32"), help="format of resident weights"),
    Option(name="store", kind=str, default="loramux-store", help="directory of adapters and registry"),
    Option(
        name="adapters",
        kind=str,
        default=None,
        help="directory whose TENANT/ADAPTER/ directories are served and followed; never written to (default: none)",
    ),
    Option(name="host", kind=str, default="127.0.0.1", help="address of the gRPC listener"),
    Option(name="port", kind=int, default=50051, low=0, high=65535, help="port of the gRPC listener; 0 picks one"),
    Option(name="probe", kind=str, default=None, help="HOST:PORT of the HTTP listener for /livez, /readyz, /metrics"),
    Option(name="device", kind=str, default="auto", choices=("auto", "cpu", "cuda"), help="where the engine runs"),
    Option(name="model_name", kind=str, default=None, help="name of the model in answers and telemetry"),
    Option(name="max_model_len", kind=int, default=None, low=2, high=16 * _MILLION, help="tokens of prompt and output"),
    Option(
        name="max_output_tokens", kind=int, default=None, low=1, high=16 * _MILLION, help="output tokens a sequence"
    ),
    Option(
        name="max_prompt_bytes",
        kind=int,
        default=1024 * 1024,
        low=1,
        high=4 * 1024 * 1024,
        help="most bytes of prompt text",
    ),
    Option(name="max_queued", kind=int, default=1024, low=1, high=100_000, help="requests that may wait at once"),
    Option(name="max_running", kind=int, default=128, low=1, high=4096, help="sequences in one engine step"),
    Option(name="max_batch_tokens", kind=int, default=2048, low=16, high=_MILLION, help="tokens in one engine step"),
    Option(name="kv_pages", kind=int, default=None, low=2, high=100 * _MILLION, help="KV pages of 16 tokens"),
    Option(name="gpu_memory_utilization", kind=float, default=0.9, low=0.05, high=0.99, help="share of device memory"),
    Option(name="rank_units", kind=int, default=64, low=1, high=65536, help="adapter slab in units of 16 rank rows"),
    Option(name="max_slots", kind=int, default=64, low=1, high=65536, help="most adapters resident at once"),
    Option(name="max_rank", kind=int, default=64, low=16, high=1024, multiple_of=16, help="largest adapter rank"),
    Option(
        name="host_adapter_gib",
        kind=float,
        default=None,
        low=0,
        high=65_536,
        help="GiB of host memory that keeps adapters ready for the slab",
    ),
    Option(
        name="schedule_ahead",
        kind=bool,
        default=None,
        negative="--no-schedule-ahead",
        help="launch a step before the results of the one before are in",
    ),
    Option(name="shadow", kind=bool, default=None, negative="--no-shadow", help="keep a dequantized copy of weights"),
    Option(
        name="prefix_cache", kind=bool, default=True, negative="--no-prefix-cache", help="reuse KV of equal prefixes"
    ),
    Option(name="batch_invariant", kind=bool, default=False, help="tokens do not depend on the rest of the batch"),
    Option(name="threads", kind=int, default=None, low=1, high=1024, help="torch threads of the engine on CPU"),
    Option(
        name="self_test", kind=bool, default=True, negative="--no-self-test", help="check against a reference at start"
    ),
    Option(name="allow_unverified_adapters", kind=bool, default=False, help="take adapters that carry no manifest"),
    Option(name="reflection", kind=bool, default=True, negative="--no-reflection", help="serve gRPC reflection"),
    Option(name="tls_cert", kind=str, default=None, help="PEM file of the listener's certificate and its chain"),
    Option(name="tls_key", kind=str, default=None, help="PEM file of its private key"),
    Option(
        name="tls_client_ca",
        kind=str,
        default=None,
        help="PEM file of the authorities of clients, which must then show a certificate",
    ),
    Option(name="allow_plaintext", kind=bool, default=False, help="listen without TLS beyond loopback"),
    Option(name="no_auth", kind=bool, default=False, help="accept every caller beyond loopback"),
    Option(name="otlp_endpoint", kind=str, default=None, help="OTLP/gRPC collector, http://HOST:PORT"),
    Option(name="grace", kind=float, default=30.0, low=0, high=86_400, help="seconds for running requests at a stop"),
    Option(
        name="drain_delay", kind=float, default=0.0, low=0, high=600, help="seconds between NOT_SERVING and refusals"
    ),
    Option(name="replica_id", kind=str, default=None, help="name of this replica"),
    Option(
        name="log_level",
        kind=str,
        default="info",
        choices=("debug", "info", "warning", "error"),
        help="least severity to log",
    ),
    Option(
        name="slow_reader_seconds",
        kind=float,
        default=30.0,
        low=0.1,
        high=3600,
        help="seconds without progress after which a stream that is not read ends",
    ),
    Option(
        name="engine_timeout",
        kind=float,
        default=120.0,
        low=1,
        high=86_400,
        help="seconds of silence after which the engine is taken for hung and replaced",
    ),
)
_BY_NAME = {option.name: option for option in OPTIONS}


def load_config(flags: Mapping[str, Any], *, environment: Mapping[str, str], file: Path | None = None) -> ServerConfig:
    """Merge all sources and check every value.

    Args:
        flags: Field name -> value for flags that were given.
        environment: Process environment.
        file: YAML file.

    Raises:
        ConfigError: Unknown or malformed setting, a value out of bounds, or settings that contradict each other.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    layers = (_file_layer(file), _environment_layer(environment), {n: (v, _BY_NAME[n].flag) for n, v in flags.items()})
    for layer in layers:
        for name, (value, source) in layer.items():
            values[name] = convert(_BY_NAME[name], value, source)
            sources[name] = source
    for option in OPTIONS:
        if option.name not in values:
            if option.default is REQUIRED:
                raise ConfigError(
                    f"{option.flag} is missing: {option.help}; give it as a flag, as "
                    f"{ENVIRONMENT_PREFIX}{option.name.upper()} or as `{option.name}` in the file"
                )
            values[option.name] = option.default
    config = ServerConfig(**values)
    _check_together(config)
    return config


def show_config(config: ServerConfig) -> str:
    """Render the settings in effect as YAML."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def split_address(flag: str, text: str) -> tuple[str, int]:
    """Split `HOST:PORT`; an IPv6 host stands in brackets.

    Raises:
        ConfigError: It is none.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not _PORT.fullmatch(port) or int(port) > 65535:
        raise ConfigError(f"{flag} is {text!r}; use HOST:PORT, for example 127.0.0.1:9090")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine only; a name counts when all of its addresses do."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(entry[4][0]).split("%")[0]).is_loopback for entry in found)


def _file_layer(file: Path | None) -> dict[str, tuple[Any, str]]:
    if file is None:
        return {}
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} cannot be read: {error}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that YAML reads and Python does not
        raise ConfigError(f"--config {file} is not YAML: {error}") from error
    except RecursionError:
        raise ConfigError(f"--config {file} is nested too deeply; it holds one mapping of settings") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"--config {file} must hold a mapping of settings, `name: value` a line")
    layer: dict[str, tuple[Any, str]] = {}
    for key_node, _ in node.value:
        name = str(key_node.value)
        line = key_node.start_mark.line + 1
        where = f"{file}:{line}"
        if name in layer:
            raise ConfigError(f"{where}: `{name}` is set twice; keep one")
        if name not in _BY_NAME:
            raise ConfigError(f"{where}: unknown setting `{name}`{_near(name, list(_BY_NAME))}")
        layer[name] = (content[name], f"{where}: {name}")
    return layer


def _environment_layer(environment: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    layer: dict[str, tuple[Any, str]] = {}
    for variable, value in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if name.upper() in _FOREIGN_VARIABLES:
            continue
        if name not in _BY_NAME:
            known = [ENVIRONMENT_PREFIX + option.name.upper() for option in OPTIONS]
            raise ConfigError(f"unknown variable {variable}{_near(variable, known)}")
        layer[name] = (value, variable)
    return layer


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean `{near[0]}`?" if near else "; `loramux-server serve --help` lists all"


def _check_together(config: ServerConfig) -> None:
    if config.probe is not None:
        split_address("--probe", config.probe)
    if config.otlp_endpoint is not None and not config.otlp_endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"--otlp-endpoint is {config.otlp_endpoint!r}; use http://HOST:PORT or https://HOST:PORT")
    if config.replica_id is not None and not _REPLICA_ID.fullmatch(config.replica_id):
        raise ConfigError(
            f"--replica-id is {shown(config.replica_id)}; use 1 to 63 of letters, digits, '.', '_', ':' and '-', "
            "starting with a letter or digit"
        )
    if config.model_name is not None and len(config.model_name) > _MAX_MODEL_NAME:
        raise ConfigError(f"--model-name has {len(config.model_name)} characters; use at most {_MAX_MODEL_NAME}")
    _check_tls(config)
    if not is_loopback(config.host):
        _check_exposed(config)
    output, both = config.max_output_tokens, config.max_model_len
    if output is not None and both is not None and output >= both:
        raise ConfigError(
            f"--max-output-tokens is {output}; use less than --max-model-len ({both}), since a prompt has a token"
        )
    if config.max_rank > config.rank_units * 16:
        raise ConfigError(
            f"--max-rank is {config.max_rank}, which does not fit into --rank-units {config.rank_units} "
            f"({config.rank_units * 16} rows); raise --rank-units to {-(-config.max_rank // 16)} or lower --max-rank"
        )


def _check_tls(config: ServerConfig) -> None:
    if (config.tls_cert is None) != (config.tls_key is None):
        there, missing = ("--tls-cert", "--tls-key") if config.tls_key is None else ("--tls-key", "--tls-cert")
        raise ConfigError(f"{there} is given without {missing}; TLS needs a certificate and its key")
    if config.tls_cert is None and config.tls_client_ca is not None:
        raise ConfigError(
            "--tls-client-ca is given without --tls-cert and --tls-key; client certificates are asked for over TLS only"
        )
    if config.tls_cert is not None and config.allow_plaintext:
        raise ConfigError("--tls-cert and --allow-plaintext contradict each other; leave one out")


def _check_exposed(config: ServerConfig) -> None:
    """Check that what other machines can reach is protected, or its lack asked for by name."""
    lacks = []
    if config.tls_cert is None and not config.allow_plaintext:
        lacks.append(("no TLS", "give --tls-cert and --tls-key, or accept that with --allow-plaintext"))
    if config.tls_client_ca is None and not config.no_auth:
        lacks.append(
            ("no credentials", "let in holders of certificates only with --tls-client-ca, or everybody with --no-auth")
        )
    if lacks:
        raise ConfigError(
            f"--host {config.host} is reachable from other machines, and this server has "
            f"{' and '.join(lack for lack, _ in lacks)}; use 127.0.0.1, or {'; '.join(way for _, way in lacks)}"
        )
