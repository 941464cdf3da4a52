"""The server for users' tests: scripts, records, and what it makes up without a script."""

import asyncio
import threading
import time
from typing import Any

import pytest

from loramux import (
    BatchRequest,
    Client,
    FinishReason,
    InvalidRequest,
    LoramuxError,
    NotAuthenticated,
    SamplingParams,
    TrafficTarget,
)
from loramux.testing import FakeError, FakeServer, Reply


def test_it_has_to_run() -> None:
    server = FakeServer()
    with pytest.raises(RuntimeError, match="not running"):
        _ = server.address
    with pytest.raises(RuntimeError, match="not running"):
        server.add_adapter("bot")
    with server:
        assert server.address
    with pytest.raises(RuntimeError, match="started once"):
        server.__enter__()


def test_two_at_a_time() -> None:
    with FakeServer() as one, FakeServer() as two, Client(one.address) as first, Client(two.address) as second:
        one.reply(Reply(["one"]))
        two.reply(Reply(["two"]))
        assert (first.generate("x").result().text, second.generate("x").result().text) == ("one", "two")


def test_stopping_does_not_wait_for_calls() -> None:
    begin = time.monotonic()
    with FakeServer() as server:
        server.reply(Reply(["x"], hang=True))
        with Client(server.address) as client:
            stream = client.generate("x")
            stream.__enter__()
    assert time.monotonic() - begin < 30
    [call] = server.calls
    assert call.ended.is_set() and call.cancelled


def test_stopping_leaves_no_task_of_a_call_that_has_just_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer()
    begun, go_on = threading.Event(), threading.Event()
    record = server._record

    def slow_record(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return record(*arguments)

    monkeypatch.setattr(server, "_record", slow_record)

    def call() -> None:
        with Client(address, timeout=30) as client, pytest.raises(LoramuxError):
            client.generate("x").result()

    with server:
        address = server.address
        caller = threading.Thread(target=call)
        caller.start()
        assert begun.wait(30)
        # Goes on while the server stops.
        threading.Timer(0.3, go_on.set).start()
    caller.join()
    assert not asyncio.all_tasks(server._loop)
    assert server.calls[0].ended.is_set()


class TestEcho:
    def test_the_prompt_comes_back(self, client: Client) -> None:
        assert client.generate("Grüße").result().text == "Grüße"
        assert client.generate(list(b"abc")).result().text == "abc"

    def test_max_tokens_cuts_bytes_but_no_character(self, client: Client) -> None:
        result = client.generate("Grüße", max_tokens=3).result()
        assert (result.text, result.finish_reason) == ("Gr", FinishReason.LENGTH)

    def test_stop(self, client: Client) -> None:
        output = client.generate("one. two.", stop=["!", "."]).result().outputs[0]
        assert output.text == "one"
        assert output.matched_stop is not None and output.matched_stop.stop == "."
        assert client.generate("one. two.", stop=".", include_stop=True).result().text == "one."

    def test_logprobs(self, client: Client) -> None:
        result = client.generate("ab", logprobs=2, prompt_logprobs=1).result()
        assert [position.token.token_id for position in result.outputs[0].logprobs] == [97, 98]
        assert len(result.outputs[0].logprobs[0].top) == 2
        assert result.prompt_logprobs[0].token.logprob is None
        assert len(result.prompt_logprobs) == 2

    def test_offsets(self, client: Client) -> None:
        tokens = client.tokenize("aü", offsets=True)
        assert tokens.offsets == ((0, 1), (1, 2), (1, 2))


class TestScripts:
    def test_replies_are_used_in_order_and_then_it_echoes(self, server: FakeServer, client: Client) -> None:
        server.reply(Reply(["a"]), Reply(["b"], finish_reason=FinishReason.TIME_LIMIT, delay=0.001))
        results = [client.generate("echo").result() for _ in range(3)]
        assert [result.text for result in results] == ["a", "b", "echo"]
        assert results[1].finish_reason is FinishReason.TIME_LIMIT

    @pytest.mark.parametrize("code", ["NOT_FOUND", "INTERNAL", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED"])
    def test_failures_are_used_once(self, server: FakeServer, client: Client, code: str) -> None:
        server.fail("GetModel", FakeError(code))
        with pytest.raises(LoramuxError) as caught:
            client.model()
        assert caught.value.code == code
        assert client.model().name == "fake"

    def test_a_bug_of_a_script_is_told(self, server: FakeServer, client: Client) -> None:
        server.reply(Reply([5]))  # type: ignore[list-item]
        with pytest.raises(LoramuxError, match="the fake server failed"):
            client.generate("x").result()

    def test_token(self) -> None:
        with FakeServer(token="right") as server, Client(server.address) as client, pytest.raises(NotAuthenticated):
            client.model()


class TestState:
    def test_add_adapter(self, server: FakeServer, client: Client) -> None:
        first = server.add_adapter("bot")
        assert server.add_adapter("bot") == first
        second = server.add_adapter("bot", content="other", promote=False)
        assert second != first
        assert client.adapters.get("bot").traffic == (TrafficTarget(version=first),)

    def test_a_pinned_version_in_the_request(self, server: FakeServer, client: Client) -> None:
        first = server.add_adapter("bot")
        server.add_adapter("bot", content="other")
        short = first.rpartition("/")[2]
        for name in (first, f"bot@{short}"):
            assert client.generate("x", adapter=name).result().adapter_version == first

    def test_a_replay_of_a_mutation_is_the_first_answer(self, server: FakeServer, client: Client) -> None:
        from loramux import _adapter_requests as requests
        from loramux import _methods as methods
        from loramux._connection import View

        version = server.add_adapter("bot", promote=False)
        request = requests.traffic_update("bot", {version: 1}, warm=True, etag=client.adapters.get("bot").etag)
        first = client._transport.unary(methods.UPDATE_ADAPTER, request, View())
        assert client._transport.unary(methods.UPDATE_ADAPTER, request, View()) == first
        request.adapter.traffic[0].weight = 2
        with pytest.raises(InvalidRequest) as caught:
            client._transport.unary(methods.UPDATE_ADAPTER, request, View())
        assert caught.value.reason == "IDEMPOTENCY_MISMATCH"

    def test_records(self, server: FakeServer, client: Client) -> None:
        list(client.for_tenant("acme").batch_generate([BatchRequest("x", sampling=SamplingParams(top_k=3))]))
        [call] = server.calls_of("BatchGenerate")
        assert call.request.items[0].request.sampling.top_k == 3
        assert call.metadata["x-loramux-tenant"] == "acme"
        assert call.ended.wait(10)
        assert not call.cancelled
