"""What the batches of both clients have in common: groups of items, and the folding of their answers."""

from __future__ import annotations

from collections.abc import Iterable

from loramux._errors import (
    ClientStateError,
    InvalidRequest,
    LoramuxError,
    NotAuthenticated,
    NotServedYet,
    PermissionDenied,
)
from loramux._events import GenerationFold
from loramux._prompt_types import BatchRequest, Prompt
from loramux._requests import MAX_MESSAGE_BYTES, batch_item, invalid
from loramux._status import error_from_status
from loramux._types import BatchItem
from loramux.v1 import generation_pb2 as pb

DEFAULT_WINDOW = 256
MAX_WINDOW = 4096
# Several calls share the window, so that one slow item does not hold back the next group.
GROUPS = 4
_GROUP_BYTES = MAX_MESSAGE_BYTES - 64 * 1024
_MAX_ITEMS = 1024

# A whole-call failure of these kinds would meet every later group too.
FATAL = (NotAuthenticated, PermissionDenied, NotServedYet, ClientStateError)


def group_size(window: int) -> int:
    """Return the largest number of items a call.

    Raises:
        InvalidRequest: The window is not 1 to 4,096.
    """
    if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window <= MAX_WINDOW:
        raise invalid("window", f"is {window!r}; it must be 1 to {MAX_WINDOW}")
    return min(max(1, window // GROUPS), _MAX_ITEMS)


class GroupBuilder:
    """Turns requests into groups of items, each of which fits into one call.

    Args:
        size: Most items a group.
        adapter: Adapter of items that name none.
    """

    def __init__(self, size: int, *, adapter: str | None) -> None:
        self._size = size
        self._adapter = adapter
        self._index = 0
        self._open_ids: set[str] = set()
        self._items: list[pb.BatchGenerateItem] = []
        self._bytes = 0
        self._carried: pb.BatchGenerateItem | None = None

    @property
    def full(self) -> bool:
        """Whether the group has to be sent before another item is added."""
        return len(self._items) >= self._size or self._carried is not None

    @property
    def items(self) -> int:
        """Items that wait to be sent."""
        return len(self._items) + (self._carried is not None)

    def add(self, request: BatchRequest | Prompt) -> BatchItem | None:
        """Add a request; returns the answer at once if it can never be served."""
        index, self._index = self._index, self._index + 1
        given = request.item_id if isinstance(request, BatchRequest) else None
        item_id = str(index) if given is None else given
        try:
            item = batch_item(index, request, self._adapter)
            if item.item_id in self._open_ids:
                raise invalid("item_id", "is the id of another item that is still open; ids must be unique")
        except InvalidRequest as error:
            return BatchItem(item_id=str(item_id), error=error)
        self._open_ids.add(item.item_id)
        size = item.ByteSize() + 16
        if self._items and self._bytes + size > _GROUP_BYTES:
            self._carried = item
        else:
            self._items.append(item)
            self._bytes += size
        return None

    def take(self) -> list[pb.BatchGenerateItem]:
        """Take the group; an item that did not fit begins the next one."""
        items = self._items
        self._items = [] if self._carried is None else [self._carried]
        self._bytes = sum(item.ByteSize() + 16 for item in self._items)
        self._carried = None
        return items

    def answered(self, item_id: str) -> None:
        """Tell that an item has its answer, so that its id is free again."""
        self._open_ids.discard(item_id)


class BatchFold:
    """Folds the answers of one group.

    Args:
        items: The items that were sent.
    """

    def __init__(self, items: Iterable[pb.BatchGenerateItem]) -> None:
        self._folds = {
            item.item_id: GenerationFold(item.request.sampling.n if item.request.sampling.HasField("n") else 1)
            for item in items
        }

    def apply(self, response: pb.BatchGenerateResponse, *, request_id: str) -> BatchItem | None:
        """Take the next answer; returns the item if it is its last one."""
        fold = self._folds.get(response.item_id)
        if fold is None:
            return None
        kind = response.WhichOneof("outcome")
        if kind == "status":
            error = fold.failed(error_from_status(response.status, request_id=request_id))
            del self._folds[response.item_id]
            return BatchItem(item_id=response.item_id, error=error)
        if kind == "event":
            fold.apply(response.event)
            if fold.complete:
                del self._folds[response.item_id]
                return BatchItem(item_id=response.item_id, result=fold.result())
        return None

    def rest(self, cause: LoramuxError | None) -> list[BatchItem]:
        """Return the items that have no answer when the call ends; `cause` is None if it ended OK."""
        folds, self._folds = self._folds, {}
        return [BatchItem(item_id=item_id, error=_failed(fold, cause)) for item_id, fold in folds.items()]


def _failed(fold: GenerationFold, cause: LoramuxError | None) -> LoramuxError:
    """Return the error of one item of a call that failed: a copy, since each is about another generation."""
    if cause is None:
        return fold.failed(None)
    copy = type(cause)(cause.message)
    copy.__dict__.update(cause.__dict__)
    return fold.failed(copy)
