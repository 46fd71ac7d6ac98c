"""One tracker in a process of its own: `python -m trainyard.worker.events.tracker_process NAME RUN_PATH`.

Reads lines of JSON from stdin until it is closed: first ``{spec}``, then ``{rewind}`` and ``{step, values}``. Writes
the reason of a failure to stdout, and nothing else. It outlives a rank that is killed, to upload what it has read.
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from trainyard.contract.rundir import read_json, write_json
from trainyard.worker.events.trackers import CLOSE_SECONDS

LAST_STEP_FILE = "trackio.json"
MAX_REASON = 300


class RemoteTracker(Protocol):
    """A run at a tracker. Later attempts of the same job continue it."""

    def rewind(self) -> None:
        """Expect that steps may be repeated from now on."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the numbers of one step."""

    def close(self) -> None:
        """Upload what is left."""


class Wandb:
    """A W&B run with the job's id. W&B ignores steps that were logged before."""

    def __init__(self, spec: Mapping[str, Any], run_path: Path) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=spec["reporting"]["wandb_project"],
            name=spec["name"],
            id=run_path.name,
            resume="allow",
            dir=str(run_path),
            config=dict(spec),
        )

    def rewind(self) -> None:
        pass

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class SwanLab:
    """A SwanLab experiment with the job's id. SwanLab ignores steps that were logged before."""

    def __init__(self, spec: Mapping[str, Any], run_path: Path) -> None:
        import swanlab

        # SwanLab's files have no folder of their own.
        (run_path / "swanlab").mkdir(exist_ok=True)
        self._run: Any = swanlab.init(
            project=spec["reporting"]["wandb_project"],
            name=spec["name"] or run_path.name,
            id=run_path.name,
            resume="allow",
            log_dir=str(run_path / "swanlab"),
            config=dict(spec),
        )

    def rewind(self) -> None:
        pass

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A trackio run named after the job's id.

    Trackio keeps two points of one step, so those that an earlier attempt logged are left out, as W&B does.
    """

    def __init__(self, spec: Mapping[str, Any], run_path: Path) -> None:
        import trackio

        self._run: Any = trackio.init(
            project=spec["reporting"]["wandb_project"],
            name=run_path.name,
            group=spec["name"],
            resume="allow",
            config=dict(spec),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._file = run_path / LAST_STEP_FILE
        self._last = int((read_json(self._file) or {}).get("step", 0))
        self._seen = self._last

    def rewind(self) -> None:
        self._seen = self._last

    def log(self, values: Mapping[str, float], step: int) -> None:
        if step <= self._seen:
            return
        self._run.log(dict(values), step=step)
        if step > self._last:  # the scores of a task come after the metrics of their step
            self._last = step
            write_json(self._file, {"step": step})

    def close(self) -> None:
        self._run.finish()


KINDS: Mapping[str, Callable[[Mapping[str, Any], Path], RemoteTracker]] = {
    "swanlab": SwanLab,
    "trackio": Trackio,
    "wandb": Wandb,
}


def main(name: str, run_path: Path) -> int:
    """Log the points of stdin until it is closed. Returns the exit code."""
    failure, points = os.dup(1), os.fdopen(os.dup(0), "rb")
    os.dup2(2, 1)  # what the libraries print belongs in the log of the rank
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # one that asks for a key must not read points
    messages = (json.loads(line) for line in points)
    try:
        tracker = KINDS[name](next(messages)["spec"], run_path)
        for message in messages:
            if "rewind" in message:
                tracker.rewind()
            else:
                tracker.log(message["values"], message["step"])
        # If the rank was killed, no process waits for this one.
        last_call = threading.Timer(CLOSE_SECONDS, os._exit, (1,))
        last_call.daemon = True
        last_call.start()
        tracker.close()
    except StopIteration:
        return 1
    except Exception as error:
        os.write(failure, f"{type(error).__name__}: {error}"[:MAX_REASON].encode())
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1], Path(sys.argv[2]))
    sys.stderr.flush()
    os._exit(code)  # the libraries' own hooks at exit may wait for their servers
