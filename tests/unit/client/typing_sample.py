"""A program that uses the SDK as its users do; checked by mypy --strict, never run."""

from collections.abc import AsyncIterator
from typing import assert_type

from loramux import (
    Adapter,
    AdapterVersion,
    AsyncClient,
    BatchItem,
    BatchRequest,
    ChatMessage,
    Client,
    Delta,
    Finished,
    GenerationResult,
    LoramuxError,
    SamplingParams,
    StreamInterrupted,
    Usage,
)


def blocking() -> None:
    with Client("localhost:50051", token="t") as client:
        bot = client.for_tenant("acme").with_adapter("bot")
        assert_type(bot, Client)
        with bot.generate("Hello", max_tokens=64, temperature=0, stop="x") as stream:
            assert_type(stream.started.adapter_version, str | None)
            for delta in stream:
                assert_type(delta, Delta)
            assert_type(stream.finished, Finished)
            assert_type(stream.usage, Usage)
        try:
            result = bot.generate([ChatMessage("user", "Hi")], sampling=SamplingParams(n=2)).result()
        except StreamInterrupted as error:
            assert_type(error.partial, str)
            assert_type(error.retry_after, float | None)
            raise
        except LoramuxError as error:
            assert_type(error.code, str)
            raise
        assert_type(result, GenerationResult)
        assert_type(result.outputs[0].token_ids, tuple[int, ...])
        for item in client.batch_generate(["a", BatchRequest([1, 2])]):
            assert_type(item, BatchItem)
        version = client.adapters.upload("./out", name="bot", promote=True)
        assert_type(version, AdapterVersion)
        assert_type(client.adapters.promote("bot", version), Adapter)
        assert_type([adapter.name for adapter in client.adapters.list()], list[str])


async def prompts() -> AsyncIterator[str]:
    yield "a"


async def asynchronous() -> None:
    async with AsyncClient("localhost:50051", token="t") as client:
        bot = client.for_tenant("acme").with_adapter("bot")
        assert_type(bot, AsyncClient)
        async with bot.generate("Hello", max_tokens=64, temperature=0) as stream:
            async for delta in stream:
                assert_type(delta, Delta)
            assert_type(stream.finished, Finished)
        assert_type(await bot.generate("Hello").result(), GenerationResult)
        async for item in client.batch_generate(prompts(), window=8):
            assert_type(item, BatchItem)
        version = await client.adapters.upload("./out", name="bot")
        assert_type(await client.adapters.rollback("bot"), Adapter)
        assert_type([entry async for entry in client.adapters.versions("bot")], list[AdapterVersion])
        assert_type(version.name, str)
