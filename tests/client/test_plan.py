import json
from pathlib import Path

import pytest

from tests.client.conftest import Run
from tests.client.fake_service import PROPOSAL, FakeService, body_of, plan, problem
from trainyard.client.api import Client
from trainyard.client.cli.commands.plan import plan_page


def test_the_page(run: Run, service: FakeService) -> None:
    del service.plan["memory_bytes"]["activations"]
    service.plan |= plan(
        memory_bytes=service.plan["memory_bytes"],
        warnings=["there is no GPU on this host: this run will use the CPU"],
        advice=['with training.dtype "float32" the run is faster'],
        bad_lines=3,
    )
    code, out, _ = run("plan", "--data_path", "/d", "--batch_size", "64")
    assert code == 0
    parts = "weights 100.0 MB, gradients 100.0 MB, optimizer 200.0 MB"
    assert out.splitlines() == [
        "Changed from defaults:",
        '  data.data_path                  "/d"',
        "  training.batch_size             64",
        "Plan:",
        "  model    25.8 M parameters; an untrained model has a loss of about 8.764",
        "  corpus   about 1.31 M tokens, 4,000 sequences, 3 bad lines",
        "  run      1,200 steps of 32.8 k tokens: 39.3 M tokens, 6.1e+15 FLOPs",
        f"  memory   400.0 MB per rank ({parts}); fits in the 80.0 GB of the device",
        "  disk     309.0 MB per checkpoint, 40.0 GB free, room for 129",
        "  time     about 2 h 10 min, by 118,240 tokens/s in job_0 on H100",
        "  queue    position 1, would start immediately",
        "  warning  there is no GPU on this host: this run will use the CPU",
        '  advice   with training.dtype "float32" the run is faster',
    ]
    assert [request.url.path for request in service.requests] == ["/jobs/plan"]
    assert body_of(service.requests[0]) == {"data": {"data_path": "/d"}, "training": {"batch_size": 64}}


def test_unknown_values_are_named_or_left_out() -> None:
    lines = plan_page({"parameters": 1000, "active_parameters": 500, "world_size": 2, "steps": None})
    text = "\n".join(lines)
    assert "500 active per token" in text
    assert "the number of steps is unknown until the corpus is read" in text
    assert "unknown: no similar run" in text
    assert "  corpus" not in text
    assert "queue" not in text
    assert "  run      7 steps" in plan_page({"steps": 7})
    assert "on 2 cpu ranks: 200 tokens" in "\n".join(
        plan_page({"steps": 2, "tokens_per_step": 100.0, "world_size": 2, "device": "cpu"})
    )


def test_held_out_sets_of_a_plan() -> None:
    sets = [
        {"name": "web", "files": 2, "documents": 300, "tokens": 12_000},
        {"name": "book", "files": 1, "documents": None, "tokens": None},
    ]
    text = "  held-out web: 2 files, 300 documents, 12 k tokens; book: 1 file"
    assert text in plan_page({"steps": 7, "eval_sets": sets})
    many = plan_page({"steps": 7, "eval_sets": [{**sets[1], "name": f"s{number}"} for number in range(256)]})
    assert "  held-out s0: 1 file; s1: 1 file; s2: 1 file; s3: 1 file; s4: 1 file; and 251 more" in many


def test_sources_are_tables(run: Run, service: FakeService, tmp_path: Path) -> None:
    sources = [
        {"name": "web", "path": "/data/web", "weight": 0.7},
        {"name": "code", "path": ["/data/a", "/data/b"], "weight": 0.3, "text_field": "content"},
    ]
    counts = {"files": 12, "documents": 1200, "tokens": 310_000_000, "share": 0.7, "passes": 0.4}
    unknown = dict.fromkeys(counts)
    service.plan["sources"] = [{"name": "web", **counts}, {"name": "code", **unknown, "files": 1}]
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({"data": {"sources": sources}, "training": {"max_steps": 10}}))
    code, out, _ = run("plan", str(file))
    assert code == 0
    lines = out.splitlines()
    start = lines.index("  data.sources")
    assert lines[start : start + 4] == [
        "  data.sources",
        "    name  path              weight  text_field",
        "    web   /data/web         0.7",
        "    code  /data/a, /data/b  0.3     content",
    ]
    assert "  sources  source  files  documents  tokens  share  passes" in lines
    assert "           web        12      1,200   310 M   70 %    0.40" in lines
    assert "           code        1          -       -      -       -" in lines


def test_json_is_the_service_s_own(run: Run, service: FakeService, tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text('{"data": {"data_path": "/d"}}')
    code, out, _ = run("plan", str(file), "--json")
    assert (code, json.loads(out)) == (0, service.plan)


def test_a_wrong_spec_is_named_by_its_flags(run: Run, service: FakeService) -> None:
    errors = [{"pointer": "/training/learning_rate", "message": "must be greater than 0"}]
    service.faults = [lambda _: problem(422, "invalid_spec", "1 mistake found", errors=errors)]
    code, out, err = run("plan", "--data_path", "/d", "--learning_rate", "-1")
    assert (code, out) == (1, "")
    assert "--learning_rate (/training/learning_rate): must be greater than 0" in err


def test_usage(run: Run, service: FakeService, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan")[0] == 2
    assert run("plan", "--data_path", "/d", "--watch")[0] == 2
    code, _, _ = run("plan", "--help")
    assert code == 0
    assert "launch nothing" in capsys.readouterr().out.replace("\n", " ")
    assert service.requests == []


def test_the_client_s_method(trainyard: Client, service: FakeService) -> None:
    assert trainyard.plan({"data": {"data_path": "/d"}})["steps"] == 1200
    assert service.submitted == {}


@pytest.mark.parametrize(
    ("device", "ranks", "limit", "said"),
    [
        ("cuda", 4, 400, "fits in the 400 B of the device"),
        ("cuda", 1, 399, "DOES NOT FIT in the 399 B of the device"),
        ("cpu", 1, 450, "; 450 B with the copy of a save: fits in the 450 B of this host"),
        ("cpu", 2, 850, "; 850 B for 2 ranks and the copy of a save: fits in the 850 B of this host"),
        ("cpu", 2, 849, "; 850 B for 2 ranks and the copy of a save: DOES NOT FIT in the 849 B of this host"),
    ],
)
def test_whether_it_fits_in_memory(device: str, ranks: int, limit: int, said: str) -> None:
    memory = {"weights": 100, "gradients": 100, "optimizer": 200}
    facts = {"device": device, "world_size": ranks, "memory_bytes": memory, "snapshot_bytes": 50}
    assert said in "\n".join(plan_page({**facts, "memory_limit_bytes": limit}))


def test_a_depth_prints_the_spec_and_the_reasons_separately(run: Run, service: FakeService) -> None:
    code, out, err = run("plan", "--depth", "12", "--batch_size", "4")
    assert (code, json.loads(out)) == (0, PROPOSAL["spec"])
    assert body_of(service.requests[-1]) == {"depth": 12, "spec": {"training": {"batch_size": 4}}}
    assert "model.hidden_size" in err
    assert "768: 64 x depth [nanochat]" in err
    assert len(service.requests) == 1, "nothing is planned or submitted"
    assert json.loads(run("plan", "--depth", "12", "--json")[1]) == PROPOSAL
    assert run("plan", "--depth", "0")[0] == 2
