"""Generate through real gRPC and a scripted engine: what a stream carries."""

import math
import time
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from loramux.v1 import generation_pb2 as pb
from loramux_server.engine.messages import ErrorSpec
from loramux_server.errors import Expired
from loramux_server.rpc.call import Call
from loramux_server.tenancy.names import shown_version
from tests.support.front_end import FrontEnd, detail, front_end, reason_of, status_of, text_request
from tests.support.scripted_engine import Script, ScriptedEngines


def text_of(events: list[pb.GenerateResponse], index: int = 0) -> str:
    return "".join(event.delta.text for event in events if event.HasField("delta") and event.delta.index == index)


def ids_of(events: list[pb.GenerateResponse], index: int = 0) -> list[int]:
    deltas = [event.delta for event in events if event.HasField("delta") and event.delta.index == index]
    return [token_id for delta in deltas for token_id in delta.token_ids]


def says(server: FrontEnd, text: str, **script: object) -> list[int]:
    """Let the engine answer a text."""
    ids = server.tokens(text)
    server.engines.script = lambda add: Script(token_ids=ids, **script)  # type: ignore[arg-type]
    return ids


async def test_a_stream_has_started_deltas_finished_usage(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        answer = says(server, "the quick brown fox", cached_tokens=2)
        events = await server.generate(text_request("hello", max_tokens=len(answer), seed=5))
        kinds = [event.WhichOneof("event") for event in events]
        assert kinds[0] == "started" and kinds[-2:] == ["finished", "usage"]
        assert set(kinds[1:-2]) == {"delta"}
        assert text_of(events) == "the quick brown fox" and ids_of(events) == answer
        started, usage = events[0].started, events[-1].usage
        prompt = server.engines.adds[0].prompt_token_ids
        assert started.seed == 5 and started.cached_tokens == 2 and started.prompt_tokens == len(prompt)
        assert started.replica_id == "replica-1" and not started.HasField("adapter")
        assert started.queue_time.ToTimedelta().total_seconds() > 0.01 and not started.HasField("adapter_load_time")
        assert events[-2].finished.reason == pb.FINISH_REASON_LENGTH
        assert not events[-2].finished.HasField("matched_stop")
        assert (usage.prompt_tokens, usage.cached_tokens, usage.output_tokens) == (len(prompt), 2, len(answer))
        await server.assert_at_rest()


async def test_defaults_and_given_values_reach_the_engine(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        await server.generate(text_request())
        await server.generate(
            text_request(
                temperature=0,
                top_p=0.5,
                top_k=4_000_000_000,
                min_p=0.25,
                repetition_penalty=1.5,
                presence_penalty=-1,
                frequency_penalty=2,
                logit_bias={3: -100, 511: 1},
                max_tokens=7,
                min_tokens=2,
                stop_token_ids=[9],
                bad_words=["fox"],
                ignore_eos=True,
                n=2,
                logprobs=0,
                priority=-100,
                split_key="user-7",
            ),
            timeout=9,
        )
        plain, full = server.engines.adds
        assert plain.sampling.temperature == 1.0 and plain.sampling.n == 1 and plain.sampling.logprobs is None
        assert plain.sampling.max_tokens == 512 - len(plain.prompt_token_ids)
        assert plain.sampling.eos_token_ids and not plain.sampling.ignore_eos
        assert plain.fairness_key == "default" and len(plain.salt) == 32
        assert plain.alias is None and plain.version is None
        sampling = full.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 512, 0.25)
        assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -1, 2)
        assert sampling.logit_bias == {3: -100, 511: 1} and sampling.stop_token_ids == [9]
        assert (sampling.max_tokens, sampling.min_tokens, sampling.n, sampling.logprobs) == (7, 2, 2, 0)
        assert sampling.bad_words == [server.tokens("fox"), server.tokens(" fox")]
        assert full.priority == -100 and full.split_key == "user-7"
        assert full.time_left is not None and 0 < full.time_left < 9.5


