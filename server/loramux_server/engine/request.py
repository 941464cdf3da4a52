"""A request from arrival to its one `Done`: the scheduler's book about it."""

import dataclasses
import enum

from loramux_server.engine.messages import Add
from loramux_server.engine.sequence import Sequence


class Phase(enum.Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """State of one `Add`.

    Attributes:
        add: The command.
        order: Arrival number; a preempted request keeps it and so returns to the front.
        arrival: Monotonic seconds.
        max_tokens: Output tokens a sequence, bounded by the model's length.
        phase: Waiting, running or done.
        version: Bound adapter version; "" = base or not bound yet.
        digest: Its digest.
        revision: Registry revision of the alias state that bound it.
        bound: Whether the request holds a reference on `version` (a preempted request keeps it).
        slot: Slab slot while running with an adapter, else -1.
        root: Prefix-cache root key once bound.
        sequences: All n, created at the first admission.
        alive: Those of them that have not ended.
        forked: Whether the sequences have pages of their own (always true for one sequence).
        admitted_order: Number of its latest admission; the newest is preempted first.
        admitted_at: Time of the first admission, None before.
        first_token_at: Time of the first output token.
        load_wait_since: Since when it waits for its adapter to be read and loaded.
        passed_over: Newer adapter requests admitted while it found no room for its adapter.
        cached_tokens: Prompt tokens found in the prefix cache at the first admission.
        computed_tokens: Tokens computed for it, recomputation included.
        preemptions: How often it was preempted.
        prompt_logprobs_sent: Prompt positions already reported (position 0 has none).
        end_ids: Token ids that end a sequence.
    """

    add: Add
    order: int
    arrival: float
    max_tokens: int
    phase: Phase = Phase.WAITING
    version: str = ""
    digest: str = ""
    revision: int = 0
    bound: bool = False
    slot: int = -1
    root: bytes = b""
    sequences: list[Sequence] = dataclasses.field(default_factory=list)
    alive: list[Sequence] = dataclasses.field(default_factory=list)
    forked: bool = False
    admitted_order: int = -1
    admitted_at: float | None = None
    first_token_at: float | None = None
    load_wait_since: float | None = None
    passed_over: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    preemptions: int = 0
    prompt_logprobs_sent: int = 1
    end_ids: frozenset[int] = frozenset()

    @property
    def request_id(self) -> str:
        """The front end's id."""
        return self.add.request_id

    @property
    def prompt_length(self) -> int:
        """Prompt tokens."""
        return len(self.add.prompt_token_ids)

    @property
    def uses_adapter(self) -> bool:
        """Whether it asks for an adapter, bound or not."""
        return self.add.alias is not None or self.add.version is not None

    @property
    def owes_prompt_logprobs(self) -> bool:
        """Whether prompt log-probabilities were asked and some are not out yet."""
        return self.add.sampling.prompt_logprobs is not None and self.prompt_logprobs_sent < self.prompt_length

    @property
    def width(self) -> int:
        """Rows it takes in a step."""
        return len(self.alive) if self.sequences else self.add.sampling.n

    @property
    def output_tokens(self) -> int:
        """Output tokens over all sequences, without those dropped after a stop."""
        return sum(
            sequence.output_length if sequence.finish_reason is None else sequence.final_tokens
            for sequence in self.sequences
        )
