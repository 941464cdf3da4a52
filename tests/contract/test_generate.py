"""What every server and both clients keep to in generations."""

import asyncio
from typing import Any

import pytest

from loramux import (
    AdapterNotFound,
    BatchRequest,
    ClientStateError,
    DeadlineExceeded,
    FinishReason,
    InvalidRequest,
    SamplingParams,
)
from tests.contract.conftest import ContractServer

PROMPT = "The quick brown fox"


async def test_events_of_a_stream(client: Any) -> None:
    async with client.generate(PROMPT, max_tokens=8, temperature=0) as stream:
        started = stream.started
        assert started.generation_id and started.replica_id
        assert started.adapter_version is None
        assert started.prompt_tokens > 0
        deltas = [delta async for delta in stream]
        assert {delta.index for delta in deltas} == {0}
        assert stream.finished.reason in (FinishReason.STOP, FinishReason.LENGTH)
        assert stream.usage.prompt_tokens == started.prompt_tokens
        ids = [token_id for delta in deltas for token_id in delta.token_ids]
        assert len(ids) == stream.usage.output_tokens <= 8
        assert (await stream.result()).text == "".join(delta.text for delta in deltas)


async def test_greedy_is_deterministic(client: Any) -> None:
    first = await client.generate(PROMPT, max_tokens=6, temperature=0).result()
    second = await client.generate(PROMPT, sampling=SamplingParams(temperature=1, max_tokens=6), temperature=0).result()
    assert first.token_ids == second.token_ids


async def test_max_tokens_ends_with_length(client: Any) -> None:
    result = await client.generate(PROMPT, max_tokens=3, temperature=0, ignore_eos=True).result()
    assert (len(result.token_ids), result.finish_reason) == (3, FinishReason.LENGTH)


async def test_several_sequences(client: Any) -> None:
    result = await client.generate(PROMPT, max_tokens=3, n=2, seed=7).result()
    assert [output.index for output in result.outputs] == [0, 1]
    assert result.usage.output_tokens == sum(len(output.token_ids) for output in result.outputs)
    assert result.started.seed == 7
    with pytest.raises(InvalidRequest):
        _ = result.text


async def test_logprobs(client: Any) -> None:
    result = await client.generate(PROMPT, max_tokens=3, temperature=0, logprobs=2).result()
    output = result.outputs[0]
    assert len(output.logprobs) == len(output.token_ids)
    for token_id, position in zip(output.token_ids, output.logprobs, strict=True):
        assert position.token.token_id == token_id
        assert position.token.logprob is not None and position.token.logprob <= 0
        assert len(position.top) == 2


async def test_token_ids_are_a_prompt(client: Any) -> None:
    ids = (await client.tokenize(PROMPT)).token_ids
    from_ids = await client.generate(list(ids), max_tokens=4, temperature=0).result()
    from_text = await client.generate(PROMPT, max_tokens=4, temperature=0).result()
    assert from_ids.started.prompt_tokens == len(ids) == from_text.started.prompt_tokens
    assert from_ids.token_ids == from_text.token_ids


async def test_tokenize_and_back(client: Any) -> None:
    tokens = await client.tokenize(PROMPT, add_special_tokens=False)
    assert tokens.max_model_len > len(tokens.token_ids) > 0
    assert await client.detokenize(tokens.token_ids) == PROMPT
    assert await client.detokenize([]) == ""


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("sampling.temperature", {"temperature": -1.0}),
        ("sampling.top_p", {"top_p": 0.0}),
        ("sampling.max_tokens", {"max_tokens": 0}),
        ("sampling.n", {"n": 0}),
    ],
)
async def test_values_out_of_range_are_named(client: Any, field: str, values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await client.generate(PROMPT, **values).result()
    assert caught.value.reason == "INVALID_PARAMETER"
    assert field in [violation.field for violation in caught.value.field_violations]
    assert caught.value.request_id


async def test_an_adapter_that_does_not_exist(client: Any) -> None:
    texts = set()
    for name in ("no-such-bot", "tenants/somebody/adapters/no-such-bot"):
        with pytest.raises(AdapterNotFound) as caught:
            await client.generate(PROMPT, adapter=name, max_tokens=1).result()
        assert (caught.value.code, caught.value.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
        texts.add(caught.value.message.replace(name, "?").replace("no-such-bot", "?"))
    assert len(texts) == 1, "a foreign adapter and none answer alike"


async def test_leaving_the_block_frees_the_call(client: Any, contract_server: ContractServer) -> None:
    async with client.generate(PROMPT, **contract_server.long_generation()) as stream:
        async for _ in stream:
            break
    with pytest.raises(ClientStateError):
        await anext(aiter(stream))
    for _ in range(100):
        if (await client.status()).own.running_requests == 0:
            break
        await asyncio.sleep(0.1)
    assert (await client.status()).own.running_requests == 0
    assert not await client.cancel(stream.started.generation_id)


async def test_cancel_from_outside_ends_well(client: Any, contract_server: ContractServer) -> None:
    async with client.generate(PROMPT, **contract_server.long_generation()) as stream:
        assert await client.cancel(stream.started.generation_id)
        result = await stream.result()
    assert result.finish_reason is FinishReason.CANCELLED
    assert result.usage.output_tokens == len(result.token_ids)


async def test_cancel_of_what_is_not_there(client: Any) -> None:
    assert not await client.cancel("no-such-generation")


async def test_a_deadline_ends_the_call(client: Any, contract_server: ContractServer) -> None:
    with pytest.raises(DeadlineExceeded):
        await client.generate(PROMPT, timeout=0.3, **contract_server.long_generation()).result()


async def test_batch(client: Any) -> None:
    sampling = SamplingParams(max_tokens=4, temperature=0)
    requests = [
        BatchRequest(PROMPT, item_id="a", sampling=sampling),
        BatchRequest("Other words", item_id="b", sampling=sampling),
        BatchRequest(PROMPT, item_id="foreign", adapter="no-such-bot", sampling=sampling),
        BatchRequest(PROMPT, item_id="hot", sampling=SamplingParams(temperature=-1)),
    ]
    items = {item.item_id: item async for item in client.batch_generate(requests)}
    assert set(items) == {"a", "b", "foreign", "hot"}
    alone = await client.generate(PROMPT, max_tokens=4, temperature=0).result()
    assert items["a"].unwrap().token_ids == alone.token_ids
    assert items["b"].error is None
    assert isinstance(items["foreign"].error, AdapterNotFound)
    assert isinstance(items["hot"].error, InvalidRequest)


async def test_model_and_status(client: Any) -> None:
    model = await client.model()
    assert model.vocab_size > 0
    assert model.max_model_len > 0
    assert len(model.fingerprint.digest) == 64
    assert model.limits.max_message_bytes == 4 * 1024 * 1024
    status = await client.status()
    assert status.state == "serving"
    assert status.replica_id
