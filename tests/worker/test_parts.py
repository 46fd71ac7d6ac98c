"""The small parts: who a rank is, what is measured, what is printed, where it may read, what others are told."""

import importlib
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from contract.events import Metric, Sample, Started, Warned
from contract.report import Outcome
from contract.rundir import ProductDir, RunDir
from contract.spec import JobSpec, TrainingSpec
from contract.status import Reason
from worker.console import Console, duration
from worker.distributed import Agreement, Ranks, Wishes, join, own_device, require, threads_per_rank
from worker.facts import cautions, has_bfloat16
from worker.failure import Failure, StopAsked, not_saved, out_of_memory
from worker.feed import Factors, cut, own_share
from worker.life import SignOfLife
from worker.meters import Interval, Meters, own_interval, peak_flops
from worker.outcome import publish_outcome
from worker.roots import check_roots
from worker.step import StepResult
from worker.stopping import StopWish
from worker.weights import mismatches, start_from, write_weights

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


def spec(**groups: Any) -> JobSpec:
    import json

    return JobSpec.model_validate_json(json.dumps({"data": {"data_path": "/x"}, **groups}))


@pytest.mark.parametrize(
    ("wanted", "dtype", "device", "native", "codes"),
    [
        ("auto", "bfloat16", "cpu", True, ["cpu_fallback"]),
        ("cpu", "bfloat16", "cpu", True, []),
        ("auto", "bfloat16", "cuda", True, []),
        ("cuda", "bfloat16", "cuda", False, ["bfloat16_emulated"]),
        ("cuda", "float16", "cuda", False, []),
    ],
)
def test_cautions_about_the_device(wanted: str, dtype: str, device: str, native: bool, codes: list[str]) -> None:
    asked = spec(training={"dtype": dtype}, resources={"device": wanted})
    assert [caution.code for caution in cautions(asked, device, native)] == codes
    assert has_bfloat16(torch.device("cpu"))


@pytest.mark.parametrize(
    ("environment", "local_world", "threads"),
    [
        ({}, 1, 8),
        ({}, 3, 2),
        ({}, 100, 1),
        ({"OMP_NUM_THREADS": "3"}, 2, 3),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 2, 4),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 1, 1),
        ({"TRAINYARD_THREADS": "5", "OMP_NUM_THREADS": "1"}, 2, 5),
    ],
)
def test_threads_are_the_users_or_an_even_share(environment: dict[str, str], local_world: int, threads: int) -> None:
    assert threads_per_rank(environment, local_world, cores=8) == threads


def test_a_process_without_torchrun_is_the_only_rank() -> None:
    ranks = join(spec().resources.timeouts, "cpu", {"TRAINYARD_THREADS": "1"})
    assert ranks == ALONE
    assert ranks.leads
    assert ranks.gather([1.0, 2.0]) == [[1.0, 2.0]]
    assert ranks.from_leader(lambda: "found") == "found"
    with pytest.raises(StopAsked):
        ranks.from_leader(raise_stop)
    agreement = Agreement(ranks)
    assert agreement.exchange(Wishes(stop=True)) == Wishes(stop=True)
    assert agreement.settle() == Wishes()


def raise_stop() -> None:
    raise StopAsked


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_cuda_that_is_not_there_is_an_error_and_auto_is_not() -> None:
    assert own_device("cuda:1", 0).type == "cpu"
    require(ALONE, spec())
    with pytest.raises(Failure, match="rank 0 of 1 has no GPU"):
        require(ALONE, spec(resources={"device": "cuda"}))


def test_shares_cover_a_step_and_factors_undo_the_mean_over_ranks() -> None:
    rows = torch.arange(11).numpy()
    shares = [own_share(rows, rank, 4).tolist() for rank in range(4)]
    assert [row for share in shares for row in share] == rows.tolist()
    assert {len(share) for share in shares} == {2, 3}
    assert [part.tolist() for part in cut(rows[:5], 2)] == [[0, 1], [2, 3], [4]]
    assert [part.tolist() for part in cut(rows[:0], 2)] == [[]]
    assert Factors(world=2, tokens=100, micros=None).of(7) == 2 / 100
    assert Factors(world=2, tokens=None, micros=4).of(50) == 2 / (4 * 50)
    assert Factors(world=2, tokens=None, micros=4).of(0) == 2 / 4


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla K80", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def result(loss: float, tokens: int, norm: float = 1.0) -> StepResult:
    return StepResult(grad_norm=norm, loss_sum=loss, aux_sum=2.0, tokens=tokens, applied=True)


def line(meters: Meters, norm: float = 1.0) -> Metric:
    return meters.line(step=2, epoch=0.5, learning_rate=1e-3, tokens=30, grad_norm=norm, eval_loss=None)


