"""Bounds of one engine, derived once from its settings and the runner."""

import dataclasses

from loramux_server.engine.config import EngineConfig
from loramux_server.engine.kv import KvCache
from loramux_server.engine.messages import Add
from loramux_server.engine.plan import Runner
from loramux_server.errors import InvalidRequest, Reason

DEFAULT_PREFILL_CHUNK = 512
"""Where neither a setting nor a measurement says better."""


def prefill_chunk(config: EngineConfig, tuned: int | None) -> int:
    """Most prompt tokens of one sequence in a step: as set, else as measured, else the default; within the budget.

    Args:
        config: Settings.
        tuned: What was measured to be best; None = nothing was.
    """
    chosen = config.prefill_chunk if config.prefill_chunk is not None else tuned or DEFAULT_PREFILL_CHUNK
    return min(chosen, config.max_batch_tokens)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a step and a request may take.

    Attributes:
        max_model_len: Longest prompt + output in tokens.
        vocab_size: Token ids are below it; None = unknown, unchecked.
        max_running: Most rows a step.
        max_batch_tokens: Token budget of a step.
        prefill_chunk: Most prompt tokens of one sequence in a step.
    """

    max_model_len: int
    vocab_size: int | None
    max_running: int
    max_batch_tokens: int
    prefill_chunk: int

    @classmethod
    def derive(
        cls,
        config: EngineConfig,
        runner: Runner,
        *,
        max_model_len: int | None,
        vocab_size: int | None,
        tuned_chunk: int | None = None,
    ) -> "Limits":
        """Limits for a configuration; a request of maximum length always fits the pool."""
        pool_tokens = (runner.num_pages - 1) * runner.page_size
        longest = min(value for value in (max_model_len, config.max_model_len, pool_tokens) if value is not None)
        chunk = prefill_chunk(config, tuned_chunk)
        for name in ("max_running", "max_batch_tokens"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name}: {getattr(config, name)} must be at least 1")
        if chunk < 1:
            raise ValueError(f"prefill_chunk: {chunk} must be at least 1")
        return cls(
            max_model_len=longest,
            vocab_size=vocab_size,
            max_running=min(config.max_running, config.max_batch_tokens),
            max_batch_tokens=config.max_batch_tokens,
            prefill_chunk=chunk,
        )

    def output_tokens(self, add: Add, kv: KvCache) -> int:
        """Output tokens a sequence of this request may produce.

        Raises:
            InvalidRequest: The request could never run here, whatever else does.
        """
        prompt, sampling = add.prompt_token_ids, add.sampling
        if not prompt:
            raise _bad("prompt", "the prompt has no tokens")
        if min(prompt) < 0 or (self.vocab_size is not None and max(prompt) >= self.vocab_size):
            raise _bad("prompt", f"a prompt token id is outside [0, {self.vocab_size})")
        if not add.weight > 0:
            raise _bad("weight", f"weight: {add.weight} must be positive")
        if sampling.max_tokens < 1:
            raise _bad("sampling.max_tokens", f"sampling.max_tokens: {sampling.max_tokens} must be at least 1")
        if not 1 <= sampling.n <= self.max_running:
            raise _bad(
                "sampling.n",
                f"sampling.n: {sampling.n} must be in [1, {self.max_running}], the sequences that this server runs at "
                "once; send several requests instead",
            )
        if len(prompt) >= self.max_model_len:
            raise InvalidRequest(
                Reason.PROMPT_TOO_LONG,
                f"the prompt has {len(prompt)} tokens; prompt and output together may have {self.max_model_len}",
                field="prompt",
            )
        output = min(sampling.max_tokens, self.max_model_len - len(prompt))
        # The last token sampled never enters the KV cache.
        pages = kv.worst_case(prompt=len(prompt), output=output - 1, sequences=sampling.n)
        if pages > kv.pool.usable:
            raise _bad(
                "sampling.n",
                f"sampling.n: {sampling.n} sequences of {len(prompt)} + {output} tokens need {pages} KV pages, "
                f"the pool has {kv.pool.usable}; lower n or max_tokens",
            )
        return output


def _bad(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(Reason.INVALID_PARAMETER, message, field=field)
