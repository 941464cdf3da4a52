"""The tuning table of a card: which backend of the NF4 product was fastest, and the best prefill chunk of a model.

`loramux-server tune` measures and writes it into the user's cache, from where every server of that card takes it. What
was measured holds for one card and one version each of torch and bitsandbytes: a table of others is left alone, as is
one that cannot be read; the card then counts as untuned, and the log says so and how to tune it. A card without a
table is served by the heuristic of `linear.TuningTable` and the engine's own chunk. No setting names a table, so none
keeps a server from starting.
"""

import importlib.metadata
import json
import logging
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import msgspec
import torch
from msgspec import Meta

from loramux_server.kernels import nf4 as packing
from loramux_server.model.linear import Backend, TuningRow, TuningTable, bitsandbytes_available
from loramux_server.model.product_times import product_shapes
from loramux_server.model.spec import ModelSpec

logger = logging.getLogger(__name__)

VERSION = 3
"""Of the file's format."""

_MAX_BYTES = 1 << 20
_HOW = "`loramux-server tune --model MODEL` measures again"
_UNTUNED = "products follow the heuristic and prefill its standing chunk"

_Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Text = Annotated[str, Meta(max_length=256)]


class TuningFileError(ValueError):
    """A table that cannot be read or written; the message names the file and the way out."""


class _Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    n: _Count
    k: _Count
    max_m: _Count
    backend: Literal["packed", "bitsandbytes", "dequantize"]


class _Chunk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: _Text
    tokens: Annotated[int, Meta(ge=16, le=1_000_000)]


class TuningFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table with what it was measured on.

    Attributes:
        version: Of this format.
        card: Name of the device.
        torch: Version of torch.
        bitsandbytes: Version of bitsandbytes; empty = it was not installed.
        rows: Choices of the product's backend; one for each (n, k, max_m).
        chunks: Best prefill chunk of a model's shapes, with NF4 bytes and no shadow; one for each model.
    """

    version: int
    card: _Text
    torch: _Text
    bitsandbytes: _Text
    rows: list[_Row]
    chunks: list[_Chunk]

    def __post_init__(self) -> None:
        places = [(row.n, row.k, row.max_m) for row in self.rows]
        if len(set(places)) < len(places):
            raise ValueError("two rows for one n, k and max_m")
        models = [chunk.model for chunk in self.chunks]
        if len(set(models)) < len(models):
            raise ValueError("two chunks for one model")

    @classmethod
    def of(cls, card: str, rows: Iterable[TuningRow], *, chunks: Mapping[str, int] | None = None) -> "TuningFile":
        """A table measured now, with these versions.

        Args:
            card: Name of the device.
            rows: Choices.
            chunks: Tokens by `model_key`.
        """
        plain = [_Row(n=row.n, k=row.k, max_m=row.max_m, backend=row.backend) for row in rows if row.backend != "dense"]
        return cls(
            version=VERSION,
            card=card,
            **versions(),
            rows=plain,
            chunks=[_Chunk(model=model, tokens=tokens) for model, tokens in (chunks or {}).items()],
        )

    def table(self) -> TuningTable:
        """The choices."""
        return TuningTable([TuningRow(n=row.n, k=row.k, max_m=row.max_m, backend=row.backend) for row in self.rows])

    def chunk(self, spec: ModelSpec) -> int | None:
        """Tokens of the prefill chunk that was best for a model; None = not measured."""
        return next((chunk.tokens for chunk in self.chunks if chunk.model == model_key(spec)), None)

    def strangeness(self, card: str) -> str:
        """How this table differs from a card and the libraries here; empty where it holds."""
        here = {"card": card, **versions()}
        told = {name: (getattr(self, name), value) for name, value in here.items() if getattr(self, name) != value}
        return ", ".join(
            f"{name} {there or 'none'} where {value or 'none'} is here" for name, (there, value) in told.items()
        )

    def joined(self, older: "TuningFile") -> "TuningFile":
        """This table, and the older one's choices for other shapes and models."""
        shapes, models = {(row.n, row.k) for row in self.rows}, {chunk.model for chunk in self.chunks}
        return msgspec.structs.replace(
            self,
            rows=[*(row for row in older.rows if (row.n, row.k) not in shapes), *self.rows],
            chunks=[*(chunk for chunk in older.chunks if chunk.model not in models), *self.chunks],
        )

    def save(self, path: Path) -> None:
        """Write it; a reader sees the old file or the new one, whole, even when this is cut short.

        Raises:
            TuningFileError: It cannot be written there.
        """
        content = msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as scratch:
                try:
                    scratch.write(content)
                    scratch.flush()
                    os.fsync(scratch.fileno())
                    os.replace(scratch.name, path)
                except BaseException:
                    os.unlink(scratch.name)
                    raise
        except OSError as error:
            raise TuningFileError(f"{path}: {error}; set XDG_CACHE_HOME to a folder that can be written") from error


