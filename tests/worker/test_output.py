"""The output of a run: a log on a full disk, a reader that has exited, and a stream that is closed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainyard.contract.messages import Outcome, read_message
from trainyard.contract.rundir import RunDir

PRINTING = """if True:
    import os, sys
    from trainyard.contract.stdio import ignore_output_errors
    ignore_output_errors()
    for stream in (sys.stdout, sys.stderr):
        print("\\u4e2d" * 100_000, file=stream, flush=True)
    os._exit(7)
"""


@pytest.mark.parametrize("output", ["> /dev/full 2>&1", "2>&1 | true", ">&- 2>&-", ""])
def test_text_that_cannot_be_printed_is_dropped_without_an_error(output: str, tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    command = f'{{ "$0" -c "$1"; echo $? > "$2"; }} {output}'
    script = ["/bin/bash", "-c", command, sys.executable, PRINTING, str(ended)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, env=environment)
    assert ended.read_text() == "7\n", done
    assert ("\\u4e2d" * 100_000 in done.stdout) == (not output)


def test_a_run_whose_log_is_on_a_full_disk_completes(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"the cat sat on mat {number}"}) + "\n" for number in range(20)))
    spec = {
        "data": {"data_path": str(corpus), "max_seq_len": 32},
        "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
        "training": {"max_steps": 3, "batch_size": 2, "accumulation_steps": 1},
        "reporting": {"log_interval": 1},
        "resources": {"device": "cpu"},
    }
    run.spec.write_text(json.dumps(spec))
    command = [sys.executable, "-m", "trainyard.worker", str(run.path)]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=full, timeout=300)
    outcome = read_message(Outcome, run.attempt(1).outcome)
    assert (done.returncode, outcome and outcome.outcome) == (0, "completed")
