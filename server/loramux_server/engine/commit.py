"""Taking in the results of a step: tokens, ends, log-probabilities, prefix-cache entries and charges."""

import logging
from collections.abc import Callable, Sequence

from loramux_server.engine.counters import Counters
from loramux_server.engine.fairness import FairnessPolicy
from loramux_server.engine.kv import KvCache
from loramux_server.engine.messages import ErrorSpec, Event, PromptLogprobs, Tokens
from loramux_server.engine.plan import RowPlan, RowResult
from loramux_server.engine.request import Phase, Request
from loramux_server.engine.request_table import RequestTable
from loramux_server.engine.sequence import Sequence as TokenSequence
from loramux_server.errors import Reason

logger = logging.getLogger(__name__)


class Committer:
    """Applies results to the requests.

    Args:
        table: Requests.
        kv: Pages; full ones enter the prefix cache here and only here.
        fairness: Charged with every token computed.
        counters: Token counters.
        emit: Takes `Tokens` and `PromptLogprobs`.
    """

    def __init__(
        self,
        *,
        table: RequestTable,
        kv: KvCache,
        fairness: FairnessPolicy,
        counters: Counters,
        emit: Callable[[Event], None],
    ) -> None:
        self._table = table
        self._kv = kv
        self._fairness = fairness
        self._counters = counters
        self._emit = emit

    def commit(self, rows: Sequence[RowPlan], results: Sequence[RowResult], now: float) -> None:
        """Take in one launch.

        Args:
            rows: Rows as launched.
            results: Their results, in order.
            now: Monotonic seconds after the step.
        """
        assert len(rows) == len(results), f"{len(results)} results for {len(rows)} rows"
        for row, result in zip(rows, results, strict=True):
            entry = self._table.sequence(row.sequence_id)
            if entry is None:
                # It ended after this step was launched, or an earlier row of it ended the whole request.
                continue
            request, sequence = entry
            if result.finite:
                self._advance(request, sequence, row, result, now)
            else:
                self._go_bad(request, now)

    def fail(self, row: RowPlan, error: ErrorSpec, now: float) -> None:
        """Fail the request of a row that cannot run."""
        entry = self._table.sequence(row.sequence_id)
        if entry is not None:
            self._table.end(entry[0], "failed", now, error=error)

    def _advance(self, request: Request, sequence: TokenSequence, row: RowPlan, result: RowResult, now: float) -> None:
        assert request.phase is Phase.RUNNING and row.start == sequence.computed, "a row was committed out of order"
        count = len(row.token_ids)
        self._kv.committed(sequence, count, root=request.root, owner=request.version)
        request.computed_tokens += count
        self._fairness.charge(request.add.fairness_key, count)
        if row.sample and count == 1 and row.start >= row.prompt_length:
            self._counters.decode_tokens += 1
        else:
            self._counters.prefill_tokens += count
        if row.prompt_logprobs is not None:
            self._report_prompt(request, row, result)
        if row.sample:
            assert result.token_id is not None, "a sampled row gave no token"
            self._append(request, sequence, result.token_id, result, now)

    def _append(self, request: Request, sequence: TokenSequence, token_id: int, result: RowResult, now: float) -> None:
        if request.first_token_at is None:
            request.first_token_at = now
        sampling = request.add.sampling
        self._emit(
            Tokens(
                request_id=request.request_id,
                index=sequence.choice,
                first=sequence.output_length,
                token_ids=[token_id],
                logprobs=[result.logprob] if sampling.logprobs is not None and result.logprob is not None else [],
            )
        )
        sequence.tokens.append(token_id)
        if token_id in request.end_ids and sequence.output_length >= sampling.min_tokens:
            self._table.finish_sequence(request, sequence, "stop", now, stop_token_id=token_id)
        elif sequence.output_length >= request.max_tokens:
            self._table.finish_sequence(request, sequence, "length", now)

    def _report_prompt(self, request: Request, row: RowPlan, result: RowResult) -> None:
        assert len(result.prompt_logprobs) == len(row.prompt_targets), "prompt log-probabilities are missing"
        first = row.start + 1
        # Recomputation after a preemption repeats positions that are out already.
        skip = max(0, request.prompt_logprobs_sent - first)
        entries = list(result.prompt_logprobs)[skip:]
        if entries:
            request.prompt_logprobs_sent = first + skip + len(entries)
            self._emit(PromptLogprobs(request_id=request.request_id, start=first + skip, entries=entries))

    def _go_bad(self, request: Request, now: float) -> None:
        for sequence in request.alive:
            self._kv.distrust(sequence)
        logger.warning("request %s: non-finite logits, version %r", request.request_id, request.version)
        if request.version:
            error = ErrorSpec(
                reason=Reason.ADAPTER_NUMERICS.value,
                message=f"the logits under adapter version {request.version} are not finite",
            )
        else:
            error = ErrorSpec(reason=Reason.INTERNAL.value, message="the base model's logits are not finite")
        self._table.end(request, "failed", now, error=error)
