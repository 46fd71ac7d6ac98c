import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.client.conftest import Run
from tests.client.fake_service import FakeService, body_of, job, problem
from trainyard.client.cli.console import Console


def sent(service: FakeService) -> Any:
    return body_of(next(request for request in service.requests if request.url.path == "/jobs"))


def test_off_a_terminal_it_submits_at_once(run: Run, service: FakeService) -> None:
    code, out, err = run(
        "submit", "--data_path", "/d/a.jsonl", "--batch_size", "64", "--name", "mine", "--labels", "a=1"
    )
    assert code == 0
    assert out == "job_0\n"
    assert "next:  trainyard watch job_0" in err
    assert sent(service) == {
        "data": {"data_path": "/d/a.jsonl"},
        "training": {"batch_size": 64},
        "name": "mine",
        "labels": {"a": "1"},
    }


WARNING = "save_interval 1,000 is longer than the run (40 steps): the only checkpoint is that of the end"


def test_off_a_terminal_warnings_stop_it(run: Run, service: FakeService) -> None:
    service.plan["warnings"] = [WARNING]
    code, out, err = run("submit", "--data_path", "/d")
    assert code == 1
    assert out == ""
    assert WARNING in err
    assert "-y submits" in err
    assert [request.url.path for request in service.requests] == ["/jobs/plan"]


def test_without_a_terminal_advice_does_not_stop_a_submission(run: Run, service: FakeService) -> None:
    service.plan["advice"] = ['with training.dtype "float32" the run is faster']
    assert run("submit", "--data_path", "/d")[:2] == (0, "job_0\n")


def test_off_a_terminal_yes_submits_in_spite_of_warnings(run: Run, service: FakeService) -> None:
    service.plan["warnings"] = [WARNING]
    code, out, _ = run("submit", "--data_path", "/d", "-y")
    assert code == 0
    assert out == "job_0\n"


@pytest.mark.parametrize("status", [404, 405])
def test_off_a_terminal_a_service_without_plans_is_sent_the_spec(run: Run, service: FakeService, status: int) -> None:
    service.faults = [lambda _: problem(status, "no", "No.")]
    assert run("submit", "--data_path", "/d")[0] == 0


def test_a_spec_file_with_flags(run: Run, service: FakeService, tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({"data": {"data_path": "/d"}, "training": {"epochs": 1}, "labels": {"a": "1"}}))
    code, _, _ = run("submit", str(file), "--epochs", "2", "--labels", "b=2", "--set", "checkpoint.keep_last=5")
    assert code == 0
    assert sent(service) == {
        "data": {"data_path": "/d"},
        "training": {"epochs": 2},
        "labels": {"a": "1", "b": "2"},
        "checkpoint": {"keep_last": 5},
    }


def test_a_spec_from_stdin_is_not_asked_about(run: Run, service: FakeService) -> None:
    code, _, _ = run("submit", "-", typed='{"data": {"data_path": "/d"}}', terminal=True)
    assert code == 0
    assert sent(service) == {"data": {"data_path": "/d"}}


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("command", ["submit", "plan"])
@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["--learning_rate", "nan"], "--learning_rate (/training/learning_rate)"),
        (["--num_train_epochs", "inf"], "--num_train_epochs (/training/epochs)"),
        (["--betas", "0.9", "nan"], "--betas (/training/betas/1)"),
        (["--set", "training.grad_clip=-Infinity"], "/training/grad_clip"),
        (["--name", "\udcff"], "/name"),
        (["--tokenizer_path", "\udcff"], "--tokenizer_path (/data/tokenizer_path)"),
    ],
)
def test_a_value_that_json_cannot_express_is_named(
    run: Run, service: FakeService, command: str, words: list[str], place: str, terminal: bool
) -> None:
    code, out, err = run(command, "--data_path", "/d", *words, typed="y\n", terminal=terminal)
    assert (code, out, service.requests) == (1, "", [])
    assert f"  {place}: " in err


