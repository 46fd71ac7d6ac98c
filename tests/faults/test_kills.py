"""Random kills of everything: thousands with fake ranks, hundreds with real gloo ranks.

`make test-long` runs a few of the former; tests/story kills real ranks. Of the long forms,

TRAINYARD_SOAK_KILLS       kills with fake ranks, over all their parts (2,000)
TRAINYARD_SOAK_GLOO_KILLS  the same with gloo ranks (300)
TRAINYARD_SOAK_SECONDS     longest time of one part (3,600)
TRAINYARD_SOAK_MINUTES     time of the nightly form (`make nightly`), which goes through all parts again and again
TRAINYARD_SOAK_HOMES       homes at once, each with its own service, database and seed (3)

Most of the time of a kill is a wait: for a lease, a back-off, a start. In several homes these waits overlap.
"""

import itertools
import os
import shutil
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
from psycopg import sql

from benchmarks.corpus import write_docstrings
from tests import soak_report
from tests.faults.invariants import Sampler, check_weights
from tests.faults.killer import Killer, KillTotals
from tests.faults.service_home import Home, Nursery
from tests.service.conftest import postgres_url
from tests.soak_report import SoakReport
from trainyard.contract.rundir import weights_name

__all__ = ["postgres_url"]

FAKE_STEPS = 40
GLOO_STEPS = 40
STEPS = {"fake": FAKE_STEPS, "gloo": GLOO_STEPS}
HOMES = 3
RANKS = 2
HIDDEN_SIZE = 64
NIGHT_KILLS = {"fake": 50, "gloo": 10}
"""Kills of a part until the nightly form continues with the next one."""


@dataclass(frozen=True)
class Part:
    """Kills of one kind. ``groups``: what differs in the spec of gloo ranks; None: fake ranks."""

    name: str
    at_once: int = 1
    postgres: bool = False
    groups: dict[str, dict[str, Any]] | None = None

    @property
    def ranks(self) -> str:
        return "fake" if self.groups is None else "gloo"

    @property
    def use_moe(self) -> bool:
        return bool((self.groups or {}).get("model", {}).get("use_moe"))


VERIFY = {"verify_every": 9}
MOE = {"use_moe": True, "num_experts": 4, "num_experts_per_tok": 2}
FAKE_PARTS = [
    Part("fake-sqlite-1-job"),
    Part("fake-sqlite-3-jobs", at_once=3),
    Part("fake-postgres-1-job", postgres=True),
    Part("fake-postgres-3-jobs", at_once=3, postgres=True),
]
GLOO_PARTS = [
    Part("gloo-dense-adamw", groups={"training": VERIFY}),
    Part("gloo-moe-adamw", groups={"model": MOE}),
    Part("gloo-dense-muon-postgres", postgres=True, groups={"training": {"optimizer": "muon", **VERIFY}}),
    Part("gloo-dense-adamw-zero1", groups={"resources": {"parallelism": "zero1"}}),
    Part("gloo-dense-adamw-fsdp", groups={"training": VERIFY, "resources": {"parallelism": "fsdp"}}),
    Part("gloo-moe-muon-zero1", groups={"model": MOE, "training": {"optimizer": "muon"},
                                        "resources": {"parallelism": "zero1"}}),
]  # fmt: skip
PARTS = [*FAKE_PARTS, *GLOO_PARTS]


@dataclass(frozen=True)
class Task:
    """Kills of a part in one home, from a seed: ``kills`` of them, or as many as fit into ``seconds``.

    The untouched run of a part counts towards its ``seconds``.
    """

    part: Part
    seed: int
    kills: int
    seconds: float


