"""Every option of a generation does on the real engine what the API says."""

import asyncio
import random
from collections import Counter

import pytest

from loramux import (
    AdapterNotFound,
    AsyncClient,
    BatchRequest,
    ChatMessage,
    FinishReason,
    GenerationResult,
    NotFound,
    SamplingParams,
)
from tests.e2e.real_server import RealServer

PROMPT = "Hello, how can I help"
VOCABULARY = 512


async def _greedy(client: AsyncClient, prompt: str | list[int] = PROMPT, **fields: object) -> GenerationResult:
    defaults: dict[str, object] = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
    return await client.generate(prompt, **{**defaults, **fields}).result()  # type: ignore[arg-type]


async def test_sequences_of_one_prompt_are_drawn_by_seed(server: RealServer) -> None:
    async with AsyncClient(server.address) as client:
        options = {"temperature": 1.0, "seed": 11, "n": 4}
        first, second = await asyncio.gather(_greedy(client, **options), _greedy(client, **options))
        other = await _greedy(client, **{**options, "seed": 12})
        greedy = await _greedy(client, n=3)
    outputs = [output.token_ids for output in first.outputs]
    assert [output.index for output in first.outputs] == [0, 1, 2, 3]
    assert outputs == [output.token_ids for output in second.outputs]
    assert len(set(outputs)) == 4
    assert outputs != [output.token_ids for output in other.outputs]
    assert first.started.seed == 11
    assert first.usage.output_tokens == 4 * 24
    assert len({output.token_ids for output in greedy.outputs}) == 1


async def test_stop_strings_match_across_tokens(server: RealServer) -> None:
    async with AsyncClient(server.address) as client:
        free = await _greedy(client, max_tokens=40)
        pieces = [await client.detokenize([token]) for token in free.token_ids]
        spans = [
            (index, left[-1] + right[0])
            for index, (left, right) in enumerate(zip(pieces, pieces[1:], strict=False))
            if left and right and (left[-1] + right[0]).isascii() and "\ufffd" not in left + right
        ]
        stop = next(
            text
            for index, text in spans
            if index >= 2 and free.text.find(text) == len("".join(pieces[: index + 1])) - 1
        )
        cut, kept, late = await asyncio.gather(
            _greedy(client, max_tokens=40, stop=stop),
            _greedy(client, max_tokens=40, stop=["never there", stop], include_stop=True),
            _greedy(client, max_tokens=40, stop=stop, min_tokens=40),
        )
    before = free.text[: free.text.index(stop)]
    assert (cut.text, cut.finish_reason) == (before, FinishReason.STOP)
    assert (kept.text, kept.finish_reason) == (before + stop, FinishReason.STOP)
    assert cut.outputs[0].matched_stop is not None and cut.outputs[0].matched_stop.stop == stop
    assert cut.usage.output_tokens == len(cut.token_ids) < 40
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert late.finish_reason is FinishReason.LENGTH and late.token_ids == free.token_ids


async def test_stop_token_ids_and_end_of_sequence(server: RealServer) -> None:
    async with AsyncClient(server.address) as client:
        free = await _greedy(client)
        token = free.token_ids[5]
        first = free.token_ids.index(token)
        stopped = await _greedy(client, stop_token_ids=[token])
        assert stopped.token_ids == free.token_ids[: first + 1]
        match = stopped.outputs[0].matched_stop
        assert match is not None and match.stop_token_id == token
        later = await _greedy(client, stop_token_ids=[token], min_tokens=first + 2)
        assert later.token_ids[:first] == free.token_ids[:first] and len(later.token_ids) >= first + 2
        assert token not in later.token_ids[: first + 2], "before min_tokens it is not sampled"
        [eos] = (await client.model()).eos_token_ids
        ended = await _greedy(client, logit_bias={eos: 100.0}, ignore_eos=False)
        match = ended.outputs[0].matched_stop
        assert ended.finish_reason is FinishReason.STOP and match is not None and match.eos_token_id == eos
        assert ended.text == "" and ended.usage.output_tokens == 1
        ignored = await _greedy(client, logit_bias={eos: 100.0}, max_tokens=5)
        assert ignored.token_ids == (eos,) * 5


async def test_logprobs_are_of_the_raw_logits(server: RealServer) -> None:
    async with AsyncClient(server.address) as client:
        plain = await _greedy(client, logprobs=5)
        biased = await _greedy(client, logprobs=5, logit_bias={7: 100.0}, max_tokens=1)
    for token, position in zip(plain.token_ids, plain.outputs[0].logprobs, strict=True):
        values = [top.logprob for top in position.top]
        assert len(values) == 5 and values == sorted(values, reverse=True)
        assert position.token.token_id == position.top[0].token_id == token
        assert position.token.logprob == values[0] < 0
    assert biased.token_ids == (7,)
    assert biased.outputs[0].logprobs[0].top == plain.outputs[0].logprobs[0].top
    chosen = biased.outputs[0].logprobs[0].token
    assert chosen.token_id == 7 and chosen.logprob is not None and chosen.logprob < -0.1


