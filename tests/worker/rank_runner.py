"""Real ranks for the tests, without paying for torch's import each time: they are forked from a server that has it."""

import json
import multiprocessing
import os
import random
import socket
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

from trainyard.contract.events import EVENT, CheckpointSaved, Event, MetricEvent, WarningEvent
from trainyard.contract.messages import Outcome
from trainyard.contract.rundir import AttemptDir, RunDir

DEADLINE = 240.0
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["trainyard.worker.main", "torch._dynamo", "tests.worker.rank_runner"])

Patch = Callable[[], None]
"""Changes a rank's process before it runs, e.g. to make a save fail."""

WORDS = "the cat sat on a mat while dogs ran over green hills and rivers to the sea".split()  # noqa: SIM905


def corpus(path: Path, documents: int = 60, seed: int = 5) -> Path:
    """Short sentences, so that a small model learns something in a few steps."""
    chooser = random.Random(seed)
    texts = (" ".join(chooser.choices(WORDS, k=chooser.randint(2, 14))) for _ in range(documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def spec(text: Path, /, **changes: dict[str, Any]) -> dict[str, Any]:
    """A small, quick run; ``changes`` go over its groups."""
    groups: dict[str, dict[str, Any]] = {
        "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        "data": {"data_path": str(text), "max_seq_len": 32},
        "training": {"batch_size": 4, "accumulation_steps": 2, "max_steps": 24, "learning_rate": 5e-3},
        "checkpoint": {"save_interval": 8},
        "reporting": {"log_interval": 5},
        "resources": {"device": "cpu"},
    }
    for group, fields in changes.items():
        groups[group] = {**groups.get(group, {}), **fields}
    return groups


def new_run(path: Path, described: dict[str, Any]) -> RunDir:
    """A run directory as a person would make it."""
    path.mkdir(parents=True)
    run = RunDir(path)
    run.spec.write_text(json.dumps(described))
    return run


@dataclass
class Ranks:
    """The processes of one attempt. ``port``: the descriptor of a socket that keeps their port from other processes."""

    run: RunDir
    attempt: int
    processes: list[ForkServerProcess]
    port: int

    def __post_init__(self) -> None:
        weakref.finalize(self, os.close, self.port)

    def wait(self) -> list[int]:
        """Exit codes, once all have ended."""
        deadline = time.monotonic() + DEADLINE
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [process for process in self.processes if process.is_alive()]
        self.kill()
        assert not hung, f"ranks hang; their logs:\n{self.logs()}"
        return [process.exitcode or 0 for process in self.processes]

    def wait_for_step(self, step: int) -> None:
        """Return once ``step`` is done."""
        wait_for_step(self.run.attempt(self.attempt), step, lambda: any(p.is_alive() for p in self.processes))

    def wait_for_save(self, step: int) -> None:
        """Return once the checkpoint of ``step`` is published, which may be some steps later."""
        self.wait_for_step(step)
        deadline = time.monotonic() + DEADLINE
        while not self.run.artifacts(None).checkpoint(step).is_dir():
            assert time.monotonic() < deadline, f"the checkpoint of step {step} never came"
            time.sleep(0.002)

    def kill(self) -> None:
        """SIGKILL to all of them."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def logs(self) -> str:
        """What they printed."""
        return "\n".join(file.read_text() for file in sorted(self.run.path.glob("printed-*")))


def wait_for_step(attempt: AttemptDir, step: int, alive: Callable[[], bool]) -> None:
    """Return once ``step`` is done; fail if no rank is alive to do it."""
    deadline = time.monotonic() + DEADLINE
    while True:
        was_alive = alive()  # asked first: the last rank may do the step and end between the two
        if (attempt.read_step() or 0) >= step:
            return
        assert time.monotonic() < deadline, f"step {step} never came"
        assert was_alive, f"no rank is left to do step {step}"
        time.sleep(0.002)


def hold_port() -> tuple[int, int]:
    """Return a descriptor and a port that no other process is given until the descriptor is closed.

    A socket that is bound and does not listen does not keep those from listening there that ask for it, as torch does.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port = int(held.getsockname()[1])
    return held.detach(), port


def hold_after(step: int) -> None:
    """In a rank: let rank 0 wait after ``step`` until it is killed, so that it cannot end before."""
    from trainyard.worker.attempt import StepHeartbeat

    beat = StepHeartbeat.beat

    def waiting(self: StepHeartbeat, done: int) -> None:
        beat(self, done)
        while done >= step and os.environ["RANK"] == "0":
            time.sleep(1)

    mock.patch.object(StepHeartbeat, "beat", waiting).start()


def start(
    run: RunDir,
    world: int = 1,
    patch: Patch | None = None,
    from_step: int | None = None,
    environment: dict[str, str] | None = None,
) -> Ranks:
    """Start an attempt by hand."""
    held, port = hold_port()
    attempt = max((directory.number for directory in run.attempts()), default=0) + 1
    shared = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TRAINYARD_THREADS": "1", **shared, **(environment or {})}
        log = run.path / f"printed-{attempt}-{rank}"
        process = SERVER.Process(target=rank_process, args=(run, own, log, patch, from_step), daemon=True)
        process.start()
        processes.append(process)
    return Ranks(run, attempt, processes, held)


def rank_process(
    run: RunDir, environment: dict[str, str], log: Path, patch: Patch | None, from_step: int | None
) -> None:
    """What a forked rank does: as `python -m trainyard.worker`, and any warning is an error."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    warnings.simplefilter("error")
    # torch's compiler warns of torch's own old parts.
    warnings.filterwarnings("default", category=DeprecationWarning, module=r"torch\.")
    from trainyard.worker.main import run_rank

    if patch is not None:
        patch()
    run_rank(run, None, from_step)
    sys.stdout.flush()


def run_to_end(
    run: RunDir,
    world: int = 1,
    patch: Patch | None = None,
    from_step: int | None = None,
    environment: dict[str, str] | None = None,
) -> Outcome:
    """Run one attempt and return what outcome.json says; the exit codes agree with it."""
    ranks = start(run, world, patch, from_step, environment)
    codes = ranks.wait()
    file = run.attempt(ranks.attempt).outcome
    assert file.exists(), ranks.logs()
    outcome = Outcome.model_validate_json(file.read_bytes())
    assert codes == [1 if outcome.outcome == "failed" else 0] * world, ranks.logs()
    return outcome


def events(run: RunDir, attempt: int = 1) -> list[Event]:
    """The outbox of an attempt; each line is strict and numbered."""
    found = [EVENT.validate_json(line) for line in run.attempt(attempt).outbox.read_text().splitlines()]
    assert [event.seq for event in found] == list(range(1, len(found) + 1))
    return found


def metrics(run: RunDir, attempt: int = 1) -> dict[int, MetricEvent]:
    """Metric lines by step."""
    return {event.step: event for event in events(run, attempt) if isinstance(event, MetricEvent)}


def warned(run: RunDir, attempt: int = 1) -> dict[str, WarningEvent]:
    """Warnings by code."""
    return {event.code: event for event in events(run, attempt) if isinstance(event, WarningEvent)}


def saves(run: RunDir, attempt: int = 1) -> list[int]:
    """Steps of the checkpoints that were published, in order."""
    return [event.step for event in events(run, attempt) if isinstance(event, CheckpointSaved)]


def curve(run: RunDir) -> dict[int, tuple[float | None, float | None, int, float, float | None]]:
    """The whole run's points by step, over all attempts; a step that was seen twice must have equal values."""
    points: dict[int, tuple[float | None, float | None, int, float, float | None]] = {}
    for directory in run.attempts():
        for step, line in metrics(run, directory.number).items():
            point = (line.loss, line.aux_loss, line.tokens, line.learning_rate, line.grad_norm)
            assert points.setdefault(step, point) == point, f"step {step}"
    return points


def outputs(run: RunDir) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of all that a run writes for others: tensors and weights."""
    for file in sorted([*run.path.glob("checkpoints/step-*/*.safetensors"), *run.path.glob("out/*.pth")]):
        yield str(file.relative_to(run.path)), file.read_bytes()
