"""The README's story, each command copied and run as it stands, in an empty folder."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

README = Path(__file__).parents[2] / "README.md"
PORT = "8000"


def blocks() -> list[str]:
    """The commands marked as part of the story, in their order."""
    return re.findall(r"<!-- story -->\n```bash\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_story_is_marked() -> None:
    assert len(blocks()) >= 6
    assert "curl" in "".join(blocks())


@pytest.mark.skipif(shutil.which("curl") is None or shutil.which("pkill") is None, reason="curl or pkill is missing")
def test_every_command_of_the_story_does_what_is_said(tmp_path: Path, free_port: str) -> None:
    script = "set -euo pipefail\n" + "\necho '== next'\n".join(blocks()) + "\nkill %1; wait\n"
    # The one change: a port that nothing else on this machine has.
    script = script.replace(f"127.0.0.1:{PORT}", f"127.0.0.1:{free_port}")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TRAINYARD_PORT": free_port,
    }
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "service.log").read_text()
    started, described, untouched, killed, resumed, compared, refused = done.stdout.split("== next\n")
    assert "texts" in started
    assert described == ""
    assert untouched.startswith("succeeded")
    assert '"step":400' in untouched
    assert "torchrun was killed by SIGKILL" in killed
    assert resumed.splitlines()[:2] == ["queued", "succeeded"]
    # On a busy machine the run has made more steps when it is killed.
    assert int(resumed.splitlines()[2]) in (100, 200, 300)
    one, two, *files = compared.splitlines()
    assert one == two
    assert len({line.split()[0] for line in files}) == 1
    for pointer in ("/model/num_attention_heads", "/training/learning_rate", "/training/batchsize", "/data/data_path"):
        assert pointer in refused
