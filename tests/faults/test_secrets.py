"""Secrets are planted wherever a service has them, everything is asked of it, and nothing that it shows holds one.

Looked through: every answer with its headers, every file in the home, the service's log at its most talkative, the
arguments of every process, and the environment of those that train.
"""

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from tests.faults.conftest import MakeHome
from tests.faults.service_home import Home, environment_of, until
from tests.service.conftest import any_url, migrated_postgres, migrated_sqlite, postgres_url, sqlite_url
from tests.service.needs import ATTEMPT, NEEDS, OPEN
from trainyard.contract.processes import all_pids
from trainyard.service.db.engine import Database

__all__ = ["any_url", "migrated_postgres", "migrated_sqlite", "postgres_url", "sqlite_url"]

ROLE = "role_with_a_password"


def planted(name: str) -> str:
    """Return a secret that occurs nowhere by chance."""
    return f"canary-{name}-{secrets.token_hex(12)}"


class Planted:
    """A service with a secret in each place, and all that was seen of it. ``known``: name -> secret."""

    def __init__(self, home: Home, url: str, tokens: Path) -> None:
        self.home = home
        names = ("token", "file-token", "password", "aws", "wandb", "value", "notice")
        self.known = {name: planted(name) for name in names}
        self.seen: list[tuple[str, bytes]] = []
        tokens.write_text(f"# of the team\n{self.known['file-token']}\n")
        database = make_url(url)
        if database.get_backend_name() != "sqlite":
            database = database.set(username=ROLE, password=self.known["password"])
        home.database_url = url
        home.environment |= {
            "TRAINYARD_DATABASE_URL": database.render_as_string(hide_password=False),
            "TRAINYARD_TOKEN": self.known["token"],
            "TRAINYARD_TOKEN_FILE": str(tokens),
            "TRAINYARD_LOG_LEVEL": "debug",
            "TRAINYARD_WEBHOOK_NETWORKS": "127.0.0.0/8",
            "AWS_SECRET_ACCESS_KEY": self.known["aws"],
            "DATABASE_PASSWORD": self.known["aws"],
            "WANDB_API_KEY": self.known["wandb"],
        }
        home.client.headers["Authorization"] = f"Bearer {self.known['token']}"

    def look(self, where: str, content: bytes) -> None:
        self.seen.append((where, content))

    def ask(self, method: str, path: str, status: int | None = None, **how: Any) -> httpx2.Response:
        """A request whose answer is looked through."""
        answer: httpx2.Response = self.home.client.request(method, self.home.url + path, **how)
        assert status is None or answer.status_code == status, answer.text
        self.look(f"answer to {method} {path}", repr(answer.headers.multi_items()).encode() + answer.content)
        return answer

    def given(self, name: str, path: str, body: Mapping[str, Any], field: str) -> None:
        """Ask for something whose one answer has a secret, and remember that."""
        answer = self.home.client.post(self.home.url + path, json=dict(body))
        assert answer.status_code == 201, answer.text
        self.known[name] = answer.json()[field]

    def found(self) -> list[str]:
        """Where something was seen that must not be."""
        return [f"{name} in {where}" for where, content in self.seen for name in self.known if self._in(name, content)]

    def _in(self, name: str, content: bytes) -> bool:
        return self.known[name].encode() in content


@pytest.fixture
def canary(make_home: MakeHome, any_url: str, tmp_path: Path) -> Iterator[Planted]:
    made = Planted(make_home(slots=2), any_url, tmp_path / "tokens")
    with _role(any_url, made.known["password"]):
        made.home.start()
        yield made
        made.home.kill()


