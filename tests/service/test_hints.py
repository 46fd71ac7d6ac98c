"""Each hint and `next` command can be followed: by a request here, or in the test that is named for it."""

import ast
import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.guides.command_lines import misunderstood
from tests.meta.hints import ROOT, commands, hints
from tests.service.harness import ServiceHarness
from tests.service.test_checkpoints import write_checkpoint
from trainyard.client.cli.hints import next_commands
from trainyard.client.cli.parser import trainyard
from trainyard.client.cli.spec_flags import leaf_schemas
from trainyard.contract.parsing import GROUPS
from trainyard.contract.rundir import RunDir
from trainyard.contract.status import JobStatus, Reason

Changes = dict[str, Any]
TRAINING = {"batch_size": 4, "accumulation_steps": 2, "max_steps": 100, "use_compile": True}

RESUMED: dict[str, tuple[Reason, Changes]] = {
    "End other programs on the host": (Reason.HOST_OUT_OF_MEMORY, {}),
    "Free space, or point": (Reason.DISK_FULL, {"save_dir": "HOME/larger"}),
    "Make the directory writable, or": (Reason.DISK_FULL, {"save_dir": "HOME/larger"}),
    "Resume with training.gradient_checkpointing": (Reason.OUT_OF_MEMORY, {"gradient_checkpointing": True}),
    'Resume with resources.parallelism "{}"': (Reason.OUT_OF_MEMORY, {"resources": {"parallelism": "zero1"}}),
    "Resume with more max_minutes": (Reason.LIMIT, {"max_minutes": 5.0}),
    "Correct the file, then resume": (Reason.SPEC_INVALID, {}),
    "Resume with fewer": (Reason.SPEC_INVALID, {"resources": {"nproc_per_node": 1, "device": "cpu"}}),
    "Give the host or its container more memory": (Reason.HOST_OUT_OF_MEMORY, {"resources": {"nproc_per_node": 1}}),
    "End the other processes of this job": (Reason.LAUNCH_FAILED, {}),
    "There are, newest first: {}": (Reason.CHECKPOINT_INVALID, {"step": 5}),
    "Resume on other devices": (Reason.SILENT_CORRUPTION, {"resources": {"device": "cpu"}}),
    "Test this host, then resume": (Reason.SILENT_CORRUPTION, {}),
    "Wait until it is complete": (Reason.DATA_INVALID, {}),
    "Undo the change, or": (Reason.CHECKPOINT_INVALID, {}),
    "Slurm accepts no more of this": (Reason.LAUNCH_FAILED, {}),
    "Slurm's commands must be in": (Reason.LAUNCH_FAILED, {}),
    "Lower resources.nproc_per_node: the": (Reason.LAUNCH_FAILED, {"resources": {"nproc_per_node": 1}}),
    "Lower resources.nnodes": (Reason.LAUNCH_FAILED, {"resources": {"nnodes": 1}}),
    "No nodes have all of it": (Reason.LAUNCH_FAILED, {"resources": {"nnodes": 1, "nproc_per_node": 1}}),
    "Mount the directory that": (Reason.LAUNCH_FAILED, {}),
}
"""Start of a hint -> the reason with which a job failed, and the changes of the resume that the hint advises."""

FORKED: dict[str, tuple[Reason, Changes]] = {
    "Set training.batch_size to": (Reason.OUT_OF_MEMORY, {"training": {"batch_size": 2, "accumulation_steps": 4}}),
    "Lower training.batch_size and": (Reason.OUT_OF_MEMORY, {"training": {"batch_size": 2, "accumulation_steps": 4}}),
    "Resume continues from the last": (
        Reason.DIVERGED,
        {"training": {"learning_rate": 1e-5, "grad_clip": 0.5, "warmup_steps": 3, "on_nonfinite": "rollback"}},
    ),
    "{} training.use_compile to false": (Reason.SPEC_INVALID, {"training": {"use_compile": False}}),
    "Fork the parent again": (Reason.CHECKPOINT_INVALID, {}),
}
"""The same for a fork."""

