"""Where a model's weights come from: a checkpoint in one of the weights modes, or tensors in memory."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from loramux_base import nf4
from loramux_base.checkpoint import Checkpoint, ModelLoadError
from loramux_base.nf4 import Nf4Error, Nf4Weight
from loramux_base.tensors import TensorReader

WEIGHTS_MODES = ("nf4", "bf16", "fp32")
"""`nf4` bytes, bfloat16, float32."""


class WeightSource(Protocol):
    """Where weights come from: a checkpoint, or tensors in memory."""

    def tensor(self, name: str) -> Tensor:
        """A dense tensor on the CPU."""
        ...

    def linear(self, name: str) -> Tensor | Nf4Weight:
        """The weight of a decoder linear, `[N, K]`."""
        ...

    def __contains__(self, name: str) -> bool:
        """Whether there is a dense tensor of the name."""
        ...


class TensorSource:
    """Weights from a mapping, dense or quantized on the way."""

    def __init__(self, tensors: Mapping[str, Tensor], *, quantize: bool = False) -> None:
        """Keep the mapping.

        Args:
            tensors: By parameter name.
            quantize: Quantize decoder linears to NF4.
        """
        self._tensors = tensors
        self._quantize = quantize

    def tensor(self, name: str) -> Tensor:
        """As the protocol."""
        return self._tensors[name]

    def linear(self, name: str) -> Tensor | Nf4Weight:
        """As the protocol."""
        return nf4.quantize(self._tensors[name]) if self._quantize else self._tensors[name]

    def __contains__(self, name: str) -> bool:
        """As the protocol."""
        return name in self._tensors


class CheckpointSource:
    """Weights of a directory, in the wanted mode."""

    def __init__(self, checkpoint: Checkpoint, *, weights: str) -> None:
        """Check that the directory can serve the mode.

        Args:
            checkpoint: Opened directory.
            weights: `nf4`, `bf16` or `fp32`.

        Raises:
            ModelLoadError: Unknown mode, a quantization that is not served, or dense weights from a quantized base.
        """
        if weights not in WEIGHTS_MODES:
            raise ModelLoadError(checkpoint.directory, f"weights: {weights!r} is none of {', '.join(WEIGHTS_MODES)}")
        self._checkpoint = checkpoint
        self._read = TensorReader(checkpoint)
        self._weights = weights
        self.quantized = _is_nf4(checkpoint)
        self._nested = bool((checkpoint.config.get("quantization_config") or {}).get("bnb_4bit_use_double_quant"))
        if self.quantized and weights != "nf4":
            raise ModelLoadError(
                checkpoint.directory,
                f"holds NF4 weights, so --weights {weights} cannot be served; use --weights nf4 or the original "
                "checkpoint",
            )

    @property
    def quantized_at_load(self) -> bool:
        """Whether NF4 bytes are made now instead of read."""
        return self._weights == "nf4" and not self.quantized

    def tensor(self, name: str) -> Tensor:
        """As the protocol; rounded to bfloat16 first in mode bf16."""
        tensor = self._read(name)
        if not tensor.is_floating_point():
            raise ModelLoadError(self._checkpoint.directory, f"tensor {name} is {tensor.dtype}, not floating point")
        return tensor.to(torch.bfloat16) if self._weights == "bf16" else tensor

    def linear(self, name: str) -> Tensor | Nf4Weight:
        """As the protocol."""
        try:
            if self.quantized and name + nf4.SUFFIX_STATE in self._checkpoint:
                return nf4.from_tensors(name, self._read, nested=self._nested)
            return nf4.quantize(self.tensor(name)) if self.quantized_at_load else self.tensor(name)
        except Nf4Error as error:
            raise ModelLoadError(self._checkpoint.directory, f"{name}: {error}") from error

    def __contains__(self, name: str) -> bool:
        """As the protocol."""
        return name in self._checkpoint


def _is_nf4(checkpoint: Checkpoint) -> bool:
    """Whether the directory holds NF4 bytes.

    Raises:
        ModelLoadError: It holds another quantization.
    """
    config = checkpoint.config.get("quantization_config")
    if config is None:
        return False
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    if method != "bitsandbytes" or not config.get("load_in_4bit") or config.get("bnb_4bit_quant_type") != "nf4":
        raise ModelLoadError(
            checkpoint.directory / "config.json",
            f"quantization {method!r} is not served; serve the original checkpoint or quantize it with "
            "`loramux-server quantize`",
        )
    return True
