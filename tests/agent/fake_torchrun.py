"""Stands in for torchrun and its ranks: pure Python, a few milliseconds a step, with the faults that are asked for.

What is to happen stands in the spec's labels, e.g. {"steps": "20", "fault": "crash_rank_1_at_5"}.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from contract.events import Finished, Metric, PhaseChanged, Warned
from contract.locks import FileLock
from contract.report import Outcome
from contract.rundir import AttemptDir, RunDir, write_json
from contract.status import Phase

PACE_SECONDS = 0.02


def main() -> int:
    """torchrun: every rank in a session of its own, exit 1 as soon as one fails."""
    run, attempt = RunDir(Path(sys.argv[1])), RunDir(Path(sys.argv[1])).attempt(int(sys.argv[2]))
    labels = json.loads(attempt.spec.read_bytes())["labels"]
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(run.path), str(attempt.number), str(rank)],
            start_new_session=True,
            env={**os.environ, "RANK": str(rank)},
        )
        for rank in range(int(labels.get("ranks", "2")))
    ]
    while None in [rank.poll() for rank in ranks]:
        failed = [(number, rank.returncode) for number, rank in enumerate(ranks) if rank.returncode not in (None, 0)]
        if failed:
            number, code = failed[0]
            print(f"  rank      : {number} (local_rank: {number})\n  exitcode  : {code} (pid: 1)", flush=True)
            for rank in ranks:
                rank.kill()
            return 1
        time.sleep(0.01)
    return 1 if any(rank.returncode for rank in ranks) else 0


class Rank:
    """One rank; rank 0 speaks for all."""

    def __init__(self, attempt: AttemptDir, rank: int) -> None:
        self.attempt = attempt
        self.rank = rank
        self.seq = 0
        self.labels: dict[str, str] = json.loads(attempt.spec.read_bytes())["labels"]

    def say(self, event: Any) -> None:
        if self.rank == 0:
            self.seq += 1
            line = event.model_copy(update={"seq": self.seq}).model_dump_json()
            with self.attempt.outbox.open("a") as outbox:
                outbox.write(line + "\n")

    def train(self) -> int:
        self.say(PhaseChanged(phase=Phase.TRAINING))
        for step in range(1, int(self.labels.get("steps", "20")) + 1):
            time.sleep(PACE_SECONDS)
            self.fault(step)
            if self.rank == 0:
                self.beat(step)
            self.say(Metric(step=step, epoch=0.0, loss=1.0 / step, learning_rate=1e-3, tokens=step))
            if self.attempt.stop.exists() and self.labels.get("fault") != "ignore_stop":
                return self.end("stopped", step)
        return self.end("completed", step)

    def beat(self, step: int) -> None:
        # In place, as the worker does: a kill between truncating and writing would leave an empty file.
        descriptor = os.open(self.attempt.progress, os.O_WRONLY | os.O_CREAT, 0o644)
        os.pwrite(descriptor, f"{step:<20}\n".encode(), 0)
        os.close(descriptor)

    def end(self, outcome: Any, step: int) -> int:
        if self.rank == 0:
            write_json(self.attempt.outcome, Outcome(outcome=outcome, step=step).model_dump(mode="json"))
        self.say(Finished(outcome=outcome, step=step))
        return 0

    def fault(self, step: int) -> None:
        match self.labels.get("fault", "").split("_at_"):
            case ["crash_rank_1", at] if self.rank == 1 and step == int(at):
                os.kill(os.getpid(), signal.SIGKILL)
            case ["hang", at] if step == int(at):
                self.say(Warned(code="about_to_hang", message="a test"))
                os.kill(os.getpid(), signal.SIGSTOP)
            case ["orphan", at] if self.rank == 0 and step == int(at):
                deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
                subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        sys.exit(main())
    directory = RunDir(Path(sys.argv[1]))
    lock = FileLock(directory.alive_lock).take(shared=True, seconds=5)
    this = Rank(directory.attempt(int(sys.argv[2])), int(sys.argv[3]))
    if this.labels.get("fault") == "ignore_stop":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(this.train())
