"""The validation worker as a real process, driven through its front-end side."""

import asyncio
import contextlib
import os
import signal
import struct
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import loramux_server
from loramux_base.adapter import version_digest
from loramux_base.adapter_digests import file_digests
from loramux_server.errors import (
    Expired,
    FailedPrecondition,
    Internal,
    LoramuxServerError,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from loramux_server.lora import worker_messages as wire
from loramux_server.lora.upload_session import ValidatedAdapter
from loramux_server.lora.uploads import AdapterValidator
from loramux_server.lora.validation import ServedBase, ValidationWorker, WorkerLimits, _Worker
from tests.support.adapters import tensor_name, tensors_of, tiny_base, write_adapter, write_base

BASE = tiny_base()
SERVED = ServedBase(fingerprint="a" * 64, parts={"weights": "1", "tokenizer": "2"})


@contextlib.asynccontextmanager
async def running(directory: Path, **options: Any) -> AsyncIterator[ValidationWorker]:
    settings: dict[str, Any] = {"max_rank": 8, "base": lambda: SERVED, "allow_unverified": True, **options}
    worker = ValidationWorker(write_base(directory), **settings)
    try:
        yield worker
    finally:
        await worker.close()


def hang(worker: ValidationWorker) -> int:
    """Stop the process, so that it does not answer; returns its id."""
    assert worker._worker is not None
    pid = worker._worker.process.pid
    os.kill(pid, signal.SIGSTOP)
    return pid


def ended(pid: int) -> bool:
    """Whether the process runs no more; a zombie may stay where no init process reaps it."""
    return gone(pid) or proc(pid, "stat").rsplit(b")", 1)[1].split()[0] == b"Z"


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def with_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(loramux_server.__file__).parents[1])}


def proc(pid: int, name: str) -> bytes:
    return Path(f"/proc/{pid}/{name}").read_bytes()


async def test_a_good_adapter(tmp_path: Path) -> None:
    tensors = tensors_of(BASE, rank=5, modules=["q_proj", "down_proj"])
    directory = write_adapter(tmp_path / "a", tensors, r=5)
    async with running(tmp_path) as worker:
        validator: AdapterValidator = worker
        result: ValidatedAdapter = await validator.validate(directory)
        assert result.digest == version_digest(directory)
        assert (result.rank, result.rank_units) == (5, 1)
        assert result.modules == ("down_proj", "q_proj")
        assert result.tensor_bytes == sum(len(data) for _, _, data in tensors.values())
        assert (result.base_fingerprint, result.base_verified) == ("", False)
        assert worker.starts == 1


def bits(dtype: str, number: int) -> bytes:
    return struct.pack("<I" if dtype == "F32" else "<H", number)


BAD_NUMBERS = {
    "F32": [0x7FC00000, 0x7F800000, 0xFF800000, 0x7F800001],
    "F16": [0x7E00, 0x7C00, 0xFC00],
    "BF16": [0x7FC0, 0x7F80, 0xFF80],
}
LARGEST = {"F32": 0x7F7FFFFF, "F16": 0x7BFF, "BF16": 0xFF7F}


async def test_numbers(tmp_path: Path) -> None:
    """Every kind of NaN and infinity in every dtype, at the very end of the file too; the largest finite one passes."""
    async with running(tmp_path) as worker:
        for dtype, numbers in BAD_NUMBERS.items():
            for place, number in enumerate([*numbers, LARGEST[dtype]]):
                tensors = {
                    name: (dtype, shape, bits(dtype, 0) * (shape[0] * shape[1]))
                    for name, (_, shape, _) in tensors_of(BASE, modules=["o_proj"]).items()
                }
                name = list(tensors)[-1 if place % 2 else 0]
                _, shape, data = tensors[name]
                one = bits(dtype, number)
                tensors[name] = (dtype, shape, data[: -len(one)] + one if place % 2 else one + data[len(one) :])
                directory = write_adapter(tmp_path / f"{dtype}{place}", tensors)
                if number == LARGEST[dtype]:
                    await worker.validate(directory)
                    continue
                with pytest.raises(FailedPrecondition, match="NaN or infinity") as caught:
                    await worker.validate(directory)
                assert (caught.value.reason, caught.value.field) == (Reason.ADAPTER_NUMERICS, name)


