"""`trainyard demo`: one real run on this machine, from nothing, told in under 40 lines. The test of the quickstart.

Everything goes over HTTP to a real service; nothing is taken from the network; whatever is claimed is checked here.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from client.advice import error_card
from client.api import Trainyard
from client.console import Console
from client.demo.curl import curl
from client.demo.docstrings import write_corpus
from client.demo.loss_lines import LossLines, done_again, past, running_again
from client.demo.machine import Machine
from client.demo.proof import damaged_files, done_twice, sha256, weights_of
from client.demo.ranks import kill_one
from client.demo.recipe import KILL_AFTER, LEARNED_LOSS, PAUSE_AFTER, STEPS, UNTRAINED_LOSS, VOCABULARY, spec
from client.demo.server import DemoService, ServiceFailed
from client.errors import TrainyardError
from client.exits import Exit, at_rest
from client.shapes import Job
from client.words import count, duration, fixed, large, one_line, size

LABEL = 11
MOST_SECONDS = 300.0
"""For one leg of the run; a machine that needs longer is told so."""


class DemoFailed(Exception):
    """A step of the story did not end as it must; the message says which and how."""


def run(args: SimpleNamespace, console: Console) -> int:
    """Tell the story. Exit 1 where any of it failed, with the evidence."""
    home = demo_home(args.home)
    with DemoService(home) as service:
        story = Story(home, service, console)
        try:
            story.tell()
        except (DemoFailed, ServiceFailed, TrainyardError, LookupError, OSError) as error:
            story.explain(error)
            return Exit.REFUSED
        except KeyboardInterrupt:
            console.say("\nstopped: ending the run and the service")
            return Exit.DETACHED
        finally:
            story.clean_up()
        story.epilogue(service.release() if args.keep else None)
    return Exit.SUCCEEDED


def demo_home(given: str | None) -> Path:
    """A fresh folder, so that the demo ends the same the second time."""
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


class Story:
    """The chapters, in order. Each says what it did and raises `DemoFailed` where that is not true."""

    def __init__(self, home: Path, service: DemoService, console: Console) -> None:
        self.home = home
        self.machine = Machine.found()
        self._service = service
        self._console = console
        self._trainyard: Trainyard | None = None
        self._job: Job | None = None
        self._began = time.monotonic()
        self._line = console.data

    def tell(self) -> None:
        """From an empty folder to a model that has learned."""
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
        self._line(f"{label:<{LABEL}}{text}")

    def _more(self, text: str) -> None:
        self._say("", text)

    @property
    def _api(self) -> Trainyard:
        if self._trainyard is None:
            raise DemoFailed("the service was not started")
        return self._trainyard

    @property
    def _id(self) -> str:
        if self._job is None:
            raise DemoFailed("no job was submitted")
        return self._job["id"]

    def _url(self, *below: str) -> str:
        return "/".join([self._service.url, "jobs", *below])

    def _corpus(self) -> None:
        began = time.monotonic()
        file = self.home / "corpus.jsonl"
        number = write_corpus(file)
        took = time.monotonic() - began
        told = f"{count(number)} docstrings of this Python's standard library, {size(file.stat().st_size)}"
        self._say("corpus", f"{told}: {file.name} ({took:.0f} s)")

    def _tokenizer(self) -> None:
        began = time.monotonic()
        arguments = ["train", str(self.home / "corpus.jsonl"), "--vocab-size", str(VOCABULARY)]
        command = [sys.executable, "-P", "-m", "worker.tokenizers", *arguments, "--out", str(self.home / "tokenizer")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise DemoFailed(f"training the tokenizer ended with {done.returncode}:\n{done.stderr.strip()}")
        self._say("tokenizer", f"byte-level BPE of {count(VOCABULARY)} tokens ({time.monotonic() - began:.0f} s)")

    def _start_service(self) -> None:
        url = self._service.start()
        self._trainyard = Trainyard(url, token="")
        self._say("service", f"ready at {url}, documented at {url}/docs")

    def _submit(self) -> LossLines:
        file = self.home / "spec.json"
        wanted = spec(self.machine, self.home / "corpus.jsonl", self.home / "tokenizer")
        file.write_text(json.dumps(wanted, indent=2) + "\n")
        self._plan(wanted)
        self._say("submit", "$ " + curl("POST", f"{self._service.url}/jobs", file))
        self._job = self._api.submit(wanted)
        self._more(f"{self._id}   {self._service.url}/jobs/{self._id}")
        return LossLines(self._api, self._id, UNTRAINED_LOSS, self._more)

    def _plan(self, wanted: dict[str, Any]) -> None:
        plan = self._api.plan(wanted)
        memory = sum(part for part in (plan.get("memory_bytes") or {}).values() if part)
        checkpoint = size(plan.get("checkpoint_bytes"))
        self._say(
            "plan", f"{large(plan.get('parameters'))} parameters, {size(memory)} a rank, {checkpoint} a checkpoint"
        )
        first = fixed(plan.get("expected_first_loss"), 2)
        self._more(f"{STEPS} steps; a model that knows nothing has a loss of {first}")

    def _pause(self, lines: LossLines) -> None:
        self._expect(lines.until(past(PAUSE_AFTER), MOST_SECONDS), "running")
        self._say("pause", "$ " + curl("POST", self._url(self._id, "pause")))
        self._api.pause(self._id)
        job = self._expect(lines.until(at_rest, MOST_SECONDS), "paused")
        saved = job["checkpoint"] or {}
        damaged = damaged_files(Path(saved["path"])) if saved else ["no checkpoint"]
        if damaged:
            raise DemoFailed(f"the checkpoint of the pause is damaged: {', '.join(damaged)}")
        self._more(f"saved at step {saved['step']}, verified: every file has the sha256 of its manifest")

    def _resume(self) -> None:
        self._say("resume", "$ " + curl("POST", self._url(self._id, "resume")))
        self._job = self._api.resume(self._id)

    def _kill(self, lines: LossLines) -> None:
        job = self._expect(lines.until(past(KILL_AFTER), MOST_SECONDS), "running")
        attempt = job.get("attempt") or 0
        rank, pid = kill_one(self._id, attempt)
        began = time.monotonic()
        self._say("accident", f"$ kill -9 {pid}   (rank {rank}, in the middle of a step)")
        job = self._expect(lines.until(running_again(attempt), MOST_SECONDS), "running")
        took = duration(time.monotonic() - began)
        self._more(f"trains again after {took}, as attempt {job.get('attempt')}, and nobody did anything")
        self._compare(attempt, lines)

    def _compare(self, attempt: int, lines: LossLines) -> None:
        before = list(self._api.metrics(self._id, attempt=attempt))
        job = lines.until(done_again(self._api, before[-1]["step"]), MOST_SECONDS)
        twice = done_twice(before, list(self._api.metrics(self._id, attempt=job.get("attempt"))))
        if not twice:
            raise DemoFailed("no step was done twice around the accident, so nothing can be compared")
        for step, first, second in twice[-2:]:
            self._more(f"step {step}: loss {first:.9f} before the accident, {second:.9f} after")
        self._require_same(twice)

    def _finish(self, lines: LossLines) -> None:
        self._job = self._expect(lines.until(at_rest, MOST_SECONDS), "succeeded")
        self._require_learned((self._job.get("progress") or {}).get("loss"))

    def _require_same(self, twice: list[tuple[int, float, float]]) -> None:
        other = [step for step, first, second in twice if abs(first - second) > self._tolerance * abs(first)]
        if other:
            raise DemoFailed(f"the recovered run is another one: the loss differs at steps {other}")

    @property
    def _tolerance(self) -> float:
        # CUDA kernels may add in another order unless they are told not to; a CPU gives the same bits.
        return 1e-2 if self.machine.gpus else 0.0

    def _require_learned(self, loss: float | None) -> None:
        if loss is None or loss >= LEARNED_LOSS:
            raise DemoFailed(f"the loss is {loss} at the end, and must be below {LEARNED_LOSS:.2f}")
        share = 100 * loss / UNTRAINED_LOSS
        self._say("finished", f"loss {loss:.3f}, {share:.0f} % of where it began")

    def _products(self) -> None:
        full = [found for found in self._api.checkpoints(self._id) if found["kind"] == "full"]
        self._say("checkpoint", f"step {full[0]['step']}  sha256 {full[0]['sha256']}")
        self._more(self._relative(full[0]["path"]))
        weights = weights_of(self._api.job(self._id), Path(full[0]["path"]))
        self._say("weights", f"MiniMind's keys, half precision  sha256 {sha256(weights)}")
        self._more(self._relative(str(weights)))
        exported = self._api.export(self._id, full[0]["step"])
        self._say("exported", f"{self._relative(exported['path'])}, for transformers")
        self._sample()

    def _sample(self) -> None:
        samples = self._api.samples(self._id)
        newest = next((sample for sample in samples if sample["step"] == STEPS), None)
        if newest is None:
            raise DemoFailed("the model wrote no sample at the last step")
        text = one_line(str(newest["text"]).strip(), 60)
        self._say("sample", f"asked to go on from {newest['prompt']!r} it wrote: {text}")

    def _relative(self, path: str) -> str:
        return str(Path(path).relative_to(self.home)) if Path(path).is_relative_to(self.home) else path

    def _expect(self, job: Job, status: str) -> Job:
        if job["status"] != status:
            raise DemoFailed(
                f"the job is {job['status']} instead of {status}: {job.get('message') or job.get('reason')}"
            )
        return job

    def epilogue(self, pid: int | None) -> None:
        """What to type next."""
        took = duration(time.monotonic() - self._began)
        if pid is not None:
            self._say("kept", f"the service runs on as process {pid}: trainyard --help, {self._service.url}/docs")
            self._more(f"trainyard list --url {self._service.url}")
        self._say("next", f'that was {took}. Your own corpus, one {{"text": ...}} a line:')
        self._more(
            f"trainyard serve --home {shlex.quote(_short(self.home))}      # in another terminal; `trainyard list`"
        )
        self._more("trainyard submit --data_path corpus.jsonl --batch_size 16 --watch")

    def explain(self, error: Exception) -> None:
        """Say what failed, with all there is to see of it."""
        self._console.say(f"\nthe demo failed: {error}")
        for attempt in (self._evidence, lambda: self._service.tail(10)):
            for line in _whatever(attempt):
                self._console.say(f"  {line}")
        self._console.say(f"everything is in {self.home}")

    def _evidence(self) -> list[str]:
        if self._trainyard is None or self._job is None:
            return []
        job = self._trainyard.job(self._id)
        return error_card(job) + self._trainyard.logs(self._id, tail=20)["data"].splitlines()

    def clean_up(self) -> None:
        """Nothing of the demo trains on, however it ended."""
        if self._trainyard is None:
            return
        if self._job is not None:
            _whatever(self._end_job)
        self._trainyard.close()

    def _end_job(self) -> list[str]:
        if not at_rest(self._api.job(self._id)):
            self._api.kill(self._id)
            self._api.wait(self._id, timeout=30.0)
        return []


def _whatever(read: Callable[[], list[Any]]) -> list[Any]:
    """What can be had: evidence that is missing must not hide the failure itself."""
    try:
        return read()
    except (TrainyardError, OSError) as error:
        return [f"(not to be had: {error})"]


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
