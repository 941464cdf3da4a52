import pytest
import torch

from loramux_demo.muon import Muon, orthogonalize
from loramux_demo.packing import pack
from loramux_demo.tokenizer import IGNORED


def stream(sizes: list[int]) -> list[tuple[list[int], list[int]]]:
    return [([index + 1] * size, [IGNORED] + [index + 1] * (size - 1)) for index, size in enumerate(sizes)]


def test_conversations_stay_whole_and_apart() -> None:
    encoded = stream([5, 7, 3, 9, 4, 6, 8, 2] * 200)
    steps = list(pack(iter(encoded), rows=4, length=8, longest=16, pad_id=0))
    assert {len(step) for step in steps} == {1, 2}, "steps with and without long conversations"
    assert {batch.ids.shape for step in steps for batch in step} == {(4, 8), (2, 16)}
    batches = [batch for step in steps for batch in step]
    seen: dict[int, int] = {}
    for batch in batches:
        for row in range(len(batch.ids)):
            for segment in range(int(batch.segments[row].max()) + 1):
                chosen = batch.segments[row] == segment
                (token,) = set(batch.ids[row][chosen].tolist())
                seen[token] = seen.get(token, 0) + 1
                count = int(chosen.sum())
                assert count == len(encoded[token - 1][0])
                assert batch.positions[row][chosen].tolist() == list(range(count))
        assert bool((batch.labels[batch.segments < 0] == IGNORED).all())
        after = batch.learned + 1
        assert torch.equal(batch.ids.flatten()[after], batch.labels.flatten()[after])
        assert len(after) == int((batch.labels != IGNORED).sum())
    assert set(seen.values()) == {1}


def test_mask_is_causal_within_a_conversation() -> None:
    (batch,) = next(pack(iter(stream([3, 2] * 200)), rows=1, length=5, longest=5, pad_id=0))
    (mask,) = (batch.mask()[0].tolist(),)
    first = int((batch.segments[0] == 0).sum())
    for query in range(5):
        for key in range(5):
            same = (query < first) == (key < first)
            assert mask[0][query][key] == (same and key <= query)


def test_rows_are_well_filled() -> None:
    steps = pack(iter(stream([11, 29, 47, 83, 150, 17, 23] * 200)), rows=4, length=192, longest=384, pad_id=0)
    batches = [batch for step in steps for batch in step]
    used = sum(int((batch.segments >= 0).sum()) for batch in batches)
    assert used > 0.95 * sum(batch.ids.numel() for batch in batches)


def test_a_conversation_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="has 9 tokens, the longest row 8"):
        list(pack(iter(stream([9])), rows=1, length=4, longest=8, pad_id=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_orthogonalized_singular_values_are_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    result = orthogonalize(matrix, dtype).float()
    assert torch.allclose(orthogonalize(torch.stack([matrix, 2 * matrix]), dtype)[1].float(), result, atol=1e-2)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.3 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(result.flatten(), (left @ right).flatten(), dim=0) > 0.97


def test_muon_goes_downhill_and_decays() -> None:
    torch.manual_seed(0)
    target = torch.randn(8, 8)
    weight = torch.zeros(8, 8, requires_grad=True)
    muon = Muon([weight])
    losses = []
    for _ in range(60):
        loss = (weight - target).square().sum()
        losses.append(loss.item())
        weight.grad = None
        loss.backward()
        muon.step(0.3)
    assert losses[-1] < 0.2 * losses[0]
    before = weight.detach().norm()
    weight.grad = torch.zeros_like(weight)
    Muon([weight], weight_decay=0.5).step(0.2)
    assert torch.isclose(weight.detach().norm(), 0.9 * before, rtol=1e-3)
