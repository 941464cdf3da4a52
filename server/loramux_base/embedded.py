"""The base model that the wheel `loramux-demo` embeds, by its name `demo`.

The wheel is found, not imported: nothing here depends on it.
"""

import importlib.util
from pathlib import Path

DEMO_NAME = "demo"
"""What stands for it where a directory or a hub id may stand; a directory of that name is `./demo`."""

_PACKAGE = "loramux_demo"


class EmbeddedBaseMissing(ValueError):
    """The embedded base cannot be used; the text is a clause that names the way out."""


def embedded_base() -> Path:
    """Directory of the embedded base.

    Raises:
        EmbeddedBaseMissing: The wheel is not installed, or has no base.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedBaseMissing(
            "is the base embedded in the package loramux-demo, which is not installed; `pip install loramux-demo`, in "
            "a checkout `pip install -e ./demo`, or give ./demo if you mean a directory"
        )
    directory = Path(next(iter(spec.submodule_search_locations))) / "base"
    if not (directory / "config.json").is_file():
        raise EmbeddedBaseMissing(
            f"is the base embedded in loramux-demo, and {directory} holds none; install the package again, or make one "
            "with `python -m loramux_demo.train_base`"
        )
    return directory.resolve()
