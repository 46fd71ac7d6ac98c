"""What is read out of squeue's JSON, in the forms of several releases."""

import json
from typing import Any

import pytest

from service.launch.squeue import SlurmJob, hosts, jobs_in

RUNNING: dict[str, Any] = {
    "job_id": 7,
    "name": "trainyard-job_a",
    "comment": "job_a/1",
    "job_state": "RUNNING",
    "state_reason": "None",
    "state_description": "",
    "nodes": "node[1-2]",
    "gres_detail": ["gpu:2(IDX:0-1)", "gpu:a100:3(IDX:0,2-3)"],
}


def job(**changes: Any) -> SlurmJob:
    return jobs_in(json.dumps({"jobs": [{**RUNNING, **changes}]}), "trainyard-")[0]


def test_a_running_job_has_its_nodes_and_gpus() -> None:
    found = job()
    assert (found.id, found.comment, found.pending, found.ended) == ("7", "job_a/1", False, False)
    placement = found.placement(ranks=2)
    assert placement.nodes == ("node1", "node2")
    assert placement.devices == ("node1/cuda:0", "node1/cuda:1", "node2/cuda:0", "node2/cuda:2", "node2/cuda:3")
    assert placement.waiting_for is None


def test_without_gpus_each_rank_has_a_place_on_its_node() -> None:
    assert job(nodes="n1", gres_detail=[]).placement(2).devices == ("n1/cpu:0", "n1/cpu:1")
    assert job(nodes="n1", gres_detail=["license:1(IDX:0)"]).placement(1).devices == ("n1/cpu:0",)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"state_reason": "Resources"}, "Slurm: Resources"),
        ({"state_reason": "None"}, "Slurm: its next look"),
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


def test_only_our_jobs_are_read() -> None:
    text = json.dumps({"jobs": [RUNNING, {"name": "somebody-else's", "job_state": 17}]})
    assert len(jobs_in(text, "trainyard-")) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"jobs": [{"name": "trainyard-x"}]}', '{"jobs": null}'])
def test_what_is_not_understood_is_no_answer(text: str) -> None:
    with pytest.raises(ValueError):
        jobs_in(text, "trainyard-")


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
    assert list(hosts(text)) == names
