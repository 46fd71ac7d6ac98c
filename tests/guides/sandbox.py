"""A folder such as a reader has who follows the guides: a corpus, a spec, a service, and a run that has ended."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.corpus import write_docstrings
from tests.guides.code_blocks import POSTGRES, REFUSED, SERVED, STOPPED, Block
from tests.story.service_process import Served

STEPS = 40
SHORT = {"12000": "20", "00002000": "00000040"}
"""Steps that the guides speak of -> steps that a short run has."""

SERVE_ONCE = """
serve_once() {
  trainyard serve > serve.log 2>&1 & local service=$!
  until curl -sf "$TRAINYARD_URL/ready" > ready.json; do kill -0 $service; sleep 0.2; done
  kill $service; wait $service
}
# One day for all blocks of a page: a later one names a file by the date of an earlier one.
date() { command date --date="@$BEGAN" "$@"; }
"""


class Box:
    """The folder, and a service on it that is started and stopped as a block needs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.began = int(time.time())
        folder.mkdir(parents=True)
        write_docstrings(folder / "corpus.jsonl", 200)
        shutil.copy(folder / "corpus.jsonl", folder / "code.jsonl")
        (folder / "run.json").write_text(json.dumps(self.spec("run")))
        self.served = Served(folder / "trainyard-home", [folder])
        self.serving = False
        self.serve()
        self.job = self.served.submit(self.spec("pre-12"))
        self.served.wait(self.job, "succeeded")

    def spec(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "model": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
            "data": {"data_path": str(self.folder / "corpus.jsonl"), "tokenizer_path": "byte", "max_seq_len": 64},
            "training": {"max_steps": STEPS, "batch_size": 4, "accumulation_steps": 2},
            "checkpoint": {"save_interval": 10, "keep_last": 4},
            "reporting": {"log_interval": 1, "sample_prompts": ["Return the"]},
            "resources": {"device": "cpu"},
        }

    def serve(self) -> None:
        if not self.serving:
            self.served.start()
            self.serving = True

    def stop(self) -> None:
        if self.serving:
            self.served.stop()
            self.serving = False

    def tidy(self) -> None:
        """End what a guide left running, so that the next one has the devices."""
        self.serve()
        for job in self.served.get("/jobs?limit=100").json()["data"]:
            if job["status"] not in ("succeeded", "failed", "cancelled", "paused", "interrupted"):
                self.served.post(f"/jobs/{job['id']}/kill")
                self.served.wait(job["id"], "cancelled", "succeeded", "failed")

    def run(self, block: Block, exported: str, postgres: Mapping[str, str] | None = None) -> None:
        """Run one block as it stands, but for the port, the length of the run and where ``RUN_DIR`` is."""
        if block.how == SERVED:
            self.serve()
        else:
            self.stop()
        if block.how == REFUSED:
            exported += "\n! {\n"
        text = self._here(block.text) + ("\n}" if block.how == REFUSED else "")
        done = self._process(block, exported, text, postgres if block.how == POSTGRES else None)
        assert done.returncode == 0, f"{block.page}:{block.line}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"

    def _here(self, text: str) -> str:
        for written, ours in SHORT.items():
            text = text.replace(written, ours)
        text = text.replace("http://127.0.0.1:8000", self.served.url)
        text = text.replace("RUN_DIR", f"trainyard-home/runs/{self.job}").replace("/jobs/JOB", f"/jobs/{self.job}")
        return "\n".join("serve_once" if line == "trainyard serve" else line for line in text.splitlines())

    def _process(
        self, block: Block, exported: str, text: str, more: Mapping[str, str] | None
    ) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-c", text]
        if block.language == "bash":
            program = ["bash", "-c", f"set -euo pipefail\n{SERVE_ONCE}\n{exported}\n{text}"]
        environment = {**os.environ, **self._settings(), **(more or {})}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        return subprocess.run(
            program, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=600, check=False
        )

    def _settings(self) -> dict[str, str]:
        return {
            "TRAINYARD_URL": self.served.url,
            "TRAINYARD_PORT": str(self.served.port),
            "TRAINYARD_DATA_ROOTS": str(self.folder),
            "TRAINYARD_CPU_SLOTS": "2",
            "JOB": self.job,
            "BEGAN": str(self.began),
        }


HOWS = (SERVED, STOPPED, POSTGRES, REFUSED)
