"""Faults of release 0.1 that can be seen from outside: each is shown on 0.1 and is absent in this release.

Faults inside of functions (arithmetic, races, fuzzed checkpoints) have their tests beside those functions.
Needs the history of this repository: release 0.1 is taken out of it. `make test-long` runs this.
"""

import gzip
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
import pytest

from benchmarks.corpus import write_docstrings
from tests.story.service_process import END_SECONDS, REQUEST_SECONDS, Served, until

ROOT = Path(__file__).parents[2]
STEPS = 7

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@dataclass
class Release:
    """A release's service, and its programs as commands. ``path``: the folder of its code."""

    name: str
    path: Path
    folder: Path
    service: list[str]
    command: list[str]
    worker: list[str]
    served: Served = field(init=False)

    def start(self) -> None:
        self.corpus = self.folder / "data" / "corpus.jsonl"
        self.corpus.parent.mkdir(parents=True)
        write_docstrings(self.corpus, 100)
        self.served = Served(self.folder / "home", [self.corpus.parent], command=self.service, path=self.path)
        os.environ["RAYON_NUM_THREADS"] = "3"
        try:
            self.served.start()
        finally:
            del os.environ["RAYON_NUM_THREADS"]

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the command of this release against its service."""
        return self.execute([*self.command, *arguments], TRAINYARD_URL=self.served.url, **environment)

    def execute(
        self, command: list[str], stdout: Any = subprocess.PIPE, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        base = {
            **os.environ,
            "PYTHONPATH": str(self.path),
            "TRAINYARD_HOME": str(self.served.home),
            "PYTHONIOENCODING": "",
        }
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            cwd=self.folder,
            env={**base, **environment},
            timeout=END_SECONDS,
            encoding="latin-1",
        )

    def spec(self, **training: Any) -> dict[str, Any]:
        return {
            "model": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2},
            "data": {"data_path": str(self.corpus), "max_seq_len": 64},
            "training": {"max_steps": STEPS, "batch_size": 2, "accumulation_steps": 1, **training},
            "resources": {"device": "cpu", "nproc_per_node": 1, "max_restarts": 0},
        }

    def finished(self) -> str:
        """Return the id of the one run that succeeded."""
        if not hasattr(self, "job_id"):
            self.job_id = self.served.submit({**self.spec(), "name": "训练"})
            self.served.wait(self.job_id, "succeeded", seconds=240)
        return str(self.job_id)

    def plan(self, spec: dict[str, Any]) -> httpx2.Response:
        return httpx2.post(self.served.url + "/jobs/plan", json=spec, timeout=REQUEST_SECONDS)

    def warnings(self, spec: dict[str, Any]) -> str:
        answer = self.plan(spec)
        return json.dumps(answer.json().get("warnings", []) if answer.status_code == 200 else answer.json())


def has_traceback(done: subprocess.CompletedProcess[str]) -> bool:
    return "Traceback (most recent call last)" in done.stderr


# A and B: runs, MiniMind's users


def a_corpus_full_of_marks_gets_no_warning(release: Release) -> bool:
    marked = release.corpus.parent / "marked.jsonl"
    line = json.dumps({"text": "<|im_start|>one<|im_end|><|im_start|>two<|im_end|>"})
    marked.write_text((line + "\n") * 50)
    tokenizer = release.corpus.parent / "marked"
    made = release.run("tokenizer", "train", str(release.corpus), "--out", str(tokenizer), "--vocab-size", "300")
    assert made.returncode == 0, made.stderr
    spec = release.spec()
    spec["data"] |= {"data_path": str(marked), "tokenizer_path": str(tokenizer)}
    return "special" not in release.warnings(spec)


def a_byte_tokenizer_that_nobody_chose_gets_no_warning(release: Release) -> bool:
    return "byte" not in release.warnings(release.spec())


def a_worker_by_hand_says_nothing_of_a_bad_corpus(release: Release) -> bool:
    folder = release.folder / "by-hand"
    folder.mkdir()
    corpus = folder / "corpus.jsonl"
    corpus.write_bytes(b"not json\n")
    spec = release.spec()
    spec["data"]["data_path"] = str(corpus)
    (folder / "spec.json").write_text(json.dumps(spec))
    done = release.execute([*release.worker, str(folder)])
    assert done.returncode != 0
    return not (done.stdout + done.stderr).strip()


# C: numbers


def a_short_run_has_no_curve(release: Release) -> bool:
    return len(release.served.metrics(release.finished())) < STEPS // 2


# D: paths, environment, output


def a_home_with_a_question_mark_puts_its_database_elsewhere(release: Release) -> bool:
    served = Served(
        release.folder / "mark" / "home?a", [release.corpus.parent], command=release.service, path=release.path
    )
    served.start()
    served.stop()
    return not list(served.home.glob("*.db*"))


def variables_of_the_service_do_not_reach_the_ranks(release: Release) -> bool:
    """RAYON_NUM_THREADS, which the settings' page promised."""
    job_id = release.served.submit(release.spec(max_steps=100_000))
    try:
        until(lambda: release.served.step(job_id) >= 1)
        found = [environment for environment in environments() if job_id.encode() in environment]
        assert found
        return not any(b"RAYON_NUM_THREADS=3" in environment for environment in found)
    finally:
        release.served.post(f"/jobs/{job_id}/cancel")
        until(lambda: release.served.job(job_id)["status"] == "cancelled")