def test_the_loss_of_a_line_is_the_mean_over_tokens_since_the_last_one() -> None:
    meters = Meters(ALONE, Interval(), 6.0, has_aux=True)
    for loss, tokens in ((30.0, 10), (20.0, 20)):
        meters.begin_step()
        meters.count(result(loss, tokens))
        meters.end_step(tokens, 0.25)
    first = line(meters)
    assert first.loss == pytest.approx(50 / 30)
    assert first.aux_loss == pytest.approx(4 / 30)
    assert first.data_seconds == pytest.approx(0.25)
    assert meters.last_loss == first.loss
    meters.begin_step()
    meters.count(result(7.0, 7))
    meters.end_step(7, 0.0)
    assert line(meters).loss == 1.0


def test_what_is_not_finite_is_counted_and_not_added() -> None:
    meters = Meters(ALONE, Interval(loss_sum=10.0, tokens=5.0), 6.0, has_aux=False)
    meters.begin_step()
    meters.count(result(math.nan, 5))
    meters.end_step(5, 0.0)
    first = line(meters, norm=math.inf)
    assert (first.loss, first.grad_norm, first.nonfinite, first.aux_loss) == (2.0, None, True, None)
    assert not line(meters).nonfinite


def test_sums_come_back_to_the_ranks_they_were_of() -> None:
    rows = [[1.0, 2.0, 3.0, 0.0], [10.0, 20.0, 30.0, 1.0]]
    second = Ranks(1, 2, 1, 2, torch.device("cpu"))
    assert own_interval(rows, second) == Interval(10.0, 20.0, 30.0, 1.0)
    assert own_interval(rows, ALONE) == Interval(11.0, 22.0, 33.0, 1.0)
    assert own_interval([], ALONE) == Interval()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (45, "45 s"), (720, "12 min"), (7800, "2 h 10 min"), (273600, "3 d 4 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_console_lines() -> None:
    console = Console()
    metric = Metric(step=5, epoch=0, loss=None, learning_rate=1e-3, tokens=1, eval_loss=2.5)
    assert console.text(metric) == "step 5/0  loss not finite  lr 1.00e-03  eval 2.5000  not finite tok/s"
    assert console.text(Sample(step=1, prompt="a", text="b\n")) == "sample at step 1: 'ab\\n'"
    assert console.text(Warned(code="x", message="look")) == "warning: look"


def test_the_sign_of_life_is_the_last_step(tmp_path: Path) -> None:
    path = tmp_path / "progress"
    life = SignOfLife(path)
    for step in (99999, 7):
        life.beat(step)
        assert int(path.read_text()) == life.step == step
    SignOfLife(None).beat(3)


def test_the_first_outcome_stands(tmp_path: Path) -> None:
    path = tmp_path / "outcome.json"
    failed = Outcome(outcome="failed", step=3, reason=Reason.OUT_OF_MEMORY)
    assert publish_outcome(path, failed) == failed
    assert publish_outcome(path, Outcome(outcome="completed", step=9)) == failed
    assert Outcome.model_validate_json(path.read_bytes()) == failed
    assert [file.name for file in tmp_path.iterdir()] == ["outcome.json"]


def test_a_wish_to_stop(tmp_path: Path) -> None:
    import signal

    wish = StopWish(tmp_path / "stop")
    assert not wish.asked()
    (tmp_path / "stop").touch()
    assert wish.asked()
    by_signal = StopWish(None)
    by_signal.on_signal(signal.SIGINT, None)
    assert by_signal.asked()
    with pytest.raises(KeyboardInterrupt):
        by_signal.on_signal(signal.SIGINT, None)


def test_failures_carry_advice_with_numbers() -> None:
    training = TrainingSpec(batch_size=32, accumulation_steps=2)
    memory = out_of_memory(torch.OutOfMemoryError("2 GiB"), rank=1, step=4, training=training, peak_bytes=7 * 10**9)
    assert memory is not None
    assert (memory.rank, memory.outcome(4).error.peak_memory_bytes) == (1, 7 * 10**9)  # type: ignore[union-attr]
    assert "batch_size to 16 and training.accumulation_steps to 4" in str(memory)
    one_row = TrainingSpec(batch_size=1)
    assert out_of_memory(RuntimeError("shapes differ"), rank=0, step=0, training=one_row) is None
    single = out_of_memory(MemoryError(), rank=0, step=0, training=one_row)
    assert "max_seq_len" in str(single)
    full = not_saved(OSError(28, "No space left on device", "/d/x"), "the checkpoint of step 3")
    assert str(full).splitlines()[0] == "the checkpoint of step 3 could not be written: No space left on device (/d/x)"
    assert "Free space" in str(full)
    assert "writable" in str(not_saved(OSError(13, "Permission denied"), "it"))
    assert pickle.loads(pickle.dumps(full)).hint == full.hint


def test_paths_outside_the_roots_are_refused(tmp_path: Path) -> None:
    home, data, outside = tmp_path / "home", tmp_path / "data", tmp_path / "outside"
    run = RunDir(home / "runs" / "job")
    for directory in (run.path, data, outside):
        directory.mkdir(parents=True)
    roots = {"TRAINYARD_DATA_ROOTS": str(data), "TRAINYARD_SAVE_ROOTS": str(data)}
    for good in (data / "c.jsonl", home / "c.jsonl"):
        check_roots(spec(data={"data_path": str(good)}), run, roots)
    check_roots(spec(data={"data_path": str(outside)}), run, {})
    (data / "link").symlink_to(outside)
    inside = {"data": {"data_path": str(data / "c.jsonl")}}
    bad: list[tuple[str, dict[str, Any]]] = [
        ("data.data_path", {"data": {"data_path": str(data / "link" / "c.jsonl")}}),
        ("data.data_path", {"data": {"data_path": str(data / ".." / "outside" / "c")}}),
        ("data.eval_data_path", {"data": {"data_path": str(data / "c.jsonl"), "eval_data_path": str(outside)}}),
        ("data.tokenizer_path", {"data": {"data_path": str(data / "c.jsonl"), "tokenizer_path": str(outside)}}),
        ("training.from_weight", {**inside, "training": {"from_weight": str(outside / "w")}}),
        ("checkpoint.save_dir", {**inside, "checkpoint": {"save_dir": str(outside)}}),
    ]
    for field, groups in bad:
        with pytest.raises(Failure, match=f"{field} lies outside"):
            check_roots(spec(**groups), run, roots)


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("raise SystemExit('executed')",))


