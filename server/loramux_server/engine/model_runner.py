"""The runner: everything with a tensor in it, behind the step contract of `plan.py`."""

import dataclasses
import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from loramux_server.engine.adapter_loader import AdapterLoader, NoAdapters
from loramux_server.engine.graphs import ForwardGraphs
from loramux_server.engine.messages import Ready
from loramux_server.engine.out_of_memory import is_out_of_memory
from loramux_server.engine.plan import OutOfMemory, RowPlan, RowResult, StepPlan, StepResult
from loramux_server.engine.sampler import Sampled, Sampler, unpack_logprobs
from loramux_server.engine.staging import BatchStaging
from loramux_server.kernels.pages import copy_pages, poison
from loramux_server.model.causal_lm import CausalLM
from loramux_server.model.slab import LoraSlab

# Rows of prompt log-probabilities projected at once: bounds the float32 logits to 128 x vocabulary.
_PROMPT_ROWS = 128


@dataclasses.dataclass(frozen=True, slots=True)
class _Launched:
    """Handle of a step: results are on their way to the host."""

    plan: StepPlan
    sampled: Tensor | None
    top: int
    prompts: list[Tensor]
    prompt_top: int
    copied: torch.cuda.Event | None
    seconds: dict[str, float]
    error: OutOfMemory | None = None

    def result(self) -> StepResult:
        """Wait, then unpack.

        Raises:
            OutOfMemory: The step did not run; nothing was committed.
        """
        if self.error is not None:
            raise self.error
        began = time.perf_counter()
        if self.copied is not None:
            self.copied.synchronize()
        rows = _unpack(self)
        return StepResult(rows=rows, seconds={**self.seconds, "wait": time.perf_counter() - began})


