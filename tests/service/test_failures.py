"""The failure card: each next action is a request that the API accepts and a command that exists."""

import shlex
from typing import Any

import pytest

from tests.service.harness import ServiceHarness
from tests.service.test_checkpoints import write_checkpoint
from trainyard.client.cli.parser import trainyard
from trainyard.client.cli.spec_flags import spec_of
from trainyard.contract.spec import TrainingSpec
from trainyard.contract.status import Reason
from trainyard.service.jobs.failures import FailureContext, next_actions

MEMORY = 61_000_000_000


def failed(rig: ServiceHarness, reason: Reason, saved: int | None = None, **groups: Any) -> dict[str, Any]:
    """A job whose attempt ended at step 12, with a checkpoint of step ``saved``."""
    job_id, attempt = rig.running(steps=100, **groups)
    for step in range(1, 13):
        attempt.metric(step, memory_bytes=MEMORY + step)
    if saved is not None:
        write_checkpoint(rig.checkpoint(job_id, attempt, saved))
    rig.ship(attempt)
    rig.exit(attempt, "failed", reason, step=12, message="why")
    return rig.job(job_id)


def named(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What helps, by what it does; each is a command that the client knows."""
    found = job["error"]["next"]
    for one in found:
        program, *words = shlex.split(one["command"])
        assert program == "trainyard"
        trainyard.commands[words[0]].make_context(words[0], words[1:])
    return {one["action"]: one for one in found}


def test_out_of_memory_is_forked_with_fewer_rows_at_once(rig: ServiceHarness) -> None:
    job = failed(
        rig, Reason.OUT_OF_MEMORY, saved=10, training={"batch_size": 4, "max_steps": 100, "accumulation_steps": 2}
    )
    assert job["error"]["peak_memory_bytes"] == MEMORY + 12
    helps = named(job)
    assert list(helps) == ["resume", "fork", "logs"]
    assert helps["fork"]["words"] == "Fork from step 10 with batch_size 2 and accumulation_steps 4"
    assert helps["fork"]["command"].endswith(
        " --step 10 --set training.batch_size=2 --set training.accumulation_steps=4"
    )
    assert helps["resume"]["words"] == "Resume from step 10, with gradient_checkpointing true"
    assert helps["resume"]["command"].endswith(" --set training.gradient_checkpointing=true")
    made = rig.client.request(helps["fork"]["method"], helps["fork"]["path"], json=helps["fork"]["body"])
    assert made.status_code == 201, made.text
    assert made.json()["spec"]["training"]["batch_size"] == 2
    rig.post_action(job["id"], "resume", helps["resume"]["body"])
    resumed = rig.job(job["id"])
    assert resumed["error"] is None
    assert resumed["spec"]["training"]["gradient_checkpointing"] is True


def test_each_shortage_of_memory_has_the_next_step(rig: ServiceHarness) -> None:
    """Checkpointing, then zero1, then fsdp; with fsdp, a device with more memory. One rank has nothing to split."""
    found = []
    for changes in ({}, {"parallelism": "ddp"}, {"parallelism": "zero1"}, {"parallelism": "fsdp"}):
        training = {"gradient_checkpointing": bool(changes)}
        resources = {"nproc_per_node": 2, "device": "cpu", **changes}
        job = failed(rig, Reason.OUT_OF_MEMORY, saved=10, training=training, resources=resources)
        found.append(named(job)["resume"])
        rig.post_action(job["id"], "resume", found[-1]["body"])
        rig.post_action(job["id"], "cancel")
    assert [one["body"] for one in found] == [
        {"gradient_checkpointing": True},
        {"resources": {"parallelism": "zero1"}},
        {"resources": {"parallelism": "fsdp"}},
        {},
    ]
    assert found[1]["words"] == "Resume from step 10, with parallelism zero1"
    assert found[3]["words"] == "Resume from step 10, on a device with more memory"
    single = failed(rig, Reason.HOST_OUT_OF_MEMORY, saved=10, training={"gradient_checkpointing": True})
    assert named(single)["resume"]["body"] == {}


def test_without_a_checkpoint_the_same_spec_is_submitted_with_changes(rig: ServiceHarness) -> None:
    groups: dict[str, Any] = {"name": "it's mine", "labels": {"team": "a b"}, "model": {"hidden_size": 64}}
    job = failed(rig, Reason.OUT_OF_MEMORY, **groups)
    again = named(job)["submit"]
    assert again["words"] == "Submit it again, with batch_size 16 and accumulation_steps 16"
    made = rig.client.post(again["path"], json=again["body"]).json()["spec"]
    changed = {**job["spec"]["training"], "batch_size": 16, "accumulation_steps": 16}
    assert made == {**job["spec"], "training": changed}
    assert "timeouts" not in again["command"]
    words = shlex.split(again["command"])[2:]
    sets = trainyard.commands["submit"].make_context("submit", words).params["set"]
    assert spec_of({}, {}, sets, rig.home) == again["body"]


@pytest.mark.parametrize(
    ("reason", "saved", "expected"),
    [
        (Reason.DIVERGED, 10, ["fork", "resume", "logs"]),
        (Reason.DIVERGED, None, ["submit", "resume", "logs"]),
        (Reason.SPEC_INVALID, None, ["submit", "logs"]),
        (Reason.DATA_INVALID, 10, ["resume", "logs"]),
        (Reason.DISK_FULL, 10, ["resume", "logs"]),
        (Reason.HOST_OUT_OF_MEMORY, 10, ["resume", "fork", "logs"]),
    ],
)
def test_what_helps(rig: ServiceHarness, reason: Reason, saved: int | None, expected: list[str]) -> None:
    helps = named(failed(rig, reason, saved))
    assert list(helps) == expected
    if reason is Reason.DIVERGED and saved:
        assert helps["fork"]["body"]["overrides"] == {"training": {"learning_rate": 2.5e-4}}


def test_a_crash_starts_again_by_itself_and_says_where_to_read(rig: ServiceHarness) -> None:
    job_id, attempt = rig.running(steps=100)
    rig.exit(attempt, "crashed", Reason.WORKER_CRASHED, step=3)
    helps = named(rig.job(job_id))
    assert helps["resume"]["words"] == "Resume from the beginning, now, without waiting for its restart"
    assert helps["logs"]["command"] == f"trainyard logs {job_id} --attempt 1 --rank 0 --tail 50"
    assert helps["logs"]["path"] == f"/jobs/{job_id}/logs?attempt=1&rank=0&tail=50"


def test_ends_that_only_the_agent_saw_and_forks_without_a_checkpoint() -> None:
    spec = {"training": TrainingSpec(batch_size=1).model_dump(mode="json")}
    lost = FailureContext("job_a", 2, Reason.NODE_LOST, None, spec, None, True, True, False)
    resume, log = next_actions(lost)
    assert resume.words == "Resume from its parent's checkpoint"
    assert log.command == "trainyard logs job_a --attempt 2 --rank agent --tail 50"
    assert log.path == "/jobs/job_a/logs?attempt=2&rank=agent&tail=50"
    own = FailureContext("job_a", 2, "something newer", 3, spec, 400, True, False, False)
    assert [one.words for one in next_actions(own)] == ["Read the log of rank 3"]


@pytest.mark.parametrize("batch_size", [1, 2, 7, 9, 32, 65536])
def test_a_smaller_batch_has_the_same_rows_in_a_step(batch_size: int) -> None:
    training = TrainingSpec(batch_size=batch_size, accumulation_steps=5)
    smaller = training.smaller_batch()
    if batch_size == 1:
        assert smaller is None
        return
    assert smaller is not None
    assert smaller[0] < batch_size
    assert smaller[0] * smaller[1] == batch_size * 5
