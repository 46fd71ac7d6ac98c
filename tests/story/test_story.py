"""The main job on real text, with real ranks: what the README tells, asserted."""

import math
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.corpus import write_docstrings
from tests.story.service_process import RANKS, Served, until
from trainyard.contract.processes import ProcessIdentity, find_by_marker
from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import JobSpec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 60
TRIES = 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "corpus.jsonl"
    assert write_docstrings(file, 400) == 400
    return file


def spec(corpus: Path, **resources: Any) -> dict[str, Any]:
    return {
        "name": "story",
        "model": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        "data": {"data_path": str(corpus), "max_seq_len": 64},
        "training": {
            "max_steps": STEPS,
            "batch_size": 4,
            "accumulation_steps": 2,
            "learning_rate": 2e-3,
            "warmup_steps": 0,
        },
        "checkpoint": {"save_interval": 20},
        "reporting": {"log_interval": 1},
        "resources": {"device": "cpu", "nproc_per_node": RANKS, "max_restarts": 0, **resources},
    }


def final_sha256(served: Served, job_id: str) -> str:
    newest = served.get(f"/jobs/{job_id}/checkpoints").json()["data"][0]
    assert newest["step"] == STEPS
    return str(newest["sha256"])


@pytest.fixture(scope="module")
def untouched(served: Served, corpus: Path) -> str:
    job_id = served.submit(spec(corpus))
    served.wait(job_id, "succeeded")
    return job_id


def catch(served: Served, wanted: dict[str, Any], step: int, act: Callable[[str], bool]) -> str:
    """Let ``act(job_id)`` act on a run that has reached ``step``, and return its id.

    The runs are short, so on a busy machine one may end between the look and the act. ``act`` returns whether it came
    in time; if not, the run has ended, and there is another one.
    """

    def at_step(job_id: str) -> bool:
        return served.step(job_id) >= step

    for _ in range(TRIES):
        job_id = served.submit(wanted)
        until(partial(at_step, job_id))
        if act(job_id):
            return job_id
    raise AssertionError(f"{TRIES} runs have ended before anything was done to them")


def test_a_run_that_nobody_touches_succeeds_and_learns(served: Served, untouched: str) -> None:
    job = served.job(untouched)
    rows = served.metrics(untouched)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {row["attempt"] for row in rows} == {1}
    assert rows[0]["loss"] == pytest.approx(math.log(259), rel=0.02)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert job["progress"]["step"] == STEPS
    assert job["summary"]
    listed = served.get(f"/jobs/{untouched}/checkpoints").json()["data"]
    assert [item["step"] for item in listed] == [60, 40, 20]
    assert all(Path(item["path"]).is_dir() for item in listed)


def test_the_learning_rate_is_the_formula_at_every_step(served: Served, untouched: str) -> None:
    for row in served.metrics(untouched):
        expected = 2e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * row["step"] / STEPS)))
        assert abs(row["learning_rate"] - expected) < 1e-12


@pytest.mark.long
def test_torchrun_killed_and_resumed_gives_the_same_weights(served: Served, untouched: str, corpus: Path) -> None:
    def kill_torchrun(job_id: str) -> bool:
        sent = [process.send(signal.SIGKILL) for process in torchruns(job_id)]
        ended = served.wait(job_id, "failed", "interrupted", "succeeded")
        return bool(sent == [True] and ended["status"] != "succeeded" and ended["progress"]["step"] < STEPS)

    job_id = catch(served, spec(corpus), 30, kill_torchrun)
    assert "torchrun was killed by SIGKILL" in served.job(job_id)["message"]
    until(lambda: not ranks(job_id))
    assert served.post(f"/jobs/{job_id}/resume").status_code == 202
    served.wait(job_id, "succeeded")
    assert final_sha256(served, job_id) == final_sha256(served, untouched)
    one, two = (weights(served, job) for job in (job_id, untouched))
    assert one.read_bytes() == two.read_bytes()
    rows, expected = served.metrics(job_id), served.metrics(untouched)
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    assert {row["attempt"] for row in rows} == {1, 2}
    attempts = served.get(f"/jobs/{job_id}/attempts").json()["data"]
    assert len(attempts) == 2


