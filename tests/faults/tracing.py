"""A trace function that acts before the n-th line that is run in marked functions."""

from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any


def at_line(codes: set[CodeType], number: int, fate: Callable[[str], None]) -> Callable[[FrameType, str, Any], Any]:
    """Return a trace function that calls ``fate`` before the ``number``-th line that is run in ``codes``."""
    left = number

    def local(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                fate(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return local

    def entered(frame: FrameType, _event: str, _argument: Any) -> Any:
        return local if frame.f_code in codes else None

    return entered
