"""Settings, the sentence, the inventory: small parts by themselves."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from contract import processes
from contract.processes import MARKER
from contract.status import Desired, JobStatus, Phase
from service.devices import inventory
from service.devices.inventory import HostInventory, cpu_slots, kind_for
from service.jobs.summary import Facts, duration, summary
from service.settings import Settings, SettingsRefused, is_loopback
from service.shapes import Checkpoint, Progress, Queue

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


# Settings


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
    with pytest.raises(SettingsRefused, match="TRAINYARD_TOKEN"):
        Settings.read({}, host=host)
    assert Settings.read({"TRAINYARD_TOKEN": "x"}, host=host).host == host
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert Settings.read({}, host=host).token is None


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "²"])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(SettingsRefused, match="TRAINYARD_PORT"):
        Settings.read({"TRAINYARD_PORT": text})


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"port": 65536}, "--port must be 0 to 65535"),
        ({"port": -1}, "--port must be 0 to 65535"),
        ({"database_url": "nothing"}, "TRAINYARD_DATABASE_URL"),
        ({"database_url": "mysql://root:secret@host/name"}, "TRAINYARD_DATABASE_URL"),
        ({"database_url": "postgresql://u:secret@host:port/name"}, "TRAINYARD_DATABASE_URL"),
    ],
)
def test_what_cannot_be_worked_with(given: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsRefused, match=named) as refused:
        Settings.read({}, **given)
    assert "secret" not in str(refused.value)


def test_every_mistake_has_its_line() -> None:
    environment = {
        "TRAINYARD_CPU_SLOTS": "few",
        "TRAINYARD_DATABASE_URL": "mysql://root:secret@host/name",
        "TRAINYARD_LOG_LEVEL": "loud",
        "TRAINYARD_PREEMPTION": "yes",
        "TRAINYARD_LAUNCHER": "slurm",
        "TRAINYARD_SLURM": "on",
        "TRAINYARD_SLURM_QOS": "a b",
        "TRAINYARD_SLURM_TIME_LIMIT": "soon",
        "TRAINYARD_SLURM_WARNING": "-1",
    }
    with pytest.raises(SettingsRefused) as refused:
        Settings.read(environment, port=-1)
    database, *rest = str(refused.value).splitlines()
    assert database.startswith("TRAINYARD_DATABASE_URL or --database-url must be sqlite:////FOLDER/FILE")
    assert rest == [
        "TRAINYARD_CPU_SLOTS must be a whole number",
        "TRAINYARD_PORT or --port must be 0 to 65535; 0 takes a free one",
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


def test_names_it_is_known_by() -> None:
    assert "10.0.0.5" in Settings.read({"TRAINYARD_TOKEN": "x"}, host="10.0.0.5").allowed_hosts
    assert Settings.read({"TRAINYARD_TOKEN": "x"}, host="0.0.0.0").allowed_hosts == ("*",)
    named = Settings.read({"TRAINYARD_ALLOWED_HOSTS": "Train.Example, b"})
    assert named.allowed_hosts[-2:] == ("train.example", "b")


# The sentence

CHECKPOINT = Checkpoint(
    id="1",
    job_id="j",
    attempt=1,
    step=12_000,
    path="/x",
    bytes=1,
    sha256="a",
    kind="full",
    loss=None,
    created_at=NOW - timedelta(minutes=3),
)
RUNNING = Facts(
    status=JobStatus.RUNNING,
    desired=Desired.RUN,
    attempt=2,
    message=None,
    hint=None,
    phase=Phase.TRAINING,
    phase_detail={},
    progress=Progress(step=12_400, steps=40_000, percent=31, eta_seconds=7800, tokens_per_second=118_240, loss=2.913),
    checkpoint=CHECKPOINT,
    queue=None,
    heard_at=NOW - timedelta(seconds=1),
)


def sentence(**changes: Any) -> str:
    return summary(replace(RUNNING, **changes), NOW)


def test_sentences() -> None:
    assert sentence() == (
        "Step 12,400 of 40,000 (31 %), ETA 2 h 10 min, 118k tok/s, loss 2.913, checkpoint 3 min ago at 12,000."
    )
    assert sentence(progress=Progress(step=3, nonfinite=True), checkpoint=None) == "Step 3, loss not finite."
    assert sentence(phase=None, progress=Progress()) == "Loading."
    assert sentence(phase=Phase.COMPILING) == "Compiling the model."
    assert sentence(heard_at=NOW - timedelta(seconds=45)) == (
        "No report for 45 s, expected every 0.5 s, last at step 12,400. "
        "Not treated as failed: its processes are looked at."
    )
    queue = Queue(position=3, waiting_for="2 GPUs; 1 of 4 free")
    assert sentence(status=JobStatus.QUEUED, queue=queue) == "Waiting for 2 GPUs; 1 of 4 free. Position 3."
    assert sentence(status=JobStatus.STARTING) == "Starting attempt 2."
    assert sentence(status=JobStatus.PAUSING) == "Saving and pausing at step 12,400."
    assert sentence(status=JobStatus.CANCELLING) == "Saving and stopping at step 12,400."
    assert sentence(status=JobStatus.CANCELLING, desired=Desired.KILL) == "Ending without a save at step 12,400."
    assert sentence(status=JobStatus.PAUSED) == "Paused at step 12,400; resuming goes on from step 12,000."
    assert sentence(status=JobStatus.SUCCEEDED) == "Finished at step 12,400, loss 2.913."
    failed = {"status": JobStatus.FAILED, "message": "out of GPU memory on rank 2", "hint": "Lower batch_size."}
    assert sentence(**failed) == "Out of GPU memory on rank 2. Lower batch_size."
    assert sentence(status=JobStatus.INTERRUPTED) == "Ended for an unknown reason."


@pytest.mark.parametrize("status", list(JobStatus))
def test_there_is_a_sentence_for_everything(status: JobStatus) -> None:
    bare = replace(
        RUNNING,
        status=status,
        progress=Progress(),
        checkpoint=None,
        queue=Queue(position=1, waiting_for="x"),
        heard_at=None,
    )
    for phase in (None, *Phase):
        said = summary(replace(bare, phase=phase), NOW)
        assert said.endswith(".")
        assert "None" not in said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-3, "0 s"), (0, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "1 h"), (7800, "2 h 10 min"), (180_000, "2 d 2 h")],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


# The inventory


class FakeNvml:
    """Two cards; a stranger on the second."""

    NVMLError = pynvml.NVMLError
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU
    asked = 0

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names
        """Start."""

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        FakeNvml.asked += 1
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetMemoryInfo(self, _: int) -> Any:  # noqa: N802
        return SimpleNamespace(total=80 << 30, used=1 << 30)

    def nvmlDeviceGetTemperature(self, index: int, sensor: int) -> int:  # noqa: N802
        assert sensor == self.NVML_TEMPERATURE_GPU
        if index:
            raise self.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 61

    def nvmlDeviceGetName(self, _: int) -> str:  # noqa: N802
        return "NVIDIA Test"

    def nvmlDeviceGetComputeRunningProcesses(self, index: int) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=77), SimpleNamespace(pid=78)] if index else []


def test_cuda_devices_and_who_is_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "77").mkdir()
    (tmp_path / "77" / "environ").write_bytes(f"A=1\0{MARKER}=job_a/1\0".encode())
    monkeypatch.setattr(processes, "PROC", tmp_path)
    monkeypatch.setattr(inventory, "pynvml", FakeNvml())
    FakeNvml.asked = 0
    host = HostInventory(slots=1)
    first, second, cpu = host.devices()
    assert (first.id, first.kind, first.model, first.memory_bytes) == ("cuda:0", "cuda", "NVIDIA Test", 80 << 30)
    assert (first.processes, first.strangers) == ((), ())
    assert (first.temperature_celsius, second.temperature_celsius, cpu.temperature_celsius) == (61, None, None)
    assert (second.processes, second.strangers) == ((77, 78), (78,))
    assert (cpu.id, cpu.kind) == ("cpu:0", "cpu")
    host.devices()
    assert FakeNvml.asked == 1, "the answer is good for a second"
    assert [d.id for d in HostInventory(0, visible="1").devices()] == ["cuda:1"]
    assert kind_for("auto", host.devices()) == "cuda"


def test_the_processor_has_the_name_that_the_kernel_gives_it(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    assert inventory.cpu_model(file) is None
    file.write_text("processor : 0\n")
    assert inventory.cpu_model(file) is None
    file.write_text("processor : 0\nmodel name\t: Some CPU @ 2 GHz\nmodel name\t: Another\n")
    assert inventory.cpu_model(file) == "Some CPU @ 2 GHz"
    assert [d.model for d in cpu_slots(2, "x")] == ["x", "x"]


def test_a_host_without_nvml_has_cpu_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert [d.id for d in HostInventory(2).devices()] == ["cpu:0", "cpu:1"]
    assert kind_for("auto", HostInventory(2).devices()) == "cpu"


@pytest.mark.parametrize(("text", "expected"), [(None, None), ("0,2", "0,2"), ("", ""), ("GPU-abc", None)])
def test_which_cards_the_service_may_see(
    monkeypatch: pytest.MonkeyPatch, text: str | None, expected: str | None
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if text is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    assert inventory.visible_devices() == expected