@dataclass
class KillRun:
    """What all parts of a session share. ``references``: weights and losses of the untouched run of each part."""

    nursery: Nursery
    folder: Path
    request: pytest.FixtureRequest
    postgres: str = ""
    totals: KillTotals = field(default_factory=KillTotals)
    references: dict[str, tuple[Any, list[float]]] = field(default_factory=dict)
    _locks: dict[str, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock))

    def need_postgres(self) -> None:
        """Start the database server. To be called by the test's own thread."""
        self.postgres = self.request.getfixturevalue("postgres_url")

    def kill_in_homes(self, tasks: Iterable[Task]) -> None:
        """Do the tasks, HOMES at once. Raises all their errors together, after the last task."""
        errors: list[Exception] = []
        waiting = iter(tasks)
        taking = threading.Lock()

        def work() -> None:
            while True:
                with taking:
                    task = next(waiting, None)
                if task is None:
                    return
                try:
                    self.kill(task)
                except Exception as error:
                    traceback.print_exception(error)
                    errors.append(error)

        homes = int(soak_report.chosen("HOMES", HOMES))
        with ThreadPoolExecutor(homes) as pool:
            for done in [pool.submit(work) for _ in range(homes)]:
                done.result()
        if errors:
            raise ExceptionGroup("kills after which something did not hold", errors)

    def kill(self, task: Task) -> None:
        """Raise AssertionError, with the part and its seed, if an invariant does not hold."""
        part, seed, began = task.part, task.seed, time.monotonic()
        print(f"{part.name}: seed {seed}", flush=True)
        with self.home(part, f"{part.name}-{seed}") as home:
            with self._locks[part.name]:
                if part.groups is not None and part.name not in self.references:
                    self.references[part.name] = untouched(home, part)
            killer = Killer(
                home,
                lambda: submit(home, part),
                seed,
                part.at_once,
                MAX_WAIT[part.ranks],
                STEPS[part.ranks],
                home.damage,
            )
            with Sampler(home) as sampler:
                try:
                    killer.run(task.kills, task.seconds - (time.monotonic() - began), sampler)
                    for job_id in killer.jobs:
                        self.check_result(home, part, job_id)
                except Exception as error:
                    error.add_note(f"{part.name}, seed {seed}; the home is {home.path}")
                    raise
                finally:
                    self.totals.add(part.name, killer, sampler)
            done = sum(killer.done.values())
            print(f"{part.name}: {done} kills, {len(killer.jobs)} jobs, {killer.seconds:.0f} s, every invariant holds",
                  flush=True)  # fmt: skip

    def check_result(self, home: Home, part: Part, job_id: str) -> None:
        if part.groups is None:
            check_weights(home, job_id, FAKE_STEPS)
            return
        weights, losses = result_of(home, part, job_id)
        assert weights == self.references[part.name][0], "I7"
        assert losses == self.references[part.name][1], "I4"

    @contextmanager
    def home(self, part: Part, name: str) -> Iterator[Home]:
        """Yield a home with its own database. After a failure it stays for a look at it."""
        real = part.groups is not None
        wanted = {"scale": 0.02, "lease_scale": 0.1, "real_ranks": real}
        home = Home(self.nursery, self.folder / name, slots=RANKS * part.at_once, **wanted)
        # A busy host is no fault: what never happens is found by these limits, and what is late is not reported.
        home.patience, home.grace, home.client.timeout = 300.0, 60.0, httpx2.Timeout(120)
        if real:
            from trainyard.worker.checkpoint.files import verify  # imports torch, which fake ranks do not need

            home.damage = verify
            write_docstrings(home.path / "docstrings.jsonl", 400)
        if part.postgres:
            url = new_database(self.postgres, name.replace("-", "_"))
            home.database_url = home.environment["TRAINYARD_DATABASE_URL"] = url
        try:
            yield home
        finally:
            home.end_all()
        shutil.rmtree(home.path)


MAX_WAIT = {"fake": 0.6, "gloo": 12.0}
"""Longest time between two kills, in seconds."""


def new_database(url: str, name: str) -> str:
    """Make a database next to that of ``url``, and return its URL."""
    with closing(psycopg.connect(url, autocommit=True)) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return with_database(url, name)


def with_database(url: str, name: str) -> str:
    base, mark, options = url.partition("?")
    return f"{base.rpartition('/')[0]}/{name}{mark}{options}"