class ModelRunner:
    """Runs step plans on a model, its KV pool and its adapter slab.

    Args:
        model: The base.
        kv: KV pool, a tensor a layer; see `memory.allocate_kv`.
        slab: Adapter slab; None = this base takes no adapters.
        loader: Residency over that slab.
        staging: Batch builder with the capacity of the largest step.
        page_size: Tokens a page.
        ready: What the engine announces.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        kv: list[Tensor],
        slab: LoraSlab | None,
        loader: AdapterLoader | NoAdapters,
        staging: BatchStaging,
        page_size: int,
        ready: Ready,
    ) -> None:
        self._model = model
        self._kv = kv
        self._slab = slab
        self._loader = loader
        self._staging = staging
        self._page_size = page_size
        self._graphs: ForwardGraphs | None = None
        self._replays = 0
        self._failed_step = 0
        self._sampled: Tensor | None = None
        self._sampler = Sampler(vocab_size=model.spec.vocab_size, device=model.device)
        self.ready = ready

    @property
    def slab(self) -> AdapterLoader | NoAdapters:
        """Adapter residency."""
        return self._loader

    @property
    def num_pages(self) -> int:
        """KV pages, page 0 included."""
        return self._kv[0].shape[0]

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self._page_size

    @property
    def asynchronous(self) -> bool:
        """On CUDA, launches return before the step is over."""
        return self._model.device.type == "cuda"

    @property
    def num_graphs(self) -> int:
        """Captured CUDA graphs."""
        return 0 if self._graphs is None else len(self._graphs)

    @property
    def replays(self) -> int:
        """Steps that replayed a graph."""
        return self._replays

    def capture(self, graphs: ForwardGraphs) -> None:
        """Capture CUDA graphs and use them from now on."""
        graphs.capture()
        self._graphs = graphs

    def launch(self, plan: StepPlan) -> _Launched:
        """Start a step: stage, forward, sample, begin the copy out."""
        if plan.behind and plan.behind == self._failed_step:
            error = OutOfMemory(f"step {plan.behind}, which this one goes on from, did not run")
            return _Launched(plan, None, 0, [], 0, None, {}, error=error)
        try:
            with torch.inference_mode():
                return self._launch(plan)
        except (RuntimeError, MemoryError) as failure:
            if not is_out_of_memory(failure):
                raise
            # The text only: the exception's frames hold the step's tensors, and they must go before the retry.
            reason = OutOfMemory(f"step of {plan.num_tokens} tokens: {failure}")
        self._failed_step = plan.step
        if self._model.device.type == "cuda":
            # What the step launched on side streams may still write to memory that is free again by now.
            torch.cuda.synchronize(self._model.device)
            torch.cuda.empty_cache()
        return _Launched(plan, None, 0, [], 0, None, {}, error=reason)

    def release_sequence(self, sequence_id: int) -> None:
        """Drop what the sampler keeps of a sequence."""
        self._sampler.release(sequence_id)

    def poison_pages(self, pages: Sequence[int]) -> None:
        """Fill pages with NaN."""
        poison(pages, self._kv)

    def close(self) -> None:
        """End the loader thread."""
        self._loader.close()

    def _launch(self, plan: StepPlan) -> _Launched:
        began = time.perf_counter()
        if plan.copies:
            copy_pages(plan.copies, self._kv)
        sampled_rows = [row for row in plan.rows if row.sample]
        logits = self._graphs.run(plan, self._sampled) if self._graphs is not None else None
        prompts: list[Tensor] = []
        prompt_top = 0
        self._replays += logits is not None
        if logits is None:
            batch = self._staging.build(plan, self._sampled)
            hidden = self._model.forward(batch, self._kv, self._slab if batch.lora is not None else None)
            logits = self._model.logits(hidden[: len(sampled_rows)]) if sampled_rows else None
            prompts, prompt_top = self._prompt_logprobs(hidden[len(sampled_rows) :], plan)
        forwarded = time.perf_counter()
        sampled = None
        if logits is not None and sampled_rows:
            sampled = self._sampler.sample(logits, sampled_rows, self._sampled)
        # Its rows may feed the step behind this one.
        self._sampled = None if sampled is None else sampled.packed[:, 0]
        host, prompts_host, event = self._to_host(sampled, prompts)
        return _Launched(
            plan,
            host,
            sampled.top if sampled is not None else 0,
            prompts_host,
            prompt_top,
            event,
            {"forward": forwarded - began, "sample": time.perf_counter() - forwarded},
        )

    def _prompt_logprobs(self, hidden: Tensor, plan: StepPlan) -> tuple[list[Tensor], int]:
        asking = [row for row in plan.rows if row.prompt_logprobs is not None and row.prompt_targets]
        if not asking:
            return [], 0
        top = max(row.prompt_logprobs or 0 for row in asking)
        # Pinned: a copy from pageable memory would wait for every step that was launched before.
        targets = torch.tensor(
            [target for row in asking for target in row.prompt_targets], dtype=torch.int64, pin_memory=hidden.is_cuda
        ).to(hidden.device, non_blocking=True)
        return [
            self._sampler.prompt_logprobs(self._model.logits(part), targets[begin : begin + _PROMPT_ROWS], top)
            for begin in range(0, len(hidden), _PROMPT_ROWS)
            for part in (hidden[begin : begin + _PROMPT_ROWS],)
        ], top

    def _to_host(
        self, sampled: Sampled | None, prompts: list[Tensor]
    ) -> tuple[Tensor | None, list[Tensor], torch.cuda.Event | None]:
        if self._model.device.type != "cuda":
            return (sampled.packed if sampled is not None else None), prompts, None

        def copy(tensor: Tensor) -> Tensor:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return host.copy_(tensor, non_blocking=True)

        host = copy(sampled.packed) if sampled is not None else None
        prompts_host = [copy(part) for part in prompts]
        event = torch.cuda.Event()
        event.record()
        return host, prompts_host, event


def _unpack(launched: _Launched) -> list[RowResult]:
    rows = launched.plan.rows
    sampled_rows = [row for row in rows if row.sample]
    results: dict[int, RowResult] = {}
    if launched.sampled is not None:
        logprobs = (
            unpack_logprobs(launched.sampled[:, 2:], launched.top, [_asked(row) for row in sampled_rows])
            if (launched.sampled.shape[1] > 2)
            else [None] * len(sampled_rows)
        )
        ids = launched.sampled[:, 0].tolist()
        finite = launched.sampled[:, 1].tolist()
        for index, row in enumerate(sampled_rows):
            results[row.sequence_id] = RowResult(
                token_id=ids[index], logprob=logprobs[index], finite=bool(finite[index])
            )
    if launched.prompts:
        _add_prompt_logprobs(launched, results)
    return [results.get(row.sequence_id, RowResult(token_id=None)) for row in rows]


def _add_prompt_logprobs(launched: _Launched, results: dict[int, RowResult]) -> None:
    columns = torch.cat(launched.prompts)
    begin = 0
    for row in launched.plan.rows:
        if row.prompt_logprobs is None or not row.prompt_targets:
            continue
        end = begin + len(row.prompt_targets)
        entries = unpack_logprobs(columns[begin:end], launched.prompt_top, [row.prompt_logprobs] * (end - begin))
        begin = end
        result = results.get(row.sequence_id, RowResult(token_id=None))
        known = tuple(entry for entry in entries if entry is not None)
        results[row.sequence_id] = dataclasses.replace(
            result,
            prompt_logprobs=known,
            # A NaN anywhere in a row of logits makes its normaliser, and so its target's log-probability, NaN.
            finite=result.finite and all(math.isfinite(entry.logprob) for entry in known),
        )


def _asked(row: RowPlan) -> int | None:
    return row.sampling.logprobs if row.sampling is not None else None
