"""Rotary position tables. Kinds: default, linear, llama3, yarn; kinds that depend on the sequence's length are refused.

Sources: Su et al. 2021 (rotary embedding), Chen et al. 2023 (linear interpolation), Llama 3.1 (band-wise scaling),
Peng et al. 2023 (YaRN).
"""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

RopeKind = Literal["default", "linear", "llama3", "yarn"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """One rotary setting.

    Attributes:
        kind: Which scaling of the frequencies.
        theta: Base of the geometric frequencies.
        rotary_dim: Leading components of a head that are rotated; even.
        original_max_position: Length of pre-training (llama3, yarn).
        factor: Of the length extension (all but default).
        low_freq_factor: llama3: wavelengths over `original_max_position / low_freq_factor` are divided by `factor`.
        high_freq_factor: llama3: wavelengths under `original_max_position / high_freq_factor` stay.
        attention_factor: yarn: factor of cos and sin; None = 0.1 ln(factor) + 1.
        beta_fast: yarn: rotations over the original length above which a frequency stays.
        beta_slow: yarn: rotations below which it is divided by `factor`.
        truncate: yarn: whether the band's borders are rounded outwards.
    """

    kind: RopeKind
    theta: float
    rotary_dim: int
    original_max_position: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def cos_sin(spec: RopeSpec, positions: int, device: torch.device) -> Tensor:
    """Table of cosines and sines.

    Args:
        spec: Setting.
        positions: Rows of the table.
        device: Of the table; it is computed on the CPU, so that every device rotates by the same numbers.

    Returns:
        `[positions, 2, rotary_dim / 2]` float32: cosines, sines.
    """
    exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim
    frequencies = 1.0 / (spec.theta**exponents)
    amplitude = 1.0
    if spec.kind == "linear":
        frequencies = frequencies / spec.factor
    elif spec.kind == "llama3":
        frequencies = _llama3(spec, frequencies)
    elif spec.kind == "yarn":
        frequencies = _yarn(spec, frequencies)
        amplitude = spec.attention_factor or (1.0 if spec.factor <= 1 else 0.1 * math.log(spec.factor) + 1.0)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    return torch.stack((angles.cos() * amplitude, angles.sin() * amplitude), dim=1).to(device)


def _llama3(spec: RopeSpec, frequencies: Tensor) -> Tensor:
    """Long wavelengths divided by the factor, short ones kept, a linear blend between."""
    wavelengths = 2 * math.pi / frequencies
    scaled = frequencies / spec.factor
    blend = (spec.original_max_position / wavelengths - spec.low_freq_factor) / (
        spec.high_freq_factor - spec.low_freq_factor
    )
    result = (1 - blend) * scaled + blend * frequencies
    result = torch.where(wavelengths > spec.original_max_position / spec.low_freq_factor, scaled, result)
    return torch.where(wavelengths < spec.original_max_position / spec.high_freq_factor, frequencies, result)


def _yarn(spec: RopeSpec, frequencies: Tensor) -> Tensor:
    """Interpolated below `beta_slow` rotations over the original length, kept above `beta_fast`, a ramp between."""

    def component(rotations: float) -> float:
        """Index (in components) of the frequency that makes so many rotations over the original length."""
        turns = spec.original_max_position / (rotations * 2 * math.pi)
        return spec.rotary_dim * math.log(turns) / (2 * math.log(spec.theta))

    low, high = component(spec.beta_fast), component(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    width = high - low or 0.001
    ramp = ((torch.arange(spec.rotary_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return frequencies / spec.factor * ramp + frequencies * (1 - ramp)
