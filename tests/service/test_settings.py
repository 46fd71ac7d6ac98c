"""Settings of the service: defaults, environment, command line, and what is rejected."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import make_url

from trainyard.contract.allowed_paths import format_roots, parse_roots
from trainyard.service.clock import utc_now
from trainyard.service.db.cli import database_url
from trainyard.service.db.engine import Database
from trainyard.service.settings import InvalidSettings, Settings, is_loopback
from trainyard.service.static_tokens import TokenFile


def test_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings.read({})
    assert settings.home == tmp_path / "trainyard-home"
    assert settings.database_url == f"sqlite:///{tmp_path}/trainyard-home/trainyard.db"
    assert (settings.host, settings.port, settings.token) == ("127.0.0.1", 8000, None)
    assert tmp_path in settings.data_roots
    assert settings.home in settings.data_roots
    assert settings.save_roots == ()
    assert settings.corpus_cache == settings.home / "cache" / "corpus"
    assert settings.cpu_slots >= 1


def test_the_environment_and_then_the_command_line(tmp_path: Path) -> None:
    environment = {
        "TRAINYARD_HOME": str(tmp_path / "a"),
        "TRAINYARD_DATABASE_URL": "postgresql://x/y",
        "TRAINYARD_DATA_ROOTS": f"{tmp_path}/b:{tmp_path}/c/../d",
        "TRAINYARD_SAVE_ROOTS": f"{tmp_path}/e",
        "TRAINYARD_PORT": "9",
        "TRAINYARD_CPU_SLOTS": "3",
        "TRAINYARD_CORPUS_CACHE": str(tmp_path / "f"),
        "TRAINYARD_TOKEN": "t",
    }
    settings = Settings.read(environment)
    assert settings.home == tmp_path / "a"
    assert settings.database_url == "postgresql://x/y"
    assert settings.data_roots == (tmp_path / "b", tmp_path / "d")
    assert settings.save_roots == (tmp_path / "e",)
    assert (settings.port, settings.cpu_slots, settings.corpus_cache) == (9, 3, tmp_path / "f")
    assert "'t'" not in repr(settings)
    given = Settings.read(environment, port=0, home=tmp_path / "z", database_url="sqlite://", host="::1")
    assert (given.port, given.home, given.database_url, given.host) == (0, tmp_path / "z", "sqlite://", "::1")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", "127.0.0.1.example.org", "2130706433"])
def test_others_may_reach_it_only_with_a_token(host: str) -> None:
    with pytest.raises(InvalidSettings, match="TRAINYARD_TOKEN"):
        Settings.read({}, host=host)
    assert Settings.read({"TRAINYARD_TOKEN": "x"}, host=host).host == host
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert Settings.read({}, host=host).token is None


@pytest.mark.parametrize("text", ["abc", " abc", "abc\n", "\tabc\r\n"])
def test_whitespace_around_a_token_is_ignored(text: str) -> None:
    """A header cannot contain it, so no client could use the service."""
    settings = Settings.read({"TRAINYARD_TOKEN": text})
    assert settings.token == "abc"
    TokenFile(settings.token, None).require("abc")


@pytest.mark.parametrize("text", [" ", "\n", " \t "])
def test_a_blank_token_is_rejected(text: str) -> None:
    with pytest.raises(InvalidSettings, match=r"^TRAINYARD_TOKEN is blank$"):
        Settings.read({"TRAINYARD_TOKEN": text}, host="0.0.0.0")


@pytest.mark.parametrize("days", ["36500", "1000000", "9" * 30])
def test_any_number_of_days_gives_a_valid_date(days: str) -> None:
    names = ("IDEMPOTENCY", "CORPUS", "THIN_METRICS", "METRICS", "EVENTS")
    settings = Settings.read({f"TRAINYARD_{name}_DAYS": days for name in names})
    for name in names:
        age = timedelta(days=getattr(settings, f"{name.lower()}_days"))
        assert utc_now() - age < utc_now() - timedelta(days=36_000)


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "²"])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(InvalidSettings, match="TRAINYARD_PORT"):
        Settings.read({"TRAINYARD_PORT": text})


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"port": 65536}, "--port must be 0 to 65535"),
        ({"port": -1}, "--port must be 0 to 65535"),
        ({"database_url": "nothing"}, "TRAINYARD_DATABASE_URL"),
        ({"database_url": "mysql://root:secret@host/name"}, "TRAINYARD_DATABASE_URL"),
        ({"database_url": "postgresql://u:secret@host:port/name"}, 'TRAINYARD_DATABASE_URL .* write "@" as %40'),
        ({"database_url": "postgresql://u:a@secret@host/name"}, "TRAINYARD_DATABASE_URL .* set PGPASSWORD"),
        ({"database_url": "postgresql://u:a@secret/b@host/name"}, "TRAINYARD_DATABASE_URL .* set PGPASSWORD"),
        ({"database_url": "postgresql://u:a/b@secret@host/name"}, "TRAINYARD_DATABASE_URL .* set PGPASSWORD"),
    ],
)
def test_what_cannot_be_worked_with(given: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidSettings, match=named) as refused:
        Settings.read({}, **given)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    ["postgresql://u:a%40b%2Fc@host/name", "postgresql://u:a/b@host/name", "postgresql:///name?host=/tmp&user=a@b"],
)
def test_urls_of_databases_that_can_be_read(url: str) -> None:
    assert Settings.read({}, database_url=url).database_url == url


def test_every_mistake_has_its_line() -> None:
    environment = {
        "TRAINYARD_CPU_SLOTS": "few",
        "TRAINYARD_DATABASE_URL": "mysql://root:secret@host/name",
        "TRAINYARD_LOG_LEVEL": "loud",
        "TRAINYARD_ON_STOP": "pause",
        "TRAINYARD_PREEMPTION": "yes",
        "TRAINYARD_LAUNCHER": "slurm",
        "TRAINYARD_SLURM": "on",
        "TRAINYARD_SLURM_QOS": "a b",
        "TRAINYARD_SLURM_TIME_LIMIT": "soon",
        "TRAINYARD_SLURM_WARNING": "-1",
    }
    with pytest.raises(InvalidSettings) as refused:
        Settings.read(environment, port=-1)
    database, *rest = str(refused.value).splitlines()
    assert database.startswith("TRAINYARD_DATABASE_URL or --database-url must be sqlite:////FOLDER/FILE")
    assert rest == [
        "TRAINYARD_CPU_SLOTS must be a whole number",
        "TRAINYARD_PORT or --port must be 0 to 65535; 0 picks a free one",
        "TRAINYARD_ON_STOP must be leave or save",
        "TRAINYARD_PREEMPTION must be off or on",
        "TRAINYARD_LOG_LEVEL must be debug or error or info or warning",
        "TRAINYARD_SLURM_QOS is not what sbatch takes",
        "TRAINYARD_SLURM_TIME_LIMIT must be a number of seconds",
        "TRAINYARD_SLURM_WARNING must be a number of seconds",
    ]
    assert "secret" not in str(refused.value)


def test_only_the_environment_that_is_given_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_PORT", "9")
    assert Settings.read({}).port == 8000
    lower_case = {"port": "9", "trainyard_port": "9", "slurm": "on", "token": "x"}
    assert Settings.read(lower_case) == Settings.read({})


@pytest.mark.parametrize(("container", "default"), [(False, "leave"), (True, "save")])
def test_runs_are_saved_at_the_end_of_a_container(
    monkeypatch: pytest.MonkeyPatch, container: bool, default: str
) -> None:
    monkeypatch.setattr("trainyard.service.settings.in_container", lambda: container)
    assert Settings.read({}).on_stop == default
    assert {Settings.read({"TRAINYARD_ON_STOP": word}).on_stop for word in ("leave", "save")} == {"leave", "save"}


def test_names_it_is_known_by() -> None:
    assert "10.0.0.5" in Settings.read({"TRAINYARD_TOKEN": "x"}, host="10.0.0.5").allowed_hosts
    assert Settings.read({"TRAINYARD_TOKEN": "x"}, host="0.0.0.0").allowed_hosts == ("*",)
    named = Settings.read({"TRAINYARD_ALLOWED_HOSTS": "Train.Example, b"})
    assert named.allowed_hosts[-2:] == ("train.example", "b")


@pytest.mark.parametrize("name", ["x?a", "x#a", "x%41", "x a&b=c", "x;a:b", "家", "x?mode=ro"])
def test_the_database_of_a_home_is_in_that_home(name: str, tmp_path: Path) -> None:
    home = tmp_path / name
    settings = Settings.read({}, home=home)
    settings.require_own_database()
    database = Database(settings.database_url)
    database.upgrade()
    database.close()
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")} == {name}
    assert (home / "trainyard.db").is_file()
    assert database_url(str(home)) == database_url(str(home / "trainyard.db")) == settings.database_url


def test_two_homes_that_differ_after_a_question_mark_have_two_databases(tmp_path: Path) -> None:
    urls = {Settings.read({}, home=tmp_path / name).database_url for name in ("x?a", "x?b")}
    assert {make_url(url).database for url in urls} == {f"{tmp_path}/x?{name}/trainyard.db" for name in "ab"}


def test_a_database_that_0_1_put_elsewhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    settings = Settings.read({}, home=tmp_path / "x?a")
    with pytest.raises(InvalidSettings, match=f"kept the database of this home in {tmp_path}/x: stop every service"):
        settings.require_own_database()
    (tmp_path / "x?a").mkdir()
    (tmp_path / "x").rename(tmp_path / "x?a" / "trainyard.db")
    settings.require_own_database()
    Settings.read({}, home=tmp_path / "y?a", database_url="sqlite://").require_own_database()


@pytest.mark.parametrize("text", ['["/a:b", "/c"]', "/a:b", "[a]:/b", "", '["/a", 3]', "[1]"])
def test_roots_are_a_json_list_or_between_colons(text: str, tmp_path: Path) -> None:
    expected = {'["/a:b", "/c"]': ["/a:b", "/c"], "/a:b": ["/a", f"{Path.cwd()}/b"], "[1]": [f"{Path.cwd()}/[1]"]}
    settings = Settings.read({"TRAINYARD_SAVE_ROOTS": text}, home=tmp_path)
    if text in expected:
        assert [str(root) for root in settings.save_roots] == expected[text]
    roots = [Path("/a:b"), Path("/[c"), Path('/d"'), Path("/\udcff")]
    assert parse_roots(format_roots(roots)) == [str(root) for root in roots]
