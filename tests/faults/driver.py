"""The real agent, with `ranks` in torchrun's place."""

import sys
from pathlib import Path
from typing import Any

from contract.rundir import AttemptDir, RunDir
from worker.agent import launch
from worker.agent.__main__ import main
from worker.agent.place import ALONE, Meeting, Place


def fake_command(
    run: RunDir, attempt: AttemptDir, resources: dict[str, Any], place: Place = ALONE, meeting: Meeting | None = None
) -> list[str]:
    return [sys.executable, "-S", str(Path(__file__).with_name("ranks.py")), str(run.path), str(attempt.number)]


if __name__ == "__main__":
    launch.torchrun_command = fake_command
    sys.exit(main())
