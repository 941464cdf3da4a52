"""Tokenize and Detokenize: bounded, and off the event loop when they are large."""

from collections.abc import Callable

from loramux.v1 import generation_pb2 as pb
from loramux_server.rpc.call import Call
from loramux_server.rpc.limits import MAX_MESSAGE_BYTES, Limits
from loramux_server.rpc.prompt import PromptEncoder
from loramux_server.rpc.validate import check_chat, check_prompt_bytes, check_token_ids, invalid, not_served

_INLINE_IDS = 4096


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
        if request.include_offsets:
            raise not_served("include_offsets")
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise invalid("prompt", "is absent", "set one of text and chat")
        special = True
        if kind == "text":
            text = request.text
            check_prompt_bytes("text", len(text.encode()), limits)
            if request.HasField("add_special_tokens"):
                special = request.add_special_tokens
        else:
            if request.HasField("add_special_tokens"):
                raise invalid("add_special_tokens", "is set with a chat prompt", "use it with text only")
            check_chat(request.chat, limits, prefix="chat")
            text = await self._prompts.render(request.chat, field="chat")
            special = False
        ids = await self._prompts.encode_text(text, add_special_tokens=special)
        response = pb.TokenizeResponse(token_ids=ids, max_model_len=limits.max_model_len)
        if response.ByteSize() > MAX_MESSAGE_BYTES:
            raise invalid(kind, f"gives {len(ids)} tokens, more than one message holds", "send it in parts")
        return response

    async def detokenize(self, request: pb.DetokenizeRequest, call: Call) -> pb.DetokenizeResponse:
        """Turn token ids into text."""
        limits = self._limits()
        if len(request.token_ids) > limits.max_prompt_bytes:
            raise invalid(
                "token_ids", f"has {len(request.token_ids)} entries", f"send {limits.max_prompt_bytes} at most"
            )
        check_token_ids("token_ids", request.token_ids, limits)
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        ids = list(request.token_ids)

        def decode() -> str:
            return self._prompts.tokenizer.decode(ids, skip_special_tokens=skip)

        text = decode() if len(ids) <= _INLINE_IDS else await self._prompts.in_thread(decode)
        response = pb.DetokenizeResponse(text=text)
        if response.ByteSize() > MAX_MESSAGE_BYTES:
            raise invalid("token_ids", f"has {len(ids)} entries, whose text is larger than a message", "send parts")
        return response
