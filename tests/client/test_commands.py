import csv
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.client.conftest import Run
from tests.client.fake_service import FakeService, Stream, body_of, job, listed, metric, problem, refused
from trainyard.client.cli.console import Console
from trainyard.client.cli.main import main
from trainyard.client.cli.parser import Command, CommandGroup, trainyard

READING = (
    "list",
    "show",
    "metrics",
    "events",
    "checkpoints",
    "attempts",
    "samples",
    "evaluations",
    "devices",
    "version",
)
OF_JOB = ("show", "metrics", "events", "checkpoints", "attempts", "samples", "evaluations", "logs")


def arguments(command: str) -> list[str]:
    return [command, "pre-12"] if command in OF_JOB else [command]


def subcommands() -> list[str]:
    return [name for name, command in trainyard.commands.items() if not command.hidden]


def test_the_commands_are_those_of_the_contract() -> None:
    expected = "demo doctor serve submit plan list show watch metrics logs events checkpoints attempts samples devices "
    expected += "pause resume save fork export generate chat describe discard cancel kill delete tokenizer corpus db "
    expected += "version completion token webhook evaluate evaluations mcp"
    assert set(subcommands()) == set(expected.split())


def test_every_command_names_a_function_that_exists() -> None:
    found = list(trainyard.commands.values())
    for command in [
        *found,
        *(each for group in found if isinstance(group, CommandGroup) for each in group.commands.values()),
    ]:
        assert isinstance(command, CommandGroup) or (isinstance(command, Command) and callable(command.runner())), (
            command.name
        )


def test_building_the_parser_imports_nothing_heavy() -> None:
    code = (
        "import sys; import trainyard.client.cli.main; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "pydantic", "httpx2", "rich", "numpy", "sqlalchemy", "fastapi"):
        assert f"'{heavy}'" not in loaded


@pytest.mark.parametrize("command", [*READING, "logs"])
def test_every_reading_command_speaks_json(run: Run, service: FakeService, command: str) -> None:
    service.log = "a\n"
    code, out, _ = run(*arguments(command), "--json")
    assert code == 0
    assert isinstance(json.loads(out), dict)


@pytest.mark.parametrize("command", [*READING, "watch", "logs", "pause", "resume", "save", "cancel", "kill", "delete"])
def test_exit_codes_without_a_service_and_without_a_right(run: Run, service: FakeService, command: str) -> None:
    line = [command] if command in ("list", "devices", "version") else [command, "pre-12"]
    service.faults = [refused] * 50
    code, _, err = run(*line)
    assert code == (0 if command == "version" else 3)
    assert "connection refused" in err
    service.faults = [lambda _: problem(401, "unauthorized", "A valid token is needed.")]
    assert run(*line)[0] == 4


@pytest.mark.parametrize(
    "line",
    [
        [], ["nonsense"], ["show"], ["list", "--limit", "x"], ["list", "--limit", "0"], ["logs", "a", "--tail", "-1"],
        ["logs", "a", "--tail", "0"], ["watch", "a", "--timeout", "nan"], ["watch", "a", "--timeout=-1"],
        ["submit", "--watch", "--timeout", "soon"], ["metrics", "a", "--attempt", "0"], ["show", "a", "--jso"],
    ],
)  # fmt: skip
def test_wrong_usage_is_2(run: Run, line: list[str]) -> None:
    code, _, err = run(*line)
    assert code == 2
    assert "Usage: trainyard" in err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["sumbit"], "there is no 'sumbit'; did you mean submit?"),
        (["watch", "pre-12", "--timout", "3"], "trainyard watch: error: there is no --timout here; did you mean"),
        (["list", "--state=failed"], "there is no --state here; did you mean --status?"),
        (
            ["resume", "a", "--parallelism", "fsdp"],
            "there is no --parallelism here; set it with --set resources.parall",
        ),
        (["resume", "a", "--gradient_checkpointing=1"], "--set training.gradient_checkpointing=VALUE"),
        (["pause", "a", "b"], "trainyard pause: error: Got unexpected extra argument (b)"),
        (["token", "lst"], "there is no 'lst'; did you mean list?"),
        (["list", "--token", "--json"], "trainyard list: error: Option '--token' requires an argument."),
    ],
)
def test_a_typo_gets_a_suggestion(run: Run, line: list[str], said: str) -> None:
    code, _, err = run(*line)
    assert code == 2
    assert said in err