def submit(home: Home, part: Part) -> str:
    if part.groups is None:
        return home.submit(max_restarts=1000, steps=str(FAKE_STEPS), pace="0.02", save_pace="0.05")
    answer = home.post("/jobs", gloo_spec(home.path / "docstrings.jsonl", part.groups))
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def gloo_spec(corpus: Path, groups: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    model = {"hidden_size": HIDDEN_SIZE, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    spec: dict[str, dict[str, Any]] = {
        "model": model,
        "data": {"data_path": str(corpus), "max_seq_len": 64},
        "training": {"max_steps": GLOO_STEPS, "batch_size": 4, "accumulation_steps": 2},
        "checkpoint": {"save_interval": 5},
        "reporting": {"log_interval": 1},
        "resources": {"device": "cpu", "nproc_per_node": RANKS, "max_restarts": 1000},
    }
    return {name: {**group, **(groups or {}).get(name, {})} for name, group in spec.items()}


def untouched(home: Home, part: Part) -> tuple[Any, list[float]]:
    home.start()
    job_id = submit(home, part)
    home.wait(job_id, "succeeded", seconds=1800, every=0.5)
    result = result_of(home, part, job_id)
    home.kill()
    return result


def result_of(home: Home, part: Part, job_id: str) -> tuple[Any, list[float]]:
    """Return (sha256 of the last checkpoint's model and the weights file, the losses)."""
    newest = home.get(f"/jobs/{job_id}/checkpoints").json()["data"][0]
    assert newest["step"] == GLOO_STEPS
    weights = home.run(job_id).path / "out" / weights_name("pretrain", HIDDEN_SIZE, part.use_moe)
    return (newest["sha256"], weights.read_bytes()), [row["loss"] for row in home.metrics(job_id)]


def tasks(part: Part, kills: int) -> list[Task]:
    """Return the kills of a part, as one task for each home."""
    homes = int(soak_report.chosen("HOMES", HOMES))
    seconds = soak_report.chosen("SECONDS", 3600)
    shares = [kills // homes + (number < kills % homes) for number in range(homes)]
    return [Task(part, soak_report.seed() + number, share, seconds) for number, share in enumerate(shares) if share]


def tasks_until(deadline: float) -> Iterator[Task]:
    """Yield the parts in turn, each time with another seed, until ``deadline``."""
    for number, part in enumerate(itertools.cycle(PARTS)):
        left = deadline - time.monotonic()
        if left <= 0:
            return
        yield Task(part, soak_report.seed() + number, NIGHT_KILLS[part.ranks], left)


@pytest.fixture
def kill_run(
    nursery: Nursery, tmp_path: Path, request: pytest.FixtureRequest, account: SoakReport
) -> Iterator[KillRun]:
    """The report is written whatever becomes of the test."""
    made = KillRun(nursery, tmp_path, request)
    yield made
    made.totals.write(account)


@pytest.mark.long
def test_a_few_kills_of_fake_ranks(kill_run: KillRun) -> None:
    kill_run.kill(Task(FAKE_PARTS[1], seed=7, kills=6, seconds=60))


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("part", FAKE_PARTS, ids=lambda part: part.name)
def test_thousands_of_kills_of_fake_ranks(kill_run: KillRun, part: Part) -> None:
    if part.postgres:
        kill_run.need_postgres()
    kill_run.kill_in_homes(tasks(part, int(soak_report.chosen("KILLS", 2000)) // len(FAKE_PARTS)))


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("part", GLOO_PARTS, ids=lambda part: part.name)
def test_hundreds_of_kills_of_gloo_ranks(kill_run: KillRun, part: Part) -> None:
    if part.postgres:
        kill_run.need_postgres()
    kill_run.kill_in_homes(tasks(part, int(soak_report.chosen("GLOO_KILLS", 300)) // len(GLOO_PARTS)))


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.skipif("TRAINYARD_SOAK_MINUTES" not in os.environ, reason="the nightly form: make nightly MINUTES=480")
def test_kills_for_a_given_time(kill_run: KillRun) -> None:
    deadline = time.monotonic() + 60 * soak_report.chosen("MINUTES", 0)
    kill_run.need_postgres()
    kill_run.kill_in_homes(tasks_until(deadline))
    assert kill_run.totals.done, "the time was too short for one kill"


def test_a_database_of_a_url() -> None:
    assert with_database("postgresql://u:p@h:1/postgres?host=/tmp", "k") == "postgresql://u:p@h:1/k?host=/tmp"


def test_the_parts_cover_what_the_guide_promises() -> None:
    names = " ".join(part.name for part in PARTS)
    for what in ("sqlite", "postgres", "1-job", "3-jobs", "dense", "moe", "adamw", "muon", "zero1", "fsdp"):
        assert what in names
    specs = [gloo_spec(Path("corpus"), part.groups) for part in GLOO_PARTS if part.groups is not None]
    assert {spec["resources"].get("parallelism", "ddp") for spec in specs} == {"ddp", "zero1", "fsdp"}
    assert all(spec["resources"]["nproc_per_node"] == RANKS for spec in specs)
