"""Where the time of a training step goes, by part of the model and kind of operator, eager and compiled, on one thread.

It is the step of the benchmark `trainer`. Shares of one thread can be compared between machines and under load.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.trainer import prepare


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root)
        for mode in ("eager", "compiled"):
            # The number of threads of OpenMP is fixed when torch is loaded.
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "benchmarks.step_profile", str(root), mode]
            subprocess.run(command, check=True, env=environment)
