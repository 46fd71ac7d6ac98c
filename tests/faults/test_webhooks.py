"""The server is killed at any moment while it sends: each event arrives, in order, and again only as itself."""

import random
import time
from collections.abc import Sequence

import pytest

from tests.faults.conftest import MakeHome
from tests.faults.service_home import Home, until
from tests.service.receiver import Got, Receiver, receiving, status, verified
from tests.soak_report import SoakReport, chosen, seed

EVENTS = ("created", "status", "checkpoint", "warning")


def firsts(got: Sequence[Got], job_id: str) -> list[str]:
    """Return the ids of a job's deliveries, in the order of their first arrival."""
    about = [one for one in got if one.payload["data"]["job"]["id"] == job_id]
    return list(dict.fromkeys(one.id for one in about))


def happened(home: Home, job_id: str) -> list[str]:
    data = home.get(f"/jobs/{job_id}/events?limit=100").json()["data"]
    return [f"evt_{event['id']}_{job_id.removeprefix('job_')}" for event in data if event["kind"] in EVENTS]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_server_killed_while_it_sends(account: SoakReport, make_home: MakeHome) -> None:
    chance, kills = random.Random(seed()), int(chosen("WEBHOOK_KILLS", 10))
    home = make_home(slots=2)
    home.environment["TRAINYARD_WEBHOOK_NETWORKS"] = "127.0.0.0/8"
    jobs: list[str] = []
    with receiving() as receiver:
        home.start()
        secret = home.post("/webhooks", {"url": receiver.url, "events": ["*"]}).json()["secret"]
        for _ in range(kills):
            make_difficult(receiver, chance)
            jobs += [home.submit(ranks="1", steps="12", pace="0.02") for _ in range(2)]
            time.sleep(chance.uniform(0.0, 2.0))
            home.kill()
            account.faults["server killed"] += 1
            receiver.hold.set()
            home.start()
        receiver.answer = status(204)
        for job_id in jobs:
            home.wait(job_id, "succeeded")
        for job_id in jobs:
            require_delivered(home, receiver, job_id)
        got = list(receiver.got)
    assert all(verified(secret, one) for one in got)
    assert len({(one.id, one.body) for one in got}) == len({one.id for one in got}), "again, but never otherwise"
    account.faults["event"] += len({one.id for one in got})
    account.faults["event sent more than once"] += len(got) - len({one.id for one in got})
    account.invariants.append("each event of each job arrived, in the job's order, and again only to the byte")


def require_delivered(home: Home, receiver: Receiver, job_id: str) -> None:
    wanted = happened(home, job_id)
    until(lambda: len(firsts(receiver.got, job_id)) >= len(wanted), 240, "all events were delivered")
    assert firsts(receiver.got, job_id) == wanted


def make_difficult(receiver: Receiver, chance: random.Random) -> None:
    """It takes all, refuses some, or does not answer before the server is dead."""
    refuse = chance.random() < 0.3
    receiver.answer = status(503 if refuse else 204)
    if chance.random() < 0.4:
        receiver.hold.clear()
