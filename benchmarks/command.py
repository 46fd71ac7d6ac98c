"""The command line: the time of `--help`, and of a completion without a service."""

import os
import statistics
import subprocess
import sys
import time

ROUNDS = 15
LIMITS = {"--help": 300, "__complete show": 150}


def main() -> None:
    environment = {**os.environ, "TRAINYARD_URL": "http://127.0.0.1:1"}
    for words, limit in LIMITS.items():
        code = "import sys; from trainyard.client.cli.main import main; sys.exit(main())"
        command = [sys.executable, "-c", code, *words.split()]
        took = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
            took.append(1000 * (time.perf_counter() - began))
        print(f"trainyard {words:<16} {statistics.median(took):6.0f} ms (best {min(took):.0f}; goal: under {limit})")
