"""`trainyard demo`: one real run on this machine, from an empty folder, in under 40 lines of output.

All requests go over HTTP to a real service. Nothing is downloaded. Every claim that is printed is checked first.
"""

import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trainyard.client.api import Client, Job
from trainyard.client.cli.console import Console
from trainyard.client.cli.formatting import bar, compact_number, count, duration, fixed, one_line, scientific, size
from trainyard.client.cli.hints import error_card
from trainyard.client.demo.corpus import write_corpus
from trainyard.client.demo.service import DemoService, ServiceFailed
from trainyard.client.download import sha256
from trainyard.client.errors import TrainyardError
from trainyard.client.exit_codes import Exit, is_idle
from trainyard.contract.processes import ProcessIdentity, find_by_marker
from trainyard.contract.rundir import ArtifactDir, read_json

VOCABULARY = 6400
UNTRAINED_LOSS = math.log(VOCABULARY)
LEARNED_LOSS = 0.6 * UNTRAINED_LOSS
"""The demo fails if the last loss is not below this."""

STEPS = 500
SAVE_INTERVAL = 100
LOG_INTERVAL = 10
PAUSE_AFTER = 130
KILL_AFTER = 240
"""Shortly after the checkpoint of step 200, so that some steps run twice and can be compared."""

SEQUENCES = 16
"""Sequences of 128 tokens in a step. Eight of them, a third layer or a wider model learn less in the same time."""

PROMPTS = ("Return the", "Raise")

EVERY = 50
"""Steps between loss lines: the whole demo fits on one screen."""

BAR = 24
INTERVAL = 0.3
EVENTS = 8
"""Events of the job that are printed after a failure."""

BF16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Flags in /proc/cpuinfo, on x86 and on Arm."""

LABEL = 11
STALL_SECONDS = 300.0
"""The demo fails if the run makes no progress for this long. A slow machine is no failure."""


class DemoFailed(Exception):
    """A step of the demo did not end as it must. The message says which and how."""


def run(args: SimpleNamespace, console: Console) -> int:
    """Run the demo. Return 1 if a step failed, after printing the logs."""
    home = demo_home(args.home)
    with ended_by_signals(), DemoService(home) as service:
        story = Story(home, service, console)
        try:
            story.play()
        except (DemoFailed, ServiceFailed, TrainyardError, LookupError, OSError) as error:
            story.explain(error)
            return Exit.REJECTED
        except KeyboardInterrupt:
            console.error("\nstopped: ending the run and the service")
            return Exit.DETACHED
        finally:
            story.clean_up()
        story.epilogue(service.detach() if args.keep else None)
    return Exit.SUCCEEDED


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP (a closed terminal) end the demo as Ctrl-C does, so that its run and its service end too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # Under nohup SIGHUP is ignored.
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def demo_home(given: str | None) -> Path:
    """Return a new folder, so that a second demo starts from nothing as well."""
    if given is not None:
        home = Path(given).resolve()
        home.mkdir(parents=True, exist_ok=True)
        return home
    parent = Path("trainyard-home").resolve()
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        home = parent / f"demo-{number}"
        try:
            home.mkdir()
        except FileExistsError:
            number += 1
        else:
            return home


@dataclass(frozen=True)
class Machine:
    """What this machine has. ``cores``: those this process may use. ``gpus``: the NVIDIA devices with a device file.

    ``bf16``: whether bfloat16 is faster here than float32. It is far slower on CPUs without instructions for it.
    """

    cores: int
    memory_bytes: int
    gpus: int
    bf16: bool = False

    @classmethod
    def found(cls, devices: Path = Path("/dev"), cpuinfo: Path = Path("/proc/cpuinfo")) -> "Machine":
        """Return what the kernel's files say of this machine."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        gpus = len(list(devices.glob("nvidia[0-9]*")))
        bf16 = gpus > 0 or not BF16_INSTRUCTIONS.isdisjoint(cpuinfo.read_text().split())
        return cls(len(os.sched_getaffinity(0)), memory, gpus, bf16)

    @property
    def ranks(self) -> int:
        """Worker processes of the demo: two if possible, so that distributed training is shown."""
        return min(2, self.gpus or self.cores)

    def __str__(self) -> str:
        gpus = f"{self.gpus} GPU{'s' if self.gpus > 1 else ''}" if self.gpus else "no GPU"
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''} on the {'GPU' if self.gpus else 'CPU'}"
        cores = f"{self.cores} core{'s' if self.cores > 1 else ''}"
        return f"{cores}, {size(self.memory_bytes)} memory, {gpus}, Python {platform.python_version()}: {ranks}"


