"""Teacher-forced evaluation, weighted by token: the result does not depend on how rows are batched.

Averages of per-batch averages, which most trainers report, move with the batch size; here sums over tokens are kept a
conversation, and divided once.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
from torch import Tensor, nn

from loramux_trainer.batches import Collator
from loramux_trainer.data.codec import IGNORED, Sequence

_ROWS_AT_ONCE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over loss tokens.

    Attributes:
        nll: Negative log-likelihood, nats.
        correct: Tokens that the model ranks first.
        tokens: Loss tokens.
    """

    nll: float
    correct: int
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        total: Over all conversations.
        by_conversation: Index of the conversation -> its sums.
    """

    total: Sums
    by_conversation: dict[int, Sums]

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a token, nats."""
        return self.total.nll / self.total.tokens

    @property
    def perplexity(self) -> float:
        """`exp(loss)`; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def accuracy(self) -> float:
        """Share of tokens that the model ranks first."""
        return self.total.correct / self.total.tokens

    def plain(self) -> dict[str, Any]:
        """Numbers for logs and manifests."""
        perplexity = self.perplexity
        return {
            "loss": self.loss,
            "perplexity": perplexity if math.isfinite(perplexity) else None,
            "accuracy": self.accuracy,
            "loss_tokens": self.total.tokens,
            "conversations": len(self.by_conversation),
        }


def evaluate(
    model: nn.Module, sequences: SequenceOf[Sequence], *, pad_id: int, batch_size: int, device: torch.device
) -> Evaluation:
    """Evaluate a causal language model on sequences.

    Args:
        model: A transformers or PEFT model; its mode (train or eval) is restored.
        sequences: At least one.
        pad_id: Id of the padding.
        batch_size: Rows a forward pass.
        device: Of the model.
    """
    collate = Collator(pad_id)
    # Rows of similar length share a batch: less padding, and the same sums.
    order = sorted(range(len(sequences)), key=lambda index: (len(sequences[index].input_ids), index))
    sums: dict[int, list[float]] = {}
    with _eval_mode(model), torch.no_grad():
        for first in range(0, len(order), batch_size):
            chosen = [sequences[index] for index in order[first : first + batch_size]]
            batch = collate(
                [
                    {"input_ids": sequence.input_ids, "labels": sequence.labels, "row": number}
                    for number, sequence in enumerate(chosen)
                ]
            )
            nll, correct, rows = _token_sums(model, {key: value.to(device) for key, value in batch.items()})
            for number, sequence in enumerate(chosen):
                mine = rows == number
                entry = sums.setdefault(sequence.conversation, [0.0, 0, 0])
                entry[0] += float(nll[mine].sum())
                entry[1] += int(correct[mine].sum())
                entry[2] += int(mine.sum())
    by_conversation = {
        index: Sums(nll=nll, correct=int(correct), tokens=int(tokens))
        for index, (nll, correct, tokens) in sorted(sums.items())
    }
    total = Sums(
        nll=math.fsum(item.nll for item in by_conversation.values()),
        correct=sum(item.correct for item in by_conversation.values()),
        tokens=sum(item.tokens for item in by_conversation.values()),
    )
    return Evaluation(total=total, by_conversation=by_conversation)


def _token_sums(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Per loss token: NLL `[M]` float64, whether ranked first `[M]`, row in the batch `[M]`; on the CPU."""
    targets = batch["labels"][:, 1:]
    # Only positions at which some row has a loss token: logits of a large vocabulary are most of the memory.
    columns = (targets != IGNORED).any(dim=0).nonzero()[:, 0]
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, logits_to_keep=columns
    ).logits
    targets = targets[:, columns]
    mask = targets != IGNORED
    rows = mask.nonzero()[:, 0]
    wanted, labels = logits[mask], targets[mask]
    nll, correct = [], []
    for first in range(0, len(labels), _ROWS_AT_ONCE):
        part = wanted[first : first + _ROWS_AT_ONCE].float()
        label = labels[first : first + _ROWS_AT_ONCE]
        nll.append(nn.functional.cross_entropy(part, label, reduction="none").double())
        correct.append(part.argmax(dim=-1) == label)
    return torch.cat(nll).cpu(), torch.cat(correct).cpu(), rows.cpu()


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
