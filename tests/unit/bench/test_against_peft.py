from pathlib import Path

import pytest
import torch
from against_peft import PeftBench
from random_model import SHAPES, write_checkpoint
from workload import SAMPLING, Adapters, write_adapters


@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
def test_a_mixed_batch_gives_as_many_tokens_as_asked(tmp_path: Path, sampling: str) -> None:
    device = torch.device("cpu")
    write_checkpoint(tmp_path / "model", SHAPES["tiny"], nf4=False, device=device)
    adapters = write_adapters(tmp_path, SHAPES["tiny"], count=2, rank=4, files=2, device=device)
    bench = PeftBench(tmp_path / "model", adapters, device="cpu")
    shape = {"concurrency": 3, "prompt": 8, "new": 3, "spec": SAMPLING[sampling], "sampling": sampling}
    mixed, base = bench.run(adapters=Adapters(count=2), **shape), bench.run(adapters=Adapters(count=0), **shape)
    assert (mixed.path, mixed.adapters, base.adapters, mixed.sampling) == ("peft", "2", "base", sampling)
    assert mixed.decode > 0 and base.prefill > 0 and mixed.resident_weight_bytes > 0
    bench.close()
