"""`eval`: base against adapter, teacher-forced on files."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic

from loramux_base.manifest import MANIFEST_NAME
from loramux_trainer.base import choose_numerics, load_model, open_base
from loramux_trainer.config import DEFAULT_LENGTH, DataConfig
from loramux_trainer.data.codec import Codec
from loramux_trainer.data.prepared import encode_files
from loramux_trainer.errors import ConfigError
from loramux_trainer.evaluate import Evaluation, evaluate
from loramux_trainer.export import check_adapter, read_facts
from loramux_trainer.lora import load_lora


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assessment:
    """Both on the same tokens.

    Attributes:
        base: The base alone.
        adapter: With the adapter.
    """

    base: Evaluation
    adapter: Evaluation

    @property
    def better_share(self) -> float:
        """Share of the conversations whose loss the adapter lowers."""
        pairs = [
            (self.base.by_conversation[index].nll, sums.nll) for index, sums in self.adapter.by_conversation.items()
        ]
        return sum(adapted < alone for alone, adapted in pairs) / len(pairs)

    def plain(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {
            "base": self.base.plain(),
            "adapter": self.adapter.plain(),
            "conversations_better": self.better_share,
        }


def assess(adapter: Path, base_directory: Path, files: Sequence[Path], *, device: str, batch_size: int) -> Assessment:
    """Evaluate an adapter and its base.

    Args:
        adapter: Adapter directory with our manifest.
        base_directory: The base.
        files: Conversations, in any shape that training takes.
        device: `auto`, `cpu` or `cuda`.
        batch_size: Rows a forward pass; the result does not depend on it.

    Raises:
        ConfigError: No adapter of ours, or one of another base.
        DataError: Unusable files.
    """
    facts = read_facts(adapter)
    base = open_base(base_directory)
    check_adapter(adapter, base)
    numerics = choose_numerics(device)
    codec = Codec.from_directory(base_directory)
    try:
        data = DataConfig(
            train=tuple(files),
            default_system=facts.get("default_system"),
            normalize=facts.get("normalize", "nfc"),
            too_long="error",
        )
    except pydantic.ValidationError as error:
        names = ", ".join(".".join(str(part) for part in item["loc"]) for item in error.errors())
        raise ConfigError(f"{adapter}: its {MANIFEST_NAME} is not as a run wrote it ({names}); train again") from error
    sequences = encode_files(files, data, codec, max_length=base.positions or DEFAULT_LENGTH)
    model = load_lora(load_model(base, numerics), adapter)

    def run() -> Evaluation:
        return evaluate(model, sequences, pad_id=codec.pad_id, batch_size=batch_size, device=numerics.device)

    adapted = run()
    with model.disable_adapter():
        return Assessment(base=run(), adapter=adapted)
