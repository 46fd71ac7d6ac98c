"""A link that is changed while a job waits in the queue: the job fails by name, and nothing outside is touched."""

import json
from pathlib import Path

import pytest

from tests.faults.conftest import MakeHome
from tests.faults.service_home import Home


def spec(home: Home, corpus: Path, save_dir: Path, steps: int) -> dict[str, object]:
    return {
        **home.spec(0, ranks="2"),
        "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        "data": {"data_path": str(corpus), "max_seq_len": 32},
        "training": {"max_steps": steps, "batch_size": 2, "accumulation_steps": 1},
        "checkpoint": {"save_dir": str(save_dir)},
    }


@pytest.mark.soak
@pytest.mark.parametrize("field", ["data.data_path", "checkpoint.save_dir"])
def test_a_link_changed_in_the_queue(make_home: MakeHome, tmp_path: Path, field: str) -> None:
    home = make_home(slots=2, real_ranks=True)
    data, save, outside = (tmp_path / name for name in ("data", "save", "outside"))
    for folder in (data / "in", save / "in", outside):
        folder.mkdir(parents=True)
        (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(200)))
    home.environment |= {"TRAINYARD_DATA_ROOTS": str(data), "TRAINYARD_SAVE_ROOTS": str(save)}
    home.start()
    wanted = (data / "in" / "corpus.jsonl", save / "in")
    first = home.post("/jobs", spec(home, *wanted, steps=1_000_000)).json()["id"]
    home.wait(first, "running")
    waiting = home.post("/jobs", spec(home, *wanted, steps=3)).json()["id"]
    assert home.job(waiting)["status"] == "queued"
    changed = data / "in" if field == "data.data_path" else save / "in"
    home.post(f"/jobs/{first}/kill")
    # Whether it is seen before or after the first one has ended: the second begins only then.
    changed.rename(changed.with_name("before"))
    changed.symlink_to(outside)
    before = sorted((path, path.stat().st_mtime_ns) for path in outside.rglob("*"))
    found = home.wait(waiting, "failed", "succeeded")
    assert (found["status"], found["reason"]) == ("failed", "spec_invalid")
    assert found["message"] == f"{field} lies outside the directories this service may use"
    assert sorted((path, path.stat().st_mtime_ns) for path in outside.rglob("*")) == before