def test_a_pickle_with_code_is_refused_and_nothing_executed(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    for name, content in (("code.pth", Bomb()), ("list.pth", [1, 2])):
        torch.save(content, tmp_path / name)
        wanted = spec(training={"from_weight": str(tmp_path / name)})
        with pytest.raises(Failure, match=f"{name} cannot be read as weights") as refused:
            start_from(model, wanted, ProductDir(tmp_path))
        assert "Nothing in the file was executed" in str(refused.value)
    (tmp_path / "torn.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(Failure, match="cannot be read"):
        start_from(model, spec(training={"from_weight": str(tmp_path / "torn.safetensors")}), ProductDir(tmp_path))


def test_every_mismatch_is_listed() -> None:
    own = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}
    given = {"a": torch.zeros(2), "b": torch.zeros(4), "d": torch.zeros(1)}
    assert mismatches(own, given) == ["b is [4] and must be [3]", "c is missing", "d is not part of the model"]
    assert mismatches(own, own) == []
    tied = torch.zeros(2)
    assert mismatches({"x": tied, "y": tied}, {"y": torch.ones(2)}) == []
    assert mismatches({"x": tied, "y": tied}, {"x": torch.ones(2), "y": tied}) == ["x and y differ and must be one"]


def test_half_precision_weights_come_back_as_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    write_weights(tmp_path / "out" / "w.pth", model.state_dict())
    start_from(other, spec(training={"from_weight": str(tmp_path / "out" / "w.pth")}), ProductDir(tmp_path))
    assert other.weight.dtype is torch.float32
    assert torch.equal(other.weight, model.weight.half().float())
    first = (tmp_path / "out" / "w.pth").read_bytes()
    write_weights(tmp_path / "out" / "w.pth", model.state_dict())
    assert (tmp_path / "out" / "w.pth").read_bytes() == first


def test_the_started_line_says_where_it_goes_on_from() -> None:
    numbers = dict.fromkeys(
        ("parameters", "active_parameters", "vocab_size", "samples", "documents", "tokens", "bad_lines"), 10
    )
    started = Started(
        start_step=3,
        steps=9,
        world_size=2,
        device="cpu",
        device_name="CPU",
        dtype="float32",
        torch_version="2",
        global_batch=4,
        tokens_per_step=1.0,
        steps_per_epoch=3,
        flops_per_token=60.0,
        resumed_from="/c/step-00000003",
        **numbers,
    )
    text = Console().text(started)
    assert text is not None
    assert text.endswith("steps 4 to 9, from /c/step-00000003")


def test_the_entry_point_loads_no_torch_before_it_has_set_up_openmp() -> None:
    assert "torch" not in vars(importlib.import_module("worker.__main__"))
