"""The unit of the guide: its command and settings exist, and a restart of it leaves the runs alone."""

import os
import re
import shutil
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path

import pytest

from tests.guides.code_blocks import DOCS, blocks
from tests.guides.command_lines import misunderstood
from tests.service.conftest import make_rig as make_rig
from tests.service.conftest import migrated_sqlite as migrated_sqlite
from tests.service.conftest import rig as rig
from tests.service.conftest import sqlite_url as sqlite_url
from tests.service.harness import ServiceHarness
from tests.service.live_server import served
from trainyard.service.settings import Settings

pytestmark = pytest.mark.long


class Unit(RawConfigParser):
    """Keys keep their case, and may stand more than once: the last wins here."""

    def optionxform(self, optionstr: str) -> str:
        return optionstr


def text() -> str:
    (block,) = [block for block in blocks(DOCS / "guides" / "systemd.md") if block.language == "ini"]
    return block.text


def test_a_restart_of_the_unit_ends_the_service_and_nothing_else() -> None:
    unit = Unit(strict=False)
    unit.read_string(text())
    kept = {name: unit["Service"][name] for name in ("KillMode", "SendSIGKILL", "OOMPolicy", "Restart")}
    assert kept == {"KillMode": "process", "SendSIGKILL": "no", "OOMPolicy": "continue", "Restart": "always"}


def test_its_command_and_its_settings_exist(tmp_path: Path) -> None:
    command = re.search(r"^ExecStart=\S*/(trainyard .*)$", text(), re.MULTILINE)
    assert command is not None
    assert misunderstood(command[1]) == ""
    given = dict(re.findall(r"^Environment=(\w+)=(.*)$", text(), re.MULTILINE))
    given["TRAINYARD_TOKEN_FILE"] = str(tmp_path / "tokens")
    (tmp_path / "tokens").write_text("secret\n")
    settings = Settings.read(given)
    assert str(settings.home) == given["TRAINYARD_HOME"]
    assert [str(root) for root in settings.data_roots] == [given["TRAINYARD_DATA_ROOTS"]]


def test_the_installation_makes_what_the_unit_names() -> None:
    unit = Unit(strict=False)
    unit.read_string(text())
    service = unit["Service"]
    commands = "\n".join(block.text for block in blocks(DOCS / "guides" / "systemd.md") if block.language == "bash")
    assert re.search(rf"^useradd .* {service['User']}$", commands, re.MULTILINE)
    given = dict(re.findall(r"^Environment=(\w+)=(.*)$", text(), re.MULTILINE))
    for path in (service["WorkingDirectory"], given["TRAINYARD_HOME"], given["TRAINYARD_TOKEN_FILE"]):
        assert re.search(rf"^install .*{re.escape(path)}\b", commands, re.MULTILINE), path
    # The file system is read-only, apart from these.
    assert service["ProtectSystem"] == "strict"
    writable = service["ReadWritePaths"].split()
    assert any(Path(given["TRAINYARD_HOME"]).is_relative_to(folder) for folder in writable)
    assert not {"PrivateTmp", "PrivateDevices", "MemoryDenyWriteExecute"} & set(service)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = re.sub(r"^ExecStart=.*$", "ExecStart=/bin/true", text(), flags=re.MULTILINE)
    (tmp_path / "trainyard.service").write_text(re.sub(r"^User=.*$", "User=root", unit, flags=re.MULTILINE))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "trainyard.service")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "trainyard.service" not in done.stderr


def test_the_pause_before_a_reboot_reaches_every_job(rig: ServiceHarness) -> None:
    """More jobs than one page, most of them still waiting."""
    (program,) = [block.text for block in blocks(DOCS / "guides" / "systemd.md") if block.language == "python"]
    for _ in range(130):
        rig.submit()
    with served(rig) as (host, port):
        environment = {**os.environ, "TRAINYARD_URL": f"http://{host}:{port}", "TRAINYARD_TOKEN": ""}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert [rig.get("/jobs", status=status)["data"] for status in ("queued", "starting", "running")] == [[], [], []]
    assert len(done.stdout.splitlines()) == 130
