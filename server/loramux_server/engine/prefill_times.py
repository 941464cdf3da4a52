"""Times prefill in chunks of several sizes, and picks the one that the scheduler should cut prompts into.

A larger chunk keeps the device busier, and makes everyone who decodes in the same step wait longer. So the chunk is the
smallest whose rate is within `ENOUGH` of the best one, among those whose step ends within `LONGEST_STEP_S`.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Sequence

from loramux_server.engine.messages import SamplingSpec
from loramux_server.engine.plan import RowPlan, Runner, StepHandle, StepPlan

LADDER = (128, 256, 512, 1024, 2048)
"""Tokens a step that are timed; each divides the next."""

ENOUGH = 0.97
"""Share of the best prefill rate that a chunk has to reach."""

LONGEST_STEP_S = 0.060
"""What a chunk may add to the time between two tokens of a running stream, where any chunk stays below it."""

_REPEATS = 3
_GREEDY = SamplingSpec(max_tokens=1, temperature=0.0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTime:
    """One chunk size.

    Attributes:
        tokens: Prompt tokens a step.
        step_s: Seconds a step, the mean over a whole prompt.
    """

    tokens: int
    step_s: float

    @property
    def rate(self) -> float:
        """Prompt tokens a second."""
        return self.tokens / self.step_s


def best_chunk(times: Sequence[ChunkTime]) -> int:
    """Tokens of the chunk to use.

    Args:
        times: At least one.
    """
    quick = [one for one in times if one.step_s <= LONGEST_STEP_S] or [min(times, key=lambda one: one.tokens)]
    fastest = max(one.rate for one in quick)
    return min(one.tokens for one in quick if one.rate >= ENOUGH * fastest)


def chunk_ladder(longest: int) -> list[int]:
    """Chunks to time on a model that takes prompts of so many tokens; empty for one that takes fewer than the least."""
    return [tokens for tokens in LADDER if tokens <= longest]


def time_chunks(runner: Runner, chunks: Sequence[int]) -> list[ChunkTime]:
    """Time a prompt as long as the largest chunk, cut into chunks of each size; the best of several runs.

    Args:
        runner: With pages for that prompt, and budgets for the largest chunk in one step.
        chunks: Ascending, each a divisor of the last.
    """
    prompt = chunks[-1]
    return [
        ChunkTime(
            tokens=tokens, step_s=min(_seconds(runner, tokens, prompt) for _ in range(_REPEATS + 1)) * tokens / prompt
        )
        for tokens in chunks
    ]


def _seconds(runner: Runner, tokens: int, prompt: int) -> float:
    flying: deque[StepHandle] = deque()
    began = time.perf_counter()
    for plan in _plans(tokens, prompt, runner.page_size):
        flying.append(runner.launch(plan))
        if len(flying) > 1:  # one step ahead, as the engine launches them
            flying.popleft().result()
    while flying:
        flying.popleft().result()
    seconds = time.perf_counter() - began
    runner.release_sequence(-1)
    return seconds


def _plans(tokens: int, prompt: int, page_size: int) -> Iterator[StepPlan]:
    for start in range(0, prompt, tokens):
        end = start + tokens
        row = RowPlan(
            sequence_id=-1,
            token_ids=[0] * tokens,
            start=start,
            pages=range(1, 1 + -(-end // page_size)),
            slot=-1,
            sample=end == prompt,
            sampling=_GREEDY if end == prompt else None,
            choice=0,
            position=end,
            history=[0] * end,
            prompt_length=prompt,
        )
        yield StepPlan(step=0, rows=[row])
