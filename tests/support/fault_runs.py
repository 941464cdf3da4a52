"""Runs requests on a real engine whose steps run out of memory, and says what became of each."""

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from loramux_server.engine import model_runner
from loramux_server.engine.messages import Add, Done, PromptLogprobs, Tokens
from loramux_server.engine.model_runner import ModelRunner
from loramux_server.engine.plan import RowPlan, StepPlan
from loramux_server.engine.sampler import Sampled, Sampler
from loramux_server.model.causal_lm import CausalLM
from tests.support.engine_runs import EagerGraph, Job, RealEngine

POINTS = ("start", "copies", "forward", "replay", "logits", "sample", "to host", "end")
"""Where in a launch memory may run out: before anything, inside, and after everything is launched."""

Rule = Callable[[str, StepPlan], bool]
"""Whether memory runs out at this point of the launch of this plan."""


@dataclasses.dataclass(kw_only=True)
class Outcome:
    """What a request gave.

    Attributes:
        tokens: By choice.
        prompt: Prompt positions whose log-probabilities came, and those.
        status: `finished`, or the reason of the error.
    """

    tokens: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    prompt: dict[int, float] = dataclasses.field(default_factory=dict)
    status: str = ""


def serve(real: RealEngine, requests: Sequence[Add], *, limit: int = 5000) -> list[Outcome]:
    """Send all requests at once and run until every one has ended, once, and nothing is held any more."""
    engine = real.engine
    # Under a salt of its own, a run finds nothing in the prefix cache but what it has put there itself.
    salt = f"before {requests[0].request_id}".encode()
    requests = [msgspec.structs.replace(request, salt=salt) for request in requests]
    outcomes = {request.request_id: Outcome() for request in requests}
    engine.handle(requests)
    while engine.has_work:
        limit -= 1
        assert limit > 0, "the engine does not come to rest"
        for event in engine.step():
            if isinstance(event, Tokens | PromptLogprobs | Done):
                outcome = outcomes[event.request_id]
                assert not outcome.status, "an event after Done"
                _take(outcome, event)
        engine.check_integrity()
        if engine.stalled:
            time.sleep(0.001)
    assert all(outcome.status for outcome in outcomes.values()), "a request never ended"
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.kv_pages_used) == (0, 0, 0), "something is still held"
    return list(outcomes.values())


def _take(outcome: Outcome, event: Tokens | PromptLogprobs | Done) -> None:
    if isinstance(event, Tokens):
        tokens = outcome.tokens.setdefault(event.index, [])
        assert event.first == len(tokens), "tokens have a gap"
        tokens.extend(event.token_ids)
    elif isinstance(event, PromptLogprobs):
        for offset, entry in enumerate(event.entries):
            assert event.start + offset not in outcome.prompt, "a prompt position came twice"
            outcome.prompt[event.start + offset] = entry.logprob
    else:
        outcome.status = event.status if event.error is None else event.error.reason


def mixed_jobs(count: int, *, adapters: int, vocab: int, seed: int, longest: int = 40) -> list[Job]:
    """Jobs of every kind: base, adapters, greedy, sampled, penalties, bans, several choices, log-probabilities."""
    generator = random.Random(seed)
    kinds: list[dict[str, object]] = [
        {},
        {"temperature": 0.9, "top_p": 0.9, "top_k": 20, "logprobs": 2},
        {"temperature": 1.0, "n": 2},
        {"presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.3},
        {"prompt_logprobs": 1},
        {"temperature": 0.7, "bad_words": [[generator.randrange(3, vocab)], [5, 6], [7, 8, 9]]},
    ]
    jobs = []
    for index in range(count):
        which = generator.randrange(-1, adapters)
        fields = {"max_tokens": generator.randint(4, 14), "seed": index, **kinds[index % len(kinds)]}
        prompt = [100 + index % 2] * (8 * (index % 3)) + [
            generator.randrange(3, vocab) for _ in range(generator.randint(1, longest))
        ]
        jobs.append(Job(prompt=tuple(prompt), adapter=None if which < 0 else which, fields=tuple(fields.items())))
    return jobs


class OutOfMemoryIn:
    """Raises PyTorch's own out-of-memory error inside launches, where a rule says so.

    Attributes:
        hits: Plans that ran out, with the point.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._plan: StepPlan | None = None
        self.hits: list[tuple[str, StepPlan]] = []

    def _at(self, point: str) -> None:
        # Outside a launch (warm-up of another engine, say) there is no plan.
        if self._plan is not None and self._rule(point, self._plan):
            self.hits.append((point, self._plan))
            raise torch.OutOfMemoryError("injected")

    @contextlib.contextmanager
    def active(self) -> Iterator["OutOfMemoryIn"]:
        """Until the block ends."""
        launch, forward, logits, sample, to_host, replay, copy_pages = (
            ModelRunner._launch,
            CausalLM.forward,
            CausalLM.logits,
            Sampler.sample,
            ModelRunner._to_host,
            EagerGraph.replay,
            model_runner.copy_pages,
        )

        def failing_launch(runner: ModelRunner, plan: StepPlan) -> Any:
            self._plan = plan
            try:
                self._at("start")
                launched = launch(runner, plan)
                self._at("end")
                return launched
            finally:
                self._plan = None

        def failing_copies(*args: Any) -> None:
            self._at("copies")
            copy_pages(*args)

        def failing_to_host(runner: ModelRunner, *args: Any) -> Any:
            self._at("to host")
            return to_host(runner, *args)

        def failing_forward(model: CausalLM, *args: Any) -> Tensor:
            # Half the damage is done by now: the keys and values of the step are written.
            hidden = forward(model, *args)
            self._at("forward")
            return hidden

        def failing_logits(model: CausalLM, hidden: Tensor) -> Tensor:
            self._at("logits")
            return logits(model, hidden)

        def failing_sample(sampler: Sampler, *args: Any, **kwargs: Any) -> Sampled:
            sampled = sample(sampler, *args, **kwargs)
            self._at("sample")
            return sampled

        def failing_replay(graph: EagerGraph) -> None:
            self._at("replay")
            replay(graph)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ModelRunner, "_launch", failing_launch)
            patch.setattr(ModelRunner, "_to_host", failing_to_host)
            patch.setattr(model_runner, "copy_pages", failing_copies)
            patch.setattr(CausalLM, "forward", failing_forward)
            patch.setattr(CausalLM, "logits", failing_logits)
            patch.setattr(Sampler, "sample", failing_sample)
            patch.setattr(EagerGraph, "replay", failing_replay)
            yield self


def prefills(plan: StepPlan) -> list[RowPlan]:
    """Rows of more than one token."""
    return [row for row in plan.rows if len(row.token_ids) > 1]