def spec(machine: Machine, corpus: Path, tokenizer: Path) -> dict[str, Any]:
    """Return the job spec that the demo submits."""
    return {
        "name": "demo",
        "labels": {"made-by": "trainyard-demo"},
        "model": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        "data": {"data_path": str(corpus), "tokenizer_path": str(tokenizer), "max_seq_len": 128},
        "training": {
            "max_steps": STEPS,
            "batch_size": SEQUENCES // machine.ranks,
            "accumulation_steps": 1,
            "learning_rate": 4e-3,
            "warmup_steps": 20,
            "dtype": "bfloat16" if machine.bf16 else "float32",
        },
        "checkpoint": {"save_interval": SAVE_INTERVAL},
        "reporting": {"log_interval": LOG_INTERVAL, "sample_prompts": list(PROMPTS)},
        "resources": {"device": "auto" if machine.gpus else "cpu", "nproc_per_node": machine.ranks},
    }


class LossPrinter:
    """Prints the loss of the first point and of each multiple of `EVERY` steps, once each."""

    def __init__(self, trainyard: Client, job_id: str, untrained_loss: float, print_: Callable[[str], None]) -> None:
        self._trainyard = trainyard
        self._job_id = job_id
        self._untrained_loss = untrained_loss
        self._print_line = print_
        self._last_step = 0

    def until(self, condition: Callable[[Job], bool], stall_seconds: float = STALL_SECONDS) -> Job:
        """Wait until ``condition(job)`` or the job has failed, and return the job.

        Raises:
            WaitTimedOut: the job made no progress for ``stall_seconds``.
        """

        def reached(job: Job) -> bool:
            self._print(self._trainyard.metrics(self._job_id, after_step=self._last_step))
            return condition(job) or job["status"] == "failed"

        return self._trainyard.wait(self._job_id, reached, stall_timeout=stall_seconds, interval=INTERVAL)

    def _print(self, points: Iterable[Any]) -> None:
        for point in points:
            if (point["step"] % EVERY == 0 or not self._last_step) and point["step"] > self._last_step:
                self._last_step = point["step"]
                self._print_line(loss_line(point, self._untrained_loss))


def loss_line(point: Any, untrained_loss: float) -> str:
    """Return a line with the step, its loss as a number and as a bar that is full for an untrained model."""
    loss = point["loss"]
    drawn = bar(None if loss is None else loss / untrained_loss, BAR)
    return f"step {point['step']:>4}   loss {fixed(loss)}   {drawn}   lr {scientific(point['learning_rate'])}"


def past(step: int) -> Callable[[Job], bool]:
    """Return a condition: the job has done ``step``, or is idle."""
    return lambda job: ((job.get("progress") or {}).get("step") or 0) >= step or is_idle(job)


def running_again(attempt: int) -> Callable[[Job], bool]:
    """Return a condition: the job trains in a later attempt, or is idle."""

    def condition(job: Job) -> bool:
        is_training = job["status"] == "running" and job.get("phase") == "training"
        return ((job.get("attempt") or 0) > attempt and is_training) or is_idle(job)

    return condition


def done_again(trainyard: Client, step: int) -> Callable[[Job], bool]:
    """Return a condition: the newest attempt has done ``step``, or the job is idle."""

    def condition(job: Job) -> bool:
        # Not the job's progress, which may still be that of the attempt before.
        points = trainyard.metrics(job["id"], after_step=step - 1, attempt=job.get("attempt"))
        return next(points, None) is not None or is_idle(job)

    return condition


