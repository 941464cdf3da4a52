"""Random step plans over a page pool of their own, as the scheduler could have made them."""

import random

from loramux_server.engine.messages import SamplingSpec
from loramux_server.engine.plan import RowPlan, StepPlan

GREEDY = SamplingSpec(max_tokens=1, temperature=0.0)


def random_plan(
    generator: random.Random,
    *,
    max_rows: int,
    max_tokens: int,
    page_size: int,
    max_length: int,
    slots: int,
    vocab: int,
    decode: bool,
) -> StepPlan:
    """A plan whose sequences own distinct pages; all rows are sampled single tokens when `decode`.

    Args:
        generator: Source of randomness.
        max_rows: Most rows.
        max_tokens: Most packed tokens.
        page_size: Tokens a page.
        max_length: Longest sequence after the step; a sequence takes its pages from a range of its own.
        slots: Slab slots; a row takes one of them or the base.
        vocab: Token ids are below it.
        decode: Whether it is a pure decode step.
    """
    count = generator.randint(1, min(max_rows, max_tokens))
    rows: list[RowPlan] = []
    left = max_tokens - count
    pages_each = -(-max_length // page_size)
    places = generator.sample(range(max_rows), count)
    for index in range(count):
        tokens = 1 if decode else 1 + generator.randint(0, min(left, max_length - 1, 12))
        left -= tokens - 1
        start = generator.randint(0, max_length - tokens)
        first = 1 + places[index] * pages_each
        rows.append(
            RowPlan(
                sequence_id=index,
                token_ids=[generator.randrange(vocab) for _ in range(tokens)],
                start=start,
                pages=range(first, first + -(-(start + tokens) // page_size)),
                slot=generator.randrange(-1, slots),
                sample=decode or generator.random() < 0.7,
                sampling=GREEDY,
                choice=0,
                position=start + tokens,
                history=[],
                prompt_length=1,
            )
        )
    return StepPlan(step=1, rows=rows)