def test_a_name_that_no_job_has_leads_to_the_list(run: Run) -> None:
    code, out, err = run("watch", "nosuch")
    assert (code, out) == (1, "")
    assert err == (
        "trainyard: no job has the id or name 'nosuch' [job_not_found]\n  run `trainyard list` to see all jobs\n"
    )


def test_ages_are_by_the_clock_of_the_service(run: Run, service: FakeService) -> None:
    response = listed([job(created_at="2020-01-31T18:28:05Z")])
    response.headers["date"] = "Fri, 31 Jan 2020 18:31:05 GMT"  # the clock of this host is years ahead
    service.faults = [lambda _: response]
    code, out, _ = run("list")
    assert (code, re.search("[23] min ago", out) is not None) == (0, True), out


@pytest.mark.parametrize(
    ("line", "note"),
    [
        (["watch", "pre12"], "did you mean pre-12?"),
        (
            ["generate", "pre-12@newest", "text"],
            "'newest' is not a step: after @ comes a number or latest, as in pre-12@1200",
        ),
    ],
)
def test_a_mistyped_job_gets_a_suggestion(run: Run, line: list[str], note: str) -> None:
    code, _, err = run(*line)
    assert (code, f"  {note}\n" in err) == (1, True), err


def test_a_corpus_in_place_of_a_spec_gets_the_flag_for_it(run: Run, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "one"}\n{"text": "two"}\n')
    code, _, err = run("submit", str(corpus))
    assert (code, "if it is the corpus, give it with --data_path" in err) == (2, True), err