async def test_more_numbers_than_a_chunk(tmp_path: Path) -> None:
    rows = {"hidden_size": 512, "intermediate_size": 8200, "num_hidden_layers": 1}
    base = tiny_base(**rows)
    tensors = tensors_of(base, rank=256, modules=["down_proj"])
    name = tensor_name(0, "down_proj", "A")
    _, shape, data = tensors[name]
    assert len(data) > 8 << 20
    tensors[name] = ("F32", shape, data[:-4] + bits("F32", 0x7F800000))
    worker = ValidationWorker(write_base(tmp_path, **rows), max_rank=256, base=lambda: SERVED, allow_unverified=True)
    try:
        with pytest.raises(FailedPrecondition) as caught:
            await worker.validate(write_adapter(tmp_path / "a", tensors, r=256))
        assert caught.value.field == name
    finally:
        await worker.close()


async def test_the_base_must_be_the_served_one(tmp_path: Path) -> None:
    def manifest(fingerprint: str, **parts: str) -> dict[str, Any]:
        return {"format_version": 1, "base_fingerprint": fingerprint, "base_parts": parts, "later": {"x": 1}}

    tensors = tensors_of(BASE, modules=["o_proj"])
    async with running(tmp_path, allow_unverified=False) as worker:
        result = await worker.validate(
            write_adapter(tmp_path / "good", tensors, manifest=manifest("a" * 64, weights="1"))
        )
        assert (result.base_fingerprint, result.base_verified) == ("a" * 64, True)
        other = write_adapter(tmp_path / "other", tensors, manifest=manifest("b" * 64, weights="9", tokenizer="2"))
        with pytest.raises(FailedPrecondition, match=r"bbbbbbbbbbbbbbbb.*aaaaaaaaaaaaaaaa \(weights differ\)"):
            await worker.validate(other)
        with pytest.raises(FailedPrecondition, match="--allow-unverified-adapters") as caught:
            await worker.validate(write_adapter(tmp_path / "none", tensors))
        assert caught.value.reason is Reason.ADAPTER_INCOMPATIBLE
        for number, bad in enumerate(({}, {"format_version": 2}, {"format_version": 1, "base_fingerprint": "x"})):
            with pytest.raises(FailedPrecondition, match="loramux_manifest"):
                await worker.validate(write_adapter(tmp_path / f"bad{number}", tensors, manifest=bad))
    async with running(tmp_path) as worker:
        # A manifest that names another base is refused even where adapters without one are taken.
        with pytest.raises(FailedPrecondition):
            await worker.validate(other)


async def test_files_must_be_those_of_the_manifest(tmp_path: Path) -> None:
    plain = write_adapter(tmp_path / "plain", tensors_of(BASE, modules=["o_proj"]))
    digests = file_digests(plain)

    def adapter(name: str, sha256: Any = digests, *, value: float = 0.5, **config: Any) -> Path:
        manifest = {"format_version": 1, "base_fingerprint": "a" * 64, "sha256": sha256}
        tensors = tensors_of(BASE, modules=["o_proj"], value=value)
        return write_adapter(tmp_path / name, tensors, manifest=manifest, **config)

    async with running(tmp_path) as worker:
        assert (await worker.validate(adapter("same"))).base_verified
        for changed, file in (
            (adapter("weights", value=0.25), "adapter_model.safetensors"),
            (adapter("alpha", lora_alpha=64), "adapter_config.json"),
        ):
            with pytest.raises(FailedPrecondition, match="copy it again from the run, or train again") as caught:
                await worker.validate(changed)
            assert (caught.value.reason, caught.value.field) == (Reason.ADAPTER_INCOMPATIBLE, file)
            said = f"{file} is not as the run wrote it: loramux_manifest.json says sha256 {digests[file][:16]}, the "
            assert f"{said}file has {file_digests(changed)[file][:16]};" in caught.value.message
        other = {"adapter_config.json": digests["adapter_config.json"]}
        for number, bad in enumerate(([], "x", {}, other, {**digests, "adapter_config.json": 3})):
            with pytest.raises(
                FailedPrecondition, match="loramux_manifest.json: sha256 .*; take the file that the run wrote"
            ):
                await worker.validate(adapter(f"bad{number}", bad))
        # Damage that makes a number infinite is told as damage.
        with pytest.raises(FailedPrecondition, match="is not as the run wrote it"):
            await worker.validate(adapter("infinite", value=float("inf")))


