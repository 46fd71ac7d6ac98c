"""What exists stands in docs/, and what stands in docs/ exists."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.meta.public_surface import commands, routes
from trainyard.contract.parsing import ALIASES, GROUPS
from trainyard.contract.spec_reference import render
from trainyard.contract.status import JobStatus, Reason
from trainyard.mcp_tools.server import TOOLS
from trainyard.service import errors
from trainyard.service.launch.slurm.config import SlurmSetup
from trainyard.service.settings import Settings

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"


def text(page: str) -> str:
    return (REFERENCE / page).read_text()


def test_every_field_of_the_spec_stands_in_the_reference() -> None:
    page = text("spec.md")
    assert [leaf for leaves in GROUPS.values() for leaf in leaves if f"`{leaf}`" not in page] == []
    assert [alias for alias in ALIASES if f"`{alias}`" not in page] == []


def test_the_reference_is_what_the_spec_says() -> None:
    assert text("spec.md") == render(), "run: python -m trainyard.contract.spec_reference > docs/reference/spec.md"


def test_every_route_stands_in_the_reference_and_the_other_way_round(tmp_path: Path) -> None:
    page = text("api.md")
    documented = set(re.findall(r"`(GET|POST|PATCH|DELETE) (/[^`?\s]*)", page))
    # JSON-RPC has a description of its own, and is not in the OpenAPI document.
    assert routes(tmp_path) | {("POST", "/mcp")} == documented


def test_every_tool_for_agents_is_in_the_guide_with_its_scope() -> None:
    page = (ROOT / "docs" / "guides" / "agents.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| `(\w+)` \|", page, re.MULTILINE)
    documented = {name: scope for names, scope in rows for name in re.findall(r"`(\w+)`", names)}
    assert documented == {name: str(tool.needs) for name, tool in TOOLS.items()}


def test_every_command_stands_in_the_reference() -> None:
    page = text("command.md")
    assert [name for name in commands() if f"`trainyard {name}" not in page] == []


def test_every_setting_stands_in_the_reference() -> None:
    page = text("settings.md")
    files = ("settings.py", "launch/slurm/config.py")
    names = {
        name for file in files for name in re.findall(r'"(TRAINYARD_[A-Z_]+)"', (ROOT / "service" / file).read_text())
    }
    assert names
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []
    assert {field.alias for kind in (Settings, SlurmSetup) for field in kind.model_fields.values()} - {None} <= names


@pytest.mark.parametrize("word", [*JobStatus, *Reason])
def test_every_status_and_reason_is_explained(word: str) -> None:
    assert f"`{word}`" in text("statuses.md")


def test_every_error_code_is_explained_and_the_other_way_round() -> None:
    kinds = list(errors.ServiceError.__subclasses__())
    for kind in kinds:
        kinds += kind.__subclasses__()
    known = {(str(kind.status), kind.code) for kind in kinds if kind.code != "refused"}
    assert set(re.findall(r"^\| (\d{3}) \| `([a-z_]+)`", text("errors.md"), re.MULTILINE)) == known


def links_of(page: Path) -> list[str]:
    return re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    links = [(page, link) for page in pages for link in links_of(page)]
    assert links
    assert [f"{page.name} -> {link}" for page, link in links if not (page.parent / link).exists()] == []


SUFFIXES = {".py", ".md", ".toml", ".yml", ".txt", ".sh"}


def test_the_project_speaks_of_itself_alone() -> None:
    foreign = re.compile(r"/work/|pypi\.org|registry\.npmjs|deb\.debian")
    files = list(project_files())
    assert len(files) > 500
    assert [str(file.relative_to(ROOT)) for file in files if foreign.search(file.read_text())] == []


def project_files() -> Iterator[Path]:
    """Yield the texts of the project, but not this one. Other tests write into hidden folders meanwhile."""
    for folder, below, names in os.walk(ROOT):
        below[:] = [name for name in below if not name.startswith(".") or name == ".ci"]
        below[:] = [name for name in below if name not in ("trainyard-home", "__pycache__")]
        files = (Path(folder, name) for name in names)
        yield from (file for file in files if file.suffix in SUFFIXES and file != Path(__file__))


def test_every_guide_can_be_found_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    guides = sorted((ROOT / "docs" / "guides").glob("*.md"))
    assert guides
    assert [guide.name for guide in guides if f"(docs/guides/{guide.name})" not in readme] == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, ahead = set[Path](), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        pages = ((page.parent / link).resolve() for link in links_of(page) if link.endswith(".md"))
        ahead += [found for found in pages if found not in reached]
    assert sorted(set((ROOT / "docs").rglob("*.md")) - reached) == []
