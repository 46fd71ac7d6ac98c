"""outcome.json: the one word on how an attempt ended. Whoever writes it first is believed."""

import os
import tempfile
from pathlib import Path

from trainyard.contract.report import Outcome
from trainyard.contract.rundir import fsync_directory


def publish_outcome(path: Path, outcome: Outcome) -> Outcome:
    """Publish ``outcome`` whole, unless there is one already; the one that stands is returned.

    A rank that is out of memory writes it while rank 0 still waits for that rank's gradient, and must not be
    overruled by rank 0's broken connection.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(outcome.model_dump_json(indent=1).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return Outcome.model_validate_json(path.read_bytes())
    finally:
        os.unlink(temporary)
    fsync_directory(path.parent)
    return outcome