SUBMITTED: dict[str, Changes] = {
    "The finished part is kept": {"data": {"num_workers": 1}},
    "One row needs too much": {"data": {"max_seq_len": 16}, "model": {"hidden_size": 256}},
    "Leave model.vocab_size out": {},
    "{} Resume once more": {},
    'Set training.optimizer to "{}"': {"training": {"optimizer": "adamw"}},
}
"""The same for a new job."""

ELSEWHERE = {
    "Move it, or add its directory to {}": "tests/worker/test_allowed_paths.py::test_adding_the_directory_is_enough",
    "Allowed actions": "tests/service/test_actions.py::test_allowed_actions_say_why_not",
    "Put back what it was": "tests/service/test_resume_compat.py::test_a_fork_keeps_the_corpus_or_begins_with_another",
    "Undo the change; data": "tests/service/test_resume_compat.py::test_a_fork_keeps_the_corpus_or_begins_with_another",
    "The stacks of all ranks are": "tests/agent/test_attempt.py",
    "Stop it first, or wait": "tests/worker/test_resume_start.py",
    "Give a .pth or": "tests/worker/test_weights.py",
    "Nothing in the file was": "tests/worker/test_weights.py::test_half_precision_weights_come_back_as_float32",
    "Set the model group": "tests/worker/test_weights.py::test_every_mismatch_is_listed",
    "`trainyard corpus check FILE`": "tests/data/test_corpus.py",
    "`sinfo` lists the partitions": "tests/slurm/test_launcher.py",
    "resources.slurm.account or": "tests/slurm/test_launcher.py",
    "resources.slurm.qos or": "tests/slurm/test_launcher.py",
    "The nodes have no such GPUs": "tests/slurm/test_launcher.py",
    "`sinfo -o %f` lists": "tests/slurm/test_launcher.py",
    "Lower resources.slurm.time_limit": "tests/slurm/test_launcher.py",
    "Request less `--mem`": "tests/slurm/test_launcher.py",
    " (--schedule continue": "tests/client/test_commands.py",
    "give --kind if only": "tests/client/test_evaluations.py",
    ": the rate had already decayed": "tests/client/test_forks.py",
    "Ctrl-C detaches": "tests/client/test_watch.py",
    "; if it is the corpus": "tests/client/test_commands.py",
}
"""Start of a hint -> the test in which it is followed, or of what it speaks of."""

COMPUTED = {"{}.", "{} {}", "", " {}", "\n  {}"}
"""Texts that other texts are put into."""


def failed(rig: ServiceHarness, reason: Reason, message: str = "why", **groups: Any) -> str:
    """A job that has failed at step 12, with the checkpoints of steps 5 and 10."""
    job_id, attempt = rig.running(steps=100, **groups)
    for step in (5, 10):
        write_checkpoint(rig.checkpoint(job_id, attempt, step))
    rig.ship(attempt)
    rig.exit(attempt, "failed", reason, step=12, message=message)
    return job_id


def test_no_hint_is_without_a_test_and_no_test_without_a_hint() -> None:
    found = {text for _, text in hints()} - COMPUTED
    known = (*RESUMED, *FORKED, *SUBMITTED, *ELSEWHERE)
    unknown = [text for text in found if not text.startswith(known) and not any(key.startswith(text) for key in known)]
    assert unknown == [], "add these hints to a table above, with the request that follows them"
    named = " ".join(found) + (ROOT / "service/launch/slurm/launcher.py").read_text()
    stale = [key for key in known if key.replace("{} ", "", 1) not in named and key not in named]
    assert stale in ([], ["{} training.use_compile to false"])


@pytest.mark.parametrize("test", sorted(set(ELSEWHERE.values())))
def test_the_named_tests_exist(test: str) -> None:
    file, _, name = test.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not name or name in names


def test_every_field_and_setting_that_a_hint_names_exists() -> None:
    leaves = set(leaf_schemas()) | {"slurm", "timeouts"}
    documented = (ROOT / "docs/reference/settings.md").read_text()
    for file, text in hints():
        for group, leaf in re.findall(r"\b([a-z]+)\.([a-z_]+)", text):
            assert group not in GROUPS or leaf in leaves, (file, text)
        for setting in re.findall(r"TRAINYARD_[A-Z_]+", text):
            assert setting in documented, (file, text)


