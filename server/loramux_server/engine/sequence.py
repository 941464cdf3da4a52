"""One sequence of tokens: what it is made of, what of it is in the KV cache, and how it ended. No tensors."""

from collections.abc import Sequence as TokenSequence

from loramux_server.engine.plan import PageCopy


class Sequence:
    """One of the n continuations of a request.

    Attributes:
        sequence_id: Small integer, unique among living sequences.
        choice: Index in the request.
        tokens: Prompt and output so far.
        prompt_length: How many of `tokens` are prompt.
        computed: Leading tokens whose KV is in `pages`.
        in_flight: Tokens behind those that a launched step computes; set only while a step behind it is planned.
        pending: Tokens (0 or 1) behind `tokens` that this step samples and that will be computed; likewise.
        pages: Pages in order; they may reach past `computed`.
        keys: Prefix-cache keys of the leading full pages, as far as they were needed.
        pending_copy: Copy-on-write that must happen before the next row; holds a reference on its source page.
        launched: Whether a runner may hold device state for it.
        finish_reason: None while alive, else `stop`, `length` or `time_limit`.
        final_tokens: Output tokens that count once finished.
    """

    __slots__ = (
        "choice",
        "computed",
        "final_tokens",
        "finish_reason",
        "in_flight",
        "keys",
        "launched",
        "pages",
        "pending",
        "pending_copy",
        "prompt_length",
        "sequence_id",
        "tokens",
    )

    def __init__(self, *, sequence_id: int, choice: int, prompt: TokenSequence[int]) -> None:
        self.sequence_id = sequence_id
        self.choice = choice
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.computed = 0
        self.in_flight = 0
        self.pending = 0
        self.pages: list[int] = []
        self.keys: list[bytes] = []
        self.pending_copy: PageCopy | None = None
        self.launched = False
        self.finish_reason: str | None = None
        self.final_tokens = 0

    @property
    def output_length(self) -> int:
        """Output tokens produced."""
        return len(self.tokens) - self.prompt_length

    @property
    def length(self) -> int:
        """Tokens, the pending one included."""
        return len(self.tokens) + self.pending

    @property
    def launched_tokens(self) -> int:
        """Leading tokens that are in the KV cache once every launched step is over."""
        return self.computed + self.in_flight

    @property
    def remaining(self) -> int:
        """Tokens that no launched step computes; 1 = an ordinary decode row."""
        return self.length - self.launched_tokens

    def finish(self, reason: str, *, tokens: int | None = None) -> None:
        """End it; `tokens` counts fewer output tokens than were produced (a stop string matched earlier)."""
        assert self.finish_reason is None, "a sequence ends once"
        self.finish_reason = reason
        self.final_tokens = self.output_length if tokens is None else min(tokens, self.output_length)
