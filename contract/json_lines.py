"""One line of a JSONL file: parse it, or say in plain words why it is bad. Standard library only."""

import json
from typing import Any, NoReturn


class BadLineError(ValueError):
    """A line cannot be used; the message is the reason."""


def parse_json_line(raw: bytes) -> Any:
    """Return the JSON value of a line. Raises BadLineError, also for NaN, deep nesting and very long numbers."""
    try:
        return json.loads(raw.decode(), parse_constant=_reject_constant)
    except UnicodeDecodeError as error:
        raise BadLineError(f"not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise BadLineError(f"not JSON at character {error.pos + 1}") from None
    except RecursionError:
        raise BadLineError("nested too deep") from None
    except BadLineError:
        raise
    except ValueError:
        # Python rejects integers of more than 4,300 digits.
        raise BadLineError("holds a number with too many digits") from None


def _reject_constant(name: str) -> NoReturn:
    raise BadLineError(f"not JSON: holds {name}")