async def test_refusals_and_good_adapters_in_any_order(tmp_path: Path) -> None:
    good = write_adapter(tmp_path / "good", tensors_of(BASE))
    bad: list[tuple[Path, str]] = [
        (write_adapter(tmp_path / "rank", tensors_of(BASE, rank=9), r=9), "limit of 8"),
        (write_adapter(tmp_path / "dora", tensors_of(BASE), use_dora=True), "DoRA"),
        (write_adapter(tmp_path / "bomb", tensors_of(BASE), rank_pattern={"(a*)*b": 4}), "repeat"),
        (write_adapter(tmp_path / "surrogate", {"\ud800": ("F32", [1, 1], bytes(4))}), "unknown tensor"),
        (tmp_path / "nowhere", "not a directory"),
    ]
    digest = version_digest(good)
    async with running(tmp_path) as worker:
        for directory, match in bad:
            with pytest.raises(FailedPrecondition, match=match) as caught:
                await worker.validate(directory)
            assert str(tmp_path) not in caught.value.message
            assert (await worker.validate(good)).digest == digest
        assert worker.starts == 1


async def test_a_base_that_takes_no_adapters(tmp_path: Path) -> None:
    worker = ValidationWorker(
        write_base(tmp_path, model_type="phi3"), max_rank=8, base=lambda: SERVED, allow_unverified=True
    )
    try:
        with pytest.raises(FailedPrecondition, match="fused qkv_proj"):
            await worker.validate(write_adapter(tmp_path / "a", tensors_of(BASE)))
    finally:
        await worker.close()


async def test_files_that_cannot_be_read_say_nothing_about_the_adapter(tmp_path: Path) -> None:
    worker = ValidationWorker(tmp_path / "missing.json", max_rank=8, base=lambda: SERVED, allow_unverified=True)
    try:
        with pytest.raises(Unavailable) as caught:
            await worker.validate(write_adapter(tmp_path / "a", tensors_of(BASE)))
        assert caught.value.reason is Reason.STORE_UNAVAILABLE
        assert str(tmp_path) not in caught.value.message
    finally:
        await worker.close()


async def test_no_base_yet(tmp_path: Path) -> None:
    def no_base() -> ServedBase:
        raise Unavailable(Reason.ENGINE_UNAVAILABLE, "starting", retry_after=1.0)

    async with running(tmp_path, base=no_base) as worker:
        with pytest.raises(Unavailable, match="starting"):
            await worker.validate(tmp_path)
        assert worker.starts == 0


async def test_a_dead_worker_is_started_again(tmp_path: Path) -> None:
    good = write_adapter(tmp_path / "good", tensors_of(BASE))
    async with running(tmp_path) as worker:
        await worker.start()
        pid = hang(worker)
        task = asyncio.create_task(worker.validate(good))
        await asyncio.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        await task  # The validation was tried again on the new worker.
        assert worker.starts == 2
        assert worker._worker is not None
        os.kill(worker._worker.process.pid, signal.SIGKILL)
        await worker._worker.process.wait()
        await worker.validate(good)
        assert worker.starts == 3


async def test_a_directory_that_kills_every_worker_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write_adapter(tmp_path / "good", tensors_of(BASE))
    async with running(tmp_path) as worker:
        ask = _Worker.ask

        async def killed(self: _Worker, request: wire.ValidateAdapter) -> wire.Answer:
            self.process.kill()
            await self.process.wait()
            return await ask(self, request)

        monkeypatch.setattr(_Worker, "ask", killed)
        with pytest.raises(Internal, match="died twice"):
            await worker.validate(good)
        monkeypatch.undo()
        await worker.validate(good)
        assert worker.starts == 3


async def test_a_hung_worker_is_killed(tmp_path: Path) -> None:
    good = write_adapter(tmp_path / "good", tensors_of(BASE))
    async with running(tmp_path, limits=WorkerLimits(seconds=0.3)) as worker:
        await worker.start()
        pid = hang(worker)
        with pytest.raises(Expired, match="0.3 s"):
            await worker.validate(good)
        assert gone(pid)
        await worker.validate(good)


