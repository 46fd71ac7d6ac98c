import dataclasses
import errno
import hashlib
import json
import os
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainyard.contract.corpus_files import MAX_FINGERPRINT_BYTES, files_fingerprint, stored_fingerprint
from trainyard.contract.run_identity import RunIdentity
from trainyard.contract.rundir import MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, ArtifactDir, FileDigest
from trainyard.worker.checkpoint import files, retention
from trainyard.worker.checkpoint.files import Damage, RunState

IDENTITY = RunIdentity(
    model={"hidden_size": 8, "vocab_size": 32},
    tokenizer="t" * 64,
    corpus="c" * 64,
    seed=1,
    max_seq_len=16,
    packing="none",
)


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)
        self.head = torch.nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.scale = torch.nn.Parameter(torch.ones(()))


def trained(seed: int) -> tuple[Tied, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer


def step(model: Tied, optimizer: torch.optim.AdamW) -> None:
    (model.head(model.embed.weight) * model.scale).pow(2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def state(step: int) -> RunState:
    return RunState(step=step, tokens=step * 100, rows_per_step=8, world_size=1, identity=IDENTITY)


def publish(artifacts: ArtifactDir, step: int, seed: int = 0) -> files.CheckpointInfo:
    model, optimizer = trained(seed)
    tensors, moments = files.unique_tensors(model.state_dict()), files.optimizer_tensors(model, optimizer)
    return files.write_checkpoint(artifacts, state(step), tensors, moments)


def test_tensor_files_are_read_by_the_safetensors_library_and_equal_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5).to(torch.bfloat16),
        "a": torch.randn(7, 2).t(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.5),
        "n": torch.arange(6),
    }
    written = files.write_tensors(tmp_path / "ours", tensors)
    read = load_file(tmp_path / "ours")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype is tensor.dtype
        assert torch.equal(read[name], tensor)
    content = (tmp_path / "ours").read_bytes()
    assert written == FileDigest(len(content), hashlib.sha256(content).hexdigest())
    save_file({"a": tensors["a"].contiguous()}, tmp_path / "theirs")
    files.write_tensors(tmp_path / "single", {"a": tensors["a"]})
    assert (tmp_path / "single").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_checkpoint_comes_back_bit_for_bit_and_goes_on_the_same(tmp_path: Path) -> None:
    artifacts = ArtifactDir(tmp_path)
    model, optimizer = trained(seed=3)
    moments = files.optimizer_tensors(model, optimizer)
    saved = files.write_checkpoint(artifacts, state(3), files.unique_tensors(model.state_dict()), moments)
    other, other_optimizer = trained(seed=4)
    restored = files.load_checkpoint(saved.path, other, other_optimizer)
    assert restored == state(3)
    assert other.head.weight is other.embed.weight
    for _ in range(2):
        step(model, optimizer)
        step(other, other_optimizer)
    assert torch.equal(model.embed.weight, other.embed.weight)
    assert torch.equal(model.scale, other.scale)


def test_what_was_loaded_does_not_hang_on_the_files(tmp_path: Path) -> None:
    """Neither on their bytes, as where a backup is put back over them, nor on their being there."""
    saved = publish(ArtifactDir(tmp_path), 3, seed=3)
    model, optimizer = trained(seed=4)
    files.load_checkpoint(saved.path, model, optimizer)
    before = {name: tensor.clone() for name, tensor in files.optimizer_tensors(model, optimizer).items()}
    for name in (MODEL_FILE, OPTIMIZER_FILE):
        with (saved.path / name).open("r+b") as file:
            file.write(b"\xff" * (saved.path / name).stat().st_size)
    after = files.optimizer_tensors(model, optimizer)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_fresh_optimizer_takes_the_state_too(tmp_path: Path) -> None:
    model, optimizer = trained(seed=3)
    moments = files.optimizer_tensors(model, optimizer)
    assert sorted(moments) == [
        f"{key}.{p}" for key in ("exp_avg", "exp_avg_sq", "step") for p in ("embed.weight", "scale")
    ]
    saved = files.write_checkpoint(ArtifactDir(tmp_path), state(3), files.unique_tensors(model.state_dict()), moments)
    fresh = Tied()
    fresh_optimizer = torch.optim.AdamW(fresh.parameters(), lr=0.5, fused=True)
    files.load_checkpoint(saved.path, fresh, fresh_optimizer)
    assert fresh_optimizer.param_groups[0]["lr"] == 0.5
    assert float(fresh_optimizer.state[fresh.scale]["step"]) == 3.0
    assert torch.equal(fresh_optimizer.state[fresh.scale]["exp_avg_sq"], optimizer.state[model.scale]["exp_avg_sq"])


