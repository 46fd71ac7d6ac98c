"""The batch script, compared with golden files."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import NodeRange, ResourcesSpec, SlurmSpec
from trainyard.service.launch.base import AttemptRef
from trainyard.service.launch.slurm.script import SbatchScript, job_name, merge_options, preparation_options, render

GOLDEN = Path(__file__).with_name("golden")

SERVICE = SlurmSpec(partition="train", account="lab", time_limit=86400, extra=["--mem=64G"])
WISHED = SlurmSpec(account="mine", qos="long", gpu_type="a100", constraint="ib&nvme", extra=["--exclusive"])
TWO_NODES = SbatchScript(
    name=AttemptRef("job_abc", 3, "slurm"),
    attempt=RunDir(Path("/shared/home/runs/job_abc")).attempt(3),
    resources=ResourcesSpec(nnodes=2, nproc_per_node=8, launcher="slurm", slurm=WISHED),
    options=merge_options(WISHED, SERVICE),
    gpus=True,
    warning=300.0,
    agent=("/opt/trainyard/bin/python", "-P", "-m", "trainyard.worker.agent"),
)
ON_CPUS = replace(
    TWO_NODES,
    attempt=RunDir(Path('/shared/my "own" home/runs/job_abc')).attempt(3),
    resources=ResourcesSpec(nnodes=NodeRange(min=1, max=2), nproc_per_node=2, launcher="slurm"),
    options=SlurmSpec(time_limit=61),
    gpus=False,
)


@pytest.mark.parametrize(("name", "batch"), [("two_nodes", TWO_NODES), ("on_cpus", ON_CPUS)])
def test_the_script_is_the_golden_one(name: str, batch: SbatchScript) -> None:
    assert render(batch) == (GOLDEN / f"{name}.sh").read_text()


@pytest.mark.parametrize("name", ["two_nodes", "on_cpus"])
def test_the_golden_scripts_are_scripts(name: str) -> None:
    done = subprocess.run(["bash", "-n", str(GOLDEN / f"{name}.sh")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_spec_overrides_the_service_settings() -> None:
    asked = merge_options(WISHED, SERVICE)
    assert (asked.partition, asked.account, asked.time_limit) == ("train", "mine", 86400)
    assert asked.extra == ["--mem=64G", "--exclusive"]
    assert merge_options(SlurmSpec(), SERVICE) == SERVICE


def test_without_a_time_limit_only_the_warning_is_asked_for() -> None:
    script = render(replace(ON_CPUS, options=SlurmSpec(), warning=90.5))
    assert "--time" not in script
    assert "#SBATCH --signal=B:USR1@91\n" in script


def test_all_attempts_of_a_job_have_one_name() -> None:
    assert f"--job-name={job_name('job_abc')}\n" in render(TWO_NODES)
    assert "--comment=job_abc/3\n" in render(TWO_NODES)


def test_a_preparation_asks_for_no_gpus() -> None:
    gpus = ["--gpus-per-task=1", "--cpus-per-gpu=8", "--mem-per-gpu=64G", "--gpu-freq=high", "--exclusive"]
    asked = SlurmSpec(partition="train", constraint="ib", gpu_type="a100", extra=[*gpus, "--mem=8G", "--nodelist=n1"])
    same = preparation_options(asked)
    assert (same.partition, same.constraint, same.gpu_type) == ("train", "ib", None)
    assert same.extra == ["--mem=8G", "--nodelist=n1"]
    elsewhere = preparation_options(merge_options(asked, SlurmSpec(prepare_partition="cpu", account="lab")))
    assert (elsewhere.partition, elsewhere.constraint, elsewhere.account) == ("cpu", None, "lab")
    assert elsewhere.extra == ["--mem=8G"]
    script = render(replace(TWO_NODES, options=elsewhere, resources=ResourcesSpec(nproc_per_node=4), gpus=False))
    assert "#SBATCH --partition=cpu\n#SBATCH --account=lab\n" in script
    assert "gres" not in script
    assert "#SBATCH --cpus-per-task=4\n" in script