def environments() -> Iterator[bytes]:
    """Yield the environment and the command line of each process."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            yield (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()


def a_rate_of_nan_is_a_traceback(release: Release) -> bool:
    return has_traceback(release.run("submit", "--data_path", str(release.corpus), "--learning_rate", "nan"))


def a_chinese_name_on_a_latin_1_terminal_is_a_traceback(release: Release) -> bool:
    release.finished()
    return has_traceback(release.run("list", PYTHONIOENCODING="latin-1", LC_ALL="C", PYTHONUTF8="0"))


def a_list_to_a_full_disk_is_a_traceback(release: Release) -> bool:
    release.finished()
    with Path("/dev/full").open("wb") as full:
        command = [*release.command, "list"]
        return has_traceback(release.execute(command, stdout=full, TRAINYARD_URL=release.served.url))


def the_command_does_not_know_its_version(release: Release) -> bool:
    return bool(release.run("--version").returncode != 0)


def logs_of_a_rank_that_is_not_there_are_empty(release: Release) -> bool:
    done = release.run("logs", release.finished(), "--rank", "7")
    return not (done.stdout + done.stderr).strip()


def a_kill_off_a_terminal_asks_nothing(release: Release) -> bool:
    job_id = release.served.submit(release.spec(max_steps=100_000))
    until(lambda: release.served.step(job_id) >= 1)
    done = release.run("kill", job_id)
    release.served.post(f"/jobs/{job_id}/cancel")
    until(lambda: release.served.job(job_id)["status"] == "cancelled")
    return bool(done.returncode == 0)


def a_spec_with_a_byte_order_mark_is_refused(release: Release) -> bool:
    file = release.folder / "mark.json"
    file.write_text(json.dumps(release.spec()), encoding="utf-8-sig")
    return bool(release.run("plan", str(file)).returncode != 0)


def a_relative_path_is_taken_from_the_folder_of_the_service(release: Release) -> bool:
    spec = release.spec()
    spec["data"]["data_path"] = "corpus.jsonl"
    return "absolute" not in release.plan(spec).text


def an_unknown_query_parameter_is_ignored(release: Release) -> bool:
    return release.served.get("/jobs?statu=queued").status_code == 200


def the_page_of_the_api_needs_the_internet(release: Release) -> bool:
    return "cdn." in release.served.get("/docs").text


def properties_have_no_description(release: Release) -> bool:
    schemas = release.served.get("/openapi.json").json()["components"]["schemas"]
    properties = [found for schema in schemas.values() for found in schema.get("properties", {}).values()]
    return any("description" not in found for found in properties if "$ref" not in found)


def weights_are_for_their_owner_alone(release: Release) -> bool:
    out = release.served.home / "runs" / release.finished() / "out"
    weights = next(file for file in out.rglob("*") if file.suffix in (".pth", ".safetensors"))
    return not weights.stat().st_mode & stat.S_IRGRP


def heartbeats_fill_the_log(release: Release) -> bool:
    release.finished()
    return "heartbeat" in (release.served.home / "service.log").read_text(errors="replace")


def modules_cannot_be_imported_first(release: Release) -> bool:
    names = {"0.1": "service.jobs.views", "0.2": "trainyard.service.jobs"}
    done = release.execute([sys.executable, "-c", f"import {names[release.name]}"])
    return bool(done.returncode != 0)


# E: hostile input


def a_tokenizer_is_parsed_in_the_service(release: Release) -> bool:
    """20 MB of nested lists cost the service hundreds of megabytes."""
    folder = release.corpus.parent / "nested"
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"model": [' + ",".join(["[" * 50 + "]" * 50] * 200_000) + "]}")
    spec = release.spec()
    spec["data"]["tokenizer_path"] = str(folder)
    before = peak_memory(release)
    with suppress(httpx2.TimeoutException):
        release.plan(spec)
    return peak_memory(release) - before > 100 << 20


def peak_memory(release: Release) -> int:
    """Return the largest resident memory of the service so far, in bytes."""
    assert release.served.process is not None
    text = Path(f"/proc/{release.served.process.pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmHWM")).split()[1]) << 10


def a_database_is_readable_by_everybody(release: Release) -> bool:
    return any(file.stat().st_mode & stat.S_IROTH for file in release.served.home.glob("*.db*"))


def an_idempotency_key_is_common_to_all_tokens(release: Release) -> bool:
    jobs = set()
    for name in ("alice", "bob"):
        secret = release.run("token", "create", name, "--scope", "submit").stdout.strip()
        assert secret
        headers = {"Authorization": f"Bearer {secret}", "Idempotency-Key": "the-same"}
        answer = httpx2.post(
            release.served.url + "/jobs", json=release.spec(), headers=headers, timeout=REQUEST_SECONDS
        )
        assert answer.status_code in (200, 201), answer.text
        jobs.add(answer.json()["id"])
    return len(jobs) == 1


def epochs_beside_max_steps_get_no_warning(release: Release) -> bool:
    return "epochs" not in release.warnings(release.spec(epochs=3))


def a_gzip_body_is_called_not_utf_8(release: Release) -> bool:
    body = gzip.compress(json.dumps(release.spec()).encode())
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    answer = httpx2.post(release.served.url + "/jobs/plan", content=body, headers=headers, timeout=REQUEST_SECONDS)
    return answer.status_code != 200 and "UTF-8" in answer.text


def health_is_forbidden_without_a_host(release: Release) -> bool:
    with socket.create_connection(("127.0.0.1", release.served.port), timeout=REQUEST_SECONDS) as client:
        client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        return b" 403 " in client.makefile("rb").readline()


class ForeignJson(BaseHTTPRequestHandler):
    """Another program on the port: it answers everything with an empty object."""

    def do_GET(self) -> None:
        body = b"{}"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def foreign_json_is_a_traceback(release: Release) -> bool:
    with HTTPServer(("127.0.0.1", 0), ForeignJson) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            return has_traceback(release.execute([*release.command, "list"], TRAINYARD_URL=url))
        finally:
            server.shutdown()
            thread.join()


def a_module_named_contract_ends_the_command(release: Release) -> bool:
    folder = release.folder / "shadow"
    folder.mkdir()
    (folder / "contract.py").write_text("raise SystemExit('the wrong module')\n")
    path = f"{folder}:{release.path}"
    done = release.execute([*release.command, "list"], PYTHONPATH=path, TRAINYARD_URL=release.served.url)
    return bool(done.returncode != 0)


def a_clean_stop_is_not_in_the_log(release: Release) -> bool:
    served = Served(release.folder / "stopped", [release.corpus.parent], command=release.service, path=release.path)
    served.start()
    log = served.home / "service.log"
    before = len(log.read_text())
    served.stop()
    return "stop" not in log.read_text()[before:].lower()


FAULTS: list[Callable[[Release], bool]] = [
    a_corpus_full_of_marks_gets_no_warning,
    a_byte_tokenizer_that_nobody_chose_gets_no_warning,
    a_worker_by_hand_says_nothing_of_a_bad_corpus,
    a_short_run_has_no_curve,
    a_home_with_a_question_mark_puts_its_database_elsewhere,
    variables_of_the_service_do_not_reach_the_ranks,
    a_rate_of_nan_is_a_traceback,
    a_chinese_name_on_a_latin_1_terminal_is_a_traceback,
    a_list_to_a_full_disk_is_a_traceback,
    the_command_does_not_know_its_version,
    logs_of_a_rank_that_is_not_there_are_empty,
    a_kill_off_a_terminal_asks_nothing,
    a_spec_with_a_byte_order_mark_is_refused,
    a_relative_path_is_taken_from_the_folder_of_the_service,
    an_unknown_query_parameter_is_ignored,
    the_page_of_the_api_needs_the_internet,
    properties_have_no_description,
    weights_are_for_their_owner_alone,
    heartbeats_fill_the_log,
    modules_cannot_be_imported_first,
    a_tokenizer_is_parsed_in_the_service,
    a_database_is_readable_by_everybody,
    an_idempotency_key_is_common_to_all_tokens,
    epochs_beside_max_steps_get_no_warning,
    a_gzip_body_is_called_not_utf_8,
    health_is_forbidden_without_a_host,
    foreign_json_is_a_traceback,
    a_module_named_contract_ends_the_command,
    a_clean_stop_is_not_in_the_log,
]


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory, old_release: Path) -> Iterator[list[Release]]:
    """0.1 and this release, each with its own service."""
    python = sys.executable
    old_command = [python, "-c", "import sys; from client.cli import main; sys.exit(main())"]
    made = [
        Release(
            "0.1", old_release, tmp_path_factory.mktemp("old"),
            [python, "-m", "service"], old_command, [python, "-m", "worker"],
        ),
        Release(
            "0.2", ROOT / "src", tmp_path_factory.mktemp("new"),
            [python, "-m", "trainyard.service"], [str(Path(python).with_name("trainyard"))],
            [python, "-m", "trainyard.worker"],
        ),
    ]  # fmt: skip
    for release in made:
        release.start()
    yield made
    for release in made:
        release.served.kill()


@pytest.mark.parametrize("shows_fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_of_0_1_is_gone(releases: list[Release], shows_fault: Callable[[Release], bool]) -> None:
    old, new = releases
    assert shows_fault(old), "0.1 does not show the fault: the check cannot fail"
    assert not shows_fault(new)
