"""The steps of the Dockerfile, in a fresh virtual environment in place of a base image: what the images contain."""

import json
import os
import re
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

from tests.meta.test_compose import ROOT, stages
from tests.story.service_process import until

pytestmark = pytest.mark.long

TOKEN = "token-of-the-image"


class Image:
    """A folder with the files and the Python of an image. Steps run in it as they stand in the Dockerfile."""

    def __init__(self, folder: Path) -> None:
        self.files = folder / "opt"
        self.files.mkdir()
        self.python = folder / "venv" / "bin" / "python"
        venv.create(folder / "venv", with_pip=True)
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.files / name)

    def run(self, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        programs = f"{self.python.parent}:/usr/bin:/bin"
        inherited = {
            name: text for name, text in os.environ.items() if name.startswith(("PIP_", "UV_", "SSL_", "HOME"))
        }
        return subprocess.run(
            ["sh", "-c", command],
            cwd=self.files,
            env={**inherited, "PATH": programs, "VIRTUAL_ENV": str(self.python.parents[1]), **environment},
            capture_output=True,
            text=True,
            timeout=900,
        )

    def packages(self) -> set[str]:
        listed = json.loads(self.run("uv pip list --format json").stdout)
        return {package["name"] for package in listed}


def installs(stage: str) -> list[str]:
    """The commands of a stage that install Python packages."""
    return [rest for word, rest in stages()[stage] if word == "RUN" and "pip install" in rest]


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Image:
    image = Image(tmp_path_factory.mktemp("control"))
    dependencies, code = installs("control")
    if image.run("pip download --no-deps --dest . uv -c constraints.txt").returncode != 0:
        pytest.skip("no package index can be reached")
    done = image.run(dependencies)
    assert done.returncode == 0, done.stderr
    for word, rest in stages()["code"]:
        assert word == "COPY"
        source, target = rest.split()[0], rest.split()[-1].strip("/")
        if (ROOT / source).is_dir():
            left_out = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / source, image.files / target, symlinks=True, ignore=left_out)
        else:
            for name in rest.split()[:-1]:
                shutil.copy(ROOT / name, image.files / name)
    done = image.run(code)
    assert done.returncode == 0, done.stderr
    return image


def test_the_control_image_has_everything_but_torch(control: Image) -> None:
    assert {"trainyard", "fastapi", "sqlalchemy", "psycopg"} <= control.packages()
    assert not control.packages() & {"torch", "numpy", "tokenizers", "triton"}
    done = control.run("trainyard --version && python -m trainyard.service --help && uv pip check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_service_of_the_image_is_healthy_by_its_own_check(control: Image, tmp_path: Path) -> None:
    """As the compose file starts it, but on a free port."""
    (check,) = [rest for word, rest in stages()["control"] if word == "HEALTHCHECK"]
    words = json.loads(check[check.index("CMD") + len("CMD") :])
    variables = dict(pair.split("=", 1) for word, rest in stages()["control"] if word == "ENV" for pair in rest.split())
    settings = {name: text for name, text in variables.items() if name.startswith("TRAINYARD_")}
    assert settings["TRAINYARD_ON_STOP"] == "save"
    settings |= {"TRAINYARD_HOME": str(tmp_path / "home"), "TRAINYARD_HOST": "127.0.0.1", "TRAINYARD_PORT": "0"}
    environment = {"PATH": f"{control.python.parent}:/usr/bin:/bin", "TRAINYARD_TOKEN": TOKEN, **settings}
    # Every start-up command but the check is that of the image.
    (command,) = [json.loads(rest) for word, rest in stages()["control"] if word == "CMD"]
    service = subprocess.Popen(
        [str(control.python), *command[1:]], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert service.stdout is not None
        url = service.stdout.readline().split()[-1]
        asked = words[-1].replace("http://127.0.0.1:8000", url)
        assert asked != words[-1]
        healthy = lambda: subprocess.run([str(control.python), *words[1:-1], asked]).returncode == 0  # noqa: E731
        until(healthy)
        listed = control.run("trainyard list", TRAINYARD_URL=url, TRAINYARD_TOKEN=TOKEN)
        assert listed.returncode == 0, listed.stderr
    finally:
        service.terminate()
        service.wait(60)
        assert service.stdout is not None
        service.stdout.close()


@pytest.mark.parametrize("torch", ["cuda", "cpu"])
def test_the_worker_image_has_the_build_of_torch_that_was_asked_for(control: Image, torch: str) -> None:
    """Resolved, not downloaded: the CUDA build is 2.7 GB."""
    (step,) = [command for command in installs("worker") if "$TORCH" in command]
    done = control.run(step.replace("uv pip install", "uv pip install --dry-run"), TORCH=torch)
    if done.returncode != 0 and "pytorch.org" in done.stderr:
        pytest.skip("the index of CPU builds cannot be reached")
    assert done.returncode == 0, done.stderr
    chosen = dict(re.findall(r"^ \+ ([\w-]+)==(\S+)$", done.stderr, re.MULTILINE))
    assert {"torch", "numpy", "tokenizers", "safetensors", "pyarrow"} <= chosen.keys()
    cuda = {name for name in chosen if name.startswith("nvidia-") and name != "nvidia-ml-py"}
    if torch == "cuda":
        assert len(cuda) > 10
        assert "+cpu" not in chosen["torch"]
    else:
        assert not cuda
        assert chosen["torch"].endswith("+cpu")
