"""Tensors of a checkpoint, read on demand."""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from loramux_base.checkpoint import Checkpoint, ModelLoadError


class TensorReader:
    """Reads tensors by name; keeps the files mapped while it lives."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Open nothing yet.

        Args:
            checkpoint: Whose tensors.
        """
        self._checkpoint = checkpoint
        self._handles: dict[Path, Any] = {}

    def __call__(self, name: str) -> Tensor:
        """The tensor on the CPU, in its stored dtype; may share memory with the mapped file.

        Args:
            name: Of the tensor.

        Raises:
            ModelLoadError: No such tensor.
        """
        info = self._checkpoint.tensors.get(name)
        if info is None:
            raise ModelLoadError(
                self._checkpoint.directory, f"has no tensor {name}; it is not a whole checkpoint of this model"
            )
        if info.file not in self._handles:
            self._handles[info.file] = safe_open(str(info.file), framework="pt", device="cpu")
        tensor: Tensor = self._handles[info.file].get_tensor(name)
        return tensor