def test_a_folder_that_cannot_be_written_is_an_error_and_no_traceback(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "export"
    code, _, err = run("export", "pre-12@12000", "--out", str(out))
    assert (code, err.splitlines()[-1]) == (1, f"trainyard: {out} cannot be read or written: Not a directory")


def test_a_checkpoint_that_does_not_exist_leads_to_the_list(run: Run) -> None:
    code, _, err = run("checkpoints", "pre-12", "--delete", "7", "-y")
    assert code == 1
    assert "`trainyard checkpoints JOB` lists the checkpoints of a job" in err


def test_without_a_token_the_error_names_the_option(run: Run, service: FakeService) -> None:
    service.faults = [lambda _: problem(401, "unauthorized", "A valid token is needed.")]
    code, _, err = run("list")
    assert (code, "give it with --token or TRAINYARD_TOKEN" in err) == (4, True)


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:99999", "http://[::1"])
def test_an_address_that_is_none_is_wrong_usage(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--url", url]) == 2
    assert "must be like http://127.0.0.1:8000" in capsys.readouterr().err


def test_a_rejection_is_exit_1_and_prints_all_problems(run: Run, service: FakeService) -> None:
    service.faults = [
        lambda _: None,
        lambda _: problem(409, "invalid_state", "The job is failed. Allowed actions: resume, delete."),
    ]
    code, out, err = run("pause", "pre-12")
    assert (code, out) == (1, "")
    assert "trainyard: The job is failed. Allowed actions: resume, delete. [invalid_state]" in err


def test_an_error_of_the_service_names_the_request(run: Run, service: FakeService) -> None:
    service.faults = [lambda _: problem(500, "internal_error", "The service made a mistake.")]
    code, _, err = run("list")
    assert code == 1
    assert "req-1" in err


def test_list(run: Run, service: FakeService) -> None:
    service.jobs["job_2"] = job("queued", id="job_2", name="wait\x1b[2J", progress=None)
    code, out, _ = run("list")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["ID", "NAME", "STATUS", "STEP", "LOSS", "ETA", "CREATED"]
    assert lines[1].startswith("job_7f3kq9  pre-12")
    assert "> RUNNING  12,400 / 40,000  2.887  2 h 10 min" in lines[1]
    assert "~ QUEUED" in lines[2]
    assert "\x1b" not in out


def test_list_shows_group_and_score_if_a_job_has_them(run: Run, service: FakeService) -> None:
    for number, kind in enumerate(("eval_loss", "loss", "bpb")):
        score = {"metric": kind, "value": 2.5 + number, "step": 3}
        service.jobs[f"job_{number}"] = job(id=f"job_{number}", group="sweep", score=score, progress=None)
    out = run("list", "--group", "sweep", "--order", "score", "--discarded")[1]
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["ID"].split() == ["ID", "NAME", "GROUP", "STATUS", "STEP", "LOSS", "SCORE", "ETA", "CREATED"]
    assert "sweep" in lines["job_0"]
    assert "2.500 eval" in lines["job_0"]
    assert "3.500" in lines["job_1"]
    assert "4.500 bpb" in lines["job_2"]
    query = dict(service.requests[-1].url.params)
    assert {name: query[name] for name in ("group", "order", "discarded")} == {
        "group": "sweep",
        "order": "score",
        "discarded": "true",
    }
    assert (
        "trainyard list --group sweep --order=-score --discarded --limit 10"
        in (run("list", "--group", "sweep", "--order=-score", "--discarded", "--limit", "1")[2])
    )


def test_describe_and_discard(run: Run, service: FakeService) -> None:
    assert run("describe", "pre-12", "lower rate", "--group", "sweep")[0] == 0
    assert json.loads(service.requests[-1].content) == {"description": "lower rate", "group": "sweep"}
    assert run("describe", "pre-12", "", "--group", "none")[0] == 0
    assert json.loads(service.requests[-1].content) == {"description": "", "group": None}
    assert "--undo" in run("discard", "pre-12")[2]
    assert json.loads(service.requests[-1].content) == {"discarded": True}
    assert run("discard", "pre-12", "--undo")[0] == 0
    assert json.loads(service.requests[-1].content) == {"discarded": False}


def test_list_reports_that_there_are_more(run: Run, service: FakeService) -> None:
    for number in range(5):
        service.jobs[f"job_{number}"] = job(id=f"job_{number}")
    _, out, err = run("list", "--limit", "3")
    assert len(out.splitlines()) == 4
    assert "trainyard list --limit 30" in err
    assert "left out: the jobs created before" in err
    assert "trainyard list --label 'a=b c' --limit 30" in run("list", "--limit", "3", "--label", "a=b c")[2]
    assert json.loads(run("list", "--limit", "3", "--json")[1])["has_more"] is True


def test_the_command_that_lists_more_keeps_all_filters(run: Run, service: FakeService) -> None:
    for number in range(3):
        service.jobs[f"job_{number}"] = job(id=f"job_{number}")
    given = ["--status=running", "--label", "a=b", "--name=pre-12", "--group=g", "--owner=ann", "--order=oldest"]
    hint = run("list", "--limit", "2", *given)[2].rpartition("List more:  trainyard ")[2].split()
    del service.requests[:]
    run(*hint)
    params = dict(service.requests[-1].url.params)
    assert params.pop("limit") == "21"
    expected = {"status": "running", "label": "a=b", "name": "pre-12", "group": "g", "owner": "ann", "order": "oldest"}
    assert params == expected


@pytest.mark.parametrize("line", [["generate", "pre-12", "-"], ["chat", "pre-12"], ["webhook", "create", "-"]])
def test_a_text_that_is_not_utf8_is_an_error(
    monkeypatch: pytest.MonkeyPatch, service: FakeService, run: Run, line: list[str]
) -> None:
    assert run("list")[0] == 0  # the fixture connects commands to the fake
    given = io.TextIOWrapper(io.BytesIO("你好\n".encode("gbk")), encoding="utf-8")
    to = Console(Stream(), Stream(), given)
    assert main(line, to) == 2
    assert "trainyard: the text on stdin " in to.err.getvalue()  # type: ignore[attr-defined]
    assert [request.method for request in service.requests if request.method != "GET"] == []


def test_an_empty_list_suggests_a_command(run: Run, service: FakeService) -> None:
    service.jobs.clear()
    assert run("list")[1] == ""
    assert "trainyard submit" in run("list")[2]


def test_show(run: Run, service: FakeService) -> None:
    error: dict[str, Any] = {
        "code": "diverged",
        "message": "loss is NaN at step 7",
        "hint": "lower the rate",
        "rank": None,
    }
    service.jobs["job_7f3kq9"] = job(
        "failed",
        error=error,
        message="Loss is NaN",
        summary="Failed at step 7.",
        resumable=True,
        alerts=[{"message": "flat"}],
    )
    code, out, _ = run("show", "pre-12")
    assert code == 0
    for line in (
        "pre-12   job_7f3kq9   ! FAILED",
        "Failed at step 7.",
        "Loss is NaN",
        "  progress   step 12,400 of 40,000, 31.0 %, ETA 2 h 10 min",
        "  alert: flat",
        "error: loss is NaN at step 7 [diverged]",
        "hint: lower the rate",
        "  you can: pause",
        "  resume     possible",
    ):
        assert line in out.splitlines(), line


def test_show_does_not_say_the_same_twice(run: Run, service: FakeService) -> None:
    service.jobs["job_7f3kq9"] = job("failed", message="rank 1 died.", summary="Rank 1 died. Try again.")
    out = run("show", "job_7f3kq9")[1]
    assert out.lower().count("rank 1 died") == 1


def test_metrics_as_table_and_csv(run: Run, service: FakeService) -> None:
    service.curve = [metric(1, 8.76), metric(2, None)]
    lines = run("metrics", "pre-12")[1].splitlines()
    assert lines[1].split() == ["1", "8.7600", "2.61e-04", "0.480", "118,240"]
    assert "not finite" in lines[2]
    rows = run("metrics", "pre-12", "--csv")[1].splitlines()
    assert rows[0].startswith("step,attempt,epoch,loss,")
    assert rows[1].startswith("1,1,0.1,8.76,")
    assert rows[2].startswith("2,1,0.1,,")
    assert run("metrics", "pre-12", "--after-step", "1", "--csv")[1].count("\n") == 2
    for empty in (run("metrics", "pre-12", "--attempt", "7", "--csv"), run("metrics", "pre-12", "--attempt", "7")):
        assert empty == (0, "", "no points yet; `trainyard show JOB` has the state of the job\n")


def test_held_out_sets_are_in_the_page_the_table_and_the_csv(run: Run, service: FakeService) -> None:
    sets = {"zh": {"loss": 4.5, "bpb": 1.25}, "code": {"loss": 2.0, "bpb": None}}
    service.curve = [metric(1, 8.0, eval=None), metric(2, 7.0, bpb=2.5, eval_loss=3.5, eval_bpb=1.1, eval=sets)]
    job_id = next(iter(service.jobs))
    known = service.jobs[job_id]
    facts = [{"name": name, "files": 1, "documents": 3, "tokens": 90, "duplicates": None} for name in sets]
    known["plan"] = {**(known.get("plan") or {}), "eval_sets": facts}
    known["progress"] = {**known["progress"], "bpb": 2.5, "eval_loss": 3.5, "eval_bpb": 1.1, "eval_step": 2}
    page = run("show", job_id)[1]
    assert "  held-out   loss 3.500 (1.100 bits per byte) at step 2\n" in page
    assert "held-out sets:\n  zh    loss 4.500 (1.250 bits per byte)\n  code  loss 2.000\n" in page
    lines = run("metrics", job_id)[1].splitlines()
    assert lines[0].split()[-4:] == ["EVAL", "LOSS", "EVAL", "BPB"]
    assert lines[2].split()[-3:] == ["2.5000", "3.5000", "1.1000"]
    rows = list(csv.DictReader(io.StringIO(run("metrics", job_id, "--csv")[1])))
    assert [(row["eval.zh.loss"], row["eval.zh.bpb"], row["eval.code.bpb"]) for row in rows] == [
        ("", "", ""), ("4.5", "1.25", "")]  # fmt: skip


def test_the_other_tables(run: Run, service: FakeService) -> None:
    service.rows = {
        "events": [{"id": "1", "at": "2026-01-31T16:31:05Z", "kind": "status", "message": "queued", "actor": "user"}],
        "checkpoints": [{"step": 60, "kind": "full", "loss": 5.5, "bytes": 12_000_000, "sha256": "ab12", "path": "/c"}],
        "attempts": [
            {"number": 1, "trigger": "submit", "start_step": 0, "end_step": 60, "created_at": "t0", "ended_at": "t1",
             "outcome": "stopped", "message": "saved"},
        ],
        "samples": [
            {"step": 60, "prompt": "Return", "text": "the\nvalue", "note": None},
            {"step": 60, "prompt": "So", "text": "it", "note": "at most 20 new tokens"},
        ],
        "devices": [
            {"id": "cpu:0", "kind": "cpu", "model": None, "memory_bytes": None, "job_id": None, "processes": []},
            {"id": "cuda:0", "kind": "cuda", "model": "H100", "memory_bytes": 8e10, "job_id": None, "processes": [7]},
            {"id": "cuda:1", "kind": "cuda", "model": "H100", "memory_bytes": 8e10, "job_id": None, "processes": [],
             "link": "nvlink", "nvlink_peers": ["cuda:0"], "numa_node": 1, "xid_errors": [{"xid": 79, "at": "t"}]},
        ],
    }  # fmt: skip
    assert run("events", "pre-12")[1].splitlines()[1] == "2026-01-31T16:31:05Z  status  queued  (by user)"
    assert run("checkpoints", "pre-12")[1].splitlines()[1] == "60    full  5.5000  12.0 MB  ab12    /c"
    assert run("attempts", "pre-12")[1].splitlines()[1].split() == [
        "1",
        "submit",
        "0",
        "60",
        "t0",
        "t1",
        "stopped:",
        "saved",
    ]
    assert run("samples", "pre-12")[1] == (
        "step 60  'Return'\n  the\n  value\nstep 60  'So'  (at most 20 new tokens)\n  it\n"
    )
    devices = run("devices")[1].splitlines()
    assert devices[1].split() == ["cpu:0", "cpu", "-", "-", "free"]
    assert devices[2].split("  ")[-1].strip() == "no job, but used by process 7"
    assert "nvlink to cuda:0, NUMA node 1" in devices[3]
    assert devices[3].endswith("XID 79: not leased until `trainyard devices --clear cuda:1`")


def test_version_names_both(run: Run) -> None:
    assert run("version")[1] == "client 0.1.0\nservice 9.9 at http://127.0.0.1:8000\n"


@pytest.mark.parametrize("verb", ["pause", "resume", "save", "cancel", "kill"])
def test_actions_say_the_state_and_what_is_next(run: Run, service: FakeService, verb: str) -> None:
    code, out, err = run(verb, "pre-12", *(["-y"] if verb == "kill" else []))
    assert (code, out) == (0, "job_7f3kq9 running\n")
    assert err.startswith("next:  trainyard watch pre-12")
    assert service.requests[-1].url.path == f"/jobs/job_7f3kq9/{verb}"


def test_resume_with_more_steps_prints_the_rates(run: Run, service: FakeService) -> None:
    service.jobs["job_7f3kq9"] |= {"learning_rate_before": 2e-4, "learning_rate_after": 1.03e-3}
    code, _, err = run("resume", "pre-12", "--max_steps", "500", "--schedule", "extend")
    assert code == 0
    assert body_of(service.requests[-1]) == {"max_steps": 500, "schedule": "extend"}
    assert "learning rate: 0.0002 at the checkpoint, 0.00103 at the next step" in err
    assert "--schedule continue" in err


def test_resume_with_other_limits(run: Run, service: FakeService) -> None:
    run("resume", "pre-12", "--max_minutes", "10.5", "--target-loss", "none", "--max_tokens", "1000")
    assert body_of(service.requests[-1]) == {"max_tokens": 1000, "max_minutes": 10.5, "target_loss": None}
    code, _, err = run("resume", "pre-12", "--max_minutes", "long")
    assert code != 0
    assert "--max_minutes takes a number or none, not 'long'" in err


def test_resume_with_changes(run: Run, service: FakeService) -> None:
    run("resume", "pre-12", "--max_steps", "500", "--set", "resources.nproc_per_node=2", "--set", "device=cpu")
    assert body_of(service.requests[-1]) == {"max_steps": 500, "resources": {"nproc_per_node": 2, "device": "cpu"}}
    for words in (
        ["--save_dir", "d"],
        ["--save-dir", "d"],
        ["--set", "checkpoint.save_dir=d"],
        ["--set", "save_dir=d"],
    ):
        run("resume", "pre-12", *words)
        assert body_of(service.requests[-1]) == {"save_dir": str(Path.cwd() / "d")}
    code, _, err = run("resume", "pre-12", "--set", "training.batch_size=2")
    assert code == 2
    assert "only resources" in err


DESTRUCTIVE = (
    ["delete", "pre-12"], ["kill", "pre-12"], ["checkpoints", "pre-12", "--delete", "1"], ["webhook", "delete", "wh_1"],
    ["token", "revoke", "ci"],
)  # fmt: skip


def writes(service: FakeService) -> list[str]:
    return [request.method for request in service.requests if request.method != "GET"]


@pytest.mark.parametrize("line", DESTRUCTIVE)
def test_what_cannot_be_undone_is_asked_and_enter_means_no(run: Run, service: FakeService, line: list[str]) -> None:
    service.files = {1: {}}
    for typed in ("\n", "n\n", "", "yess\n"):
        code, _, err = run(*line, typed=typed, terminal=True)
        assert (code, "[y/N]" in err, writes(service)) == (1, True, []), typed
        assert "nothing was" in err
    # The fake has no webhooks and tokens: that the request is sent is enough.
    run(*line, typed="y\n", terminal=True)
    assert len(writes(service)) == 1


@pytest.mark.parametrize("line", DESTRUCTIVE)
def test_off_a_terminal_it_needs_y(run: Run, service: FakeService, line: list[str]) -> None:
    service.files = {1: {}}
    code, out, err = run(*line, "--json", typed="y\n")
    assert (code, out, writes(service)) == (2, "", [])
    assert "-y confirms it" in err
    run(*line, "-y")
    assert len(writes(service)) == 1


def test_delete_with_y(run: Run, service: FakeService) -> None:
    assert run("delete", "pre-12", "--json", "-y")[:2] == (0, '{"id": "job_7f3kq9", "deleted": true}\n')
    assert service.jobs == {}


def test_kill_names_what_is_lost(run: Run, service: FakeService) -> None:
    assert "lose what it has computed after step 12,000? " in run("kill", "pre-12", terminal=True)[2]
    service.jobs["job_7f3kq9"]["checkpoint"] = None
    assert "lose everything it has computed? " in run("kill", "pre-12", terminal=True)[2]


def test_the_option_version_needs_no_service(run: Run, service: FakeService) -> None:
    service.faults = [refused] * 9
    assert run("--version") == (0, f"trainyard {importlib.metadata.version('trainyard')}\n", "")
    assert service.requests == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["list", "--name", "\udcff"], "/query/name: must be text"),
        (["list", "--label", "a=\udcff"], "/query/label/0: must be text"),
        (
            ["resume", "pre-12", "--set", "resources.max_restarts=NaN"],
            "/resources/max_restarts: must be a finite number",
        ),
        (["fork", "pre-12", "--set", "training.learning_rate=Infinity"], "/overrides/training/learning_rate: must be"),
        (["fork", "pre-12", "--name", "\udcff"], "/overrides/name: must be text"),
        (["webhook", "create", "http://x.y", "--rule", "no_progress=nan"], "/rules/0/minutes: must be a finite number"),
        (["webhook", "create", "http://x.y", "--label", "\udcff=1"], "/labels: must be text"),
        (["token", "create", "\udcff"], "/name: must be text"),
    ],
)
def test_a_value_that_json_cannot_express_is_named(
    run: Run, service: FakeService, line: list[str], message: str
) -> None:
    code, out, err = run(*line)
    assert (code, out, writes(service)) == (1, "", [])
    assert message in err


