"""Slurm's settings and spec fields: what is valid, and what is rejected with its JSON pointer."""

from pathlib import Path
from typing import Any

import pytest

from trainyard.service.errors import SpecInvalid
from trainyard.service.jobs.submission import HostLimits, kind_of, validate_spec
from trainyard.service.launch.slurm.config import ALLOWED, RESERVED, SlurmSetup
from trainyard.service.settings import InvalidSettings, Settings

ON = {"TRAINYARD_SLURM": "on"}


def settings(tmp_path: Path, **environment: str) -> Settings:
    return Settings.read({"TRAINYARD_DATA_ROOTS": str(tmp_path), **environment}, home=tmp_path / "home")


def accepted(tmp_path: Path, resources: dict[str, Any], **environment: str) -> Any:
    (tmp_path / "corpus.jsonl").write_text('{"text": "one"}\n')
    host = HostLimits(settings(tmp_path, **environment), ())
    raw = {"data": {"data_path": str(tmp_path / "corpus.jsonl")}, "resources": resources}
    return validate_spec(raw, host), host


def refused(tmp_path: Path, resources: dict[str, Any], **environment: str) -> dict[str, str]:
    with pytest.raises(SpecInvalid) as told:
        accepted(tmp_path, resources, **environment)
    return {problem["pointer"]: problem["message"] for problem in told.value.extra["errors"]}


def test_slurm_is_not_used_unless_asked_for(tmp_path: Path) -> None:
    assert settings(tmp_path).slurm is None
    assert settings(tmp_path, **ON).slurm == SlurmSetup()
    with pytest.raises(InvalidSettings, match="TRAINYARD_LAUNCHER must be local"):
        settings(tmp_path, TRAINYARD_LAUNCHER="slurm")


def test_what_is_asked_of_slurm_comes_from_the_settings(tmp_path: Path) -> None:
    found = settings(
        tmp_path,
        **ON,
        TRAINYARD_LAUNCHER="slurm",
        TRAINYARD_SLURM_PARTITION="a,b",
        TRAINYARD_SLURM_ACCOUNT="lab",
        TRAINYARD_SLURM_QOS="long",
        TRAINYARD_SLURM_GPU_TYPE="a100",
        TRAINYARD_SLURM_CONSTRAINT="ib&nvme",
        TRAINYARD_SLURM_TIME_LIMIT="86400",
        TRAINYARD_SLURM_EXTRA="--mem=64G --exclusive",
        TRAINYARD_SLURM_ALLOW="mem, wrap",
        TRAINYARD_SLURM_REPORTS="directory",
        TRAINYARD_SLURM_URL="http://login1:8000",
        TRAINYARD_SLURM_WARNING="600",
        TRAINYARD_SLURM_DEVICE="cpu",
    )
    assert found.launcher == "slurm"
    assert found.slurm is not None
    asked = found.slurm.defaults
    assert (asked.partition, asked.account, asked.qos, asked.gpu_type) == ("a,b", "lab", "long", "a100")
    assert (asked.constraint, asked.time_limit, asked.extra) == ("ib&nvme", 86400, ["--mem=64G", "--exclusive"])
    assert found.slurm.allowed == ("mem",), "what the launcher relies on is nobody else's to give"
    assert (found.slurm.reports, found.slurm.url) == ("directory", "http://login1:8000")
    assert (found.slurm.warning, found.slurm.device) == (600, "cpu")


def test_reserved_options_cannot_be_allowed(tmp_path: Path) -> None:
    found = settings(tmp_path, **ON, TRAINYARD_SLURM_ALLOW=",".join([*sorted(RESERVED), "mem"]))
    assert found.slurm is not None
    assert found.slurm.allowed == ("mem",)
    assert {"array", "clusters", "dependency", "no-kill", "requeue", "version", "wrap"} < RESERVED
    assert not RESERVED & set(ALLOWED)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TRAINYARD_SLURM", "yes"),
        ("TRAINYARD_SLURM_REPORTS", "mail"),
        ("TRAINYARD_SLURM_DEVICE", "tpu"),
        ("TRAINYARD_SLURM_WARNING", "soon"),
        ("TRAINYARD_SLURM_PARTITION", "a b"),
        ("TRAINYARD_SLURM_EXTRA", "--wrap=rm;ls"),
        ("TRAINYARD_SLURM_TIME_LIMIT", "5"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(InvalidSettings, match=name):
        settings(tmp_path, **{**ON, name: value})


def test_a_job_chooses_its_launcher(tmp_path: Path) -> None:
    spec, host = accepted(tmp_path, {"launcher": "slurm", "nnodes": 2, "nproc_per_node": 8}, **ON)
    assert (spec.resources.ranks, kind_of(spec, host)) == (16, "cuda")
    spec, host = accepted(tmp_path, {"launcher": "slurm"}, **ON, TRAINYARD_SLURM_DEVICE="cpu")
    assert kind_of(spec, host) == "cpu"
    spec, _ = accepted(tmp_path, {"nnodes": {"min": 1, "max": 4}}, **ON, TRAINYARD_LAUNCHER="slurm")
    assert spec.resources.launcher == "slurm", "the stored spec says who runs it"
    assert (spec.resources.min_nodes, spec.resources.max_nodes, spec.rows_per_step) == (1, 4, 32 * 8 * 4)


def test_what_cannot_be_run_is_refused_with_its_place(tmp_path: Path) -> None:
    assert refused(tmp_path, {"launcher": "slurm"}).keys() == {"/resources/launcher"}
    assert "/resources/nnodes" in refused(tmp_path, {"nnodes": 2, "device": "cpu"})
    assert "/resources/nnodes" in refused(tmp_path, {"nnodes": 2, "launcher": "local"}, **ON)
    assert refused(tmp_path, {"launcher": "slurm", "nnodes": {"min": 3, "max": 2}}, **ON).keys() == {
        "/resources/nnodes"
    }
    assert refused(tmp_path, {"launcher": "slurm", "device": "cuda:1"}, **ON).keys() == {"/resources/device"}


@pytest.mark.parametrize("line", ["--wrap=ls", "--dependency=none", "--output=x", "--uid=0", "--export=ALL"])
def test_options_that_are_not_on_the_list_are_refused(tmp_path: Path, line: str) -> None:
    asked = {"launcher": "slurm", "slurm": {"extra": ["--mem=1G", line]}}
    assert refused(tmp_path, asked, **ON).keys() == {"/resources/slurm/extra/1"}


@pytest.mark.parametrize(
    "line", ["mem=1G", "--mem=1G --wrap=ls", "--mem=$(ls)", "--mem=1\n#SBATCH --wrap=x", "--mem=1\n", "\n", "-n1"]
)
def test_a_line_is_one_option(tmp_path: Path, line: str) -> None:
    problems = refused(tmp_path, {"launcher": "slurm", "slurm": {"extra": [line]}}, **ON)
    assert all(pointer.startswith("/resources/slurm/extra") for pointer in problems)


def test_the_list_is_the_settings(tmp_path: Path) -> None:
    asked = {"launcher": "slurm", "slurm": {"extra": [f"--{name}" for name in ALLOWED]}}
    spec, _ = accepted(tmp_path, asked, **ON)
    assert len(spec.resources.slurm.extra) == len(ALLOWED)
    assert len(refused(tmp_path, asked, **ON, TRAINYARD_SLURM_ALLOW="mem")) == len(ALLOWED) - 1
