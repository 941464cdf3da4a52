"""Fingerprint of a base model: which weights, config, tokenizer and quantization an adapter was trained on.

Parts, each a SHA-256 in hex:

- `config`: the keys of config.json that the forward pass depends on, rotary settings in one layout.
- `weights`: name, dtype, shape and digest of every tensor, sorted by name; sharding does not matter.
- `tokenizer`: tokenizer.json as parsed JSON, and the special-token keys of tokenizer_config.json.
- `quantization`: what the linear weights are stored as.
- `chat_template`: the template text. A field of its own: it is not part of `Fingerprint.hex`.

Digests are cached beside the checkpoint by file size, modification time and header, so that a repeated start reads no
weights; a directory that cannot be written is hashed each time.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loramux_base.checkpoint import Checkpoint, ModelLoadError, TensorInfo, read_json

CACHE_NAME = ".loramux-digests.json"
"""Cache of digests in the checkpoint's directory."""

_CACHE_VERSION = 2
_CHUNK = 1 << 22
_log = logging.getLogger(__name__)

_ESSENTIALS = (
    "attention_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "sliding_window",
    "sliding_window_pattern",
    "tie_word_embeddings",
    "use_sliding_window",
    "vocab_size",
)
_TOKENIZER_KEYS = ("add_bos_token", "add_eos_token", "bos_token", "eos_token", "pad_token", "unk_token")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Digest of a base model.

    Attributes:
        parts: Digest by part: config, weights, tokenizer, quantization, chat_template.
    """

    parts: Mapping[str, str]

    @property
    def hex(self) -> str:
        """SHA-256 over all parts but the chat template."""
        lines = [f"{name}={digest}" for name, digest in sorted(self.parts.items()) if name != "chat_template"]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def differences(self, parts: Mapping[str, str]) -> tuple[str, ...]:
        """Names of the parts that differ from (or are missing in) another fingerprint's parts, sorted."""
        return tuple(sorted(name for name in self.parts if parts.get(name) != self.parts[name]))


def base_fingerprint(directory: str | Path, *, quantized_at_load: str | None = None) -> Fingerprint:
    """Fingerprint of a model directory.

    Args:
        directory: Of the checkpoint.
        quantized_at_load: Name of a quantization that is applied after loading (`nf4`); it is not the same base as
            one whose quantized bytes are on disk.

    Raises:
        ModelLoadError: Unreadable checkpoint.
    """
    checkpoint = Checkpoint(directory)
    cache = _DigestCache(checkpoint.directory / CACHE_NAME)
    parts = {
        "config": _sha(_essentials(checkpoint.config)),
        "weights": _weights_digest(checkpoint, cache),
        "tokenizer": _tokenizer_digest(checkpoint.directory, cache),
        "quantization": _quantization_digest(checkpoint.config, quantized_at_load),
        "chat_template": _sha(read_chat_template(checkpoint.directory)),
    }
    cache.save()
    return Fingerprint(parts=parts)


def read_chat_template(directory: Path) -> str | list[Any] | None:
    """The template text of the directory (`chat_template.jinja` wins over tokenizer_config.json), None if it has none.

    Raises:
        ModelLoadError: Unreadable template or tokenizer_config.json.
    """
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(file, f"unreadable ({error}); download it again") from error
    config = directory / "tokenizer_config.json"
    if not config.is_file():
        return None
    template = read_json(config).get("chat_template")
    return template if isinstance(template, str | list) else None


def _sha(value: Any) -> str:
    """SHA-256 of a JSON value, independent of key order and white space."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _essentials(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.json that change the forward pass; null and absent are the same."""
    result = {key: config[key] for key in _ESSENTIALS if config.get(key) is not None}
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.pop("type", None)
    if not any(isinstance(value, Mapping) for value in rope.values()):
        rope.setdefault("rope_type", kind or "default")
    for key in ("rope_theta", "rope_local_base_freq", "partial_rotary_factor"):
        if config.get(key) is not None:
            rope.setdefault(key, config[key])
    result["rope"] = {key: value for key, value in rope.items() if value is not None}
    return result