async def test_bias_penalties_and_bad_words(server: RealServer) -> None:
    async with AsyncClient(server.address) as client:
        free = await _greedy(client)
        banned = await _greedy(client, logit_bias=dict.fromkeys(set(free.token_ids), -100.0))
        assert not set(banned.token_ids) & set(free.token_ids)
        stuck = {"logit_bias": {9: 20.0}, "max_tokens": 60}
        plain, presence, frequency, repetition = await asyncio.gather(
            _greedy(client, **stuck),
            _greedy(client, **stuck, presence_penalty=2.0),
            _greedy(client, logit_bias={9: 8.0}, max_tokens=60, frequency_penalty=2.0),
            _greedy(client, logit_bias={9: 8.0}, max_tokens=60, repetition_penalty=10.0),
        )
        assert Counter(plain.token_ids)[9] == 60
        assert Counter(presence.token_ids)[9] == 60, "2 off 20 is not enough, however often"
        assert 0 < Counter(frequency.token_ids)[9] < 30, "2 off for each time is"
        assert Counter(repetition.token_ids)[9] < 60
        pieces = [await client.detokenize([token]) for token in free.token_ids]
        word = next(piece for piece in pieces if piece.strip().isascii() and piece.strip().isalnum()).strip()
        assert word in free.text
        ids = (await client.tokenize(word)).token_ids
        without = await _greedy(client, bad_words=[word])
        windows = [without.token_ids[i : i + len(ids)] for i in range(len(without.token_ids))]
        assert ids not in windows
        assert without.token_ids != free.token_ids


async def test_truncations_keep_the_best_tokens_only(server: RealServer) -> None:
    async with AsyncClient(server.address) as client:
        free = await _greedy(client)
        hot = {"temperature": 3.0, "seed": 5}
        for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
            assert (await _greedy(client, **hot, **narrow)).token_ids == free.token_ids
        assert (await _greedy(client, **hot)).token_ids != free.token_ids
        top = await _greedy(client, **hot, top_k=3, logprobs=3)
        for position in top.outputs[0].logprobs:
            assert position.token.token_id in {entry.token_id for entry in position.top}


async def test_prompt_is_truncated_from_the_left(server: RealServer) -> None:
    ids = random.Random(600).choices(range(3, 500), k=50)
    async with AsyncClient(server.address) as client:
        cut = await _greedy(client, ids, truncate_prompt_tokens=10)
        assert cut.usage.prompt_tokens == 10
        assert cut.token_ids == (await _greedy(client, ids[-10:])).token_ids
        whole = await _greedy(client, ids, truncate_prompt_tokens=100)
        assert whole.usage.prompt_tokens == 50
        long = await _greedy(client, ids * 60, truncate_prompt_tokens=30, max_tokens=2)
        assert long.usage.prompt_tokens == 30


async def test_time_limit_gives_what_there_is(server: RealServer) -> None:
    async with AsyncClient(server.address) as client:
        result = await _greedy(client, max_tokens=2000, soft_time_limit=0.8)
    assert result.finish_reason is FinishReason.TIME_LIMIT
    assert 0 < len(result.token_ids) == result.usage.output_tokens < 2000


async def test_cancellation_from_outside(server: RealServer) -> None:
    async with AsyncClient(server.address) as client:
        async with client.generate(PROMPT, max_tokens=1500, ignore_eos=True, n=2) as stream:
            await anext(aiter(stream))
            assert await client.cancel(stream.started.generation_id) is True
            result = await stream.result()
        assert [output.finish_reason for output in result.outputs] == [FinishReason.CANCELLED] * 2
        assert result.usage.output_tokens == sum(len(output.token_ids) for output in result.outputs) < 3000
        again = None
        try:
            again = await client.cancel(result.generation_id)
        except NotFound as error:
            assert error.reason == "GENERATION_NOT_FOUND"
        assert not again