@pytest.mark.long
def test_a_rank_killed_is_recovered_without_anybody(served: Served, untouched: str, corpus: Path) -> None:
    def kill_rank_1(job_id: str) -> bool:
        sent = [rank.send(signal.SIGKILL) for rank in ranks(job_id) if rank.variable("RANK") == "1"]
        served.wait(job_id, "succeeded")
        return sent == [True] and "rank 1 was killed by SIGKILL" in served.get(f"/jobs/{job_id}/events").text

    job_id = catch(served, spec(corpus, max_restarts=3), 25, kill_rank_1)
    assert final_sha256(served, job_id) == final_sha256(served, untouched)
    told = served.get(f"/jobs/{job_id}/events").json()["data"]
    assert any("rank 1 was killed by SIGKILL" in str(event) for event in told), told


@pytest.mark.long
def test_paused_and_resumed_is_the_same_run(served: Served, untouched: str, corpus: Path) -> None:
    def pause(job_id: str) -> bool:
        requested = served.post(f"/jobs/{job_id}/pause").status_code
        assert requested == 202 or served.job(job_id)["status"] == "succeeded"
        return bool(served.wait(job_id, "paused", "succeeded")["status"] == "paused")

    job_id = catch(served, spec(corpus), 10, pause)
    paused = served.job(job_id)
    assert paused["resumable"]
    assert paused["checkpoint"]["step"] < STEPS
    assert ranks(job_id) == []
    assert served.post(f"/jobs/{job_id}/resume").status_code == 202
    served.wait(job_id, "succeeded")
    assert final_sha256(served, job_id) == final_sha256(served, untouched)


@pytest.mark.long
def test_the_server_killed_while_it_runs_costs_nothing(served: Served, untouched: str, corpus: Path) -> None:
    def kill_the_server(job_id: str) -> bool:
        served.kill()
        attempt = RunDir(served.home / "runs" / job_id).attempt(1)
        before = attempt.read_step() or 0
        until(lambda: (attempt.read_step() or 0) > before + 3 or attempt.exit.exists())
        went_on = (attempt.read_step() or 0) > before + 3
        served.start()
        job = served.wait(job_id, "succeeded")
        assert job["attempt"] == 1
        return went_on

    job_id = catch(served, spec(corpus), 5, kill_the_server)
    rows = served.metrics(job_id)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {row["attempt"] for row in rows} == {1}
    assert final_sha256(served, job_id) == final_sha256(served, untouched)


@pytest.mark.long
def test_a_run_that_ends_while_the_server_is_away_has_ended_well(served: Served, corpus: Path) -> None:
    job_id = served.submit(spec(corpus))
    until(lambda: served.step(job_id) >= 5)
    served.kill()
    exit_report = RunDir(served.home / "runs" / job_id).attempt(1).exit
    until(exit_report.exists)
    served.start()
    served.wait(job_id, "succeeded")
    assert [row["step"] for row in served.metrics(job_id)] == list(range(1, STEPS + 1))


def test_a_broken_line_is_named_by_its_number(served: Served, corpus: Path) -> None:
    broken = corpus.with_name("broken.jsonl")
    broken.write_text('{"text": "a good line, long enough to be read"}\n' * 6 + '{"text": \n')
    wanted = spec(broken)
    wanted["data"]["max_bad_lines"] = 0.0
    job_id = served.submit(wanted)
    failed = served.wait(job_id, "failed")
    assert failed["reason"] == "data_invalid"
    assert "line 7" in failed["error"]["message"]


def ranks(job_id: str) -> list[ProcessIdentity]:
    return [process for process in all_of(job_id) if process.variable("RANK") is not None]


def torchruns(job_id: str) -> list[ProcessIdentity]:
    """The only torchrun of a run that continues."""
    return [p for p in all_of(job_id) if p.variable("RANK") is None and p.variable("TRAINYARD_ATTEMPT_ID") is None]


def all_of(job_id: str) -> list[ProcessIdentity]:
    return [process for number in (1, 2, 3) for process in find_by_marker(f"{job_id}/{number}")]


def weights(served: Served, job_id: str) -> Path:
    wanted = JobSpec.model_validate_json((served.home / "runs" / job_id / "attempt-0001" / "spec.json").read_bytes())
    products = RunDir(served.home / "runs" / job_id).artifacts(wanted.checkpoint.save_dir)
    return products.weights(wanted.checkpoint.save_weight, wanted.model.hidden_size, wanted.model.use_moe)
