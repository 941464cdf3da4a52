"""BatchGenerate through real gRPC: each item has its own fate."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2

from loramux.v1 import generation_pb2 as pb
from loramux_server.engine.aliases import AliasTable
from loramux_server.engine.messages import Add, ErrorSpec, PutAlias
from loramux_server.tenancy.records import TargetRecord
from tests.support.front_end import FrontEnd, detail, front_end, reason_of, text_request
from tests.support.lifecycle_doubles import new_version
from tests.support.scripted_engine import Script, ScriptedEngines


def items(*requests: pb.GenerateRequest, **fields: Any) -> pb.BatchGenerateRequest:
    return pb.BatchGenerateRequest(
        items=[pb.BatchGenerateItem(item_id=f"item-{n}", request=request) for n, request in enumerate(requests)],
        **fields,
    )


async def run(server: FrontEnd, request: pb.BatchGenerateRequest) -> dict[str, list[pb.BatchGenerateResponse]]:
    answers: dict[str, list[pb.BatchGenerateResponse]] = {}
    async for response in server.generation.BatchGenerate(request, timeout=20):
        answers.setdefault(response.item_id, []).append(response)
    return answers


def reason(response: pb.BatchGenerateResponse) -> str:
    return str(detail(response.status, error_details_pb2.ErrorInfo).reason)


async def test_items_keep_their_own_order_and_outcome(tmp_path: Path) -> None:
    def script(add: Add) -> Script:
        if add.sampling.seed == 1:
            return Script(error=ErrorSpec(reason="OUT_OF_MEMORY", message="no room"), error_after=1)
        return Script(token_ids=[70 + add.sampling.seed] * 3)

    async with front_end(tmp_path, ScriptedEngines(script)) as server:
        answers = await run(
            server,
            items(
                text_request(seed=0),
                text_request(seed=1),
                text_request(temperature=-1),
                pb.GenerateRequest(text="a", adapter="nobody"),
                text_request(seed=4, n=2),
            ),
        )
        assert set(answers) == {f"item-{n}" for n in range(5)}
        good = [response.event.WhichOneof("event") for response in answers["item-0"]]
        assert good == ["started", *["delta"] * (len(good) - 3), "finished", "usage"]
        assert answers["item-4"][-1].event.usage.output_tokens == 6
        assert [reason(answers[f"item-{n}"][-1]) for n in (1, 2, 3)] == [
            "OUT_OF_MEMORY",
            "INVALID_PARAMETER",
            "ADAPTER_NOT_FOUND",
        ]
        violation = detail(answers["item-2"][0].status, error_details_pb2.BadRequest).field_violations[0]
        assert violation.field == "items[2].request.sampling.temperature"
        assert answers["item-1"][0].event.HasField("started")
        await server.assert_at_rest()


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (items(), "items"),
        (items(*[text_request()] * 1025), "items"),
        (pb.BatchGenerateRequest(items=[pb.BatchGenerateItem(request=text_request())]), "items[0].item_id"),
        (pb.BatchGenerateRequest(items=[pb.BatchGenerateItem(item_id="a", request=text_request())] * 2), "items[1]"),
    ],
    ids=["none", "too many", "no id", "same id"],
)
async def test_a_malformed_call_fails_as_a_whole(tmp_path: Path, request_: pb.BatchGenerateRequest, field: str) -> None:
    async with front_end(tmp_path) as server:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await run(server, request_)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT and reason_of(error.value) == "INVALID_PARAMETER"
        assert (error.value.details() or "").startswith(field) and server.engines.adds == []


async def test_a_batch_leaves_room_in_the_queue(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with front_end(tmp_path, ScriptedEngines(lambda add: Script(hold=gate)), max_queued=8) as server:
        async with asyncio.TaskGroup() as group:
            batch = group.create_task(run(server, items(*[text_request() for _ in range(40)])))
            await server.engines.until(lambda: len(server.engines.adds) == 4)
            single = group.create_task(server.generate(text_request()))
            await server.engines.until(lambda: len(server.engines.adds) == 5)
            gate.set()
        answers = batch.result()
        assert len(answers) == 40 and all(a[-1].event.HasField("usage") for a in answers.values())
        assert single.result()[-1].HasField("usage")
        await server.assert_at_rest()


async def test_an_item_that_takes_too_long_fails_alone(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        server.engines.script = lambda add: Script(pause_after=1 if add.sampling.seed == 1 else None)
        request = items(text_request(seed=0), text_request(seed=1))
        request.items[1].timeout.FromMilliseconds(100)
        answers = await run(server, request)
        assert answers["item-0"][-1].event.HasField("usage")
        assert answers["item-1"][-1].status.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        request.items[1].timeout.FromMilliseconds(-1)
        assert reason((await run(server, request))["item-1"][-1]) == "INVALID_PARAMETER"
        await server.assert_at_rest()


async def test_a_reader_that_lags_pauses_the_batch_and_loses_nothing(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        server.engines.script = lambda add: Script(token_ids=list(range(100, 164)) * 5, top=20, per_frame=64)
        count = 90
        call = server.generation.BatchGenerate(items(*[text_request(logprobs=20) for _ in range(count)]))
        await call.read()
        await asyncio.sleep(0.5)
        assert len(server.engines.adds) < count
        tokens, ended = 0, 0
        while (response := await call.read()) is not grpc.aio.EOF:
            tokens += len(response.event.delta.token_ids)
            ended += response.event.HasField("usage")
        assert (tokens, ended) == (count * 320, count)
        await server.assert_at_rest()


def split(server: FrontEnd, *weights: int) -> None:
    """Give the adapter `bot` versions of its own with such shares of its traffic."""
    registry, table = server.app.lifecycle.registry, server.app.lifecycle.table
    targets = []
    for number, weight in enumerate(weights):
        change = registry.commit_version(new_version(content=f"v{number}"))
        table.apply(change)
        targets.append(TargetRecord(digest=change.result.digest, weight=weight))
    table.apply(registry.update_adapter("default", "bot", traffic=targets))


async def test_pinned_items_stay_on_the_version_of_their_split_key(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        split(server, 3, 1)
        keys = [f"user-{number % 16}" for number in range(48)]
        requests = [pb.GenerateRequest(text="a", adapter="bot", sampling={"split_key": key}) for key in keys]
        answers = await run(server, items(*requests, pin_versions=True))
        assert all(answer[-1].event.HasField("usage") for answer in answers.values())
        adds = server.engines.adds
        assert len(adds) == len(keys) and {add.alias for add in adds} == {None}
        # What the engine chooses for a single request of that key.
        aliases = AliasTable()
        for command in server.engines.commands:
            if isinstance(command, PutAlias):
                aliases.put(command.spec)
        for add in adds:
            chosen = aliases.resolve("tenants/default/adapters/bot", split_key=add.split_key, seed=0)
            assert chosen is not None and add.version == chosen[0]
        assert len({add.version for add in adds}) == 2


async def test_pinned_items_without_a_split_key_share_one_version(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        split(server, 1, 1)
        drawn = set()
        for _ in range(16):
            server.engines.commands.clear()
            names = ["bot", "tenants/default/adapters/bot"] * 2
            await run(server, items(*[pb.GenerateRequest(text="a", adapter=name) for name in names], pin_versions=True))
            (version,) = {add.version for add in server.engines.adds}
            drawn.add(version)
        assert len(drawn) == 2


async def test_leaving_a_batch_frees_every_item(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        server.engines.script = lambda add: Script(pause_after=1)
        call = server.generation.BatchGenerate(items(*[text_request() for _ in range(100)]))
        await call.read()
        await server.engines.until(lambda: len(server.engines.adds) == 64)
        call.cancel()
        await server.engines.until(lambda: len(server.engines.aborts) == 64)
        await server.assert_at_rest()


async def test_engine_death_fails_the_items_in_the_stream(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        server.engines.script = lambda add: Script(pause_after=1)
        async with asyncio.TaskGroup() as group:
            batch = group.create_task(run(server, items(*[text_request() for _ in range(80)])))
            await server.engines.until(lambda: len(server.engines.adds) == 64)
            server.engines.start_gate = asyncio.Event()
            server.engines.current.crash()
        answers = batch.result()
        assert len(answers) == 80 and {reason(a[-1]) for a in answers.values()} == {"ENGINE_UNAVAILABLE"}


async def test_prompts_of_a_batch_are_taken_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, most = 0, 0
    async with front_end(tmp_path) as server:
        encoder = server.app.generation._prompts
        encode = encoder.encode

        async def watched(*arguments: Any, **keywords: Any) -> list[int]:
            nonlocal at_once, most
            at_once += 1
            most = max(most, at_once)
            await asyncio.sleep(0)
            at_once -= 1
            return await encode(*arguments, **keywords)

        monkeypatch.setattr(encoder, "encode", watched)
        answers = await run(server, items(*[text_request("a b " * 200)] * 16))
        assert len(answers) == 16 and most == 1


async def test_a_malformed_timeout_is_the_items_own_failure(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        request = items(text_request(), text_request())
        request.items[0].timeout.seconds, request.items[0].timeout.nanos = 5, -1
        answers = await run(server, request)
        assert answers["item-1"][-1].event.HasField("usage")
        violations = detail(answers["item-0"][-1].status, error_details_pb2.BadRequest).field_violations
        assert [violation.field for violation in violations] == ["items[0].timeout"]
