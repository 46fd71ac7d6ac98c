"""The process that prepares a corpus, with its real agent: every way in which it ends, and that it continues."""

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.conftest import until
from tests.unique_ids import unique_job_id
from trainyard.contract.locks import is_held
from trainyard.contract.messages import ExitReport
from trainyard.contract.outbox import OutboxReader
from trainyard.contract.prepared import PrepareTask, corpus_parts, find_prepared
from trainyard.contract.processes import ProcessIdentity, find_by_marker
from trainyard.contract.rundir import AttemptDir, RunDir
from trainyard.contract.spec import DataSpec, JobSpec, ResourcesSpec, Timeouts
from trainyard.contract.status import Reason
from trainyard.service.launch.base import AttemptRef, AttemptState, Launch
from trainyard.service.launch.local import LocalLauncher

CORPUS = unique_job_id("corpus_a")
TOKENIZERS = "trainyard.worker.data.part"


class Host:
    """A home, and attempts to prepare the corpus in ``folder``."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.cache, self.folder = path, path / "cache", folder
        self.launcher = LocalLauncher(path, self.cache, [path, folder])
        self.number = 0
        self.timeouts = Timeouts()
        self.processes = 2

    @property
    def name(self) -> AttemptRef:
        return AttemptRef(CORPUS, self.number)

    @property
    def attempt(self) -> AttemptDir:
        return self.run.attempt(self.number)

    @property
    def run(self) -> RunDir:
        return RunDir(self.path / "corpora" / CORPUS)

    @property
    def data(self) -> DataSpec:
        return DataSpec(data_path=str(self.folder), max_seq_len=64)

    def start(self) -> None:
        self.number += 1
        spec = JobSpec(data=self.data, resources=ResourcesSpec(device="cpu", timeouts=self.timeouts))
        task = PrepareTask(parts=corpus_parts(self.data), processes=self.processes)
        self.launcher.start(Launch(self.name, CORPUS, spec, (), "token", task=task))

    def end(self) -> ExitReport:
        until(lambda: self.launcher.find(self.name).state is AttemptState.ENDED)
        report = self.launcher.find(self.name).report
        assert report is not None
        until(lambda: not find_by_marker(str(self.name)))
        assert not is_held(self.run.alive_lock)
        return report

    def worker(self) -> ProcessIdentity:
        """The process that prepares, once it tokenizes."""
        until(lambda: self.done() > 0)
        found = [p for p in find_by_marker(str(self.name)) if "prepare" in command(p)]
        return found[0]

    def done(self) -> int:
        lines = OutboxReader(self.attempt.outbox).read(10_000)
        return max((line.get("done") or 0 for line in lines), default=0)

    def digest(self) -> str:
        """A digest of the token shards and packed rows."""
        prepared = find_prepared(self.cache, corpus_parts(self.data))
        assert prepared is not None
        found = hashlib.sha256()
        for key in sorted(prepared.keys):
            for file in sorted((self.cache / key).rglob("*.bin")):
                found.update(file.read_bytes())
        return found.hexdigest()


def command(process: ProcessIdentity) -> list[str]:
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


DOCUMENTS = 60_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files that take some seconds, in several parts."""
    folder = tmp_path_factory.mktemp("corpus")
    chance = random.Random(7)
    words = [str(chance.getrandbits(40)) for _ in range(200)]
    for number in range(4):
        lines = (json.dumps({"text": " ".join(chance.choices(words, k=60))}) for _ in range(DOCUMENTS // 4))
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def host(tmp_path: Path, corpus: Path) -> Iterator[Host]:
    made = Host(tmp_path, corpus)
    yield made
    for number in range(1, made.number + 1):
        made.launcher.kill(AttemptRef(CORPUS, number))


@pytest.mark.long
def test_it_prepares_without_torch_and_without_a_device(host: Host) -> None:
    host.start()
    report = host.end()
    assert (report.outcome, report.reason) == ("completed", None)
    assert f"{DOCUMENTS:,} documents" in report.message
    assert find_prepared(host.cache, corpus_parts(host.data)) is not None
    assert list(host.cache.glob("*/rows-*"))
    loaded = "import sys, trainyard.worker.prepare; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.long
def test_a_stop_keeps_what_is_done_and_sigterm_too(host: Host) -> None:
    host.start()
    host.worker()
    host.launcher.stop(host.name)
    assert (host.end().outcome, host.end().reason) == ("stopped", Reason.USER)
    host.start()
    agent = [p for p in find_by_marker(str(host.name)) if p.variable("TRAINYARD_ATTEMPT_TOKEN")]
    host.worker()
    agent[0].send(signal.SIGTERM)  # a host that shuts down, or a service that ends with its runs
    assert host.end().outcome == "stopped"


def test_a_killed_process_leaves_nothing_alive(host: Host) -> None:
    host.start()
    host.worker().send(signal.SIGKILL)
    report = host.end()
    assert (report.outcome, report.reason) == ("crashed", Reason.WORKER_CRASHED)
    assert report.message == "the process that prepares the corpus was killed by SIGKILL"


def test_a_killed_agent_is_found_and_the_process_ended(host: Host) -> None:
    host.start()
    worker = host.worker()
    for process in find_by_marker(str(host.name)):
        if process.variable("TRAINYARD_ATTEMPT_TOKEN"):
            process.send(signal.SIGKILL)
    until(lambda: host.launcher.find(host.name).state is AttemptState.ORPHANED)
    host.launcher.kill(host.name)
    assert host.end().reason is Reason.AGENT_LOST
    assert not worker.alive()


@pytest.mark.long
def test_a_process_that_makes_no_progress_is_ended_as_hung(host: Host) -> None:
    host.timeouts = Timeouts(preparing=3.0)
    host.start()
    host.worker().send(signal.SIGSTOP)
    report = host.end()
    assert (report.outcome, report.reason) == ("crashed", Reason.HUNG)


@pytest.mark.long
def test_tokenizers_that_make_no_progress_are_found_too(host: Host) -> None:
    host.timeouts = Timeouts(preparing=4.0)
    host.start()
    host.worker()
    for process in find_by_marker(str(host.name)):
        if TOKENIZERS in command(process):
            process.send(signal.SIGSTOP)
    assert host.end().reason is Reason.HUNG


@pytest.mark.long
def test_only_one_attempt_prepares_a_corpus(host: Host) -> None:
    host.start()
    host.worker().send(signal.SIGSTOP)
    host.start()  # as a second service that believes the first attempt to be gone
    until(lambda: host.launcher.find(host.name).state is AttemptState.ENDED)
    report = host.launcher.find(host.name).report
    assert report is not None
    assert (report.outcome, report.reason) == ("crashed", Reason.LAUNCH_FAILED)
    assert not host.attempt.outbox.exists()


def test_bad_data_is_reported_as_by_a_run(host: Host) -> None:
    host.folder = host.path / "bad"
    host.folder.mkdir()
    (host.folder / "0.jsonl").write_text("no json\n" * 50)
    (host.folder / "1.jsonl").write_text('{"text": "one"}\n')
    host.start()
    report = host.end()
    assert (report.outcome, report.reason) == ("failed", Reason.DATA_INVALID)
    assert report.error is not None
    assert report.error.hint == "`trainyard corpus check FILE` lists every bad line."
    assert "bad line" in report.message


def test_a_file_that_unpacks_to_too_much_fails_without_a_device(host: Host) -> None:
    host.folder = host.path / "bomb"
    host.folder.mkdir()
    (host.folder / "bomb.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b"a" * (200 << 20) + b'"}\n', 9))
    host.start()
    report = host.end()
    assert (report.outcome, report.reason) == ("failed", Reason.DATA_INVALID)
    assert "unpacks to more than" in report.message


@pytest.mark.long
def test_killed_at_random_points_it_continues_to_the_same_bytes(host: Host) -> None:
    seed = int(os.environ.get("SEED", "0")) or random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    host.start()
    assert host.end().outcome == "completed"
    untouched = host.digest()
    shutil.rmtree(host.cache)
    kills = 0
    while True:
        host.start()
        deadline = time.monotonic() + chance.uniform(0.3, 4.0)
        until(lambda: host.attempt.exit.exists() or time.monotonic() > deadline)  # noqa: B023 - of this round
        members = [p for p in find_by_marker(str(host.name)) if not p.variable("TRAINYARD_ATTEMPT_TOKEN")]
        if host.attempt.exit.exists() or kills == 8:
            break
        if members:
            chance.choice(members).send(signal.SIGKILL)
            kills += 1
        host.end()
    report = host.end()
    while report.outcome != "completed":
        host.start()
        report = host.end()
    print("kills", kills)
    assert host.digest() == untouched