class Story:
    """The steps of the demo, in order. Each prints its result, and raises `DemoFailed` if it is not as claimed."""

    def __init__(self, home: Path, service: DemoService, console: Console) -> None:
        self.home = home
        self.machine = Machine.found()
        self._service = service
        self._console = console
        self._trainyard: Client | None = None
        self._job: Job | None = None
        self._started_at = time.monotonic()

    def play(self) -> None:
        """Run all steps, from an empty folder to a trained model. Raises DemoFailed."""
        self._say("machine", str(self.machine))
        self._say("home", str(self.home))
        self._corpus()
        self._tokenizer()
        self._start_service()
        lines = self._submit()
        self._pause(lines)
        self._resume()
        self._kill(lines)
        self._finish(lines)
        self._products()

    def _say(self, label: str, text: str) -> None:
        self._console.data(f"{label:<{LABEL}}{text}")

    def _more(self, text: str) -> None:
        self._say("", text)

    @property
    def _api(self) -> Client:
        if self._trainyard is None:
            raise DemoFailed("the service was not started")
        return self._trainyard

    @property
    def _id(self) -> str:
        if self._job is None:
            raise DemoFailed("no job was submitted")
        return self._job.id

    def _url(self, *below: str) -> str:
        return "/".join([self._service.url, "jobs", *below])

    def _corpus(self) -> None:
        began = time.monotonic()
        file = self.home / "corpus.jsonl"
        number = write_corpus(file)
        seconds = time.monotonic() - began
        content = f"{count(number)} docstrings of this Python's standard library, {size(file.stat().st_size)}"
        self._say("corpus", f"{content}: {file.name} ({seconds:.0f} s)")

    def _tokenizer(self) -> None:
        began = time.monotonic()
        arguments = ["train", str(self.home / "corpus.jsonl"), "--vocab-size", str(VOCABULARY)]
        arguments += ["--out", str(self.home / "tokenizer")]
        command = [sys.executable, "-P", "-m", "trainyard.worker.data.tokenizers", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise DemoFailed(f"training the tokenizer ended with {done.returncode}:\n{done.stderr.strip()}")
        self._say("tokenizer", f"byte-level BPE of {count(VOCABULARY)} tokens ({time.monotonic() - began:.0f} s)")

    def _start_service(self) -> None:
        url = self._service.start()
        self._trainyard = Client(url, token="")
        self._say("service", f"ready at {url}, API docs at {url}/docs")

    def _submit(self) -> LossPrinter:
        file = self.home / "spec.json"
        job_spec = spec(self.machine, self.home / "corpus.jsonl", self.home / "tokenizer")
        file.write_text(json.dumps(job_spec, indent=2) + "\n")
        self._plan(job_spec)
        self._say("submit", "$ " + curl("POST", f"{self._service.url}/jobs", file))
        self._job = self._api.submit(job_spec)
        self._more(f"{self._id}   {self._service.url}/jobs/{self._id}")
        return LossPrinter(self._api, self._id, UNTRAINED_LOSS, self._more)

    def _plan(self, job_spec: dict[str, Any]) -> None:
        plan = self._api.plan(job_spec)
        memory = sum(part for part in (plan.get("memory_bytes") or {}).values() if part)
        parameters, checkpoint = compact_number(plan.get("parameters")), size(plan.get("checkpoint_bytes"))
        self._say("plan", f"{parameters} parameters, {size(memory)} per rank, {checkpoint} per checkpoint")
        first = fixed(plan.get("expected_first_loss"), 2)
        self._more(f"{STEPS} steps; an untrained model has a loss of about {first} (= ln {VOCABULARY})")

    def _pause(self, lines: LossPrinter) -> None:
        self._expect(lines.until(past(PAUSE_AFTER)), "running")
        self._say("pause", "$ " + curl("POST", self._url(self._id, "pause")))
        self._api.pause(self._id)
        job = self._expect(lines.until(is_idle), "paused")
        saved = job["checkpoint"] or {}
        damaged = damaged_files(Path(saved["path"])) if saved else ["no checkpoint"]
        if damaged:
            raise DemoFailed(f"the checkpoint of the pause is damaged: {', '.join(damaged)}")
        self._more(f"saved at step {saved['step']}, verified: every file has the sha256 of its manifest")

    def _resume(self) -> None:
        self._say("resume", "$ " + curl("POST", self._url(self._id, "resume")))
        self._job = self._api.resume(self._id)

    def _kill(self, lines: LossPrinter) -> None:
        job = self._expect(lines.until(past(KILL_AFTER)), "running")
        attempt = job.get("attempt") or 0
        rank, pid = kill_one(self._id, attempt)
        began = time.monotonic()
        self._say("accident", f"$ kill -9 {pid}   (rank {rank}, in the middle of a step)")
        job = self._expect(lines.until(running_again(attempt)), "running")
        seconds = duration(time.monotonic() - began)
        self._more(f"trains again after {seconds}, as attempt {job.get('attempt')}, without any command")
        self._compare(attempt, lines)

    def _compare(self, attempt: int, lines: LossPrinter) -> None:
        before = list(self._api.metrics(self._id, attempt=attempt))
        job = lines.until(done_again(self._api, before[-1]["step"]))
        twice = done_twice(before, list(self._api.metrics(self._id, attempt=job.get("attempt"))))
        if not twice:
            raise DemoFailed("no step was done twice around the accident, so nothing can be compared")
        for step, first, second in twice[-2:]:
            self._more(f"step {step}: loss {first:.9f} before the accident, {second:.9f} after")
        self._require_same(twice)

    def _finish(self, lines: LossPrinter) -> None:
        self._job = self._expect(lines.until(is_idle), "succeeded")
        self._require_learned((self._job.get("progress") or {}).get("loss"))

    def _require_same(self, twice: list[tuple[int, float, float]]) -> None:
        # CUDA kernels may add in another order unless deterministic ones are chosen. A CPU gives the same bits.
        tolerance = 1e-2 if self.machine.gpus else 0.0
        different = [step for step, first, second in twice if abs(first - second) > tolerance * abs(first)]
        if different:
            raise DemoFailed(f"the recovered run is not the same run: the loss differs at steps {different}")

    def _require_learned(self, loss: float | None) -> None:
        if loss is None or loss >= LEARNED_LOSS:
            raise DemoFailed(f"the loss is {loss} at the end, and must be below {LEARNED_LOSS:.2f}")
        share = 100 * loss / UNTRAINED_LOSS
        self._say("finished", f"loss {loss:.3f}, {share:.0f} % of the first loss")

    def _products(self) -> None:
        newest = next(found for found in self._api.checkpoints(self._id) if found["kind"] == "full")
        self._say("checkpoint", f"step {newest['step']}  sha256 {newest['sha256']}")
        self._more(self._relative(newest["path"]))
        weights = weights_of(self._api.job(self._id), Path(newest["path"]))
        self._say("weights", f"MiniMind's keys, half precision  sha256 {sha256(weights)}")
        self._more(self._relative(str(weights)))
        exported = self._api.export(self._id, newest["step"])
        self._say("exported", f"{self._relative(exported['path'])}, for transformers")
        self._sample()

    def _sample(self) -> None:
        samples = self._api.samples(self._id)
        newest = next((sample for sample in samples if sample["step"] == STEPS), None)
        if newest is None:
            raise DemoFailed("the model generated no sample at the last step")
        text = one_line(str(newest["text"]).strip(), 60)
        self._say("sample", f"prompt {newest['prompt']!r}: {text}")

    def _relative(self, path: str) -> str:
        return str(Path(path).relative_to(self.home)) if Path(path).is_relative_to(self.home) else path

    def _expect(self, job: Job, status: str) -> Job:
        if job["status"] != status:
            raise DemoFailed(
                f"the job is {job['status']} instead of {status}: {job.get('message') or job.get('reason')}"
            )
        return job

    def epilogue(self, pid: int | None) -> None:
        """Print what to type next."""
        seconds = duration(time.monotonic() - self._started_at)
        if pid is not None:
            self._say("kept", f"the service keeps running as process {pid}: trainyard --help, {self._service.url}/docs")
            self._more(f"trainyard list --url {self._service.url}")
        self._say("next", f'the demo took {seconds}. Your own corpus, one {{"text": ...}} a line:')
        home = self.home.relative_to(Path.cwd()) if self.home.is_relative_to(Path.cwd()) else self.home
        self._more(f"trainyard serve --home {shlex.quote(str(home))}      # in another terminal; `trainyard list`")
        self._more("trainyard submit --data_path corpus.jsonl --batch_size 16 --watch")

    def explain(self, error: Exception) -> None:
        """Print what failed, with the job's error, its events, its logs and the service's log."""
        self._console.error(f"\nthe demo failed: {error}")
        evidence: dict[str, Callable[[], list[str]]] = {
            "job": self._job_error,
            "events": self._job_events,
            "log of rank 0": self._job_log,
            "log of the agent and torchrun": lambda: self._job_log("agent"),
            "log of the service": lambda: self._service.tail(10),
        }
        for name, read in evidence.items():
            for line in [f"{name}:", *(f"  {line}" for line in _or_error(read))]:
                self._console.error(f"  {line}")
        self._console.error(f"all files are in {self.home}")

    def _job_error(self) -> list[str]:
        if self._trainyard is None or self._job is None:
            return ["none was submitted"]
        job = self._trainyard.job(self._id)
        step = (job.get("progress") or {}).get("step") or 0
        state = f"{job['status']}, attempt {job.get('attempt')}, phase {job.get('phase')}, step {step} of {STEPS}"
        return [state, *error_card(job)]

    def _job_events(self) -> list[str]:
        if self._trainyard is None or self._job is None:
            return []
        events = list(self._trainyard.events(self._id))[-EVENTS:]
        return [f"{event['at']} {event['kind']}: {event['message']}" for event in events]

    def _job_log(self, rank: str | None = None) -> list[str]:
        if self._trainyard is None or self._job is None:
            return []
        return self._trainyard.logs(self._id, rank=rank, tail=20)["data"].splitlines()

    def clean_up(self) -> None:
        """Stop the run if it still trains, and close the connection."""
        if self._trainyard is None:
            return
        if self._job is not None:
            _or_error(self._end_job)
        self._trainyard.close()

    def _end_job(self) -> list[str]:
        if not is_idle(self._api.job(self._id)):
            self._api.kill(self._id)
            self._api.wait(self._id, stall_timeout=60.0)
        return []


def _or_error(read: Callable[[], list[Any]]) -> list[Any]:
    # An error while the logs are read must not hide the failure of the demo.
    try:
        return read()
    except (TrainyardError, OSError) as error:
        return [f"(not available: {error})"]


def curl(method: str, url: str, body_file: Path | None = None) -> str:
    """Return the curl command of a request, to copy into a shell."""
    words = ["curl", "-sS"]
    if method != "GET":
        words += ["-X", method]
    if body_file is not None:
        words += ["-H", "Content-Type: application/json", "-d", f"@{body_file}"]
    return shlex.join([*words, url])


def ranks_of(job_id: str, attempt: int) -> dict[int, ProcessIdentity]:
    """Return rank -> process. A rank's children inherit its environment, so the oldest process is the rank itself."""
    found: dict[int, ProcessIdentity] = {}
    for process in sorted(find_by_marker(f"{job_id}/{attempt}"), key=lambda process: process.start_ticks):
        rank = process.variable("RANK")
        if rank is not None and rank.isdecimal():
            found.setdefault(int(rank), process)
    return found


def kill_one(job_id: str, attempt: int, seconds: float = 5.0) -> tuple[int, int]:
    """SIGKILL the highest rank and return (rank, pid). Raises LookupError if no rank is found within ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ranks = ranks_of(job_id, attempt)
        if ranks and ranks[max(ranks)].send(signal.SIGKILL):
            return max(ranks), ranks[max(ranks)].pid
        time.sleep(0.1)
    raise LookupError(f"no rank of {job_id}, attempt {attempt}, runs on this machine")


def damaged_files(checkpoint: Path) -> list[str]:
    """Return the names in the checkpoint's manifest whose file is missing or has other bytes."""
    manifest: dict[str, Any] = read_json(checkpoint / "manifest.json") or {"files": {"manifest.json": {}}}
    return [name for name, entry in manifest["files"].items() if not _matches(checkpoint / name, entry)]


def _matches(file: Path, entry: dict[str, Any]) -> bool:
    return file.is_file() and file.stat().st_size == entry.get("bytes") and sha256(file) == entry.get("sha256")


def done_twice(before: list[Any], after: list[Any]) -> list[tuple[int, float, float]]:
    """Return (step, loss before, loss after) of the steps that are in both attempts."""
    first = {point["step"]: point["loss"] for point in before}
    return [(point["step"], first[point["step"]], point["loss"]) for point in after if point["step"] in first]


def weights_of(job: Mapping[str, Any], checkpoint: Path) -> Path:
    """Return the weights file of the job that wrote ``checkpoint``. Raises FileNotFoundError."""
    spec = job["spec"]
    model, stem = spec["model"], spec["checkpoint"]["save_weight"]
    file = ArtifactDir(checkpoint.parent.parent).weights(stem, model["hidden_size"], model["use_moe"])
    if not file.is_file():
        raise FileNotFoundError(f"there is no weights file {file}")
    return file
