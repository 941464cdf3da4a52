"""Counters of one engine since it started; the source of `Stats`."""

import dataclasses


@dataclasses.dataclass(slots=True, kw_only=True)
class Counters:
    """See `messages.Stats` for the meaning of each."""

    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    distinct_adapters: int = 0
    step_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    prefill_tokens: int = 0
    decode_tokens: int = 0
    requests_finished: int = 0
    requests_cancelled: int = 0
    requests_failed: int = 0

    def count_end(self, status: str) -> None:
        """Count a request by the status of its `Done`."""
        if status == "finished":
            self.requests_finished += 1
        elif status == "cancelled":
            self.requests_cancelled += 1
        else:
            self.requests_failed += 1

    def add_seconds(self, seconds: dict[str, float]) -> None:
        """Add a step's seconds by part."""
        for part, value in seconds.items():
            self.step_seconds[part] = self.step_seconds.get(part, 0.0) + value
