"""The unit of the guide: its command and settings exist, and a restart of it leaves the runs alone."""

import re
from configparser import RawConfigParser

from tests.guides.code_blocks import DOCS, blocks
from tests.guides.command_lines import misunderstood
from trainyard.service.settings import Settings


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


def test_its_command_and_its_settings_exist() -> None:
    command = re.search(r"^ExecStart=\S*/(trainyard .*)$", text(), re.MULTILINE)
    assert command is not None
    assert misunderstood(command[1]) == ""
    given = dict(re.findall(r"^Environment=(\w+)=(.*)$", text(), re.MULTILINE))
    settings = Settings.read(given)
    assert str(settings.home) == given["TRAINYARD_HOME"]
    assert [str(root) for root in settings.data_roots] == [given["TRAINYARD_DATA_ROOTS"]]
