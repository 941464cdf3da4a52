"""What a server of given settings will take of its device's memory, from the config alone: nothing is loaded.

Weights, slab and pages are exact; what a step needs beside them is an estimate, and the server measures it at start.
"""

import dataclasses

import torch

from loramux_base.nf4 import BLOCK_SIZE
from loramux_base.shapes import LINEAR_GROUPS, BaseShapes
from loramux_server.engine.config import EngineConfig
from loramux_server.engine.host_arena import arena_bytes
from loramux_server.engine.memory import page_bytes
from loramux_server.model.slab import UNIT_ROWS, staging_bytes
from loramux_server.model.spec import ModelSpec

# Float32 copies of the logits that sampling with every parameter holds at once.
_LOGIT_COPIES = 4
# cuBLAS' workspace, as torch sets it from compute capability 9.0 on, for each stream that multiplies: the default one,
# that of the steps, that of captures.
_CUBLAS_BYTES = 3 * (32 << 20)
# Most splits of the KV cache that a row leaves partial sums for, and tokens of the smallest.
_MOST_SPLITS, _SPLIT_TOKENS = 32, 256


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Bytes by use, and what fits.

    Attributes:
        memory: Bytes of the device.
        weights: Base weights, embedding, rotary tables.
        unit: One rank unit (16 rank rows in every linear layer).
        slab: All rank units and their tables.
        staging: What adapters are copied through, on CUDA.
        host: Host memory that keeps adapters; not of the device.
        workspace: Largest step; on CUDA once more for captured graphs, and what libraries hold.
        page: One KV page over all layers.
        pages: KV pages that fit; negative or 0 = nothing does.
        page_size: Tokens a page.
    """

    memory: int
    weights: int
    unit: int
    slab: int
    staging: int
    host: int
    workspace: int
    page: int
    pages: int
    page_size: int

    @property
    def tokens(self) -> int:
        """Tokens in the KV pages."""
        return max(0, self.pages) * self.page_size

    @property
    def needed(self) -> int:
        """Bytes of everything together; more than `memory` if a fixed number of pages does not fit."""
        return self.weights + self.slab + self.staging + self.workspace + max(0, self.pages) * self.page

    def requests(self, context: int) -> int:
        """Requests of so many tokens, prompt and output, that the pages hold at once."""
        return max(0, self.pages) // -(-context // self.page_size)


def plan_capacity(config: EngineConfig, spec: ModelSpec, shapes: BaseShapes | None, *, memory: int) -> Capacity:
    """Add up.

    Args:
        config: Settings; `device` is `cpu` or `cuda`.
        spec: Base model.
        shapes: Its linear layers; None = it takes no adapters.
        memory: Bytes of the device.
    """
    cuda = config.device == "cuda"
    dtype = torch.float32 if config.weights == "fp32" or not cuda else torch.bfloat16
    shadow = not cuda if config.shadow is None else config.shadow
    weights = weight_bytes(spec, weights=config.weights, dtype=dtype, shadow=shadow)
    unit = 0 if shapes is None else unit_bytes(shapes, dtype)
    slab = unit * config.rank_units
    if shapes is not None:
        modules = sum(len(group) for group in LINEAR_GROUPS.values())
        slab += config.max_slots * (shapes.num_layers * modules * 8 + 4)
    staging = staging_bytes(shapes, dtype=dtype, max_rank=config.max_rank) if cuda and shapes is not None else 0
    workspace = step_bytes(config, spec, dtype=dtype, dequantizes=config.weights == "nf4" and not shadow)
    if cuda:
        workspace = 2 * workspace + _CUBLAS_BYTES + 2 * partial_bytes(config, spec)
    page = page_bytes(spec, config.page_size, dtype)
    if config.kv_pages is not None:
        pages = config.kv_pages
    elif cuda:
        room = int(memory * config.gpu_memory_utilization) - weights - slab - staging - workspace
        pages = room // page
    else:
        pages = -(-config.kv_tokens // config.page_size)
    return Capacity(
        memory=memory,
        weights=weights,
        unit=unit,
        slab=slab,
        staging=staging,
        host=arena_bytes(config.host_adapter_bytes, cuda=cuda) if shapes is not None else 0,
        workspace=workspace,
        page=page,
        pages=pages,
        page_size=config.page_size,
    )


def weight_bytes(spec: ModelSpec, *, weights: str, dtype: torch.dtype, shadow: bool) -> int:
    """Resident bytes of the base, as `CausalLM.resident_weight_bytes` counts them."""
    hidden, inner = spec.hidden_size, spec.num_heads * spec.head_dim
    outer = spec.num_kv_heads * spec.head_dim
    linears = (
        (inner + 2 * outer, hidden, spec.qkv_bias),
        (hidden, inner, spec.output_bias),
        (2 * spec.intermediate_size, hidden, spec.mlp_bias),
        (hidden, spec.intermediate_size, spec.mlp_bias),
    )
    layer = 0
    for n, k, bias in linears:
        packed = weights == "nf4" and not shadow
        layer += n * k // 2 + n * k // BLOCK_SIZE * 4 if packed else n * k * dtype.itemsize
        layer += n * dtype.itemsize if bias else 0
    norms = (4 if spec.sandwich_norms else 2) * hidden + (2 * spec.head_dim if spec.qk_norm else 0)
    embeddings = spec.vocab_size * hidden * (1 if spec.tied_embeddings else 2)
    tables = sum(spec.max_position * rope.rotary_dim * 4 for rope in spec.ropes)
    return spec.num_layers * (layer + norms * dtype.itemsize) + (embeddings + hidden) * dtype.itemsize + tables


def unit_bytes(shapes: BaseShapes, dtype: torch.dtype) -> int:
    """Bytes of one rank unit in every linear layer: A `[16, K]` a module, B `[16, N]`."""
    widths = sum(k + n for k, n in shapes.modules.values())
    return shapes.num_layers * UNIT_ROWS * widths * dtype.itemsize


def partial_bytes(config: EngineConfig, spec: ModelSpec) -> int:
    """Bytes of the float32 sums that the splits of the KV cache leave in a decode step.

    Args:
        config: Row budget and model length.
        spec: Base model.
    """
    splits = min(_MOST_SPLITS, -(-(config.max_model_len or spec.max_position) // _SPLIT_TOKENS))
    rows = min(config.max_running, config.max_batch_tokens)
    return rows * spec.num_heads * splits * (spec.head_dim + 2) * 4


def step_bytes(config: EngineConfig, spec: ModelSpec, *, dtype: torch.dtype, dequantizes: bool) -> int:
    """About what the largest step holds beside weights and pages.

    Args:
        config: Token and row budgets.
        spec: Base model.
        dtype: Compute dtype.
        dequantizes: Large products expand the NF4 weight of one layer at a time.
    """
    tokens = config.max_batch_tokens
    rows = min(config.max_running, tokens)
    # Residual stream, block output and its norm live through the gated MLP, the widest place.
    activations = tokens * (3 * spec.hidden_size + 3 * spec.intermediate_size) * dtype.itemsize
    logits = rows * spec.vocab_size * 4 * _LOGIT_COPIES
    dense = 2 * spec.intermediate_size * spec.hidden_size * dtype.itemsize if dequantizes else 0
    return max(activations + dense, logits + activations // 4)