def _quantization_digest(config: Mapping[str, Any], at_load: str | None) -> str:
    stored = config.get("quantization_config")
    if at_load is not None:
        return _sha({"at_load": at_load})
    if not isinstance(stored, Mapping):
        return _sha(None)
    keys = ("quant_method", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    return _sha({key: stored.get(key) for key in keys})


def _tokenizer_digest(directory: Path, cache: "_DigestCache") -> str:
    contents: dict[str, Any] = {}
    fast = directory / "tokenizer.json"
    if fast.is_file():
        # cached too: the JSON of a large vocabulary takes longer to read than everything else of a repeated start
        contents["tokenizer.json"] = cache.get(fast, _stat_key(fast), lambda: {"json": _sha(read_json(fast))})["json"]
    else:
        for name in ("tokenizer.model", "vocab.json", "merges.txt"):
            if (directory / name).is_file():
                contents[name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    if (directory / "tokenizer_config.json").is_file():
        config = read_json(directory / "tokenizer_config.json")
        contents["config"] = {key: config[key] for key in _TOKENIZER_KEYS if config.get(key) is not None}
    return _sha(contents)


def _weights_digest(checkpoint: Checkpoint, cache: "_DigestCache") -> str:
    digests: dict[str, str] = {}
    for file in checkpoint.files:
        tensors = {name: info for name, info in checkpoint.tensors.items() if info.file == file}
        digests.update(cache.get(file, _weights_key(file, tensors), functools.partial(_hash_all, tensors)))
    return _sha(
        [[name, info.dtype, list(info.shape), digests[name]] for name, info in sorted(checkpoint.tensors.items())]
    )


def _stat_key(file: Path) -> str:
    """Changes whenever the file is rewritten: size and modification time."""
    status = file.stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


def _weights_key(file: Path, tensors: Mapping[str, TensorInfo]) -> str:
    """As `_stat_key`, and the header."""
    header = [[info.name, info.dtype, list(info.shape), info.offset] for _, info in sorted(tensors.items())]
    return _sha([_stat_key(file), header])


class _DigestCache:
    """Digests by file name, each valid for one key; kept in a file of the checkpoint's directory."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stored = _read_cache(file)
        self._used: dict[str, dict[str, Any]] = {}

    def get(self, file: Path, key: str, compute: Callable[[], dict[str, str]]) -> dict[str, str]:
        """Digests of the file from the cache if its key is the same, else computed."""
        entry = self._stored.get(file.name)
        if not (isinstance(entry, dict) and entry.get("key") == key and isinstance(entry.get("digests"), dict)):
            entry = {"key": key, "digests": compute()}
        self._used[file.name] = entry
        digests: dict[str, str] = entry["digests"]
        return digests

    def save(self) -> None:
        """Write what was used, if it is not what is stored."""
        if self._used != self._stored:
            _write_cache(self._file, self._used)


def _hash_all(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Digests on several threads (hashing releases the GIL)."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(_hash_tensor, tensors.values()), strict=True))


def _hash_tensor(info: TensorInfo) -> str:
    digest = hashlib.sha256()
    left = info.nbytes
    with info.file.open("rb") as stream:
        stream.seek(info.offset)
        while left:
            piece = stream.read(min(_CHUNK, left))
            if not piece:
                raise ModelLoadError(info.file, f"ended inside tensor {info.name}; it changed while it was read")
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def _read_cache(file: Path) -> dict[str, dict[str, Any]]:
    """Entries by file name; an absent, foreign or damaged cache counts as empty: it can be computed again."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(value, dict) or value.get("version") != _CACHE_VERSION:
        return {}
    files = value.get("files")
    return files if isinstance(files, dict) else {}


def _write_cache(file: Path, files: Mapping[str, Any]) -> None:
    """Write atomically; a directory that may not be written is not an error."""
    temporary: str | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=file.parent, prefix=CACHE_NAME, suffix=".tmp", delete=False, encoding="utf-8"
        ) as stream:
            temporary = stream.name
            json.dump({"version": _CACHE_VERSION, "files": files}, stream)
        os.replace(temporary, file)
        temporary = None
    except OSError as error:
        _log.info("digests of %s are not cached: %s", file.parent, error)
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