@pytest.mark.parametrize("command", sorted({command for _, command in commands()}))
def test_every_command_in_a_message_is_understood(command: str) -> None:
    words = command.replace("trainyard {} ", "trainyard submit ").replace("{}", "X").partition("#")[0]
    assert misunderstood(words) == ""


def test_the_commands_after_each_status_are_understood() -> None:
    for status in JobStatus:
        for resumable in (True, False):
            for command in next_commands({"status": status, "resumable": resumable}, "a b'c"):
                program, name, *words = shlex.split(command)
                assert program == "trainyard"
                assert trainyard.commands[name].make_context(name, words).params["job"] == "a b'c"


def test_a_hint_is_followed_by_a_resume(rig: ServiceHarness) -> None:
    (rig.home / "larger").mkdir()
    for reason, changes in RESUMED.values():
        job_id = failed(rig, reason, resources={"nproc_per_node": 2, "device": "cpu"})
        body = {name: str(rig.home / "larger") if name == "save_dir" else value for name, value in changes.items()}
        rig.post_action(job_id, "resume", body)
        assert rig.post_action(job_id, "cancel")["status"] == "cancelled"


def test_a_hint_is_followed_by_a_fork(rig: ServiceHarness) -> None:
    for hint, (reason, changes) in FORKED.items():
        job_id = failed(rig, reason, training=TRAINING)
        answer = rig.client.post(f"/jobs/{job_id}/fork", json={"overrides": changes})
        assert answer.status_code == 201, (hint, answer.text)
        rig.post_action(answer.json()["id"], "cancel")


def test_a_hint_is_followed_by_a_new_job(rig: ServiceHarness) -> None:
    for changes in SUBMITTED.values():
        groups = {group: {**rig.spec().get(group, {}), **fields} for group, fields in changes.items()}
        assert rig.job(rig.submit(**groups))["status"] == "queued"


def test_every_next_action_is_accepted(rig: ServiceHarness) -> None:
    """Its request by the service, and its command by the command line."""
    for reason, saved in itertools.product(Reason, (True, False)):
        message = "training.use_compile: the model cannot be compiled here" if reason is Reason.SPEC_INVALID else "why"
        job_id, attempt = rig.running(steps=100, training=TRAINING, resources={"max_restarts": 0})
        if saved:
            write_checkpoint(rig.checkpoint(job_id, attempt, 10))
            rig.ship(attempt)
        rig.exit(attempt, "failed", reason, step=12, message=message)
        directory = RunDir(rig.home / "runs" / job_id).attempt(1)
        directory.logs.mkdir(parents=True, exist_ok=True)
        for log in (directory.rank_log(0), directory.agent_log):
            log.write_text("log\n")
        actions = (rig.job(job_id)["error"] or {}).get("next") or []
        made = [job_id]
        for action in sorted(actions, key=lambda one: bool(one["action"] == "resume")):
            words = shlex.split(action["command"])
            trainyard.commands[words[1]].make_context(words[1], words[2:])
            answer = rig.client.request(action["method"], action["path"], json=action["body"])
            assert answer.status_code in (200, 201, 202), (action, answer.text)
            made += [answer.json()["id"]] if action["action"] in ("fork", "submit") else []
        for one in made:
            rig.client.post(f"/jobs/{one}/cancel")


def test_a_model_that_cannot_be_compiled_is_forked_without(rig: ServiceHarness) -> None:
    job_id = failed(
        rig, Reason.SPEC_INVALID, "training.use_compile: the model cannot be compiled here", training=TRAINING
    )
    fork, resume, _ = rig.job(job_id)["error"]["next"]
    assert fork["command"] == f"trainyard fork {job_id} --step 10 --set training.use_compile=false"
    assert resume["words"] == "Resume from step 10, once the cause is removed"


def test_a_full_disk_names_the_option_for_another_disk(rig: ServiceHarness) -> None:
    job_id = failed(rig, Reason.DISK_FULL)
    assert "--save_dir" in rig.job(job_id)["error"]["next"][0]["words"]
    assert Path(rig.home).is_dir()
