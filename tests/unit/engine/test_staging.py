"""Batch assembly against a token-by-token reference."""

import dataclasses
import random

import torch

from loramux_server.engine.messages import SamplingSpec
from loramux_server.engine.plan import RowPlan, StepPlan
from loramux_server.engine.staging import BatchStaging

PAGE = 4
SPEC = SamplingSpec(max_tokens=1)


def make_row(
    sequence_id: int, *, start: int, count: int, slot: int, sample: bool = True, targets: tuple[int, ...] | None = None
) -> RowPlan:
    pages = [10 * (sequence_id + 1) + index for index in range(-(-(start + count) // PAGE))]
    return RowPlan(
        sequence_id=sequence_id,
        token_ids=[100 * sequence_id + index for index in range(count)],
        start=start,
        pages=pages,
        slot=slot,
        sample=sample,
        sampling=SPEC,
        choice=0,
        position=start + count,
        history=[],
        prompt_length=1,
        prompt_logprobs=None if targets is None else 1,
        prompt_targets=targets or (),
    )


def make_staging() -> BatchStaging:
    return BatchStaging(device=torch.device("cpu"), max_tokens=256, max_sequences=16, max_pages=32, page_size=PAGE)


def test_random_plans_match_a_token_by_token_reference() -> None:
    staging = make_staging()
    generator = random.Random(3)
    for _ in range(200):
        rows = [
            make_row(
                index, start=generator.randrange(20), count=generator.randrange(1, 12), slot=generator.randrange(-1, 4)
            )
            for index in range(generator.randrange(1, 9))
        ]
        batch = staging.build(StepPlan(step=0, rows=rows))
        tokens = [(row, offset) for row in rows for offset in range(len(row.token_ids))]
        assert batch.token_ids.tolist() == [row.token_ids[offset] for row, offset in tokens]
        positions = [row.start + offset for row, offset in tokens]
        assert batch.positions.tolist() == positions
        assert batch.kv_slots.tolist() == [
            row.pages[position // PAGE] * PAGE + position % PAGE
            for (row, _), position in zip(tokens, positions, strict=True)
        ]
        assert batch.kv_lengths.tolist() == [row.start + len(row.token_ids) for row in rows]
        assert batch.query_starts.tolist()[-1] == len(tokens)
        for row, table in zip(rows, batch.page_tables.tolist(), strict=True):
            assert table == list(row.pages) + [0] * (len(table) - len(row.pages))
        assert batch.max_kv_length == max(batch.kv_lengths.tolist())
        slots = [row.slot for row, _ in tokens]
        if max(slots) < 0:
            assert batch.lora is None
            continue
        assert batch.lora is not None
        assert batch.lora.token_slots.tolist() == slots
        order = batch.lora.order.tolist()
        assert order == sorted(range(len(slots)), key=lambda index: slots[index])
        starts = batch.lora.segment_starts.tolist()
        for segment, slot in enumerate(batch.lora.segment_slots.tolist()):
            assert {slots[index] for index in order[starts[segment] : starts[segment + 1]]} == {slot}
        assert len(starts) == batch.lora.num_segments + 1 == len(set(slots)) + 1


def test_logit_rows_are_the_sampled_rows_then_the_prompt_rows() -> None:
    rows = [
        make_row(0, start=5, count=1, slot=-1),
        make_row(1, start=0, count=4, slot=-1, sample=False, targets=(7, 8, 9, 10)),
        make_row(2, start=0, count=3, slot=-1, targets=(5, 6)),
    ]
    batch = make_staging().build(StepPlan(step=0, rows=rows))
    assert batch.logit_rows.tolist() == [0, 7, 1, 2, 3, 4, 5, 6]


def test_a_full_step_fits_the_buffers() -> None:
    rows = [make_row(index, start=112, count=16, slot=index, targets=(1,) * 16) for index in range(16)]
    batch = make_staging().build(StepPlan(step=0, rows=rows))
    assert len(batch.token_ids) == 256 and batch.page_tables.shape == (16, 32)


def test_the_fullest_step_has_room() -> None:
    rows, tokens, pages = 16, 20, 32
    staging = BatchStaging(
        device=torch.device("cpu"), max_tokens=tokens, max_sequences=rows, max_pages=pages, page_size=PAGE
    )
    last = pages * PAGE - 1
    late = [
        dataclasses.replace(make_row(index, start=last, count=1, slot=index), source=rows - 2 - index)
        for index in range(rows - 1)
    ]
    chunk = make_row(rows - 1, start=0, count=tokens - len(late), slot=rows - 1, targets=(7, 8, 9, 10, 11))
    batch = staging.build(StepPlan(step=2, behind=1, rows=[*late, chunk]), torch.arange(50, 50 + len(late)))
    assert batch.token_ids.tolist() == [*reversed(range(50, 50 + len(late))), *chunk.token_ids]
    assert len(batch.logit_rows) == rows + 5 and batch.lora is not None and batch.lora.num_segments == rows
