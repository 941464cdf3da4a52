"""CUDA graphs of whole forward passes, logits included: a ladder of decode sizes and one of mixed token counts.

A step that fits a rung is padded up to it and replayed: one launch instead of several hundred. Sampling stays outside:
what it launches depends on what the rows ask for. What does not fit (prompt log-probabilities, more rows than the
ladder) runs eagerly, and so do steps of an operation that has no kernel for the model's shape.
"""

import bisect
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from loramux_base.adapter import LINEAR_GROUPS
from loramux_server.engine.plan import StepPlan
from loramux_server.engine.static_batch import BatchShape, StaticBatch
from loramux_server.kernels import attention, lora
from loramux_server.kernels.capability import capture_obstacle
from loramux_server.model.causal_lm import CausalLM
from loramux_server.model.slab import LoraSlab

logger = logging.getLogger(__name__)

_EAGER = (
    "no CUDA graph of %s, since %s: they are launched kernel by kernel, several times slower. Full speed needs a base, "
    "and a card with Triton, that the kernels take"
)

DECODE_LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows of decode graphs; those above `max_running` are left out."""

MIXED_LADDER = (
    *range(128, 640, 64),
    *range(640, 1024, 128),
    *range(1024, 2048, 256),
    *range(2048, 8193, 1024),
)
"""Tokens of mixed graphs; those above the token budget are left out. A step pays for the padding up to its rung."""

KV_LADDER = (1024, 4096, 16384, 65536, 262144)
"""Bounds of KV lengths: they size the grid of split-KV attention."""


class Replayable(Protocol):
    """Recorded launches."""

    def replay(self) -> None:
        """Launch again what was recorded, at the same addresses."""
        ...


Recorder = Callable[[Callable[[], None]], Replayable]
"""Takes a function that launches kernels, and makes of what it launches something to replay."""


class CudaRecorder:
    """Captures CUDA graphs that share one memory pool.

    Args:
        device: The CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, launches: Callable[[], None]) -> Replayable:
        """Run once, so that kernels compile and libraries allocate their workspaces, then capture."""
        launches()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            launches()
        return graph


class ForwardGraphs:
    """Captured forward passes of one model over one KV pool.

    Args:
        model: The base.
        kv: The pool.
        slab: Adapters; None = base-only graphs.
        static: The buffers that the graphs read.
        max_tokens: Token budget of a step.
        max_sequences: Most sequences of a step.
        max_model_len: Longest sequence.
        batch_invariant: Attention's grid follows the KV bound in mixed steps too.
        record: Makes a graph of launches.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        kv: list[Tensor],
        slab: LoraSlab | None,
        static: StaticBatch,
        max_tokens: int,
        max_sequences: int,
        max_model_len: int,
        batch_invariant: bool,
        record: Recorder,
    ) -> None:
        self._model = model
        self._kv = kv
        self._slab = slab
        self._static = static
        self._batch_invariant = batch_invariant
        self._decode = _rungs(DECODE_LADDER, max_sequences)
        self._mixed = _rungs(MIXED_LADDER, max_tokens)
        self._kv_bounds = _rungs(KV_LADDER, max_model_len)
        self._logits = torch.zeros(max_sequences, model.spec.vocab_size, dtype=torch.float32, device=model.device)
        self._record = record
        self._graphs: dict[BatchShape, Replayable] = {}

    def __len__(self) -> int:
        """Captured graphs."""
        return len(self._graphs)

    def capture(self) -> None:
        """Capture every shape, the largest first, so that the smaller ones reuse its memory."""
        began = time.monotonic()
        adapted = self._adapted()
        shapes = [
            BatchShape(tokens=tokens, decode=decode, lora=with_adapters, max_kv_length=bound)
            for decode, rungs in ((False, self._mixed), (True, self._decode))
            for tokens in reversed(rungs)
            for with_adapters in adapted
            for bound in (self._kv_bounds if decode or self._batch_invariant else self._kv_bounds[-1:])
        ]
        with torch.inference_mode():
            for shape in shapes:
                self._graphs[shape] = self._record(functools.partial(self._launches, shape))
        logger.info("captured %d graphs in %.1f s", len(self._graphs), time.monotonic() - began)

    def _adapted(self) -> Sequence[bool]:
        """Which steps can be captured: with adapters (True), of the base alone (False)."""
        obstacle = _attention_obstacle(self._model)
        if obstacle is not None:
            logger.warning(_EAGER, "any step", obstacle)
            return ()
        if self._slab is None:
            return (False,)
        obstacle = _lora_obstacle(self._model, self._slab)
        if obstacle is not None:
            logger.warning(_EAGER, "steps with adapters", obstacle)
            return (False,)
        return (True, False)

    def run(self, plan: StepPlan, sampled: Tensor | None = None) -> Tensor | None:
        """Run a plan's forward pass.

        Args:
            plan: What to run.
            sampled: `[R]` tokens that the step before has sampled, for rows that take theirs from it.

        Returns:
            `[sampled rows, V]` float32 logits, overwritten by the next run; None when no graph fits.
        """
        shape = self.shape_of(plan)
        graph = None if shape is None else self._graphs.get(shape)
        if shape is None or graph is None:
            return None
        self._static.fill(plan, shape, sampled)
        graph.replay()
        return self._logits[: sum(row.sample for row in plan.rows)]

    def shape_of(self, plan: StepPlan) -> BatchShape | None:
        """The rung that a plan is padded to, or None."""
        if any(row.prompt_logprobs is not None for row in plan.rows):
            return None
        total = plan.num_tokens
        # A decode graph projects row i of the batch as logit row i: every row must be sampled.
        decode = total == len(plan.rows) and all(row.sample for row in plan.rows)
        tokens = _at_least(self._decode if decode else self._mixed, total)
        longest = max(row.start + len(row.token_ids) for row in plan.rows)
        bound = _at_least(self._kv_bounds, longest)
        if tokens is None or bound is None:
            return None
        if not decode and not self._batch_invariant:
            bound = self._kv_bounds[-1]
        return BatchShape(
            tokens=tokens, decode=decode, lora=any(row.slot >= 0 for row in plan.rows), max_kv_length=bound
        )

    def _launches(self, shape: BatchShape) -> None:
        """One forward pass over the static batch; before the first plan it holds no token, only padding."""
        batch = self._static.batch(shape)
        hidden = self._model.forward(batch, self._kv, self._slab if shape.lora else None)
        self._logits[: len(hidden)].copy_(self._model.logits(hidden))


def _attention_obstacle(model: CausalLM) -> str | None:
    """Why no forward pass of the model can be captured, None if they can."""
    spec = model.spec
    unsupported = attention.unsupported(
        model.dtype, heads=spec.num_heads, kv_heads=spec.num_kv_heads, head_dim=spec.head_dim
    )
    return capture_obstacle(model.device, "paged_attention", unsupported)


def _lora_obstacle(model: CausalLM, slab: LoraSlab) -> str | None:
    """Why no forward pass with adapters can be captured, None if they can."""
    groups = (slab.group(0, name) for name in LINEAR_GROUPS)  # every layer has the same shapes
    causes = (lora.unsupported(model.dtype, group) for group in groups)
    return capture_obstacle(model.device, "lora_add", next(filter(None, causes), None))


def _rungs(ladder: tuple[int, ...], limit: int) -> list[int]:
    """Rungs below the limit, and the limit."""
    return [*(rung for rung in ladder if rung < limit), limit]


def _at_least(rungs: list[int], value: int) -> int | None:
    place = bisect.bisect_left(rungs, value)
    return rungs[place] if place < len(rungs) else None