def test_tied_weights_stand_once_and_equal_weights_give_equal_files(tmp_path: Path) -> None:
    first, second = publish(ArtifactDir(tmp_path / "a"), 1), publish(ArtifactDir(tmp_path / "b"), 1)
    assert set(load_file(first.path / MODEL_FILE)) == {"embed.weight", "scale"}
    assert first.sha256 == second.sha256
    assert first.sha256 == hashlib.sha256((first.path / MODEL_FILE).read_bytes()).hexdigest()
    assert first.bytes == sum(file.stat().st_size for file in first.path.iterdir())
    assert files.checkpoint_info(1, first.path) == first


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    chooser = random.Random(11)
    saved = publish(ArtifactDir(tmp_path), 400)
    assert files.verify(saved.path) is None
    for _ in range(100):
        name = chooser.choice([MODEL_FILE, OPTIMIZER_FILE, STATE_FILE])
        content = bytearray((saved.path / name).read_bytes())
        position, bit = chooser.randrange(len(content)), 1 << chooser.randrange(8)
        content[position] ^= bit
        (saved.path / name).write_bytes(content)
        assert files.verify(saved.path) == f"{name} sha256"
        assert files.verify(saved.path, thorough=False) is None
        content[position] ^= bit
        (saved.path / name).write_bytes(content)
    assert files.verify(saved.path) is None


def test_other_damage_is_named(tmp_path: Path) -> None:
    artifacts = ArtifactDir(tmp_path)
    cut, missing, no_manifest, torn = (publish(artifacts, step) for step in (1, 2, 3, 4))
    os.truncate(cut.path / MODEL_FILE, 10)
    (missing.path / OPTIMIZER_FILE).unlink()
    (no_manifest.path / "manifest.json").unlink()
    (torn.path / "manifest.json").write_text('{"files": {}}')
    assert files.verify(cut.path, thorough=False) == "model.safetensors size"
    assert files.verify(missing.path) == "optimizer.safetensors missing"
    assert files.verify(no_manifest.path) == "manifest.json missing"
    assert files.verify(torn.path) == "manifest.json unreadable (ValueError)"


def test_the_newest_sound_one_is_found_and_damaged_ones_are_set_aside(tmp_path: Path) -> None:
    artifacts = ArtifactDir(tmp_path)
    for number in (380, 400):
        publish(artifacts, number)
    with (artifacts.checkpoint(400) / MODEL_FILE).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    damaged: list[Damage] = []
    assert files.newest_valid(artifacts, damaged) == artifacts.checkpoint(380)
    assert [str(damage) for damage in damaged] == ["checkpoint 400 invalid: model.safetensors sha256"]
    assert [number for number, _ in artifacts.published()] == [380]
    assert (artifacts.checkpoints / ".invalid-step-00000400" / MODEL_FILE).exists()
    publish(artifacts, 400)
    assert files.quarantine(artifacts.checkpoint(400)).name == ".invalid-step-00000400-1"


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts, real_write, room = ArtifactDir(tmp_path), os.write, 600
    publish(artifacts, 1)

    def write(descriptor: int, data: memoryview) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = bytes(data)[:room]
        room -= len(part)
        return real_write(descriptor, part)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space left"):
        publish(artifacts, 2)
    assert sorted(path.name for path in artifacts.checkpoints.iterdir()) == ["step-00000001"]
    assert files.verify(artifacts.checkpoint(1)) is None


def test_state_survives_json_exactly(tmp_path: Path) -> None:
    full = dataclasses.replace(
        state(5),
        interval=[[0.1 + 0.2, 1e-300, 3.0, 0.0]],
        trouble={"in_a_row": 1},
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**16).state_dict(),
        loss=1 / 3,
    )
    assert RunState.from_json(json.loads(json.dumps(asdict(full)))) == full


