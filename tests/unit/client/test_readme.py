"""The examples of the docstrings and of the README, run against the fake server."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

import loramux
import loramux.testing
from loramux.testing import FakeServer, Reply


def block(text: str | None) -> str:
    [code] = re.findall(r"```python\n(.*?)```", text or "", re.S)
    return str(code)


def test_example_of_the_package(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    code = block(loramux.__doc__).replace("localhost:50051", server.address)
    exec(compile(code, "example", "exec"), {})
    assert capsys.readouterr().out == "Hello"


def test_example_of_the_fake_server() -> None:
    exec(compile(block(loramux.testing.__doc__), "example", "exec"), {})


def test_ten_lines(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The contract, word by word: view, stream, result, batch, upload, promote."""
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"tensors")
    first = server.add_adapter("support-bot", tenant="acme")
    server.reply(Reply(["Hel", "lo"]))

    async def example() -> Any:
        from loramux import AsyncClient, ChatMessage

        async with AsyncClient(server.address, token="t") as client:
            bot = client.for_tenant("acme").with_adapter("support-bot")
            async with bot.generate("Hello", max_tokens=64, temperature=0) as stream:
                print(stream.started.adapter_version)
                async for delta in stream:
                    print(delta.text, end="")
                print(stream.finished, stream.usage)
            result = await bot.generate([ChatMessage("user", "Hello")]).result()
            items = [item async for item in client.batch_generate(["a", "b"], window=256)]
            adapters = client.for_tenant("acme").adapters
            version = await adapters.upload(tmp_path, name="support-bot", promote=True)
            await adapters.promote("support-bot", version)
            return result, items, version, await adapters.rollback("support-bot")

    result, items, version, adapter = asyncio.run(example())
    out = capsys.readouterr().out
    assert out.startswith(first)
    assert "HelloFinished(" in out
    assert (result.text, result.finish_reason, result.adapter_version) == ("Hello", "stop", first)
    assert sorted(item.unwrap().text for item in items) == ["a", "b"]
    assert version.name != first
    assert adapter.serving_version == first
