"""Bounds of a request, in one table: what `validate` checks, what `GetModel` publishes."""

from dataclasses import dataclass

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
MAX_METADATA_BYTES = 16 * 1024
MAX_SEQUENCES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds that a server sets; token counts and ids come from the served model.

    Attributes:
        vocab_size: Token ids are below it.
        max_model_len: Prompt and output together, in tokens.
        max_output_tokens: Tokens a sequence.
        max_prompt_bytes: UTF-8 bytes of a text prompt or of a rendered chat, before tokenization.
        max_messages: Messages of a chat.
        max_sequences: Largest n.
        max_logprobs: Largest logprobs and prompt_logprobs.
        max_stop_strings: Stop strings a request.
        max_stop_bytes: UTF-8 bytes of a stop string or bad word.
        max_stop_token_ids: Stop token ids a request.
        max_bad_words: Bad words a request.
        max_logit_bias: Entries of logit_bias.
        max_split_key_bytes: UTF-8 bytes of split_key.
        max_batch_items: Items a BatchGenerate call.
        max_item_id_bytes: UTF-8 bytes of an item id.
    """

    vocab_size: int
    max_model_len: int
    max_output_tokens: int
    max_prompt_bytes: int = 1024 * 1024
    max_messages: int = 1024
    max_sequences: int = MAX_SEQUENCES
    max_logprobs: int = 20
    max_stop_strings: int = 16
    max_stop_bytes: int = 256
    max_stop_token_ids: int = 64
    max_bad_words: int = 64
    max_logit_bias: int = 1024
    max_split_key_bytes: int = 256
    max_batch_items: int = 1024
    max_item_id_bytes: int = 128