def test_a_spec_with_a_byte_order_mark(run: Run, service: FakeService, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text('{"name": "队", "data": {"data_path": "/d"}}', encoding="utf-8-sig")
    assert run("submit", str(file))[0] == 0
    assert sent(service) == {"name": "队", "data": {"data_path": "/d"}}
    stdin = io.TextIOWrapper(io.BytesIO(file.read_bytes()), encoding="latin-1")
    assert json.loads(Console(stdin=stdin).read_stdin())["name"] == "队"


def test_relative_paths_are_made_absolute(
    run: Run, service: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("submit", "--data_path", "a.jsonl")
    assert sent(service)["data"]["data_path"] == str(tmp_path / "a.jsonl")


def test_json_prints_the_job(run: Run) -> None:
    code, out, _ = run("submit", "--data_path", "/d", "--json")
    assert code == 0
    assert json.loads(out)["id"] == "job_0"


@pytest.mark.parametrize(("typed", "code", "posts"), [("\n", 0, 1), ("y\n", 0, 1), ("n\n", 1, 0), ("", 1, 0)])
def test_on_a_terminal_it_shows_and_asks(run: Run, service: FakeService, typed: str, code: int, posts: int) -> None:
    found, _, err = run("submit", "--data_path", "/d", "--batch_size", "64", typed=typed, terminal=True)
    assert found == code
    assert len([request for request in service.requests if request.url.path == "/jobs"]) == posts
    assert "time     about 2 h 10 min, by 118,240 tokens/s in job_0 on H100" in err
    assert re.search(r"training\.batch_size +64\n", err)
    assert "Submit? [Y/n]" in err
    assert "accumulation_steps" not in err


def test_yes_does_not_ask(run: Run, service: FakeService) -> None:
    code, _, err = run("submit", "--data_path", "/d", "-y", terminal=True)
    assert code == 0
    assert "Submit?" not in err
    assert [request.url.path for request in service.requests] == ["/jobs"]


@pytest.mark.parametrize("status", [404, 405])
def test_a_service_without_plans_gets_the_settings_shown(run: Run, service: FakeService, status: int) -> None:
    service.faults = [lambda _: problem(status, "no", "No.")]
    code, _, err = run("submit", "--data_path", "/d", "--epochs", "2", typed="y\n", terminal=True)
    assert code == 0
    assert "training.epochs" in err
    assert "Plan:" not in err


def test_a_spec_that_the_service_rejects_is_not_asked_about(run: Run, service: FakeService) -> None:
    errors = [{"pointer": "/data/data_path", "message": "does not exist"}]
    service.faults = [lambda _: problem(422, "invalid_spec", "1 mistake found", errors=errors)]
    code, _, err = run("submit", "--data_path", "/d", terminal=True)
    assert code == 1
    assert "--data_path (/data/data_path): does not exist" in err
    assert "Submit?" not in err


def test_on_a_terminal_a_wrong_spec_is_not_asked_about(run: Run, service: FakeService) -> None:
    code, _, err = run("submit", "--batch_size", "0", terminal=True)
    assert code == 1
    assert service.requests == []
    assert "--batch_size (/training/batch_size):" in err
    assert "/data/data_path: is required" in err


@pytest.mark.parametrize(
    "program", [["torchrun", "--nproc_per_node", "4", "trainer/train_pretrain.py"], ["python", "train_pretrain.py"]]
)
def test_minimind_s_whole_command_line_may_be_pasted(run: Run, service: FakeService, program: list[str]) -> None:
    assert run("submit", *program, "--data_path", "/d/a.jsonl", "--batch_size", "64", "-y")[0] == 0
    ranks = {"resources": {"nproc_per_node": 4}} if "4" in program else {}
    data = {"data_path": "/d/a.jsonl", "special_tokens": "tokens"}
    assert sent(service) == {"data": data, "training": {"batch_size": 64}, **ranks}


def minimind_folder(root: Path) -> Path:
    """The folders of MiniMind's repository that its trainer reads."""
    for name in ("trainer", "dataset", "model"):
        (root / name).mkdir(parents=True)
    (root / "trainer" / "train_pretrain.py").write_text("")
    (root / "dataset" / "pretrain_hq.jsonl").write_text('{"text": "a"}\n')
    (root / "model" / "tokenizer.json").write_text("{}")
    return root


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("trainer", "torchrun --nproc_per_node 2 train_pretrain.py --batch_size 8"),
        ("trainer", "python train_pretrain.py --batch_size 8"),
        ("trainer", "--batch_size 8"),
        (".", "torchrun --standalone --master_port 29501 --nproc_per_node=2 trainer/train_pretrain.py --batch_size 8"),
        (".", "trainer/train_pretrain.py --batch_size 8 --data_path ../dataset/pretrain_hq.jsonl"),
    ],
)
def test_minimind_s_lines_take_its_corpus_and_tokenizer(
    run: Run, service: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, line: str
) -> None:
    root = minimind_folder(tmp_path / "minimind")
    monkeypatch.chdir(root / folder)
    code, _, err = run("submit", *line.split(), "-y")
    assert code == 0, err
    corpus, model = root / "dataset" / "pretrain_hq.jsonl", root / "model"
    assert sent(service)["data"] == {
        "data_path": str(corpus), "tokenizer_path": str(model), "special_tokens": "tokens"}  # fmt: skip
    assert f"MiniMind: --data_path {corpus}" in err
    assert f"MiniMind: --tokenizer_path {model}" in err
    assert "MiniMind: --special_tokens tokens" in err
    assert "byte" not in err


