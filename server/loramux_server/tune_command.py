"""`loramux-server tune`: measure which backend of the NF4 product is fastest on this card, for a model's shapes."""

from pathlib import Path

import torch

from loramux_base.checkpoint import read_json
from loramux_server.config import ConfigError
from loramux_server.model.load import default_dtype
from loramux_server.model.spec import ModelSpec
from loramux_server.model.tuning import (
    CudaTimer,
    Measured,
    TuningFile,
    choices,
    cuda_backends,
    measure,
    product_shapes,
    read_tuning,
    tuning_path,
)


def tune(directory: Path) -> str:
    """Measure and write the card's table; rows of other shapes in it stay.

    Args:
        directory: Of the base.

    Returns:
        Lines of text: microseconds by backend, and where the table lies.

    Raises:
        ConfigError: No CUDA device is here, or the model cannot be served.
        TuningFileError: The card has a table that cannot be read.
    """
    try:
        spec = ModelSpec.from_config(read_json(directory / "config.json"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"--model {directory}: {error}") from error
    if not torch.cuda.is_available():
        raise ConfigError("tune needs a CUDA device: on the CPU there is one product, nothing to choose from")
    device = torch.device("cuda", torch.cuda.current_device())
    card = torch.cuda.get_device_name(device)
    path = tuning_path(card)
    kept = read_tuning(path).rows if path.is_file() else []
    with torch.inference_mode():
        measured = measure(product_shapes(spec), CudaTimer(device, default_dtype(device)), backends=cuda_backends())
    found = TuningFile.of(card, choices(measured))
    shapes = {(row.n, row.k) for row in found.rows}
    rows = [*(row for row in kept if (row.n, row.k) not in shapes), *found.rows]
    TuningFile(version=found.version, card=card, torch=found.torch, rows=rows).save(path)
    return f"{report(measured)}\nwrote {path}"


def report(measured: list[Measured]) -> str:
    """A line a product: N, K, M, microseconds by backend, the choice."""
    return "\n".join(
        f"{one.n:6} x {one.k:6}  M = {one.m:5}  "
        + "  ".join(f"{backend} {1e6 * seconds:8.1f} us" for backend, seconds in one.seconds.items())
        + f"  -> {one.best}"
        for one in measured
    )
