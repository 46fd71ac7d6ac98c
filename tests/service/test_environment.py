"""The environment of a run: one documented list, which has every variable that a page or a hint names."""

import re
from pathlib import Path

import pytest

from tests.meta.hints import ROOT, hints
from trainyard.contract.spec import JobSpec
from trainyard.service.launch.base import AttemptRef, Launch
from trainyard.service.launch.environment import INHERITED, INHERITED_PREFIXES, WorkerEnvironment, inherited
from trainyard.worker.agent.torchrun import ALLOCATOR, rank_environment

SETTINGS = ROOT / "docs/reference/settings.md"
VARIABLE = re.compile(r"`([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+|CXX|CC|[a-z]+_proxy)(?:=[^`]*)?`")

NOT_OF_RUNS = {
    "RUN_DIR", "PYTEST_ARGS", "NO_COLOR", "SLURM_CONF", "STRICT_SPREAD", "RAY_JOB_STOP_WAIT_TIME_S",
    "JOB_COMPLETION_INDEX", "TCP_NODELAY", "FLAG_ALIASES", "SLURM_PROCID", "SLURM_LAUNCH_NODE_IPADDR",
    "SO_PEERCRED", "COMPOSE_PROFILES", "DATA_DIR", "POSTGRES_PASSWORD", "WORLD_SIZE", "RANK",
    "RANK_DEATHS", "WEBHOOK_KILLS",
    "UV_TORCH_BACKEND",
}  # fmt: skip
"""Names in the pages that are no variables of a run."""


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def named() -> set[str]:
    """The variables that pages and hints name, without the service's own settings."""
    texts = [*(page.read_text() for page in pages()), *(f"`{word}`" for _, text in hints() for word in text.split())]
    texts.append("`CXX`")  # it is in a part of a computed hint
    found = {name for text in texts for name in VARIABLE.findall(text)}
    return {name for name in found - NOT_OF_RUNS if not name.startswith("TRAINYARD_")}


def in_a_rank(tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a rank that a service with ``environment`` launches."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    spec = JobSpec.model_validate({"data": {"data_path": "/x"}})
    launch = Launch(AttemptRef("job_a", 1), "att_a", spec, (), "token")
    return rank_environment(WorkerEnvironment(tmp_path, tmp_path).of(launch))


def test_every_variable_that_a_page_or_a_hint_names_reaches_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = named()
    assert {"RAYON_NUM_THREADS", "CXX", "CUDA_VISIBLE_DEVICES", "WANDB_MODE"} <= names
    reached = in_a_rank(tmp_path, dict.fromkeys(names, "value"), monkeypatch)
    assert [name for name in sorted(names) if reached.get(name) != "value"] == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ALLOCATOR),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
    ],
)
def test_the_allocators_of_a_gpu_are_chosen_unless_the_user_has_chosen(
    given: dict[str, str], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert in_a_rank(tmp_path, given, monkeypatch).get("PYTORCH_ALLOC_CONF") == expected


@pytest.mark.parametrize(
    "name",
    ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUBLAS_WORKSPACE_CONFIG", "http_proxy", "https_proxy", "no_proxy"],
)
def test_what_0_1_withheld_reaches_the_ranks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_a_rank(tmp_path, {name: "value"}, monkeypatch)[name] == "value"


def test_the_documented_list_is_that_of_the_code() -> None:
    section = SETTINGS.read_text().partition("## Environment of runs")[2].partition("| for |")[2]
    documented = set(re.findall(r"`([A-Za-z_]+\*?)`", section.partition("\n\n")[0])) - {"use_compile"}
    assert documented == {*INHERITED, *(f"{prefix}*" for prefix in INHERITED_PREFIXES)}


def test_secrets_and_the_ranks_of_another_torchrun_do_not_reach_them() -> None:
    secrets = ("TRAINYARD_TOKEN", "TRAINYARD_DATABASE_URL", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "RANK", "WORLD_SIZE")
    assert inherited(dict.fromkeys((*secrets, "MASTER_ADDR", "PYTHONPATH", "TORCHELASTIC_RUN_ID"), "x")) == {}
