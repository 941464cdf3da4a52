"""Static batches: the rows of the plan are those of the eager batch, and padding touches nothing of theirs."""

import random

import pytest
import torch

from loramux_server.engine.plan import RowPlan, StepPlan
from loramux_server.engine.staging import BatchStaging
from loramux_server.engine.static_batch import BatchShape, StaticBatch
from loramux_server.kernels.batch import ForwardBatch
from tests.support.random_plans import GREEDY, random_plan

PAGE = 4
ROWS = 8
TOKENS = 48
LENGTH = 40
SLOTS = 5
CPU = torch.device("cpu")


@pytest.fixture
def static() -> StaticBatch:
    return StaticBatch(
        device=CPU,
        max_tokens=TOKENS,
        max_sequences=ROWS,
        max_pages=LENGTH // PAGE,
        max_segments=SLOTS + 1,
        page_size=PAGE,
    )


@pytest.fixture
def staging() -> BatchStaging:
    return BatchStaging(device=CPU, max_tokens=TOKENS, max_sequences=ROWS, max_pages=LENGTH // PAGE, page_size=PAGE)


def shape_for(plan: StepPlan, generator: random.Random, *, decode: bool) -> BatchShape:
    used, most = plan.num_tokens, ROWS if decode else TOKENS
    return BatchShape(
        tokens=generator.randint(used, most),
        decode=decode,
        lora=any(row.slot >= 0 for row in plan.rows) or generator.random() < 0.3,
        max_kv_length=LENGTH,
    )


def check(batch: ForwardBatch, exact: ForwardBatch, plan: StepPlan, shape: BatchShape) -> None:
    total, used = plan.num_tokens, len(plan.rows)
    for name in ("token_ids", "positions", "kv_slots"):
        padded, wanted = getattr(batch, name).tolist(), getattr(exact, name).tolist()
        assert padded == wanted + [0] * (shape.tokens - total), name
    sampled = len(exact.logit_rows)
    assert batch.logit_rows.tolist()[:sampled] == exact.logit_rows.tolist()
    assert all(0 <= row < shape.tokens for row in batch.logit_rows.tolist())
    assert batch.kv_lengths.tolist()[:used] == exact.kv_lengths.tolist()
    starts = batch.query_starts.tolist()
    assert starts[: used + 1] == exact.query_starts.tolist()
    for index in range(used):
        pages = len(plan.rows[index].pages)
        assert batch.page_tables[index, :pages].tolist() == list(plan.rows[index].pages)
    if shape.decode:
        # Padding is sequences of one token on the trash page.
        assert len(starts) == shape.tokens + 1 and starts == list(range(shape.tokens + 1))
        assert batch.kv_lengths.tolist()[used:] == [1] * (shape.tokens - used)
        assert batch.page_tables[used:, 0].tolist() == [0] * (shape.tokens - used)
        assert batch.max_query_length == 1
    else:
        # Padding belongs to no sequence.
        assert len(starts) == ROWS + 1 and set(starts[used:]) == {total}
    check_lora(batch, plan, shape)


def check_lora(batch: ForwardBatch, plan: StepPlan, shape: BatchShape) -> None:
    if not shape.lora:
        assert batch.lora is None
        return
    assert batch.lora is not None
    slots = [row.slot for row in plan.rows for _ in row.token_ids] + [-1] * (shape.tokens - plan.num_tokens)
    assert batch.lora.token_slots.tolist() == slots
    order, starts = batch.lora.order.tolist(), batch.lora.segment_starts.tolist()
    assert sorted(order) == list(range(shape.tokens))
    assert starts[0] == 0 and starts[-1] == shape.tokens and starts == sorted(starts)
    seen: list[int] = []
    for slot, begin, end in zip(batch.lora.segment_slots.tolist(), starts, starts[1:], strict=False):
        assert [slots[token] for token in order[begin:end]] == [slot] * (end - begin)
        seen.extend([slot] if end > begin else [])
    assert sorted(seen) == sorted(set(slots)), "a slot has two segments or none"
    assert set(batch.lora.segment_slots.tolist()[len(seen) :]) <= {-1}, "an unused segment names a slot"


@pytest.mark.parametrize("seed", range(4))
def test_random_plans_in_turn_match_the_eager_batch(static: StaticBatch, staging: BatchStaging, seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(60):
        decode = generator.random() < 0.5
        plan = random_plan(
            generator,
            max_rows=ROWS,
            max_tokens=TOKENS,
            page_size=PAGE,
            max_length=LENGTH,
            slots=SLOTS,
            vocab=1000,
            decode=decode,
        )
        shape = shape_for(plan, generator, decode=decode)
        static.fill(plan, shape)
        check(static.batch(shape), staging.build(plan), plan, shape)


def test_a_batch_made_before_sees_later_plans(static: StaticBatch) -> None:
    generator = random.Random(9)
    shape = BatchShape(tokens=ROWS, decode=True, lora=True, max_kv_length=LENGTH)
    batch = static.batch(shape)
    addresses = [batch.token_ids.data_ptr(), batch.page_tables.data_ptr(), batch.kv_lengths.data_ptr()]
    for _ in range(8):
        plan = random_plan(
            generator,
            max_rows=ROWS,
            max_tokens=ROWS,
            page_size=PAGE,
            max_length=LENGTH,
            slots=SLOTS,
            vocab=1000,
            decode=True,
        )
        static.fill(plan, shape)
        assert batch.token_ids.tolist()[: len(plan.rows)] == [row.token_ids[0] for row in plan.rows]
        again = static.batch(shape)
        assert addresses == [again.token_ids.data_ptr(), again.page_tables.data_ptr(), again.kv_lengths.data_ptr()]


def test_the_largest_plan_fits(static: StaticBatch, staging: BatchStaging) -> None:
    share = TOKENS // ROWS
    rows = [
        RowPlan(
            sequence_id=index,
            token_ids=[index] * share,
            start=LENGTH - share,
            pages=range(1 + index * (LENGTH // PAGE), 1 + (index + 1) * (LENGTH // PAGE)),
            slot=index % SLOTS,
            sample=True,
            sampling=GREEDY,
            choice=0,
            position=LENGTH,
            history=[],
            prompt_length=1,
        )
        for index in range(ROWS)
    ]
    plan = StepPlan(step=1, rows=rows)
    shape = BatchShape(tokens=TOKENS, decode=False, lora=True, max_kv_length=LENGTH)
    static.fill(plan, shape)
    check(static.batch(shape), staging.build(plan), plan, shape)
    assert static.batch(shape).page_tables.shape == (ROWS, LENGTH // PAGE)
