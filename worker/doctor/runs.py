"""Trials with whole runs of the worker, as processes: a run that is killed and resumed, and runs of several ranks."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from trainyard.contract.rundir import MODEL_FILE, OPTIMIZER_FILE, RunDir
from trainyard.contract.spec import Parallelism
from trainyard.worker.checkpoint.files import read_manifest
from trainyard.worker.cuda_errors import error_line
from trainyard.worker.doctor.bench import Trial, worker_environment
from trainyard.worker.doctor.report import CheckResult, fault, ok, warning

RUN_SECONDS = 150.0
STEPS, SAVE_AT = 80, 20
LOSS_STEPS = 10
FLOAT32_DIFFERENCE = 1e-4
"""Sums over ranks have another order: losses in float32 differ by rounding."""


class RunFailed(Exception):
    """A run of the worker did not end well. The message has the last line of its output."""


@dataclass(frozen=True)
class WorkerRun:
    """A run directory, and how many ranks train in it."""

    run: RunDir
    trial: Trial
    world: int = 1

    @classmethod
    def create(cls, trial: Trial, name: str, world: int = 1, **training: Any) -> "WorkerRun":
        """Write the spec of a small run."""
        run = RunDir(trial.folder / name)
        run.path.mkdir()
        interval, parallelism = training.pop("log_interval", STEPS), training.pop("parallelism", "ddp")
        described = {
            "model": trial.sizes.run,
            "data": {"data_path": str(trial.texts()), "max_seq_len": trial.sizes.run_length},
            "training": {
                "max_steps": STEPS,
                "batch_size": 4,
                "accumulation_steps": 2,
                "dtype": trial.sizes.dtype,
                **training,
            },
            "checkpoint": {"save_interval": SAVE_AT, "keep_last": 10},
            "reporting": {"log_interval": interval},
            "resources": {"device": trial.device.type, "nproc_per_node": world, "parallelism": parallelism},
        }
        run.spec.write_text(json.dumps(described))
        return cls(run, trial, world)

    def start(self) -> "subprocess.Popen[bytes]":
        """Start the run in a session of its own, with its output in printed.log."""
        program = ["-m", "trainyard.worker", str(self.run.path)]
        if self.world > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.world}"]
            program = [*launcher, *program]
        with (self.run.path / "printed.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", *program],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=worker_environment(self.trial.folder),
                start_new_session=True,
            )

    def finish(self, process: "subprocess.Popen[bytes] | None" = None) -> None:
        """Wait until the run ends; start it if no ``process`` is given. Raises RunFailed."""
        process = process or self.start()
        try:
            with killed_on_error(process):
                code = process.wait(RUN_SECONDS)
        except subprocess.TimeoutExpired:
            raise RunFailed(f"the run did not end within {RUN_SECONDS:.0f} s: {self._last_words()}") from None
        if code != 0:
            raise RunFailed(f"the run ended with {code}: {self._last_words()}")

    def kill_after_save(self) -> bool:
        """Start the run, and end it with SIGKILL after its first checkpoint. Return False if it ended before."""
        process, deadline = self.start(), time.monotonic() + RUN_SECONDS
        saved = self.run.artifacts(None).checkpoint(SAVE_AT)
        with killed_on_error(process):
            while not saved.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    self.finish(process)
                    return False
                time.sleep(0.002)
        alive = process.poll() is None
        kill_group(process)
        return alive and not self.run.artifacts(None).checkpoint(STEPS).exists()

    def digests(self) -> dict[str, str]:
        """Return the sha256 of the tensors of the last checkpoint."""
        manifest = read_manifest(self.run.artifacts(None).checkpoint(STEPS))
        return {name: manifest[name].sha256 for name in (MODEL_FILE, OPTIMIZER_FILE)}

    def losses(self) -> list[float]:
        """Return the losses of the first attempt, by metric line."""
        lines = (json.loads(line) for line in self.run.attempt(1).outbox.read_text().splitlines())
        return [float(line["loss"]) for line in lines if line["kind"] == "metric"]

    def _last_words(self) -> str:
        return error_line((self.run.path / "printed.log").read_text(errors="replace")) or "it printed nothing"


@contextlib.contextmanager
def killed_on_error(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Kill the process and its children if the block raises: Ctrl-C does not reach their session."""
    try:
        yield
    except BaseException:
        kill_group(process)
        raise


def kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill the process and all that it has started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def check_resume(trial: Trial) -> Iterator[CheckResult]:
    """Kill a run and resume it: weights and moments must be those of a run that was not killed.

    On a GPU first with ``deterministic``, which promises equal bits, then without, to show what the default gives.
    """
    for deterministic in (True, False) if trial.device.type == "cuda" else (False,):
        suffix = "deterministic" if deterministic else "default"
        untouched = WorkerRun.create(trial, f"untouched-{suffix}", deterministic=deterministic)
        killed = WorkerRun.create(trial, f"killed-{suffix}", deterministic=deterministic)
        untouched.finish()
        was_killed = killed.kill_after_save()
        killed.finish()
        yield judge_resume(
            untouched.digests(), killed.digests(), was_killed=was_killed,
            promised=deterministic or trial.device.type == "cpu",
        )  # fmt: skip


def judge_resume(
    expected: dict[str, str], found: dict[str, str], *, was_killed: bool, promised: bool
) -> CheckResult:  # fmt: skip
    """``promised``: whether equal bits are promised for this device and setting."""
    data = {"expected": expected, "found": found, "was_killed": was_killed, "promised": promised}
    how = "" if promised else " without training.deterministic"
    if not was_killed:
        message = f"the run ended before it could be killed{how}"
        return warning("resume", message, "run the doctor again, on an idle machine", **data)
    different = [name for name in expected if expected[name] != found[name]]
    if not different:
        return ok("resume", f"killed and resumed{how}: sha256 {expected[MODEL_FILE][:12]}, as if never killed", **data)
    message = f"killed and resumed{how}: {', '.join(different)} differ from the run that was not killed"
    if promised:
        return fault("resume", message, "report it with doctor.json: resumed runs are not exact here", **data)
    return warning("resume", message, "set training.deterministic for bit-exact resumes on this card", **data)


def check_ranks(trial: Trial, world: int) -> Iterator[CheckResult]:
    """Train the same steps with one rank and with ``world``, by each parallelism, and compare the float32 losses."""
    settings: dict[str, Any] = {"max_steps": LOSS_STEPS, "dtype": "float32", "log_interval": 1}
    alone = WorkerRun.create(trial, "one-rank", batch_size=2 * world, **settings)
    alone.finish()
    backend = "NCCL" if trial.device.type == "cuda" else "gloo"
    for parallelism in get_args(Parallelism):
        together = WorkerRun.create(
            trial, f"all-ranks-{parallelism}", world, batch_size=2, parallelism=parallelism, **settings
        )
        began = time.perf_counter()
        together.finish()
        seconds = time.perf_counter() - began
        yield judge_ranks(world, f"{backend} with {parallelism}", alone.losses(), together.losses(), seconds)


def judge_ranks(
    world: int, backend: str, expected: list[float], found: list[float], seconds: float
) -> CheckResult:  # fmt: skip
    """``expected``: losses of one rank; ``found``: of all. ``seconds``: the whole run of all ranks."""
    differences = [abs(a - b) / abs(a) for a, b in zip(expected, found, strict=False)]
    # max() may ignore a NaN; a sum is NaN.
    worst = max(differences) if math.isfinite(sum(differences)) and differences else math.nan
    data = {"world": world, "backend": backend, "losses": [expected, found], "worst": worst, "run_seconds": seconds}
    if len(expected) != LOSS_STEPS or len(found) != LOSS_STEPS or not worst <= FLOAT32_DIFFERENCE:
        message = f"{world} ranks by {backend} do not give the losses of one: off by {worst:.2g}"
        return fault("ranks", message, "train with one rank, and report it with doctor.json", **data)
    return ok("ranks", f"{world} ranks by {backend} give the losses of one, off by at most {worst:.1g}", **data)