async def test_a_cancelled_call_leaves_nothing_behind(tmp_path: Path) -> None:
    good = write_adapter(tmp_path / "good", tensors_of(BASE))
    async with running(tmp_path) as worker:
        await worker.start()
        pid = hang(worker)
        task = asyncio.create_task(worker.validate(good))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert gone(pid)
        assert (await worker.validate(good)).digest == version_digest(good)


async def test_calls_wait_in_a_bounded_queue(tmp_path: Path) -> None:
    good = write_adapter(tmp_path / "good", tensors_of(BASE))
    async with running(tmp_path, limits=WorkerLimits(queued=3)) as worker:
        results = await asyncio.gather(*(worker.validate(good) for _ in range(5)), return_exceptions=True)
        refused = [result for result in results if isinstance(result, ResourceExhausted)]
        assert len(refused) == 2
        assert all(error.reason is Reason.QUEUE_FULL and error.retry_after for error in refused)
        assert len({result.digest for result in results if not isinstance(result, BaseException)}) == 1
        assert worker.starts == 1
        await worker.validate(good)


async def test_close_fails_what_is_under_way(tmp_path: Path) -> None:
    good = write_adapter(tmp_path / "good", tensors_of(BASE))
    async with running(tmp_path) as worker:
        await worker.start()
        pid = hang(worker)
        tasks = [asyncio.create_task(worker.validate(good)) for _ in range(2)]
        await asyncio.sleep(0.05)
        await worker.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [error.reason for error in results if isinstance(error, LoramuxServerError)] == [Reason.DRAINING] * 2
        assert gone(pid)
        await worker.close()
        with pytest.raises(Unavailable):
            await worker.validate(good)


async def test_limits_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_SECRET_KEY", "confidential")
    good = write_adapter(tmp_path / "good", tensors_of(BASE))
    async with running(tmp_path, limits=WorkerLimits(memory_bytes=3 << 30, cpu_seconds=50)) as worker:
        await worker.validate(good)
        assert worker._worker is not None
        pid = worker._worker.process.pid
        limits = proc(pid, "limits").decode()
        values = {line[:26].strip(): line[26:].split()[0] for line in limits.splitlines()[1:]}
        assert values["Max address space"] == str(3 << 30)
        assert values["Max core file size"] == values["Max file size"] == "0"
        assert 50 <= int(values["Max cpu time"]) <= 60
        assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
        assert b"confidential" not in proc(pid, "environ")
        assert b"torch" not in proc(pid, "maps")


async def test_processor_time_is_bounded() -> None:
    code = "from loramux_server.lora.worker import _limit_processor\n_limit_processor(1)\nwhile True: pass"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, env=with_path())
    async with asyncio.timeout(60):
        assert await process.wait() == -signal.SIGXCPU


@pytest.mark.parametrize(
    ("limits", "attempts"),
    # The first starts and dies of its own limit, which is tried twice; the second never starts.
    [(WorkerLimits(memory_bytes=48 << 20), 2), (WorkerLimits(start_seconds=0.001), 1)],
)
async def test_a_worker_that_does_not_start_is_reported(tmp_path: Path, limits: WorkerLimits, attempts: int) -> None:
    good = write_adapter(tmp_path / "good", tensors_of(BASE))
    async with running(tmp_path, limits=limits) as worker:
        for _ in range(2):
            with pytest.raises(Internal, match="does not start|died"):
                await worker.validate(good)
        assert worker.starts == 2 * attempts
        assert worker._worker is None


async def test_the_worker_ends_with_its_parent(tmp_path: Path) -> None:
    write_base(tmp_path)
    code = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from loramux_server.lora.validation import ServedBase, ValidationWorker\n"
        "async def main():\n"
        "    worker = ValidationWorker(Path(sys.argv[1]), max_rank=8, base=lambda: None)\n"
        "    await worker.start()\n"
        "    print(worker._worker.process.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(tmp_path / "config.json"), stdout=asyncio.subprocess.PIPE, env=with_path()
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    parent.kill()
    await parent.communicate()
    async with asyncio.timeout(20):
        while not ended(pid):  # noqa: ASYNC110 - it is no child of ours
            await asyncio.sleep(0.02)


async def test_imports_no_torch() -> None:
    code = "import sys, loramux_server.lora.validation, loramux_server.lora.worker; print('torch' in sys.modules)"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, env=with_path()
    )
    out, _ = await process.communicate()
    assert out.strip() == b"False"
