"""Facts of the served base that `GetModel` publishes and that need its files."""

import json
import logging
from pathlib import Path

from loramux_base.checkpoint import ModelLoadError
from loramux_base.fingerprint import base_fingerprint
from loramux_server.engine.messages import Ready
from loramux_server.rpc.replica import BaseModel

_log = logging.getLogger(__name__)


def describe_base(
    directory: Path, ready: Ready, *, name: str, eos_token_ids: tuple[int, ...], has_chat_template: bool
) -> BaseModel:
    """Read what is not in `Ready`. Blocks; the engine has filled the cache of tensor digests by then.

    Args:
        directory: Of the checkpoint.
        ready: What the engine reported.
        name: Name that the operator gave.
        eos_token_ids: Of the tokenizer.
        has_chat_template: Whether chats are taken.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config")
    at_load = "nf4" if ready.weights == "nf4" and quantization is None else None
    parts: dict[str, str] = {}
    try:
        fingerprint = base_fingerprint(directory, quantized_at_load=at_load)
    except (ModelLoadError, OSError) as error:
        _log.warning("the parts of the base's fingerprint are not known: %s", error)
    else:
        if fingerprint.hex == ready.fingerprint:
            parts = dict(fingerprint.parts)
        else:
            _log.warning("the base changed on disk after the engine had loaded it; restart the server")
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