def test_what_a_line_names_is_kept_and_other_folders_are_not_searched(
    run: Run, service: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = minimind_folder(tmp_path / "minimind")
    monkeypatch.chdir(root / "trainer")
    assert run("submit", "--data_path", "/d", "--tokenizer", "byte", "-y")[0] == 2  # --tokenizer_path
    flags = ["--data_path", "/d", "--tokenizer_path", "byte", "--special_tokens", "text"]
    code, _, err = run("submit", "train_pretrain.py", *flags, "-y")
    assert code == 0
    assert "MiniMind:" not in err
    assert sent(service)["data"] == {"data_path": "/d", "tokenizer_path": "byte", "special_tokens": "text"}
    service.requests.clear()
    monkeypatch.chdir(root / "dataset")
    code, _, err = run("submit", "--data_path", "/d", "-y")
    assert sent(service)["data"] == {"data_path": "/d"}
    assert 'the built-in "byte" tokenizer is used' in err


def test_folders_outside_the_roots_get_the_command_that_allows_them(
    run: Run, service: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    errors = [
        {"pointer": "/data/data_path", "message": "lies outside the directories that TRAINYARD_DATA_ROOTS allows"},
        {"pointer": "/checkpoint/save_dir", "message": "lies outside the directories that TRAINYARD_SAVE_ROOTS allows"},
    ]
    roots = {
        "settings": {"TRAINYARD_DATA_ROOTS": ["/srv"], "TRAINYARD_SAVE_ROOTS": []},
        "command": ["trainyard", "serve", "--home", "/a home", "--port", "8000"],
    }
    service.faults = [lambda _: problem(422, "invalid_spec", "2 mistakes found", errors=errors, roots=roots)]
    code, _, err = run("submit", "--data_path", "data/c.jsonl", "--save_dir", "../out", "-y")
    assert code == 1
    expected = f"TRAINYARD_DATA_ROOTS=/srv:{tmp_path}/data TRAINYARD_SAVE_ROOTS={tmp_path.parent}/out"
    assert f"to allow it, start the service as:  {expected} trainyard serve --home '/a home' --port 8000\n" in err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_spec_file_of_a_windows_program_is_read(
    run: Run, service: FakeService, tmp_path: Path, encoding: str
) -> None:
    file = tmp_path / "run.json"
    file.write_text('{"name": "\u4e2d", "data": {"data_path": "/d"}}', encoding=encoding)
    assert run("submit", str(file), "-y")[0] == 0
    assert sent(service)["name"] == "\u4e2d"
    service.requests.clear()
    assert run("submit", "-", "-y", typed='\ufeff{"data": {"data_path": "/d"}}')[0] == 0
    assert sent(service) == {"data": {"data_path": "/d"}}


def test_a_wrong_path_is_shown_in_full(
    run: Run, service: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    errors = [{"pointer": "/data/data_path", "message": "does not exist"}]
    service.faults = [lambda _: problem(422, "invalid_spec", "1 mistake found", errors=errors)]
    code, _, err = run("submit", "--data_path", "../d.jsonl", "-y")
    assert code == 1
    assert f"--data_path (/data/data_path): does not exist ({tmp_path}/../d.jsonl)" in err


def test_every_problem_of_the_service_is_printed_with_its_flag(run: Run, service: FakeService) -> None:
    errors = [
        {"pointer": "/training/learning_rate", "message": "must be greater than 0"},
        {"pointer": "/training/epochs", "message": "must be positive"},
        {"pointer": "/data/data_path", "message": "is required"},
        {"pointer": "", "message": "must be an object"},
    ]
    service.faults = [lambda _: problem(422, "invalid_spec", "4 mistakes found", errors=errors)]
    code, out, err = run("submit", "--learning_rate", "0", "--num_train_epochs", "-1")
    assert (code, out) == (1, "")
    assert "4 mistakes found" in err
    assert "--learning_rate (/training/learning_rate): must be greater than 0" in err
    assert "--num_train_epochs (/training/epochs): must be positive" in err
    assert "  /data/data_path: is required" in err
    assert "  the spec: must be an object" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batchsize", "3"], "there is no flag --batchsize; did you mean --batch_size"),
        ([], "give a SPEC.json"),
        (["/nowhere/spec.json"], "cannot read /nowhere/spec.json: No such file"),
        (["--data_path", "/d", "--timeout", "3"], "--watch"),
        (["--data_path", "/d", "--labels", "x"], "KEY=VALUE"),
        (["--data_path"], "requires an argument"),
    ],
)
def test_wrong_usage(
    run: Run, service: FakeService, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    code, _, err = run("submit", *arguments)
    assert code == 2
    assert said in err + capsys.readouterr().err
    assert service.requests == []


@pytest.mark.parametrize("text", ["{", "[]", '"a"', "[" * 100_000])
def test_a_file_without_a_spec(run: Run, tmp_path: Path, text: str) -> None:
    file = tmp_path / "spec.json"
    file.write_text(text)
    code, _, err = run("submit", str(file))
    assert code == 2
    assert str(file) in err


def test_watch_follows_with_the_run_s_exit_code(run: Run, service: FakeService) -> None:
    service.faults = [
        lambda _: None,
        lambda _: service.jobs.update(job_0=job("failed", id="job_0", message="diverged")),
    ]
    code, out, err = run("submit", "--data_path", "/d", "--watch", "-y")
    assert code == 10
    assert "status=failed" in out
    assert "failed: diverged" in err


def test_help_shows_the_spec_s_groups(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, _ = run("submit", "--help")
    shown = capsys.readouterr().out
    assert code == 0
    for part in ("--data_path", "--use_moe", "micro-batches per step", "resources:", "--num_train_epochs"):
        assert part in shown
