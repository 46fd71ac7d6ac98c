"""The compose file and the Dockerfile match the documentation. No container engine is needed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPOSE = shutil.which("docker-compose")


def rendered(*profiles: str, **environment: str) -> subprocess.CompletedProcess[str]:
    assert COMPOSE is not None
    flags = [flag for profile in profiles for flag in ("--profile", profile)]
    return subprocess.run(
        [COMPOSE, *flags, "config"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.skipif(COMPOSE is None, reason="docker-compose is not installed")
def test_compose_is_valid_and_refuses_to_start_without_secrets() -> None:
    good = rendered("gpu", TRAINYARD_TOKEN="t", POSTGRES_PASSWORD="p")
    assert good.returncode == 0, good.stderr
    assert "capabilities" in good.stdout
    bad = rendered()
    assert bad.returncode != 0
    assert "TRAINYARD_TOKEN" in bad.stderr or "POSTGRES_PASSWORD" in bad.stderr


def test_the_control_image_has_no_torch_and_nothing_runs_as_root() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    control = lines[: lines.index("FROM control AS worker")]
    assert not any("[worker]" in line for line in control)
    assert [line for line in lines if line.startswith("USER")][-1] == "USER trainyard"
    assert "USER trainyard" in control