async def test_absent_seeds_are_drawn_and_reported(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        seeds = {(await server.generate(text_request()))[0].started.seed for _ in range(3)}
        assert seeds == {add.sampling.seed for add in server.engines.adds} and len(seeds) == 3


async def test_a_stop_string_across_tokens_cuts_text_and_counts(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        ids = [token for letter in "one two END three four" for token in server.tokens(letter)]
        server.engines.script = lambda add: Script(token_ids=ids, per_frame=4)
        events = await server.generate(text_request(stop=["END", "never"]))
        assert text_of(events) == "one two "
        finished, usage = events[-2].finished, events[-1].usage
        assert finished.reason == pb.FINISH_REASON_STOP and finished.matched_stop.stop == "END"
        assert usage.output_tokens == len("one two END") == len(ids_of(events))
        (stop,) = server.engines.stops
        assert (stop.index, stop.tokens) == (0, len("one two END"))
        assert [event.WhichOneof("event") for event in events].count("finished") == 1
        await server.assert_at_rest()


async def test_include_stop_keeps_the_stop_string(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        says(server, "one two END three")
        events = await server.generate(text_request(stop=["END"], include_stop=True))
        assert text_of(events) == "one two END"


async def test_text_that_only_began_a_stop_string_comes_out_at_the_end(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        says(server, "one EN")
        events = await server.generate(text_request(stop=["END"]))
        assert text_of(events) == "one EN" and events[-2].finished.reason == pb.FINISH_REASON_LENGTH


async def test_no_stop_string_matches_before_min_tokens(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        ids = [token for letter in "aXbXc" for token in server.tokens(letter)]
        server.engines.script = lambda add: Script(token_ids=ids)
        events = await server.generate(text_request(stop=["X"], min_tokens=3))
        assert text_of(events) == "aXb" and events[-1].usage.output_tokens == 4


async def test_end_tokens_are_named_and_not_part_of_the_text(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        (eos,) = server.app.generation._prompts.tokenizer.eos_token_ids
        word = server.tokens("fox")
        server.engines.script = lambda add: Script(token_ids=[*word, eos], finish="stop")
        events = await server.generate(text_request())
        assert text_of(events) == "fox" and ids_of(events) == [*word, eos]
        assert events[-2].finished.matched_stop.eos_token_id == eos
        kept = await server.generate(text_request(include_stop=True))
        assert text_of(kept) == "fox<|im_end|>"
        stop = server.tokens("x")[0]
        server.engines.script = lambda add: Script(token_ids=[*word, stop], finish="stop")
        events = await server.generate(text_request(stop_token_ids=[stop]))
        assert text_of(events) == "fox" and events[-2].finished.matched_stop.stop_token_id == stop
        events = await server.generate(text_request(stop_token_ids=[stop], include_stop=True))
        assert text_of(events) == "foxx"


async def test_characters_are_never_split_between_deltas(tmp_path: Path) -> None:
    text = "a😀é你b"
    async with front_end(tmp_path) as server:
        alphabet = server.app.generation._prompts.tokenizer
        token_bytes = server.app.generation._token_bytes
        ids = [next(i for i in range(256) if token_bytes(i) == bytes([byte])) for byte in text.encode()]
        assert alphabet.decode(ids) == text and len(ids) > len(text)
        server.engines.script = lambda add: Script(token_ids=ids)
        events = await server.generate(text_request())
        assert text_of(events) == text and ids_of(events) == ids
        assert "\ufffd" not in text_of(events)
        server.engines.script = lambda add: Script(token_ids=ids[:3])
        assert text_of(await server.generate(text_request())) == "a\ufffd"


async def test_sequences_are_independent(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        answer = says(server, "hello fox")
        events = await server.generate(text_request(n=3))
        assert [text_of(events, index) for index in range(3)] == ["hello fox"] * 3
        finished = [event.finished.index for event in events if event.HasField("finished")]
        assert sorted(finished) == [0, 1, 2] and events[-1].usage.output_tokens == 3 * len(answer)
        says(server, "hello fox")
        events = await server.generate(text_request(n=2, stop=["lo"]))
        assert [text_of(events, index) for index in range(2)] == ["hel"] * 2
        assert len(server.engines.stops) == 2
        await server.assert_at_rest()


async def test_logprobs_of_output_and_prompt(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        answer = says(server, "the fox", top=2)
        events = await server.generate(text_request("hello", logprobs=2, prompt_logprobs=2))
        positions = [p for event in events for p in event.delta.logprobs]
        assert [p.token.token_id for p in positions] == answer
        assert b"".join(p.token.token_bytes for p in positions) == b"the fox"
        assert all(math.isclose(p.token.logprob, -0.5) and [t.token_id for t in p.top] == [0, 1] for p in positions)
        prompt = server.engines.adds[0].prompt_token_ids
        chunk = events[1].prompt_logprobs
        assert chunk.offset == 0 and [p.token.token_id for p in chunk.positions] == prompt
        assert not chunk.positions[0].token.HasField("logprob") and chunk.positions[1].token.HasField("logprob")


async def test_log_probabilities_come_in_messages_that_do_not_hold_up_others(tmp_path: Path) -> None:
    engines = ScriptedEngines(lambda add: Script(token_ids=[70] * 300, per_frame=300, top=20))
    async with front_end(tmp_path, engines) as server:
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[1] * 200), sampling=pb.SamplingParams(logprobs=20, max_tokens=300)
        )
        deltas = [event.delta for event in await server.generate(request) if event.HasField("delta")]
        assert [len(delta.logprobs) for delta in deltas] == [256, 44]
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[1] * 500), sampling=pb.SamplingParams(prompt_logprobs=1, max_tokens=1)
        )
        chunks = [e.prompt_logprobs for e in await server.generate(request) if e.HasField("prompt_logprobs")]
        assert [(chunk.offset, len(chunk.positions)) for chunk in chunks] == [(0, 256), (256, 244)]
        assert not chunks[0].positions[0].token.HasField("logprob")
        assert all(position.token.HasField("logprob") for position in chunks[1].positions)


async def test_no_more_sequences_than_the_engine_runs_at_once(tmp_path: Path) -> None:
    async with front_end(tmp_path, max_running=4) as server:
        assert server.app.limits().max_sequences == 4
        with pytest.raises(grpc.aio.AioRpcError, match="sampling.n is 5; use 1 to 4"):
            await server.generate(text_request(n=5))
        assert (await server.generate(text_request(n=4)))[-1].usage.output_tokens == 12


async def test_a_refusal_of_the_engine_names_its_field(tmp_path: Path) -> None:
    error = ErrorSpec(reason="INVALID_PARAMETER", message="sampling.n: 8 sequences do not fit", field="sampling.n")
    async with front_end(tmp_path, ScriptedEngines(lambda add: Script(error=error))) as server:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await server.generate(text_request(n=8))
        violations = detail(status_of(refused.value), error_details_pb2.BadRequest).field_violations
        assert [violation.field for violation in violations] == ["sampling.n"]


async def test_a_chat_is_rendered_with_the_models_template(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        chat = pb.ChatPrompt(messages=[pb.ChatMessage(role=pb.CHAT_ROLE_USER, content="hi")])
        await server.generate(pb.GenerateRequest(chat=chat))
        expected = server.tokens("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
        assert server.engines.adds[0].prompt_token_ids == expected
        tokens = await server.generation.Tokenize(pb.TokenizeRequest(chat=chat))
        assert list(tokens.token_ids) == expected and tokens.max_model_len == 512


async def test_token_ids_run_as_they_stand_and_truncation_keeps_the_end(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        ids = pb.TokenIds(ids=range(10, 30))
        await server.generate(pb.GenerateRequest(token_ids=ids))
        sampling = pb.SamplingParams(truncate_prompt_tokens=4)
        await server.generate(pb.GenerateRequest(token_ids=ids, sampling=sampling))
        assert server.engines.adds[0].prompt_token_ids == list(range(10, 30))
        assert server.engines.adds[1].prompt_token_ids == [26, 27, 28, 29]


async def test_special_tokens_can_be_left_out(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        await server.generate(pb.GenerateRequest(text="fox"))
        await server.generate(pb.GenerateRequest(text="fox", add_special_tokens=False))
        first, second = (add.prompt_token_ids for add in server.engines.adds)
        assert first[1:] == second == server.tokens("fox")


async def test_the_version_that_answers_is_named(tmp_path: Path) -> None:
    version = "tenants/default/adapters/bot/versions/" + "ab" * 32
    async with front_end(tmp_path) as server:
        server.engines.script = lambda add: Script(version=version)
        started = (await server.generate(text_request()))[0].started
        assert started.adapter.adapter == "tenants/default/adapters/bot"
        assert started.adapter.version == shown_version(version)
        assert started.adapter.digest == "ab" * 32 and started.adapter.revision == 7
        assert started.adapter_load_time.ToTimedelta().total_seconds() > 0


async def test_a_large_prompt_is_tokenized_like_a_small_one(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        text = "the quick brown fox jumps over the lazy dog " * 400
        ids = (await server.generation.Tokenize(pb.TokenizeRequest(text=text, add_special_tokens=False))).token_ids
        assert list(ids) == server.tokens(text)
        back = await server.generation.Detokenize(pb.DetokenizeRequest(token_ids=ids))
        assert back.text == text


async def test_detokenize_keeps_special_tokens_on_request(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        ids = server.tokens("a<|im_end|>b")
        assert (await server.generation.Detokenize(pb.DetokenizeRequest(token_ids=ids))).text == "ab"
        request = pb.DetokenizeRequest(token_ids=ids, skip_special_tokens=False)
        assert (await server.generation.Detokenize(request)).text == "a<|im_end|>b"
        assert (await server.generation.Detokenize(pb.DetokenizeRequest())).text == ""


async def test_a_failure_of_the_engine_keeps_its_reason(tmp_path: Path) -> None:
    engines = ScriptedEngines(
        lambda add: Script(error=ErrorSpec(reason="ADAPTER_NOT_FOUND", message="adapter 'bot' is gone"))
    )
    async with front_end(tmp_path, engines) as server:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await server.generate(text_request())
        assert error.value.code() is grpc.StatusCode.NOT_FOUND and reason_of(error.value) == "ADAPTER_NOT_FOUND"
        engines.script = lambda add: Script(error=ErrorSpec(reason="OUT_OF_MEMORY", message="no room"), error_after=1)
        call = server.generation.Generate(text_request())
        received = []
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for event in call:
                received.append(event.WhichOneof("event"))
        assert received == ["started", "delta"] and reason_of(error.value) == "OUT_OF_MEMORY"
        await server.assert_at_rest()


async def test_a_soft_time_limit_is_passed_on_and_named(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        says(server, "half an ans", finish="time_limit")
        events = await server.generate(text_request(soft_time_limit={"seconds": 2}))
        assert events[-2].finished.reason == pb.FINISH_REASON_TIME_LIMIT and text_of(events) == "half an ans"
        limit = server.engines.adds[0].soft_time_limit
        assert limit is not None and 1.5 < limit <= 2


async def test_a_request_whose_deadline_has_passed_never_reaches_the_engine(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        late = Call(tenant="default", principal="local", correlation_id="c", deadline=time.monotonic() - 0.01)
        with pytest.raises(Expired):
            await server.app.generation.accept(text_request(), late)
        assert server.engines.adds == [] and server.app.gate.queued == 0


async def test_reflection_lists_our_services(tmp_path: Path) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    for settings, served in (({}, True), ({"reflection": False, "store": str(tmp_path / "other")}, False)):
        async with front_end(tmp_path, **settings) as server:
            call = reflection_pb2_grpc.ServerReflectionStub(server.channel).ServerReflectionInfo(iter([request]))
            if served:
                names = {service.name for service in (await call.read()).list_services_response.service}
                assert {f"loramux.v1.{name}Service" for name in ("Generation", "Adapter", "Model")} <= names
            else:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await call.read()
                assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
