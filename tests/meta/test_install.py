"""The wheel: what is in it, and that it works beside MiniMind's own packages in one environment."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.guides.code_blocks import DOCS, blocks
from tests.story.service_process import free_port

ROOT = Path(__file__).parents[2]
PACKAGES = ("client", "contract", "mcp_tools", "migrations", "model", "service", "worker")


def run(*arguments: str, cwd: Path, path: str = "") -> str:
    """Run Python and return its output."""
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def run_installed(installed: Path, *arguments: str, cwd: Path) -> str:
    """Run Python with the wheel and its dependencies. -S hides the checkout, which is installed in development mode."""
    dependencies = [folder for folder in sys.path if folder.endswith("-packages")]
    return run("-S", *arguments, cwd=cwd, path=os.pathsep.join([str(installed), *dependencies]))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built without a network, from a copy: setuptools writes into the source folder."""
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    pytest.importorskip("pip", reason="pip is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*PACKAGES, "docs", "src"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run("-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(source), cwd=folder)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel."""
    target = tmp_path_factory.mktemp("installed")
    options = ("--quiet", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check")
    run("-m", "pip", "install", *options, "--target", str(target), str(wheel), cwd=target)
    return target


@pytest.fixture
def minimind(tmp_path: Path) -> Path:
    """A folder with MiniMind's layout. Its trainers are run from `trainer/` and import `model` from the parent."""
    files = {
        "model/__init__.py": "",
        "model/model_minimind.py": "class MiniMindForCausalLM: ...\n",
        "trainer/__init__.py": "",
        "trainer/trainer_utils.py": "from model.model_minimind import MiniMindForCausalLM as Model\n",
        "trainer/train_pretrain.py": (
            "import os, sys\n"
            "sys.path.append(os.path.abspath(os.path.join(os.path.dirname(__file__), '..')))\n"
            "from trainer.trainer_utils import Model\n"
            "import trainyard, trainyard.worker.agent.__main__, trainyard.model.decoder\n"
            "print(Model.__module__, sys.modules['model'].__file__, trainyard.__file__)\n"
        ),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_wheel_has_the_packages_below_one_name(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    top = {name.partition("/")[0] for name in names}
    assert top == {"trainyard", next(name for name in top if name.endswith(".dist-info"))}
    assert {f"trainyard/{package}/__init__.py" for package in PACKAGES} < names
    assert {"trainyard/__init__.py", "trainyard/py.typed", "trainyard/migrations/script.py.mako"} < names
    assert any(name.startswith("trainyard/service/dashboard/static/") for name in names)
    pages = {f"trainyard/{page.relative_to(ROOT)}" for page in (ROOT / "docs").rglob("*.md")}
    assert {name for name in names if name.startswith("trainyard/docs/")} == pages


def test_the_wheel_has_the_license_that_it_names(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
        license_text = archive.read(metadata.replace("METADATA", "licenses/LICENSE")).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Apache License" in license_text
    assert "[Apache License 2.0](LICENSE)" in (ROOT / "README.md").read_text()


def test_the_wheel_has_no_tests_and_no_test_doubles(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sources = {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")}
    assert [name for name in sources if "test" in name.lower() or "fake" in name.lower()] == []
    doubles = re.compile(r"^class (Fake|Fixed|Stub)|^(from|import) (tests|pytest)\b", re.MULTILINE)
    assert [name for name, text in sources.items() if doubles.search(text)] == []


def test_minimind_s_model_and_trainyard_s_are_imported_side_by_side(installed: Path, minimind: Path) -> None:
    shown = run_installed(installed, "train_pretrain.py", cwd=minimind / "trainer")
    module, model, trainyard = shown.split()
    assert module == "model.model_minimind"
    assert Path(model).is_relative_to(minimind)
    assert Path(trainyard).is_relative_to(installed)


@pytest.mark.parametrize(
    "module", ["trainyard.worker", "trainyard.worker.doctor", "trainyard.service", "trainyard.worker.agent"]
)
def test_programs_start_from_minimind_s_folder(installed: Path, minimind: Path, module: str) -> None:
    shown = run_installed(installed, "-m", module, "--help", cwd=minimind)
    assert "usage:" in shown.lower()


def test_the_command_is_installed(installed: Path, minimind: Path) -> None:
    shown = run_installed(installed, str(installed / "bin" / "trainyard"), "--help", cwd=minimind)
    assert "submit" in shown


@pytest.fixture
def service_port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A port for a service, which the environment names to the service and to its clients."""
    port = free_port()
    monkeypatch.setenv("TRAINYARD_PORT", str(port))
    monkeypatch.setenv("TRAINYARD_URL", f"http://127.0.0.1:{port}")
    for name in ("TRAINYARD_TOKEN", "TRAINYARD_HOME", "TRAINYARD_DATA_ROOTS", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    return port


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel and what pip installs with it, without torch."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run("-m", "venv", str(folder), cwd=folder.parent)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    reached = subprocess.run([*pip, "annotated-doc"], capture_output=True, text=True, check=False)
    if reached.returncode != 0:
        pytest.skip("pip reaches no package registry")
    done = subprocess.run(
        [*pip, "-c", str(ROOT / "constraints.txt"), str(wheel)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@contextmanager
def serving(command: list[str], cwd: Path) -> Iterator[None]:
    """Run a service while the block runs, and check that it ends when asked."""
    with (cwd / "service.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=cwd, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            ended = process.wait(60)
    assert ended == 0, (cwd / "service.log").read_text()[-2000:]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_pip_install_in_an_empty_environment_works_from_any_folder(
    environment: Path, minimind: Path, service_port: int
) -> None:
    for name in ("client", "service", "worker", "contract"):
        (minimind / name).mkdir()
        (minimind / name / "__init__.py").write_text("raise ImportError('of another project')")
    (minimind / "corpus.jsonl").write_text('{"text": "one"}\n')
    python, command = str(environment / "bin" / "python"), str(environment / "bin" / "trainyard")
    program = """
import importlib.util, json, pathlib, trainyard
assert importlib.util.find_spec("torch") is None
with trainyard.Client(retries=trainyard.RetryPolicy(seconds=120)) as client:
    plan = client.plan({"data": {"data_path": str(pathlib.Path("corpus.jsonl").resolve())}})
    print(json.dumps([trainyard.__file__, client.ready()["status"], plan["parameters"], trainyard.__version__]))
"""
    with serving([command, "serve"], minimind):
        done = subprocess.run([python, "-c", program], cwd=minimind, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:] + (minimind / "service.log").read_text()[-2000:]
        file, status, parameters, version = json.loads(done.stdout)
        listed = subprocess.run([command, "list"], cwd=minimind, capture_output=True, text=True, check=False)
        assert listed.returncode == 0, listed.stderr
    assert Path(file).is_relative_to(environment)
    assert status == "ok"
    assert parameters > 1_000_000
    shown = subprocess.run([command, "--version"], cwd="/", capture_output=True, text=True, check=True)
    assert version in shown.stdout


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_ten_lines_of_python_train_a_first_model(
    installed: Path, minimind: Path, tmp_path: Path, service_port: int
) -> None:
    """The first program of the page on the Python API, as it stands, from the folder of another project."""
    program = next(block.text for block in blocks(DOCS / "guides" / "python.md") if "Popen" in block.text)
    assert len([line for line in program.splitlines() if line]) == 10
    ending = "finally:\n    service.terminate()\n    service.wait(60)\n"
    script = tmp_path / "first.py"
    script.write_text("try:\n" + textwrap.indent(program, "    ") + "\n" + ending)
    shown = run_installed(installed, str(script), cwd=minimind)
    losses = [float(loss) for loss in re.findall(r"^\d+ (\d+\.\d+)$", shown, re.MULTILINE)]
    assert len(losses) >= 10
    assert losses[-1] < losses[0]
    assert re.search(r"^succeeded /.*/pretrain_64\.pth ", shown, re.MULTILINE)
    assert list((minimind / "trainyard-home" / "runs").glob("*/out/pretrain_64.pth"))
