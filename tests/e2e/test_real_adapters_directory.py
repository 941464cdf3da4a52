"""`--adapters`: what lies there is served, followed and never written to; bad neighbours change nothing."""

import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path

from loramux import AdapterNotFound, AsyncClient
from tests.e2e.real_server import RealServer, alive, children_of, eventually, real_server

PROMPT = "The quick brown fox"
TENSORS = "adapter_model.safetensors"


def _put(source: Path, target: Path) -> None:
    """Copy beside the target, then rename: the way in which adapters arrive."""
    new = target.with_name(f".{target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, new)
    if target.exists():
        target.rename(target.with_name(f".old-{target.name}"))
    new.rename(target)


def _tree(root: Path) -> list[tuple[str, int, int]]:
    """Everything in a directory that a write would change."""
    found = [(str(path), path.lstat().st_mtime_ns, path.lstat().st_size) for path in root.rglob("*")]
    return sorted([*found, (str(root), root.stat().st_mtime_ns, 0)])


def _said(server: RealServer, text: str) -> list[str]:
    return [line for line in list(server.log) if "adapters directory: " in line and text in line]


async def test_a_directory_is_served_followed_and_left_as_it_is(
    checkpoint: Path, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    root, store = tmp_path / "adapters", tmp_path / "store"
    _put(adapters["v1"], root / "default" / "bot")
    _put(adapters["rslora"], root / "default" / "other")
    _put(adapters["v1"], root / "default" / "late.partial")
    _put(adapters["v1"], root / "acme" / "bot")
    _put(adapters["v1"], root / "default" / "bad")
    (root / "default" / "bad" / TENSORS).write_bytes(b"no tensors at all")
    (root / "default" / "link").symlink_to(adapters["v1"], target_is_directory=True)
    flags = ("--adapters", str(root), "--kv-pages", "256")
    before = _tree(root)

    with real_server(checkpoint, store, *flags) as server:
        for words in (
            "default/bot is taken as version",
            "default/other is taken as version",
            "default/bad is refused until it changes: ADAPTER_INCOMPATIBLE",
            "'default/late.partial' is left alone: its name ends in .partial",
            "'default/link' is left alone: it is a symbolic link",
            "'acme' is left alone: this server has no such tenant",
        ):
            assert len(_said(server, words)) == 1, server.log_text()[-4000:]
        async with AsyncClient(server.address) as client:
            names = {adapter.name async for adapter in client.adapters.list()}
            assert {name.rpartition("/")[2] for name in names} == {"bot", "other"}
            first = await client.generate(PROMPT, adapter="bot", temperature=0, max_tokens=8).result()
            uploaded = await client.adapters.upload(adapters["v2"], name="rival")

            async with client.generate(PROMPT, adapter="bot", max_tokens=1500, ignore_eos=True) as stream:
                await anext(aiter(stream))
                assert _tree(root) == before
                _put(adapters["v2"], root / "default" / "bot")
                await eventually(lambda: len(_said(server, "default/bot is taken as version")) == 2, "taken again")
                second = await client.generate(PROMPT, adapter="bot", temperature=0, max_tokens=8).result()
                result = await stream.result()
            assert result.adapter_version == first.adapter_version and result.usage.output_tokens == 1500
            assert _version(second.adapter_version) == _version(uploaded.name)
            assert second.adapter_version != first.adapter_version

            await client.adapters.promote("bot", f"bot@{_version(first.adapter_version)}")
            await client.adapters.delete("other")
            held = sorted([version.name async for version in client.adapters.versions("bot")])
            revision = (await client.adapters.get("bot")).revision
        assert "Traceback" not in server.log_text()

    before = _tree(root)
    with real_server(checkpoint, store, *flags) as server:
        async with AsyncClient(server.address) as client:
            assert sorted([version.name async for version in client.adapters.versions("bot")]) == held
            assert (await client.adapters.get("bot")).revision == revision
            again = await client.generate(PROMPT, adapter="bot", temperature=0, max_tokens=8).result()
            assert (again.adapter_version, again.token_ids) == (first.adapter_version, first.token_ids)
            try:
                await client.adapters.get("other")
            except AdapterNotFound:
                pass
            else:
                raise AssertionError("a deletion by RPC stays")
        assert _said(server, "its traffic stays where an operator put it")
        assert _said(server, "default/other") and not _said(server, "default/other is taken")
        assert server.child("loramux_server.lora.worker") is None or _said(server, "default/bad is refused")
    assert _tree(root) == before


async def test_sigterm_in_the_first_scan_ends_cleanly(
    checkpoint: Path, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    count = 300
    for index in range(count):
        shutil.copytree(adapters["v1"], tmp_path / "adapters" / "default" / f"bot-{index:03}")
    server = RealServer(
        *("--model", str(checkpoint), "--store", str(tmp_path / "store"), "--adapters", str(tmp_path / "adapters")),
        *("--weights", "fp32", "--device", "cpu", "--threads", "1", "--no-self-test", "--allow-unverified-adapters"),
        *("--kv-pages", "256"),
    )
    try:
        await eventually(lambda: bool(_said(server, "is taken as version")), "scanning", seconds=110)
        assert not server.address, "it is not ready before the first scan is over"
        children = children_of(server.process.pid)
        server.process.send_signal(signal.SIGTERM)
        code = await _ended(server)
    finally:
        server.stop()
    assert code == 0, server.log_text()[-4000:]
    assert "Traceback" not in server.log_text()
    assert 0 < len(_said(server, "is taken as version")) < count
    assert not _said(server, "is refused") and not _said(server, "tried again")
    assert not [pid for pid in children if alive(pid)], "no child is left"
    assert not os.listdir(tmp_path / "store" / ".trash")


async def _ended(server: RealServer) -> int | None:
    await eventually(lambda: server.process.poll() is not None, "ended", seconds=40)
    return server.process.returncode


def _version(name: str) -> str:
    """The digits of a version's name."""
    return name.rpartition("/")[2]
