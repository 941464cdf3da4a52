"""Facts of the served base that `GetModel` publishes and that need its files."""

import json
import logging
from pathlib import Path

from loramux_base.checkpoint import ModelLoadError
from loramux_base.fingerprint import base_fingerprint
from loramux_server.engine.messages import Ready
from loramux_server.rpc.replica import BaseModel

_log = logging.getLogger(__name__)

# An engine that knows the parts of the fingerprint reports them in `Ready.details` under this prefix.
_DETAIL = "fingerprint."


def describe_base(
    directory: Path, ready: Ready, *, name: str, eos_token_ids: tuple[int, ...], has_chat_template: bool
) -> BaseModel:
    """Read what is not in `Ready`. Blocks: without the parts of the fingerprint in it, tensors may be hashed.

    Args:
        directory: Of the checkpoint.
        ready: What the engine reported.
        name: Name that the operator gave.
        eos_token_ids: Of the tokenizer.
        has_chat_template: Whether chats are taken.
    """
    parts = {name.removeprefix(_DETAIL): digest for name, digest in ready.details.items() if name.startswith(_DETAIL)}
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config")
    at_load = "nf4" if ready.weights == "nf4" and quantization is None else None
    if not parts:
        parts = _read_parts(directory, ready.fingerprint, at_load)
    if at_load is not None:
        words = "nf4 block=64 absmax=fp32, quantized at load"
    elif ready.weights == "nf4":
        words = "nf4 block=64 absmax=fp32"
    else:
        words = "none"
    return BaseModel(
        name=name,
        family=str(config.get("model_type", "")),
        fingerprint=ready.fingerprint,
        fingerprint_parts=parts,
        quantization=words,
        eos_token_ids=eos_token_ids,
        has_chat_template=has_chat_template,
    )


def _read_parts(directory: Path, expected: str, quantized_at_load: str | None) -> dict[str, str]:
    """Compute the digests by part; the engine has filled the cache of tensor digests if it may write there."""
    try:
        fingerprint = base_fingerprint(directory, quantized_at_load=quantized_at_load)
    except (ModelLoadError, OSError) as error:
        _log.warning("the parts of the base's fingerprint are not known: %s", error)
        return {}
    if fingerprint.hex != expected:
        _log.warning("the base changed on disk after the engine had loaded it; restart the server")
        return {}
    return dict(fingerprint.parts)
