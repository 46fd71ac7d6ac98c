"""Named places in the code where tests inject faults. A test uses the name, so renaming a function breaks no test.

- ``@failpoint("launch.local.spawn")`` marks a function. Tests look up its code with `marked_code` and trace it, to act
  before any one of its lines. The decorator returns the function unchanged and costs nothing.
- ``hit("step.updated", self)`` is one point between two statements. It calls the action that a test has armed there
  with `arm`, with what the point shows of itself, and does nothing else: one look-up in an empty dictionary.

Nothing but tests arms a failpoint. There is no environment variable for it, so no user can.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_marked: dict[str, set[CodeType]] = {}
_armed: dict[str, Callable[..., None]] = {}


def failpoint(*names: str) -> Callable[[Function], Function]:
    """Mark a function with ``names``. A name is a dotted path from an area to a place: ``launch.local.spawn``."""

    def mark(function: Function) -> Function:
        assert isinstance(function, FunctionType), "put @failpoint below @property, @classmethod and the like"
        for name in names:
            _marked.setdefault(name, set()).add(function.__code__)
        return function

    return mark


def marked_code(*areas: str) -> set[CodeType]:
    """Return the code of all functions whose name is one of ``areas`` or below one.

    Only modules that are imported by now are known. Raises LookupError if an area has no marked function.
    """
    found: set[CodeType] = set()
    for area in areas:
        codes = [code for name, code in _marked.items() if name == area or name.startswith(f"{area}.")]
        if not codes:
            raise LookupError(f"no function is marked with the failpoint {area}")
        found = found.union(*codes)
    return found


def hit(name: str, *shown: object) -> None:
    """Call the action that is armed at ``name``, if there is one, with ``shown``."""
    action = _armed.get(name)
    if action is not None:
        action(*shown)


def arm(name: str, action: Callable[..., None]) -> None:
    """Call ``action`` each time this process comes to ``hit(name, ...)``. It may raise, block, or end the process."""
    _armed[name] = action


def disarm(name: str) -> None:
    """Let ``hit(name)`` do nothing again."""
    _armed.pop(name, None)


@contextlib.contextmanager
def armed(name: str, action: Callable[..., None]) -> Iterator[None]:
    """Keep ``action`` armed at ``name`` for as long as the block runs."""
    arm(name, action)
    try:
        yield
    finally:
        disarm(name)
