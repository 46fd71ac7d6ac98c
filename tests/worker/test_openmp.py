"""How OpenMP's threads wait: a default, unless the user has set it."""

import json
import os
import subprocess
import sys

import pytest

from trainyard.worker.openmp import SPINS, limit_spinning


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": SPINS}),
        ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, {"OMP_WAIT_POLICY": "PASSIVE"}),
    ],
)
def test_settings_of_the_user_are_kept(given: dict[str, str], expected: dict[str, str]) -> None:
    environment = dict(given)
    limit_spinning(environment)
    assert environment == expected


def test_the_worker_sets_it_before_torch_is_loaded() -> None:
    """OpenMP would not read it later."""
    program = (
        "import json, sys\n"
        "from unittest import mock\n"
        "from trainyard.worker import __main__ as worker, openmp\n"
        "loaded = []\n"
        "def look(environment): loaded.append('torch' in sys.modules); sys.exit(0)\n"
        "with mock.patch.object(worker, 'limit_spinning', look):\n"
        "    try: worker.main()\n"
        "    except SystemExit: print(json.dumps(loaded))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, os.getcwd()], check=True, capture_output=True, text=True, timeout=60
    )
    assert json.loads(done.stdout) == [False]
