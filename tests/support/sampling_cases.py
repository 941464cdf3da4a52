"""Inputs and a naive reference of the sampling tests, shared by the torch, interpreter and CUDA tests.

The reference sorts, works in float64, one row at a time, with Python's integers for the hash.
"""

import math

import numpy as np
import torch
from torch import Tensor

PARAMETERS = (
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.8, 50, 0.95, 0.0),
    (1.3, 1, 1.0, 0.0),
    (0.3, 0, 0.9, 0.0),
    (2.0, 0, 1.0, 0.05),
    (1.0, 7, 0.5, 0.2),
    (0.7, 2000, 0.99, 0.0),
    (1e-6, 0, 0.5, 0.0),
    (1.0, 0, 1e-6, 0.0),
    (5.0, 3, 1.0, 0.0),
)
"""Temperature, top-k, top-p, min-p of rows."""


def sampling_inputs(vocab: int, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Raw logits, adjusted logits with some bans, parameters and keys; a row for each of `PARAMETERS`, twice."""
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * len(PARAMETERS)
    raw = 4 * torch.randn(rows, vocab, generator=generator)
    raw[1::3] = (raw[1::3] * 4).round() / 4  # equal logits
    adjusted = raw.clone()
    adjusted[:, 3::7] = -math.inf
    adjusted[::2] += 100.0
    parameters = torch.tensor(PARAMETERS * 2, dtype=torch.float64)
    parameters[:, 1] = torch.where(parameters[:, 1] < vocab, parameters[:, 1], 0)
    keys = torch.randint(-(1 << 63), (1 << 63) - 1, (rows,), generator=generator)
    return raw.to(device), adjusted.to(device), parameters.to(device), keys.to(device)


def assert_picked(result: Tensor, raw: Tensor, adjusted: Tensor, parameters: Tensor, keys: Tensor) -> None:
    """Each token is the reference's, or one that float32 cannot tell from it."""
    result = result.cpu()
    for row in range(len(raw)):
        token = int(result[row, 0])
        logits = adjusted[row].double().cpu().numpy()
        temperature, top_k, top_p, min_p = parameters[row].tolist()
        assert result[row, 1] == int(torch.isfinite(raw[row]).all())
        if temperature == 0:
            assert token == int(np.argmax(logits)), f"row {row}"
        else:
            strict, relaxed = (_kept(logits, temperature, int(top_k), top_p, min_p, slack) for slack in (-1e-5, 1e-5))
            score = logits / temperature - np.log(_exponential(int(keys[row]), len(logits)))
            assert relaxed[token], f"row {row}: token {token} is outside the limits"
            best = score[strict].max(initial=-math.inf)
            # The division is float32: its error grows with the quotient.
            slack = 1e-5 * (1 + abs(logits[token] / temperature))
            assert score[token] >= best - slack, f"row {row}: token {token} does not win"
        if result.shape[1] == 3:
            expected = torch.logsumexp(raw[row].double(), -1).item()
            assert abs(result[row, 2:3].view(torch.float32).item() - expected) < 1e-4


def _kept(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, slack: float) -> np.ndarray:
    """Tokens that pass the limits, each limit moved by a share `slack` of mass or probability."""
    kept = logits > -math.inf
    if top_k:
        kept &= logits >= np.sort(logits)[::-1][min(top_k, kept.sum()) - 1]
    weights = np.where(kept, np.exp((logits - logits.max()) / temperature), 0.0)
    if top_p < 1:
        values = np.unique(logits[kept])[::-1]
        masses = np.array([weights[logits >= value].sum() for value in values])
        enough = masses >= (top_p + slack) * weights.sum()
        kept &= logits >= values[enough.argmax() if enough.any() else -1]
    if min_p > 0:
        kept &= np.exp((logits - logits.max()) / temperature) >= min_p * (1 - slack)
    return kept


def _exponential(key: int, vocab: int) -> np.ndarray:
    values = np.empty(vocab)
    mask = (1 << 64) - 1
    for token in range(vocab):
        bits = ((key & mask) + (token + 1) * 0x9E3779B97F4A7C15) & mask
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & mask
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & mask
        bits ^= bits >> 31
        values[token] = -math.log1p(-min(((bits >> 24) + 0.5) / (1 << 40), 1 - 2.0**-24))
    return values
