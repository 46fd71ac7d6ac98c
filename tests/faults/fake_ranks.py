"""Stands in for torchrun and its ranks: standard library only, a few milliseconds a step, with real checkpoints.

The "weights" are a chain of hashes over the steps, so a step left out, or done twice, changes the last ones. What is
to happen is in the spec's labels: {"steps": "40", "pace": "0.02", "save": "5", "fault": "signal_9_at_5"}. A fault
strikes in the first attempt, or with {"always": "1"} in each. {"deaf": "1"}: stop requests and SIGTERM are ignored.
{"save_pace": "0.1"}: a save takes at least that long.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainyard.contract.locks import FileLock
from trainyard.contract.rundir import ArtifactDir, AttemptDir, RunDir, write_json

MODEL, MANIFEST = "model.safetensors", "manifest.json"
RANK_EXIT_SECONDS = 20.0


def weights_after(steps: int) -> str:
    """The weights of an untouched run."""
    weights = hashlib.sha256(b"begin").hexdigest()
    for step in range(1, steps + 1):
        weights = next_weights(weights, step)
    return weights


def next_weights(weights: str, step: int) -> str:
    return hashlib.sha256(f"{weights} {step}".encode()).hexdigest()


def loss_of(weights: str) -> float:
    return int(weights[:8], 16) / 2**32


def damage(checkpoint: Path) -> str | None:
    """Return why the checkpoint is not valid, or None."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
        content = (checkpoint / MODEL).read_bytes()
    except (OSError, ValueError, KeyError) as error:
        return f"{checkpoint.name}: {type(error).__name__}"
    known = manifest[MODEL] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return None if known else f"{checkpoint.name}: {MODEL} sha256"


