"""kogc: an ahead-of-time compiler for decoding one stream of tokens at the speed of memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .session import Session

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(path: str | os.PathLike[str], device: int = 0, **kw: Any) -> Session:
    """Open a built artifact directory as a session; the loader is imported only here."""
    from .session import load as _load

    return _load(path, device, **kw)