@pytest.mark.parametrize(
    ("line", "module", "passed", "settings"),
    [
        (
            ["serve", "--host", "::1", "--port", "81", "--home", "/h", "--database-url", "sqlite://"],
            "trainyard.service",
            [],
            {
                "TRAINYARD_HOST": "::1",
                "TRAINYARD_PORT": "81",
                "TRAINYARD_HOME": "/h",
                "TRAINYARD_DATABASE_URL": "sqlite://",
            },
        ),
        (["serve", "--no-scheduler"], "trainyard.service", ["--no-scheduler"], {}),
        (["db", "upgrade", "--home", "/h"], "trainyard.service.db.cli", ["upgrade"], {"TRAINYARD_HOME": "/h"}),
        (
            ["db", "copy", "/h", "postgresql:///t"],
            "trainyard.service.db.cli",
            ["copy", "/h", "postgresql:///t"],
            {},
        ),
        (
            ["db", "backup", "/b", "--home", "/h"],
            "trainyard.service.db.cli",
            ["backup", "/b"],
            {"TRAINYARD_HOME": "/h"},
        ),
        (["doctor"], "trainyard.worker.doctor", [], {}),
        (
            ["doctor", "--gpu", "--json", "--out", "d", "--home", "/h"],
            "trainyard.worker.doctor",
            ["--json", "--gpu", "--out", "d"],
            {"TRAINYARD_HOME": "/h"},
        ),
        (
            ["tokenizer", "train", "f.jsonl", "--vocab-size", "500", "--out", "d"],
            "trainyard.worker.data.tokenizers",
            ["train", "f.jsonl", "--vocab-size", "500", "--out", "d", "--text-field", "text"],
            {},
        ),
        (
            ["corpus", "list", "--home", "/h"],
            "trainyard.service.maintenance.corpus_cache",
            ["list"],
            {"TRAINYARD_HOME": "/h"},
        ),
        (["corpus", "prune", "--days", "7"], "trainyard.service.maintenance.corpus_cache", ["prune", "--days=7"], {}),
        (["corpus", "list", "--json"], "trainyard.service.maintenance.corpus_cache", ["list", "--json"], {}),
        (
            ["corpus", "check", "f", "--json"],
            "trainyard.worker.data.corpus",
            ["check", "f", "--text-field", "text", "--special-tokens", "text", "--json"],
            {},
        ),
        (
            ["corpus", "show", "f", "g", "--tokenizer_path", "t", "--home", "/h"],
            "trainyard.worker.data.inspection",
            ["show", "--text-field", "text", "--special-tokens", "text", "--tokenizer", "t", "--", "f", "g"],
            {"TRAINYARD_HOME": "/h"},
        ),
        (
            ["corpus", "sample", "o.jsonl", "f", "--documents", "5", "--seed=-1"],
            "trainyard.worker.data.inspection",
            ["sample", "--documents=5", "--seed=-1", "--text-field", "text", "--", "o.jsonl", "f"],
            {},
        ),
        (
            ["corpus", "check", "f", "--text-field", "b"],
            "trainyard.worker.data.corpus",
            ["check", "f", "--text-field", "b", "--special-tokens", "text"],
            {},
        ),
    ],
)
def test_local_commands_become_their_program(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    line: list[str],
    module: str,
    passed: list[str],
    settings: dict[str, str],
) -> None:
    became: list[Any] = []

    def execve(program: str, arguments: list[str], environment: dict[str, str]) -> None:
        became.extend([program, arguments, environment])
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.delenv("TRAINYARD_SOAK_SEED", raising=False)
    run(*line)
    program, arguments_, environment = became
    assert program == sys.executable
    assert arguments_ == [sys.executable, "-P", "-m", module, *passed]
    given = {name: value for name, value in environment.items() if name.startswith("TRAINYARD_")}
    assert given == settings


def test_of_several_jobs_with_a_name_the_newest_is_meant(run: Run, service: FakeService) -> None:
    service.jobs = {name: job("succeeded", id=name) for name in ("job_new", "job_old")}
    code, out, err = run("show", "pre-12", "--json")
    assert (code, json.loads(out)["id"]) == (0, "job_new")
    assert err == "pre-12 is the newest of 2 jobs with this name, job_new; older: job_old (succeeded)\n"
    assert run("resume", "pre-12")[1].startswith("job_new ")
    for line in (
        ["delete", "pre-12", "-y"],
        ["kill", "pre-12", "-y"],
        ["checkpoints", "pre-12", "--delete", "1", "-y"],
    ):
        code, _, err = run(*line)
        assert code == 2, "what destroys does not guess"
        assert "2 jobs are named 'pre-12'; give the id of one: job_new" in err
    assert set(service.jobs) == {"job_new", "job_old"}