def torchrun(run: RunDir, attempt: AttemptDir) -> int:
    """Start every rank in its own session; return 1 as soon as one fails, with no rank left."""
    labels = json.loads(attempt.spec.read_bytes())["labels"]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-S", __file__, str(run.path), str(attempt.number), str(rank)],
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
    """One rank; rank 0 emits events and saves for all."""

    def __init__(self, run: RunDir, attempt: AttemptDir, rank: int) -> None:
        self.run, self.attempt, self.rank = run, attempt, rank
        self.products = ArtifactDir(run.path)
        self.labels: dict[str, str] = json.loads(attempt.spec.read_bytes())["labels"]
        self.seq = 0
        self.steps = int(self.labels.get("steps", "20"))
        self.pace = float(self.labels.get("pace", "0.02"))
        self.save_interval = int(self.labels.get("save", "5"))
        self.save_pace = float(self.labels.get("save_pace", "0"))
        self.deaf = "deaf" in self.labels
        if self.deaf:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def train(self) -> int:
        self.fault(0)
        start, weights = self.newest()
        self.emit("started", **STARTED, start_step=start, steps=self.steps)
        self.emit("phase", phase="training")
        for step in range(start + 1, self.steps + 1):
            time.sleep(self.pace)
            self.fault(step)
            weights = next_weights(weights, step)
            self.beat(step)
            self.emit("metric", step=step, epoch=0.0, loss=loss_of(weights), learning_rate=1e-3, tokens=step)
            stopping = self.attempt.stop.exists() and not self.deaf
            if step % self.save_interval == 0 or step == self.steps or stopping:
                self.save(step, weights)
            if stopping and step < self.steps:
                return self.end("stopped", step)
        return self.end("completed", self.steps)

    def emit(self, kind: str, **fields: Any) -> None:
        if self.rank == 0:
            self.seq += 1
            line = {"kind": kind, "seq": self.seq, "at": datetime.now(UTC).isoformat(), **fields}
            # One write: a kill in between leaves no half line but the last.
            descriptor = os.open(self.attempt.outbox, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.write(descriptor, json.dumps(line).encode() + b"\n")
            os.close(descriptor)

    def beat(self, step: int) -> None:
        if self.rank == 0:
            descriptor = os.open(self.attempt.progress, os.O_WRONLY | os.O_CREAT, 0o644)
            os.pwrite(descriptor, f"{step:<20}\n".encode(), 0)
            os.close(descriptor)

    def newest(self) -> tuple[int, str]:
        for step, path in self.products.published():
            if damage(path) is None:
                return step, (path / MODEL).read_text()
        return 0, weights_after(0)

    def save(self, step: int, weights: str) -> None:
        """Published by one rename, as the worker does."""
        path = self.products.checkpoint(step)
        if self.rank != 0 or path.exists():
            return
        partial = path.with_name(f".saving-{step}-{self.attempt.number}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / MODEL).write_text(weights)
        time.sleep(self.save_pace)
        sha256 = hashlib.sha256(weights.encode()).hexdigest()
        write_json(partial / MANIFEST, {"files": {MODEL: {"bytes": len(weights), "sha256": sha256}}})
        partial.rename(path)
        self.emit("checkpoint", step=step, path=str(path), bytes=len(weights), sha256=sha256)

    def end(self, outcome: str, step: int) -> int:
        if self.rank == 0:
            write_json(self.attempt.outcome, {"outcome": outcome, "step": step})
        self.emit("finished", outcome=outcome, step=step)
        return 0

    def fault(self, step: int) -> None:
        if self.attempt.number > 1 and "always" not in self.labels:
            return
        what, _, at = self.labels.get("fault", "").partition("_at_")
        if self.rank != int(self.labels.get("fault_rank", "0")) or str(step) != at:
            return
        match what.split("_"):
            case ["exit", code]:
                print(f"about to end with exit code {code}", file=sys.stderr, flush=True)
                os._exit(int(code))
            case ["signal", number]:
                os.kill(os.getpid(), int(number))
                signal.pause()
            case ["loader"]:
                deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(120)"
                subprocess.Popen([sys.executable, "-S", "-c", deaf], start_new_session=True)
            case ["compiler"]:
                self.compile()
            case ["file", *_]:
                wait_for_file(self.run.path / "go")

    def compile(self) -> None:
        """Wait for a compiler that a signal ends, as torch does. The label ``talks``: SIGUSR2 ends this rank too."""
        compiler = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(120)"])

        def fail(*_: object) -> None:
            error = {"outcome": "failed", "reason": "spec_invalid", "step": 0, "message": "cannot be compiled here"}
            write_json(self.attempt.outcome, error)
            os._exit(1)

        def print_stacks(*_: object) -> None:
            print("the stacks", file=sys.stderr, flush=True)

        signal.signal(signal.SIGUSR2, fail if "talks" in self.labels else print_stacks)
        compiler.wait()
        fail()


def wait_for_file(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


STARTED: dict[str, Any] = {
    "world_size": 2,
    "device": "cpu",
    "device_name": "fake CPU",
    "dtype": "float32",
    "torch_version": "0",
    "parameters": 1,
    "active_parameters": 1,
    "vocab_size": 259,
    "samples": 1,
    "documents": 1,
    "tokens": 1,
    "bad_lines": 0,
    "global_batch": 1,
    "tokens_per_step": 1.0,
    "steps_per_epoch": 1,
    "flops_per_token": 1.0,
}


def main() -> int:
    run = RunDir(Path(sys.argv[1]))
    attempt = run.attempt(int(sys.argv[2]))
    if len(sys.argv) == 3:
        return torchrun(run, attempt)
    log = os.open(attempt.rank_log(int(sys.argv[3])), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 2)
    # As in the worker: first the lock, then the check whether this attempt is still the current one.
    lock = FileLock(run.alive_lock).take(shared=True, seconds=10)
    if run.current.read_text().strip() != str(attempt.number):
        return 3
    code = Rank(run, attempt, int(sys.argv[3])).train()
    lock.release()
    return code


if __name__ == "__main__":
    sys.exit(main())
