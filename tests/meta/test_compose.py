"""The compose file and the Dockerfile match the documentation. No container engine is needed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainyard.service.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE = shutil.which("docker-compose")
SECRETS = {"TRAINYARD_TOKEN": "t", "POSTGRES_PASSWORD": "p@ss/w%41rd:x"}


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


def compose(file: str = "docker-compose.yml") -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / file).read_text())
    return loaded


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage of the Dockerfile, with those of the stages below it."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            below, _, name = rest.partition(" AS ")
            found[name] = list(found.get(below, []))
        elif not word.startswith("#"):
            found[name].append((word, rest))
    return found


needs_compose = pytest.mark.skipif(COMPOSE is None, reason="docker-compose is not installed")


@needs_compose
def test_compose_refuses_to_start_without_secrets() -> None:
    bad = rendered()
    assert bad.returncode != 0
    assert "TRAINYARD_TOKEN" in bad.stderr or "POSTGRES_PASSWORD" in bad.stderr
    assert ".env.example" in bad.stderr


@needs_compose
def test_the_profiles_differ_only_in_the_build_of_torch_and_the_gpus() -> None:
    found = {}
    for profile, name in (("cpu", "trainyard"), ("gpu", "trainyard-gpu")):
        done = rendered(profile, **SECRETS)
        assert done.returncode == 0, done.stderr
        services = yaml.safe_load(done.stdout)["services"]
        running = {key for key, service in services.items() if service.get("profiles", [profile]) == [profile]}
        assert running == {"postgres", name}
        found[profile] = services[name]
        del found[profile]["profiles"]
    assert found["cpu"].pop("build")["args"] == {"TORCH": "cpu"}
    assert found["gpu"].pop("build")["args"] == {"TORCH": "cuda"}
    assert (found["cpu"].pop("image"), found["gpu"].pop("image")) == ("trainyard", "trainyard-cuda")
    (device,) = found["gpu"].pop("deploy")["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert found["cpu"] == found["gpu"]


@needs_compose
def test_a_password_of_any_characters_reaches_postgres_and_the_service() -> None:
    done = rendered("cpu", **SECRETS)
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    environment = services["trainyard"]["environment"]
    assert environment["PGPASSWORD"] == services["postgres"]["environment"]["POSTGRES_PASSWORD"]
    assert environment["PGPASSWORD"] == SECRETS["POSTGRES_PASSWORD"]
    assert SECRETS["POSTGRES_PASSWORD"] not in environment["TRAINYARD_DATABASE_URL"]


@needs_compose
def test_the_example_of_an_env_file_names_every_variable_of_the_compose_file() -> None:
    text = (ROOT / ".env.example").read_text()
    named = set(re.findall(r"^(?:# )?(\w+)=", text, re.MULTILINE))
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    assert used <= named
    assert named - used == {"COMPOSE_PROFILES"}


def test_compose_with_the_example_starts_the_service_on_cpus() -> None:
    services = compose()["services"]
    assert {name: service.get("profiles") for name, service in services.items()} == {
        "postgres": None,
        "trainyard": ["cpu"],
        "trainyard-gpu": ["gpu"],
    }
    assert re.search(r"^COMPOSE_PROFILES=cpu$", (ROOT / ".env.example").read_text(), re.MULTILINE)


def test_the_settings_of_the_compose_file_exist() -> None:
    names = {name for name in compose()["services"]["trainyard"]["environment"] if name.startswith("TRAINYARD_")}
    known = {field.alias for field in Settings.model_fields.values()}
    assert names <= known


def test_the_service_may_write_to_each_of_its_volumes() -> None:
    """Docker gives a new volume the owner of the folder in the image, and root if there is none."""
    volumes = compose()["services"]["trainyard"]["volumes"]
    writable = [text.split(":")[1] for text in volumes if not text.endswith(":ro")]
    assert writable
    for stage in ("control", "worker"):
        made = [rest for word, rest in stages()[stage] if word == "RUN" and "install -d -o trainyard" in rest]
        assert all(folder in made[0].split() for folder in writable)


def test_models_can_be_compiled_in_the_image() -> None:
    """Inductor needs a compiler, a folder for libraries that may be loaded, and a home to write to."""
    service = compose()["services"]["trainyard"]
    (tmp,) = service["tmpfs"]
    assert "exec" in tmp.partition(":")[2].split(",")
    worker = stages()["worker"]
    assert any(word == "RUN" and "g++" in rest.split() for word, rest in worker)
    home = next(found[1] for word, rest in worker if word == "ENV" and (found := re.search(r"\bHOME=(\S+)", rest)))
    assert any(text.split(":")[1] == home for text in service["volumes"])


HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_hadolint_has_nothing_to_say_about_the_dockerfile() -> None:
    assert HADOLINT is not None
    done = subprocess.run([HADOLINT, "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_both_parts_have_a_health_check_that_asks_them() -> None:
    for stage in ("control", "worker"):
        (check,) = [rest for word, rest in stages()[stage] if word == "HEALTHCHECK"]
        assert "http://127.0.0.1:8000/health" in check
    assert "pg_isready" in str(compose()["services"]["postgres"]["healthcheck"]["test"])
    assert compose()["services"]["trainyard"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}


@pytest.mark.parametrize("stage", ["control", "worker"])
def test_a_change_of_the_code_keeps_the_layers_of_the_dependencies(stage: str) -> None:
    steps = stages()[stage]
    first_code = next(i for i, (word, rest) in enumerate(steps) if word == "COPY" and "--from=code" in rest)
    before, after = steps[:first_code], steps[first_code:]
    assert [rest.split()[:-1] for word, rest in before if word == "COPY"] == [["pyproject.toml", "constraints.txt"]]
    assert [rest for word, rest in after if word == "RUN"] == ["pip install --no-deps --no-build-isolation -e ."]


def test_the_image_has_each_package_of_the_code() -> None:
    copied = {rest.split()[0] for word, rest in stages()["code"] if word == "COPY"}
    packages = {link.name for link in (ROOT / "src" / "trainyard").iterdir() if link.is_symlink()}
    assert packages | {"src"} <= copied


def test_the_control_image_has_no_torch_and_nothing_runs_as_root() -> None:
    assert not any("worker" in rest for word, rest in stages()["control"] if word == "RUN")
    assert any("--extra worker" in rest for word, rest in stages()["worker"] if word == "RUN")
    for stage in ("control", "worker"):
        assert stages()[stage][-1] == ("USER", "10001:10001")


def test_the_build_of_torch_is_cpu_or_cuda_and_nothing_else() -> None:
    (choice,) = [rest for word, rest in stages()["worker"] if word == "RUN" and "$TORCH" in rest]
    for torch, expected in {"cpu": "--torch-backend cpu", "cuda": "", "gpu": None}.items():
        command = choice.replace("uv pip install", "echo")
        done = subprocess.run(["sh", "-c", command], env={"TORCH": torch}, capture_output=True, text=True)
        if expected is None:
            assert done.returncode == 1
            assert "give cpu or cuda" in done.stderr
        else:
            assert done.stdout.strip().endswith(f"--extra worker --extra corpora {expected}".strip())


def test_the_image_s_commands_are_programs_of_this_project() -> None:
    (command,) = [rest for word, rest in stages()["worker"] if word == "CMD"]
    assert yaml.safe_load(command) == ["python", "-m", "trainyard.service"]
    done = subprocess.run([sys.executable, "-m", "trainyard.service", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