def test_a_newer_state_is_refused(tmp_path: Path) -> None:
    saved = publish(ArtifactDir(tmp_path), 1)
    value = json.loads((saved.path / STATE_FILE).read_bytes())
    (saved.path / STATE_FILE).write_text(json.dumps({**value, "version": 2}))
    with pytest.raises(ValueError, match="version 2; this program reads 1"):
        files.read_state(saved.path)


def test_differences_are_named() -> None:
    other = dataclasses.replace(IDENTITY, seed=2, model={"hidden_size": 16, "vocab_size": 32}, corpus="d" * 64)
    assert IDENTITY.differences(IDENTITY) == []
    assert IDENTITY.differences(other) == [
        "model.hidden_size is 8 and was 16",
        f"the corpus is another one (fingerprint {'c' * 12} and was {'d' * 12})",
        "seed is 1 and was 2",
    ]


@pytest.mark.parametrize(
    ("steps", "keep_last", "keep_every", "gone"),
    [
        ([1, 2, 3, 4, 5], 3, None, ([2, 1], [])),
        ([1, 2, 3], 1, None, ([1], [])),
        ([10, 20, 30, 40, 50], 2, 20, ([30, 10], [20])),
        ([10, 20, 30, 40], 2, 10, ([], [20, 10])),
        ([7], 1, None, ([], [])),
        ([], 3, None, ([], [])),
    ],
)
def test_surplus(steps: list[int], keep_last: int, keep_every: int | None, gone: tuple[list[int], list[int]]) -> None:
    assert retention.checkpoints_to_delete(steps, keep_last, keep_every) == gone


def test_pruning_never_counts_a_damaged_one_as_kept(tmp_path: Path) -> None:
    artifacts = ArtifactDir(tmp_path)
    for number in (1, 2, 3, 4):
        publish(artifacts, number)
    os.truncate(artifacts.checkpoint(4) / MODEL_FILE, 10)
    removed = retention.delete_old_checkpoints(artifacts, keep_last=1, keep_every=None)
    assert [(pruned.step, pruned.weights) for pruned in removed] == [(1, None)]
    assert [number for number, _ in artifacts.published()] == [4, 3, 2]


def test_leftovers_are_collected_and_nothing_else(tmp_path: Path) -> None:
    artifacts = ArtifactDir(tmp_path)
    publish(artifacts, 1)
    publish(artifacts, 2)
    files.quarantine(artifacts.checkpoint(2))
    for name in (".saving-step-00000003-99", ".removing-step-00000001"):
        (artifacts.checkpoints / name).mkdir()
        (artifacts.checkpoints / name / MODEL_FILE).write_bytes(b"torn")
    artifacts.out.mkdir()
    (artifacts.out / ".pretrain_8.pth.abc").write_bytes(b"torn")
    (artifacts.out / "pretrain_8.pth").write_bytes(b"whole")
    assert retention.delete_leftovers(artifacts) == 3
    left = sorted(path.name for path in artifacts.checkpoints.iterdir())
    assert left == [".invalid-step-00000002", "step-00000001"]
    assert [path.name for path in artifacts.out.iterdir()] == ["pretrain_8.pth"]


def test_the_state_of_a_run_on_very_many_files_can_be_read(tmp_path: Path) -> None:
    """A corpus may have a million files. A state.json with all their names is too large to be read."""
    count = 100_000
    names = [f"d/{number}" for number in range(count)]
    sketches = ["0123456789abcdef"] * count
    most = files_fingerprint(names, [1] * count, sketches)
    assert 0.8 * MAX_FINGERPRINT_BYTES < len(json.dumps(most["files"])) <= MAX_FINGERPRINT_BYTES
    assert stored_fingerprint(most) == most
    more = files_fingerprint(names * 2, [1] * 2 * count, sketches * 2)
    for fingerprint, step in ((stored_fingerprint(most), 1), (stored_fingerprint(more), 2)):
        identity = dataclasses.replace(IDENTITY, corpus_file=fingerprint)
        (tmp_path / str(step)).mkdir()
        files.write_state(tmp_path / str(step), dataclasses.replace(state(step), identity=identity))
        assert files.read_state(tmp_path / str(step)).identity.corpus_file == fingerprint
