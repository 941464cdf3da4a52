"""Tokenize and Detokenize: bounded, and off the event loop when they are large."""

from collections.abc import Callable

from loramux.v1 import generation_pb2 as pb
from loramux_server.rpc.call import Call
from loramux_server.rpc.limits import MAX_MESSAGE_BYTES, Limits
from loramux_server.rpc.prompt import PromptEncoder
from loramux_server.rpc.validate import check_chat, check_prompt_bytes, check_token_ids, invalid

_INLINE_IDS = 4096
# Decoding holds the interpreter from its first id to its last.
_MAX_IDS = 131_072


class Tokenization:
    """The two handlers."""

    def __init__(self, prompts: PromptEncoder, limits: Callable[[], Limits]) -> None:
        """Create them.

        Args:
            prompts: Template and tokenizer.
            limits: Bounds of a request.
        """
        self._prompts = prompts
        self._limits = limits

    async def tokenize(self, request: pb.TokenizeRequest, call: Call) -> pb.TokenizeResponse:
        """Turn text or a chat into token ids."""
        limits = self._limits()
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise invalid("prompt", "is absent", "set one of text and chat")
        offsets: list[tuple[int, int]] = []
        if kind == "text":
            text = request.text
            check_prompt_bytes("text", len(text.encode()), limits)
            special = request.add_special_tokens if request.HasField("add_special_tokens") else True
            if request.include_offsets:
                encoding = await self._prompts.encode_with_offsets(text, add_special_tokens=special)
                ids, offsets = encoding.ids, encoding.offsets
            else:
                ids = await self._prompts.encode_text(text, add_special_tokens=special)
        else:
            if request.HasField("add_special_tokens"):
                raise invalid("add_special_tokens", "is set with a chat prompt", "use it with text only")
            check_chat(request.chat, limits, prefix="chat")
            encoding = await self._prompts.encode_chat(request.chat, field="chat", offsets=request.include_offsets)
            ids, offsets = encoding.ids, encoding.offsets if request.include_offsets else []

        def respond() -> pb.TokenizeResponse:
            return pb.TokenizeResponse(
                token_ids=ids,
                offsets=[pb.TokenOffset(start=start, end=end) for start, end in offsets],
                max_model_len=limits.max_model_len,
            )

        response = respond() if len(offsets) <= _INLINE_IDS else await self._prompts.in_thread(respond)
        if response.ByteSize() > MAX_MESSAGE_BYTES:
            raise invalid(kind, f"gives {len(ids)} tokens, more than one message holds", "send it in parts")
        return response

    async def detokenize(self, request: pb.DetokenizeRequest, call: Call) -> pb.DetokenizeResponse:
        """Turn token ids into text."""
        limits = self._limits()
        most = max(limits.max_model_len, _MAX_IDS)
        if len(request.token_ids) > most:
            raise invalid("token_ids", f"has {len(request.token_ids)} entries", f"send {most} at most")
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True

        def decode() -> str:
            ids = list(request.token_ids)
            check_token_ids("token_ids", ids, limits)
            return self._prompts.tokenizer.decode(ids, skip_special_tokens=skip)

        text = decode() if len(request.token_ids) <= _INLINE_IDS else await self._prompts.in_thread(decode)
        response = pb.DetokenizeResponse(text=text)
        if response.ByteSize() > MAX_MESSAGE_BYTES:
            raise invalid(
                "token_ids", f"has {len(request.token_ids)} entries, whose text is larger than a message", "send parts"
            )
        return response
