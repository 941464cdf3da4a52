"""Uploads against the fake server: the files that are read, breaks and resumption."""

import hashlib
from pathlib import Path

import pytest

from loramux import AsyncClient, Client, DeadlineExceeded, InvalidRequest, Unavailable, VersionState
from loramux._upload import CHUNK_BYTES, local_adapter
from loramux.testing import FakeError, FakeServer
from tests.support.client_clock import FakeClock

CONFIG = b'{"peft_type": "LORA"}'


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory as PEFT saves it, of two and a half pieces, with a file that is nobody's business."""
    (tmp_path / "adapter_config.json").write_bytes(CONFIG)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x07" * (2 * CHUNK_BYTES + CHUNK_BYTES // 2))
    (tmp_path / "loramux_manifest.json").write_bytes(b'{"base": "x"}')
    (tmp_path / "optimizer.pt").write_bytes(b"not to be sent")
    return tmp_path


class TestLocal:
    def test_reads_three_files(self, directory: Path) -> None:
        local = local_adapter(directory)
        data = (directory / "adapter_model.safetensors").read_bytes()
        assert (local.config, local.manifest) == (CONFIG, b'{"base": "x"}')
        assert (local.size, local.sha256) == (len(data), hashlib.sha256(data).hexdigest())

    def test_pieces_are_bounded_and_start_anywhere(self, directory: Path) -> None:
        local = local_adapter(str(directory))
        pieces = list(local.pieces("u", 0, None))
        assert [len(piece.data) for piece in pieces] == [CHUNK_BYTES, CHUNK_BYTES, CHUNK_BYTES // 2]
        assert [piece.offset for piece in pieces] == [0, CHUNK_BYTES, 2 * CHUNK_BYTES]
        seen: list[tuple[int, int]] = []
        [last] = local.pieces("u", local.size - 5, lambda sent, total: seen.append((sent, total)))
        assert (last.data, last.offset) == (b"\x07" * 5, local.size - 5)
        assert seen == [(local.size, local.size)]

    def test_a_pickle_is_refused_with_the_way_out(self, directory: Path) -> None:
        (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
        with pytest.raises(InvalidRequest, match="safe_serialization=True"):
            local_adapter(directory)

    def test_what_is_no_adapter(self, directory: Path) -> None:
        with pytest.raises(InvalidRequest, match="no directory"):
            local_adapter(directory / "nowhere")
        (directory / "adapter_model.safetensors").write_bytes(b"")
        with pytest.raises(InvalidRequest, match="empty"):
            local_adapter(directory)
        (directory / "adapter_model.safetensors").unlink()
        with pytest.raises(InvalidRequest, match="no adapter_model.safetensors"):
            local_adapter(directory)
        (directory / "adapter_config.json").unlink()
        with pytest.raises(InvalidRequest, match=r"no adapter_config\.json"):
            local_adapter(directory)

    def test_a_huge_config_is_not_read(self, directory: Path) -> None:
        (directory / "adapter_config.json").write_bytes(b" " * (64 * 1024 + 1))
        with pytest.raises(InvalidRequest, match="adapter_config"):
            local_adapter(directory)


class TestUpload:
    def test_upload_and_promote(self, server: FakeServer, client: Client, directory: Path) -> None:
        version = client.adapters.upload(directory, name="bot", promote=True, labels={"team": "a"})
        assert version.state is VersionState.READY
        assert [file.name for file in version.files] == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "loramux_manifest.json",
        ]
        adapter = client.adapters.get("bot")
        assert adapter.serving_version == version.name
        assert adapter.labels == {"team": "a"}
        assert client.generate("Hi", adapter="bot").result().adapter_version == version.name

    def test_without_promote_it_does_not_serve(self, client: Client, directory: Path) -> None:
        version = client.adapters.upload(directory, name="bot")
        assert client.adapters.get("bot").serving_version is None
        assert client.adapters.upload(directory, name="bot").name == version.name

    def test_a_break_resumes_where_the_server_is(self, server: FakeServer, directory: Path) -> None:
        clock = FakeClock()
        sent: list[int] = []
        server.break_upload(after_bytes=CHUNK_BYTES + 1)
        with Client(server.address) as client:
            client._transport.clock = clock
            version = client.adapters.upload(directory, name="bot", progress=lambda done, _: sent.append(done))
        assert version.state is VersionState.READY
        assert len(server.calls_of("WriteAdapterUpload")) == 2
        assert len(server.calls_of("GetAdapterUpload")) == 1
        assert len(clock.slept) == 1
        size = (directory / "adapter_model.safetensors").stat().st_size
        assert sent[-1] == size

    async def test_a_break_resumes_where_the_server_is_async(self, server: FakeServer, directory: Path) -> None:
        clock = FakeClock()
        server.break_upload(after_bytes=CHUNK_BYTES + 1)
        async with AsyncClient(server.address) as client:
            client._transport.clock = clock
            version = await client.adapters.upload(directory, name="bot", promote=True)
            assert (await client.adapters.get("bot")).serving_version == version.name
        assert len(server.calls_of("WriteAdapterUpload")) == 2
        assert len(clock.slept) == 1

    def test_an_error_of_progress_reaches_its_owner(self, server: FakeServer, client: Client, directory: Path) -> None:
        with pytest.raises(ZeroDivisionError):
            client.adapters.upload(directory, name="bot", progress=lambda done, total: print(1 // 0))
        assert client.adapters.upload(directory, name="bot").state is VersionState.READY

    async def test_an_error_of_progress_reaches_its_owner_async(self, server: FakeServer, directory: Path) -> None:
        async with AsyncClient(server.address) as client:
            with pytest.raises(ZeroDivisionError):
                await client.adapters.upload(directory, name="bot", progress=lambda done, total: print(1 // 0))
            assert (await client.adapters.upload(directory, name="bot")).state is VersionState.READY

    def test_a_lost_place_is_asked_for(self, server: FakeServer, client: Client, directory: Path) -> None:
        lost = FakeError("INVALID_ARGUMENT", "INVALID_PARAMETER", field_violations=[("offset", "is 0")])
        server.fail("WriteAdapterUpload", lost, lost)
        assert client.adapters.upload(directory, name="bot").state is VersionState.READY
        assert len(server.calls_of("GetAdapterUpload")) == 2
        server.fail("WriteAdapterUpload", *[lost] * 9)
        (directory / "adapter_model.safetensors").write_bytes(b"other")
        with pytest.raises(InvalidRequest):
            client.adapters.upload(directory, name="bot")
        assert len(server.calls_of("WriteAdapterUpload")) == 3 + 6

    def test_breaks_without_progress_end_it(self, server: FakeServer, directory: Path) -> None:
        server.fail("WriteAdapterUpload", *[FakeError("UNAVAILABLE")] * 20)
        with Client(server.address) as client:
            client._transport.clock = FakeClock()
            with pytest.raises(Unavailable):
                client.adapters.upload(directory, name="bot")
        assert len(server.calls_of("WriteAdapterUpload")) == 5

    def test_another_upload_of_the_same_files_goes_on(
        self, server: FakeServer, client: Client, directory: Path
    ) -> None:
        server.break_upload(after_bytes=2 * CHUNK_BYTES)
        server.fail("GetAdapterUpload", FakeError("INTERNAL"))
        with pytest.raises(Exception, match="scripted failure"):
            client.adapters.upload(directory, name="bot")
        sent: list[int] = []
        client.adapters.upload(directory, name="bot", progress=lambda done, _: sent.append(done))
        assert len(sent) == 1

    def test_a_refusal_of_the_start_sends_no_bytes(self, server: FakeServer, client: Client, directory: Path) -> None:
        server.fail("StartAdapterUpload", FakeError("INVALID_ARGUMENT", "INVALID_PARAMETER"))
        with pytest.raises(InvalidRequest):
            client.adapters.upload(directory, name="bot")
        assert not server.calls_of("WriteAdapterUpload")

    def test_a_file_that_changes_is_noticed(self, client: Client, directory: Path) -> None:
        def change(_: int, __: int) -> None:
            with (directory / "adapter_model.safetensors").open("r+b") as file:
                file.seek(-1, 2)
                file.write(b"\x08")

        with pytest.raises(InvalidRequest) as caught:
            client.adapters.upload(directory, name="bot", progress=change)
        assert caught.value.reason == "DIGEST_MISMATCH"

    @pytest.mark.parametrize(
        ("timeout", "least", "most"), [(None, 3000, 3700), (500, 400, 600), (float("inf"), 1e6, None)]
    )
    def test_its_time_goes_to_every_call(
        self,
        server: FakeServer,
        client: Client,
        directory: Path,
        timeout: float | None,
        least: float,
        most: float | None,
    ) -> None:
        client.adapters.upload(directory, name="bot", timeout=timeout, promote=True)
        for call in server.calls:
            left = float("inf") if call.time_remaining is None else call.time_remaining
            assert left > least and (most is None or left < most), call.method

    def test_its_time_is_bounded(self, server: FakeServer, directory: Path) -> None:
        clock = FakeClock()
        server.fail("WriteAdapterUpload", FakeError("UNAVAILABLE", pushback_ms=5000))
        with Client(server.address) as client:
            client._transport.clock = clock
            with pytest.raises((Unavailable, DeadlineExceeded)):
                client.adapters.upload(directory, name="bot", timeout=3)
        assert clock.slept == []