async def test_a_batch_item_fails_alone(server: RealServer) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    requests = [
        BatchRequest(PROMPT, item_id="base", sampling=sampling),
        BatchRequest(PROMPT, item_id="adapter", adapter="v1", sampling=sampling),
        BatchRequest(PROMPT, item_id="nobody", adapter="nobody", sampling=sampling),
        BatchRequest([1, 2, 999_999], item_id="outside", sampling=sampling),
        BatchRequest([ChatMessage("user", "Hi")], item_id="chat", adapter="rslora", sampling=sampling),
    ]
    async with AsyncClient(server.address) as client:
        items = {item.item_id: item async for item in client.batch_generate(requests)}
        assert set(items) == {"base", "adapter", "nobody", "outside", "chat"}
        assert isinstance(items["nobody"].error, AdapterNotFound)
        outside = items["outside"].error
        assert outside is not None and outside.reason == "INVALID_PARAMETER" and "token_ids.ids[2]" in outside.message
        for name, adapter in (("base", None), ("adapter", "v1")):
            alone = await _greedy(client, adapter=adapter, max_tokens=6)
            assert items[name].unwrap().token_ids == alone.token_ids
            assert items[name].unwrap().adapter_version == alone.adapter_version
        assert items["chat"].unwrap().usage.output_tokens == 6


@pytest.mark.parametrize(
    "text", ["Hello, world", "Grüße, naïve café", "你好世界", "😀 emoji 👩‍👩‍👧", " leading\n\ttabs "]
)
async def test_tokens_and_text_go_round(server: RealServer, text: str) -> None:
    async with AsyncClient(server.address) as client:
        tokens = await client.tokenize(text)
        assert await client.detokenize(tokens.token_ids) == text
        assert tokens.max_model_len == 2048
        result = await _greedy(client, text, max_tokens=1)
        assert result.usage.prompt_tokens == len(tokens.token_ids)
        assert result.token_ids == (await _greedy(client, list(tokens.token_ids), max_tokens=1)).token_ids


async def test_a_chat_runs_what_tokenize_shows(server: RealServer) -> None:
    chat = [ChatMessage("system", "Be brief."), ChatMessage("user", "Grüße 😀")]
    async with AsyncClient(server.address) as client:
        tokens = (await client.tokenize(chat)).token_ids
        rendered = await client.detokenize(tokens, skip_special_tokens=False)
        assert rendered == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nGrüße 😀<|im_end|>\n<|im_start|>assistant\n"
        )
        result = await client.generate(chat, temperature=0, max_tokens=8).result()
        same = await client.generate(list(tokens), temperature=0, max_tokens=8).result()
        assert result.usage.prompt_tokens == len(tokens)
        assert result.token_ids == same.token_ids


async def test_text_of_deltas_is_the_text_of_the_tokens(server: RealServer) -> None:
    async with AsyncClient(server.address) as client:
        async with client.generate(PROMPT, temperature=1.5, seed=3, max_tokens=120, ignore_eos=True) as stream:
            deltas = [delta async for delta in stream]
        ids = [token for delta in deltas for token in delta.token_ids]
        assert len(ids) == 120 and all(token < VOCABULARY for token in ids)
        assert "".join(delta.text for delta in deltas) == await client.detokenize(ids)
        assert len(deltas) > 1


async def test_prompt_logprobs_of_a_prompt_of_one_token(server: RealServer) -> None:
    async with AsyncClient(server.address) as client:
        [entry] = (await _greedy(client, [7], max_tokens=2, prompt_logprobs=3)).prompt_logprobs
    assert (entry.token.token_id, entry.token.logprob, list(entry.top)) == (7, None, [])


async def test_prompt_logprobs_of_a_long_prompt(server: RealServer) -> None:
    ids = random.Random(601).choices(range(3, 500), k=1900)
    async with AsyncClient(server.address) as client:
        long = await _greedy(client, ids, max_tokens=1, prompt_logprobs=20)
        short = await _greedy(client, ids[:300], max_tokens=1, prompt_logprobs=20, n=2)
    assert [entry.token.token_id for entry in long.prompt_logprobs] == ids
    assert {len(entry.top) for entry in long.prompt_logprobs[1:]} == {20}
    for one, other in zip(long.prompt_logprobs[1:300], short.prompt_logprobs[1:], strict=True):
        assert one.token.logprob == pytest.approx(other.token.logprob, abs=1e-4)
    assert long.usage.cached_tokens == short.usage.cached_tokens == 0, "such a request does not read the cache"
    assert long.prompt_logprobs[1].token.token_bytes == short.prompt_logprobs[1].token.token_bytes


async def test_the_model_is_described(server: RealServer) -> None:
    async with AsyncClient(server.address) as client:
        model = await client.model()
        assert (model.name, model.family, model.vocab_size) == ("tiny-qwen2", "qwen2", VOCABULARY)
        assert (model.max_model_len, model.has_chat_template) == (2048, True)
        prints = model.fingerprint
        assert all(len(digest) == 64 for digest in (prints.digest, prints.weights_digest, prints.tokenizer_digest))
        assert model.limits.max_output_tokens == 2047