@contextlib.contextmanager
def _role(url: str, password: str) -> Iterator[None]:
    """On Postgres, create a role with a password."""
    if url.startswith("sqlite"):
        yield
        return
    database = Database(url)
    _execute(database, f"CREATE ROLE {ROLE} LOGIN SUPERUSER PASSWORD '{password}'")
    yield
    _execute(database, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{ROLE}'")
    _execute(database, f"DROP ROLE {ROLE}")
    database.close()


def _execute(database: Database, statement: str) -> None:
    with database.engine.begin() as connection:
        connection.execute(text(statement))


def test_secrets_are_seen_nowhere(canary: Planted, any_url: str) -> None:
    home = canary.home
    canary.given("named-token", "/tokens", {"name": "ci", "scope": "submit"}, "token")
    canary.given("webhook", "/webhooks", {"url": "http://127.0.0.1:9/hook", "events": ["*"]}, "secret")
    notice = f"json://robot:{canary.known['notice']}@127.0.0.1:9/{canary.known['notice']}"
    canary.ask("POST", "/webhooks", 201, json={"url": notice, "events": ["*"]})
    long = home.submit(steps="100000", pace="0.02")
    failing = home.submit(0, steps="10", ranks="1", fault="exit_1_at_3", pace="0.02")
    # The first rank makes steps while the second one is still started.
    until(lambda: home.step(long) >= 3 and [len(home.named(long, role)) for role in ("torchrun", "rank")] == [1, 2])
    look_at_processes(canary, long)
    ask_what_is_refused(canary, long)
    remote = not any_url.startswith("sqlite")
    if remote:
        lose_the_database(canary, any_url)
    canary.ask("POST", f"/jobs/{long}/kill", 202)
    for job_id in (long, failing):
        home.wait(job_id, "failed", "cancelled")
    # What is shown of a job depends on its end and not on where it is stored: once on each is enough.
    ask_everything(canary, long if remote else failing)
    home.kill()
    look_at_files(canary)
    assert len(canary.known) >= 9
    assert canary.found() == []
    assert_it_would_have_been_found(canary)


def look_at_processes(canary: Planted, job_id: str) -> None:
    """The arguments of all; and what those that train were given, which is what a run may know."""
    (agent,) = canary.home.named(job_id, "agent")
    canary.known["attempt"] = environment_of(agent.pid)[b"TRAINYARD_ATTEMPT_TOKEN"].decode()
    for pid in all_pids():
        with contextlib.suppress(OSError):
            canary.look(f"arguments of {pid}", Path(f"/proc/{pid}/cmdline").read_bytes())
    training = [*canary.home.named(job_id, "torchrun"), *canary.home.named(job_id, "rank")]
    assert len(training) == 3
    for process in [agent, *training]:
        environment = environment_of(process.pid)
        allowed = {b"WANDB_API_KEY", b"TRAINYARD_ATTEMPT_TOKEN"} if process is agent else {b"WANDB_API_KEY"}
        assert canary.known["wandb"].encode() == environment[b"WANDB_API_KEY"], "a tracker's own key goes with the run"
        rest = {name: value for name, value in environment.items() if name not in allowed}
        canary.look(f"environment of {process.pid}", repr(rest).encode())


def ask_what_is_refused(canary: Planted, job_id: str) -> None:
    """401, 403, 404, 409, 422: with secrets in places where they do not belong."""
    value, token = canary.known["value"], canary.known["token"]
    spec = canary.home.spec()
    wrong = {"training": {"learning_rate": value, "epochs": value}, "name": [value], "model": {"hidden_size": value}}
    for body in (spec | wrong, {"data": {"data_path": f"/{value}"}}, {"data": {"tokenizer_path": value}}):
        for path in ("/jobs", "/jobs/plan"):
            canary.ask("POST", path, 422, json=body)
    canary.ask("POST", "/jobs", 422, content=f'{{"name": "{value}"', headers={"Content-Type": "application/json"})
    canary.ask("PATCH", f"/jobs/{job_id}", 422, json={"priority": value})
    canary.ask("POST", "/tokens", 422, json={"name": f"{value} "})
    canary.ask("POST", "/webhooks", 422, json={"url": f"https://user:{value}@host"})
    canary.ask("POST", f"/jobs/{job_id}/resume", 409)
    canary.ask("GET", f"/jobs/{value}", 404)
    canary.ask("GET", f"/{token}?token={token}", 404)
    canary.ask("GET", "/jobs", 422, params={"limit": value, "token": token})
    for header in (f"Bearer {value}", f"Basic {token}", f"Bearer {canary.known['named-token'][:-1]}", token):
        canary.ask("GET", "/jobs", 401, headers={"Authorization": header})
    canary.ask("GET", "/tokens", 403, headers={"Authorization": f"Bearer {canary.known['named-token']}"})
    report = f"/internal/attempts/{value}/heartbeat"
    canary.ask(
        "POST", report, 401, json={"step": value}, headers={"Authorization": f"Bearer {canary.known['attempt']}"}
    )


def lose_the_database(canary: Planted, url: str) -> None:
    """What a driver says of a connection that fails has the connection's parameters at hand."""
    database = Database(url)
    _execute(database, f"ALTER ROLE {ROLE} NOLOGIN")
    _execute(database, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{ROLE}'")
    until(lambda: canary.ask("GET", "/jobs").status_code == 503)
    canary.ask("GET", "/ready", 503)
    _execute(database, f"ALTER ROLE {ROLE} LOGIN")
    database.close()
    until(lambda: canary.ask("GET", "/jobs").status_code == 200)


def ask_everything(canary: Planted, job_id: str) -> None:
    """Every address that is read, but for streams."""
    webhook = canary.ask("GET", "/webhooks", 200).json()["data"][0]["id"]
    until(lambda: canary.ask("GET", f"/webhooks/{webhook}/deliveries", 200).json()["data"])
    delivery = canary.ask("GET", f"/webhooks/{webhook}/deliveries", 200).json()["data"][0]["id"]
    names = {"job_id": job_id, "webhook_id": webhook, "delivery_id": delivery, "step": 5, "name": "manifest.json"}
    # No corpus and no evaluation has these ids: the answers are 404.
    names |= {"model": f"{job_id}@latest", "corpus_id": "cor_aaaaaaaaaaaa", "evaluation_id": "eval_aaaaaaaaaa"}
    asked = 0
    for (method, path), need in NEEDS.items():
        if method == "GET" and need not in (OPEN, ATTEMPT) and not path.endswith("/stream"):
            answer = canary.ask("GET", path.replace(":path}", "}").format(**names, form="hf"))
            asked += answer.status_code == 200
            assert answer.status_code < 500, answer.text
    assert asked >= 15
    for path in ("/health", "/ready", "/openapi.json", "/docs", "/"):
        canary.ask("GET", path, 200)
    canary.ask("GET", f"/jobs/{job_id}/logs?rank=agent", 200)


def look_at_files(canary: Planted) -> None:
    """Everything in the home; a webhook's secret and the URL of a chat are in the database, because they are used."""
    for file in canary.home.path.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            if file.name.startswith("trainyard.db"):
                for name in ("webhook", "notice"):
                    content = content.replace(canary.known[name].encode(), b"")
            canary.look(f"file {file.name}", content)
    assert [where for where, _ in canary.seen if where == "file service.log"]


def assert_it_would_have_been_found(canary: Planted) -> None:
    for name, secret in canary.known.items():
        canary.look("the test itself", f"x{secret}x".encode())
        assert canary.found() == [f"{name} in the test itself"]
        canary.seen.pop()
