"""Random kills of everything: thousands with fake ranks, hundreds with real gloo ranks.

`make test` runs a few of the former; tests/story kills real ranks.

TRAINYARD_SOAK_KILLS and _SECONDS choose number and longest time of the long forms.
"""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.corpus import write_docstrings
from tests import soak_report
from tests.faults.conftest import MakeHome
from tests.faults.fake_ranks import damage
from tests.faults.invariants import Sampler, check_weights
from tests.faults.killer import Killer
from tests.faults.service_home import Home
from tests.soak_report import SoakReport
from trainyard.worker.checkpoint.files import verify

FAKE_STEPS = 40
GLOO_STEPS = 40


def fake_kills(make_home: MakeHome, account: SoakReport, seed: int, kills: int, seconds: float) -> None:
    home = make_home(slots=4, scale=0.02)

    def submit() -> str:
        return home.submit(max_restarts=1000, steps=str(FAKE_STEPS), pace="0.02")

    killer = Killer(home, submit, seed, 2, 0.6, damage)
    with Sampler(home) as sampler:
        killer.run(kills, seconds, sampler)
        for job in killer.jobs:
            check_weights(home, job, FAKE_STEPS)
        killer.report(account, sampler)


@pytest.mark.long
def test_a_few_kills_of_fake_ranks(make_home: MakeHome, account: SoakReport) -> None:
    fake_kills(make_home, account, seed=7, kills=6, seconds=60)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_thousands_of_kills_of_fake_ranks(make_home: MakeHome, account: SoakReport) -> None:
    fake_kills(
        make_home,
        account,
        soak_report.seed(),
        int(soak_report.chosen("KILLS", 2000)),
        soak_report.chosen("SECONDS", 3600),
    )


def gloo_spec(corpus: Path) -> dict[str, Any]:
    return {
        "model": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        "data": {"data_path": str(corpus), "max_seq_len": 64},
        "training": {"max_steps": GLOO_STEPS, "batch_size": 4, "accumulation_steps": 2},
        "checkpoint": {"save_interval": 5},
        "reporting": {"log_interval": 1},
        "resources": {"device": "cpu", "nproc_per_node": 2, "max_restarts": 1000},
    }


def final_weights(home: Home, job_id: str) -> tuple[str, bytes]:
    """(sha256 of the last checkpoint's model, the weights file)."""
    newest = home.get(f"/jobs/{job_id}/checkpoints").json()["data"][0]
    assert newest["step"] == GLOO_STEPS
    return str(newest["sha256"]), (home.run(job_id).path / "out" / "pretrain_64.pth").read_bytes()


def gloo_kills(make_home: MakeHome, account: SoakReport, seed: int, kills: int, seconds: float) -> None:
    home = make_home(slots=2, scale=0.02, real_ranks=True)
    home.damage = verify
    corpus = home.path / "docstrings.jsonl"
    write_docstrings(corpus, 400)

    def submit() -> str:
        answer = home.post("/jobs", gloo_spec(corpus))
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    home.start()
    untouched = submit()
    home.wait(untouched, "succeeded", seconds=120)
    home.kill()
    killer = Killer(home, submit, seed, 1, 12.0, verify)
    with Sampler(home) as sampler:
        killer.run(kills, seconds, sampler)
        for job in killer.jobs:
            assert final_weights(home, job) == final_weights(home, untouched), "I7"
            assert losses(home, job) == losses(home, untouched), "I4"
        killer.report(account, sampler)


def losses(home: Home, job_id: str) -> list[float]:
    return [row["loss"] for row in home.metrics(job_id)]


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_hundreds_of_kills_of_gloo_ranks(make_home: MakeHome, account: SoakReport) -> None:
    gloo_kills(
        make_home,
        account,
        soak_report.seed(),
        int(soak_report.chosen("KILLS", 200)),
        soak_report.chosen("SECONDS", 7200),
    )