def versions() -> dict[str, str]:
    """Versions here of what a measurement depends on; empty = not installed."""
    try:
        bitsandbytes = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        bitsandbytes = ""
    return {"torch": str(torch.__version__), "bitsandbytes": bitsandbytes}


def model_key(spec: ModelSpec) -> str:
    """What a prefill step's time depends on, in one line."""
    heads = f"{spec.num_heads}/{spec.num_kv_heads} x {spec.head_dim}"
    widths = f"hidden {spec.hidden_size}, mlp {spec.intermediate_size}, heads {heads}, vocabulary {spec.vocab_size}"
    return f"{spec.family}, {spec.num_layers} layers, {widths}"


def cuda_backends() -> list[Backend]:
    """Backends of an NF4 product that can run on CUDA here."""
    here: list[Backend] = ["dequantize"]
    if bitsandbytes_available():
        here.append("bitsandbytes")
    if packed_available():
        here.append("packed")
    return here


def packed_available() -> bool:
    """Whether our own product runs on the CUDA device that is here."""
    if not torch.cuda.is_available():
        return False
    return packing.unsupported(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16) is None


def tuning_path(card: str) -> Path:
    """Where the table of a card is kept.

    Raises:
        TuningFileError: This user has no home directory and no XDG_CACHE_HOME.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise TuningFileError(f"no place for tuning tables: {error}; set XDG_CACHE_HOME") from error
    return cache / "loramux" / "tuning" / f"{re.sub(r'[^A-Za-z0-9]+', '-', card).strip('-')}.json"


def read_tuning(path: Path) -> TuningFile | None:
    """Read a table; None where there is none.

    Raises:
        TuningFileError: It is damaged, or of another format version.
    """
    try:
        content = _read(path)
        plain = json.loads(content, object_pairs_hook=_each_once, parse_constant=_no_number)
        version = plain.get("version") if isinstance(plain, dict) else None
        if isinstance(version, int) and version != VERSION:
            raise ValueError(f"format version {version} where {VERSION} is read")
        return msgspec.convert(plain, type=TuningFile)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise TuningFileError(f"{path} is no tuning table: {error or type(error).__name__}; {_HOW}") from error


def find_tuning(card: str, spec: ModelSpec) -> TuningFile | None:
    """The table of a card; None, and a line in the log, where there is none that can be used for a model.

    Args:
        card: Name of the device.
        spec: Of the model that it is wanted for.
    """
    try:
        path = tuning_path(card)
        found = read_tuning(path)
    except TuningFileError as error:
        logger.warning("%s; until then %s", error, _UNTUNED)
        return None
    if found is None:
        logger.info("no tuning table for %s: %s; `loramux-server tune --model MODEL` measures", card, _UNTUNED)
        return None
    if strange := found.strangeness(card):
        logger.warning("%s is not used, it was measured with %s; %s; until then %s", path, strange, _HOW, _UNTUNED)
        return None
    here = cuda_backends()
    gone = {(row.n, row.k) for row in found.rows if row.backend not in here}
    rows = [row for row in found.rows if (row.n, row.k) not in gone]
    if gone:
        # The library is installed and does not load: shapes that chose its product follow the heuristic again.
        logger.warning("%s names backends that are not here, %s are; %s", path, here, _HOW)
    if set(product_shapes(spec)) - {(row.n, row.k) for row in found.rows}:
        logger.info("%s has nothing of this model's products: %s; %s", path, _UNTUNED, _HOW)
        return None
    return msgspec.structs.replace(found, rows=rows)


def _read(path: Path) -> bytes:
    # Not blocking: a pipe in the file's place must not hold the server's start up.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a file")
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"more than {_MAX_BYTES} bytes")
    return content


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field is given twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")
