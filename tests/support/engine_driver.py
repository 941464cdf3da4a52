"""Drives an `Engine` over a `FakeRunner` and judges its events against what each request must have given."""

import dataclasses

from loramux_server.engine.config import EngineConfig
from loramux_server.engine.engine import Engine
from loramux_server.engine.messages import (
    Add,
    AliasSpec,
    Completed,
    Done,
    Event,
    PromptLogprobs,
    PutAlias,
    PutVersion,
    SamplingSpec,
    SequenceFinished,
    Started,
    Stop,
    Tokens,
    VersionSpec,
    VersionState,
)
from tests.support.fake_runner import FakeRunner, FakeSlab, solo_output


class Clock:
    """Monotonic seconds that stand still until told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclasses.dataclass
class Transcript:
    """Events of one request."""

    add: Add
    started: Started | None = None
    tokens: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    finished: dict[int, SequenceFinished] = dataclasses.field(default_factory=dict)
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
    done: Done | None = None
    stops: dict[int, int] = dataclasses.field(default_factory=dict)


def version(name: str) -> VersionSpec:
    """A version whose path is `/name` and whose digest is its own."""
    return VersionSpec(version=name, digest=f"digest-{name}", path=f"/{name}")


class Driver:
    """One engine, its clock and everything it has said."""

    def __init__(self, *, runner: FakeRunner | None = None, vocab_size: int | None = None, **config: object) -> None:
        self.runner = runner if runner is not None else FakeRunner()
        self.clock = Clock()
        settings = {"model": "fake", "page_size": self.runner.page_size, "poison": True, **config}
        self.config = EngineConfig(**settings)  # type: ignore[arg-type]
        self.engine = Engine(self.config, self.runner, clock=self.clock, fingerprint="base", vocab_size=vocab_size)
        self.events: list[Event] = []
        self.requests: dict[str, Transcript] = {}
        self.completed: dict[str, Completed] = {}
        self.states: list[VersionState] = []

    def add(self, request_id: str, prompt: list[int], **fields: object) -> Transcript:
        """Add a request; fields of `SamplingSpec` and `Add` may be mixed."""
        of_sampling = {name: fields.pop(name) for name in list(fields) if name in SamplingSpec.__struct_fields__}
        sampling = SamplingSpec(**{"max_tokens": 4, **of_sampling})  # type: ignore[arg-type]
        add = Add(request_id=request_id, prompt_token_ids=prompt, sampling=sampling, **fields)  # type: ignore[arg-type]
        transcript = self.requests.setdefault(request_id, Transcript(add))
        self.engine.handle([add])
        return transcript

    def put(self, *names: str) -> None:
        """Make versions known."""
        self.engine.handle([PutVersion(spec=version(name)) for name in names])

    def alias(self, alias: str, *targets: tuple[str, float], revision: int = 1) -> None:
        """Point an alias."""
        self.engine.handle([PutAlias(spec=AliasSpec(alias=alias, targets=list(targets), revision=revision))])

    def stop(self, request_id: str, index: int, tokens: int) -> None:
        """Send a stop as the front end would: only for tokens it has seen of a sequence that it believes alive."""
        transcript = self.requests[request_id]
        seen = len(transcript.tokens.get(index, []))
        if transcript.done is None and index not in transcript.finished and 0 < tokens <= seen:
            transcript.stops[index] = tokens
            self.engine.handle([Stop(request_id=request_id, index=index, tokens=tokens)])

    def step(self, count: int = 1) -> None:
        """Run steps, checking every invariant after each."""
        for _ in range(count):
            events = self.engine.step()
            self.engine.check_integrity()
            for event in events:
                self._take(event)

    def run(self, limit: int = 5000) -> None:
        """Step until nothing is left to do."""
        while self.engine.has_work:
            assert limit > 0, "the engine does not come to rest"
            limit -= 1
            self.step()

    def _take(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Completed):
            assert event.operation_id not in self.completed, "an operation was answered twice"
            self.completed[event.operation_id] = event
        elif isinstance(event, VersionState):
            self.states.append(event)
        elif isinstance(event, Started | Tokens | SequenceFinished | PromptLogprobs | Done):
            self._take_of_request(event)

    def _take_of_request(self, event: Started | Tokens | SequenceFinished | PromptLogprobs | Done) -> None:
        transcript = self.requests[event.request_id]
        assert transcript.done is None, "an event after Done"
        if isinstance(event, Started):
            assert transcript.started is None, "started twice"
            transcript.started = event
        elif isinstance(event, Tokens):
            assert transcript.started is not None
            assert event.index not in transcript.finished, "tokens after the end"
            tokens = transcript.tokens.setdefault(event.index, [])
            assert event.first == len(tokens), "tokens have a gap"
            tokens.extend(event.token_ids)
        elif isinstance(event, SequenceFinished):
            assert event.index not in transcript.finished, "a sequence finished twice"
            transcript.finished[event.index] = event
        elif isinstance(event, PromptLogprobs):
            assert event.start == len(transcript.prompt_logprobs) + 1, "prompt log-probabilities have a gap"
            transcript.prompt_logprobs.extend(entry.logprob for entry in event.entries)
        else:
            transcript.done = event

    # --- judgement -------------------------------------------------------------------------------------------------

    def judge(self) -> None:
        """Assert that every request ended once and gave what it gives alone."""
        for transcript in self.requests.values():
            self._judge(transcript)

    def _judge(self, transcript: Transcript) -> None:
        done, add = transcript.done, transcript.add
        assert done is not None, f"{add.request_id} never ended"
        assert (done.error is not None) == (done.status == "failed")
        path = ""
        if transcript.started is not None and transcript.started.version:
            path = f"/{transcript.started.version}"
        for index, tokens in transcript.tokens.items():
            alone = solo_output(add.prompt_token_ids, add.sampling, path, index)
            alone = alone[: self.engine.limits.max_model_len - len(add.prompt_token_ids)]
            assert tokens == alone[: len(tokens)], f"{add.request_id}/{index} differs from the solo run"
            end = transcript.finished.get(index)
            if end is not None and end.reason in ("stop", "length") and index not in transcript.stops:
                assert tokens == alone and end.tokens == len(alone)
                assert end.stop_token_id == (alone[-1] if end.reason == "stop" else None)
            elif end is not None and index in transcript.stops:
                assert end.tokens in (transcript.stops[index], len(alone))
        if done.status == "finished":
            assert set(transcript.finished) == set(range(add.sampling.n))
            assert done.output_tokens == sum(end.tokens for end in transcript.finished.values())
            if add.sampling.prompt_logprobs is not None:
                assert transcript.prompt_logprobs == [-float(token) for token in add.prompt_token_ids[1:]]

    def assert_at_rest(self) -> None:
        """Assert that nothing is held: pages, sequences, slots in use."""
        self.engine.check_integrity()
        stats = self.engine.stats()
        assert (stats.waiting, stats.running, stats.kv_pages_used) == (0, 0, 0)
        assert self.runner.live_sequences == set()
        ended = stats.requests_finished + stats.requests_cancelled + stats.requests_failed
        assert ended == len(self.requests)
        if not self.engine.has_work:
            told = {state.version: state.references for state in self.states}
            assert not any(told.values()), "references left over"


def make_driver(
    *,
    pages: int = 63,
    page_size: int = 4,
    rank_units: int = 8,
    max_slots: int = 8,
    units: dict[str, int] | None = None,
    delay: int = 0,
    reading: int = 0,
    host_size: int = 0,
    **config: object,
) -> Driver:
    """A driver with the given pool and slab."""
    slab = FakeSlab(
        rank_units=rank_units, max_slots=max_slots, units=units, delay=delay, reading=reading, host_size=host_size
    )
    return Driver(runner=FakeRunner(num_pages=pages + 1, page_size=page_size, slab=slab), **config)


def finish(driver: Driver) -> None:
    """Run to the end and judge; nothing may be left."""
    driver.run()
    driver.judge()
    driver.assert_at_rest()


def reason(transcript: Transcript) -> str | None:
    """Why a request that has ended failed; None if it did not."""
    assert transcript.done is not None
    return None if transcript.done.error is None else transcript.done.error.reason
