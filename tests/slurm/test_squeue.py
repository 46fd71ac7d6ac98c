"""Parsing of squeue's JSON from several releases."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.slurm import fake_commands
from trainyard.service.launch.slurm.queue import SlurmJob, expand_hostlist, parse_squeue

GPUS = ["gpu:2(IDX:0-1)", "gpu:a100:3(IDX:0,2-3)"]
RUNNING: dict[str, Any] = {**fake_commands.RUNNING, "gres_detail": GPUS}


def job(**changes: Any) -> SlurmJob:
    return parse_squeue(json.dumps({"jobs": [{**RUNNING, **changes}]}), "trainyard-")[0]


def test_a_running_job_has_its_nodes_and_gpus() -> None:
    found = job()
    assert (found.id, found.comment, found.pending, found.ended) == ("7", "job_a/1", False, False)
    placement = found.placement(ranks=2)
    assert placement.nodes == ("node1", "node2")
    assert placement.devices == ("node1/cuda:0", "node1/cuda:1", "node2/cuda:0", "node2/cuda:2", "node2/cuda:3")
    assert placement.waiting_for is None


def test_without_gpus_each_rank_has_a_place_on_its_node() -> None:
    assert job(nodes="n1", gres_detail=[]).placement(2).devices == ("n1/cpu:0", "n1/cpu:1")
    mixed = "gpu:a100:1(IDX:0),gpu:h100:2(IDX:2-3),mps:0(IDX:N/A)"
    assert job(nodes="n1", gres_detail=[mixed]).placement(1).devices == ("n1/cuda:0", "n1/cuda:2", "n1/cuda:3")
    assert job(nodes="n1", gres_detail=["license:1(IDX:0)"]).placement(1).devices == ("n1/cpu:0",)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"state_reason": "Resources"}, "Slurm: Resources"),
        ({"state_reason": "None"}, "Slurm: its next scheduling cycle"),
        ({"state_reason": "ReqNodeNotAvail", "state_description": "ReqNodeNotAvail, node2"}, None),
    ],
)
def test_a_pending_job_has_slurm_s_reason(said: dict[str, str], reason: str | None) -> None:
    found = job(job_state="PENDING", nodes="", gres_detail=None, **said)
    assert found.pending
    assert found.placement(1).waiting_for == (reason or "Slurm: ReqNodeNotAvail, node2")
    assert found.placement(1).nodes == ()


@pytest.mark.parametrize(
    ("state", "pending", "ended"),
    [
        ("CONFIGURING", True, False),
        ("COMPLETING", False, False),
        ("SUSPENDED", False, False),
        ("NODE_FAIL", False, True),
        ("CANCELLED", False, True),
        (["RUNNING"], False, False),
        (["CANCELLED", "COMPLETING"], False, False),
        (["COMPLETED"], False, True),
        ("A_STATE_OF_TOMORROW", False, False),
    ],
)
def test_an_unknown_state_is_not_an_end(state: object, pending: bool, ended: bool) -> None:
    found = job(job_state=state)
    assert (found.pending, found.ended) == (pending, ended)


def test_a_job_whose_nodes_boot_waits_for_them() -> None:
    for state in ("CONFIGURING", ["RUNNING", "CONFIGURING"], ["CONFIGURING"]):
        found = job(job_state=state)
        assert (found.pending, found.placement(1).waiting_for) == (True, "Slurm: its nodes, which are booting")


@pytest.mark.parametrize("reason", ["AssocMaxJobsLimit", "QOSMaxJobsPerUserLimit", "PartitionTimeLimit", "Dependency"])
def test_limits_and_quotas_are_reasons_as_slurm_calls_them(reason: str) -> None:
    assert job(job_state="PENDING", state_reason=reason, nodes="").placement(1).waiting_for == f"Slurm: {reason}"


RELEASES = sorted((Path(__file__).parent / "golden").glob("squeue-*.json"))


@pytest.mark.parametrize("file", RELEASES, ids=lambda file: file.stem)
def test_every_release_s_form_is_read(file: Path) -> None:
    running, pending, ended = parse_squeue(file.read_text(), "trainyard-")
    assert (running.id, running.name, running.comment) == ("71", "trainyard-job_a", "job_a/1")
    assert running.placement(1).devices == ("node1/cuda:0", "node1/cuda:1", "node2/cuda:0", "node2/cuda:1")
    assert (pending.pending, pending.placement(1).waiting_for) == (True, "Slurm: Resources")
    assert (ended.ended, ended.state, ended.comment) == (True, "CANCELLED", "job_c/12")


def test_there_are_forms_of_several_releases() -> None:
    assert [file.stem for file in RELEASES] == [f"squeue-{number}" for number in ("22.05", "23.02", "23.11", "24.05")]


def test_a_number_may_come_with_a_word_on_whether_it_is_one() -> None:
    assert job(job_id={"set": True, "infinite": False, "number": 12}).id == "12"
    for nothing in ({"set": False, "infinite": False, "number": 0}, {"set": True, "infinite": True, "number": 0}, "x"):
        with pytest.raises(ValueError):
            job(job_id=nothing)


def test_only_our_jobs_are_read() -> None:
    others: list[dict[str, Any]] = [{"name": "somebody-else's", "job_state": 17}, {}, {"name": None}, {"name": ["x"]}]
    assert len(parse_squeue(json.dumps({"jobs": [RUNNING, *others]}), "trainyard-")) == 1


@pytest.mark.parametrize("name", ["tab\there", "line\nbreak", "\x01\x7f", "\ud800", "\u202etfel", '\\"'])
def test_what_others_call_their_jobs_does_not_matter(name: str) -> None:
    """Some releases write such characters as they are."""
    text = json.dumps({"jobs": [{**RUNNING, "name": "NAME", "comment": "NAME"}, RUNNING]}, ensure_ascii=False)
    for said in (text.replace("NAME", name.replace('\\"', "")), text.replace('"NAME"', json.dumps(name))):
        assert [each.comment for each in parse_squeue(said, "trainyard-")] == ["job_a/1"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"jobs": [{"name": "trainyard-x"}]}', '{"jobs": null}'])
def test_what_is_not_understood_is_no_answer(text: str) -> None:
    with pytest.raises(ValueError):
        parse_squeue(text, "trainyard-")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,12],x", ["n08", "n09", "n10", "n12", "x"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("gpu-[1,3].local", ["gpu-1.local", "gpu-3.local"]),
    ],
)
def test_host_lists_are_spelt_out(text: str, names: list[str]) -> None:
    assert list(expand_hostlist(text)) == names
