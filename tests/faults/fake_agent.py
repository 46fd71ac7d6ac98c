"""The real agent, with `fake_ranks` in place of torchrun."""

import sys
from pathlib import Path
from typing import Any

from trainyard.contract.rundir import AttemptDir, RunDir
from trainyard.worker.agent import torchrun
from trainyard.worker.agent.__main__ import main
from trainyard.worker.agent.rendezvous import SINGLE_NODE, NodeInfo, RendezvousEndpoint

ELSEWHERE = """
import os, sys, time
while not os.path.exists(sys.argv[1]):
    time.sleep(0.02)
"""
"""All ranks are on the first node; each other node has a process that ends when they do."""


def fake_command(
    run: RunDir,
    attempt: AttemptDir,
    resources: dict[str, Any],
    node: NodeInfo = SINGLE_NODE,
    endpoint: RendezvousEndpoint | None = None,
) -> list[str]:
    if not node.is_leader:
        return [sys.executable, "-S", "-c", ELSEWHERE, str(attempt.over)]
    return [sys.executable, "-S", str(Path(__file__).with_name("fake_ranks.py")), str(run.path), str(attempt.number)]


if __name__ == "__main__":
    torchrun.torchrun_command = fake_command
    sys.exit(main())
