"""Adapters on their way to a CUDA slab: page-locked host memory, the same rows from host and store, 200 in 8 slots."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramux_base.adapter import CONFIG_NAME, TENSORS_NAME, base_shapes
from loramux_base.checkpoint import read_json
from loramux_server.engine.adapter_loader import AdapterLoader
from loramux_server.engine.config import EngineConfig
from loramux_server.engine.host_arena import HostArena
from loramux_server.model.serving_blob import BLOB_NAME
from loramux_server.model.slab import LoraSlab
from tests.support.engine_runs import Job, RealEngine
from tests.support.tiny_models import make_adapter, make_checkpoint

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
ADAPTERS = 200
GROUPS = ("qkv", "o", "gate_up", "down")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and 200 adapters of it, of four shapes."""
    root = tmp_path_factory.mktemp("residency")
    base = make_checkpoint(root / "base", "qwen2", hidden=256, layers=3, dtype="bfloat16")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    shapes = [
        make_adapter(root / f"shape{rank}", base, rank=rank, alpha=32, target_modules=targets[: 7 if rank > 4 else 3])
        for rank in (4, 5, 8, 16)
    ]
    adapters = [redrawn(shapes[index % 4], root / f"a{index}", seed=index) for index in range(ADAPTERS)]
    return base, adapters


def redrawn(adapter: Path, directory: Path, *, seed: int) -> Path:
    """An adapter of the same shape with numbers of its own."""
    directory.mkdir()
    shutil.copy(adapter / CONFIG_NAME, directory / CONFIG_NAME)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) * (0.2 if "lora_B" in name else tensor.shape[1] ** -0.5)
        for name, tensor in load_file(adapter / TENSORS_NAME).items()
    }
    save_file(tensors, directory / TENSORS_NAME, metadata={"format": "pt"})
    return directory


def make_config(base: Path, **fields: object) -> EngineConfig:
    settings: dict[str, object] = {
        "model": str(base),
        "weights": "nf4",
        "device": "cuda",
        "batch_invariant": True,
        "kv_pages": 600,
        "max_running": 16,
        "max_batch_tokens": 256,
        "prefill_chunk": 64,
        "max_model_len": 512,
        "rank_units": 8,
        "max_slots": 8,
        "max_rank": 16,
        "poison": True,
        "self_test": False,
        **fields,
    }
    return EngineConfig(**settings)  # type: ignore[arg-type]


def test_the_arena_is_page_locked_until_it_is_closed() -> None:
    arena = HostArena((3 << 20) + 100, device=CUDA)
    lease = arena.reserve("a", 1 << 20)
    assert lease is not None and arena.page_locked and lease.memory.is_pinned()
    lease.release()
    assert arena.reserve("b", 3 << 20) is not None, "sizes are not rounded"
    arena.close()
    assert not lease.memory.is_pinned()
    again = HostArena(3 << 20, device=CUDA)
    assert again.page_locked
    again.close()


def load(loader: AdapterLoader, slot: int, path: Path) -> None:
    loader.start_load(slot, slot, 1, str(path))
    loader.wait_idle()
    assert loader.poll_loads() == [(slot, None)]


def rows_of(slab: LoraSlab) -> list[torch.Tensor]:
    """Everything in the slab as bytes, NaN included."""
    groups = [slab.group(layer, name) for layer in range(3) for name in GROUPS]
    tensors = [tensor for g in groups for tensor in (g.a, g.b, g.ranks, g.scales, g.first_rows)]
    return [tensor.contiguous().view(torch.uint8).cpu() for tensor in tensors]


def test_store_blob_and_host_give_the_same_rows(files: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, adapters = files
    copies = [Path(shutil.copytree(path, tmp_path / path.name)) for path in adapters[:4]]
    shapes = base_shapes(read_json(base / "config.json"))

    def fill(*, host_bytes: int, blobs: bool, passes: int) -> tuple[list[torch.Tensor], AdapterLoader]:
        slab = LoraSlab(shapes, rank_units=4, max_slots=4, max_rank=16, dtype=torch.bfloat16, device=CUDA, poison=True)
        loader = AdapterLoader(
            slab,
            shapes,
            rank_units=4,
            max_slots=4,
            max_rank=16,
            device=CUDA,
            host_bytes=host_bytes,
            serving_blobs=blobs,
        )
        for number in range(passes):
            for slot, path in enumerate(copies):
                if number:
                    loader.clear(slot)
                load(loader, slot, path)
        torch.cuda.synchronize()
        loader.check_integrity()
        return rows_of(slab), loader

    from_store, loader = fill(host_bytes=0, blobs=False, passes=1)
    loader.close()
    written, loader = fill(host_bytes=16 << 20, blobs=True, passes=1)
    loader.close()
    assert all((path / BLOB_NAME).exists() for path in copies)
    from_blob, loader = fill(host_bytes=16 << 20, blobs=True, passes=1)
    assert loader.host_use().misses == 4
    loader.close()
    warm, loader = fill(host_bytes=16 << 20, blobs=True, passes=2)
    assert (loader.host_use().misses, loader.host_use().hits) == (4, 4)
    loader.close()
    for other in (written, from_blob, warm):
        assert all(map(torch.equal, from_store, other))


def jobs_over_all(adapters: int, *, vocab: int, seed: int) -> list[Job]:
    """Every adapter once, a third of them twice, the base now and then, in random order."""
    generator = random.Random(seed)
    picks: list[int | None] = [*range(adapters), *range(0, adapters, 3), *[None] * 10]
    generator.shuffle(picks)
    return [
        Job(
            prompt=tuple(generator.randrange(3, vocab) for _ in range(generator.randrange(1, 60))),
            adapter=pick,
            fields=(("temperature", 0.9), ("top_k", 40), ("seed", index)) if index % 2 else (),
        )
        for index, pick in enumerate(picks)
    ]


def test_many_adapters_through_few_slots_give_the_tokens_of_a_static_run(files: tuple[Path, list[Path]]) -> None:
    base, adapters = files
    jobs = jobs_over_all(len(adapters), vocab=512, seed=1)
    static = RealEngine(
        make_config(base, rank_units=ADAPTERS, max_slots=ADAPTERS, cuda_graphs=False, host_adapter_bytes=0), adapters
    )
    expected = static.run(jobs)
    assert static.engine.stats().adapter_evictions == 0
    static.close()
    # The arena holds some of them only; what it lost comes from the blobs that the first run wrote.
    moving = RealEngine(make_config(base, host_adapter_bytes=8 << 20, serving_blobs=True), adapters)
    first = moving.run(jobs)
    again = moving.run(list(reversed(jobs)))[::-1]
    stats = moving.engine.stats()
    moving.close()
    assert first == expected
    assert again == expected
    assert stats.adapter_evictions > ADAPTERS and stats.resident_versions <= 8
    assert stats.host_prefetches > 0 and stats.host_misses > 0 and stats.host_bytes_used <= 8 << 20
    assert any((path / BLOB_NAME).exists() for path in adapters)
