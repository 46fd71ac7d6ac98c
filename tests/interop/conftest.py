"""Published checkpoints of small models in run directories, as a run leaves them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.texts import docstrings
from trainyard.contract.run_identity import RunIdentity
from trainyard.contract.rundir import RunDir
from trainyard.model.config import ModelConfig
from trainyard.model.decoder import Decoder
from trainyard.worker.checkpoint import files
from trainyard.worker.checkpoint.files import RunState
from trainyard.worker.data.tokenizers import load_tokenizer, train_tokenizer

Make = Callable[..., tuple[RunDir, Decoder]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(docstrings(), 400, out)
    return out


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make(tokenizer_path, step=3, **model)`` publishes a checkpoint of random weights in ``tmp_path / "run"``."""

    def made(tokenizer_path: str = "byte", step: int = 3, **changes: Any) -> tuple[RunDir, Decoder]:
        tokenizer, run = load_tokenizer(tokenizer_path), RunDir(tmp_path / "run")
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = ModelConfig(**{**shape, "vocab_size": tokenizer.vocab_size, **changes})
        model = Decoder(config, torch.Generator().manual_seed(step))
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms that are not 1 and logits far apart: a norm left out, or a wrong angle, must show.
                parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
        run.path.mkdir(exist_ok=True)
        run.spec.write_text(json.dumps({"data": {"data_path": "/x", "tokenizer_path": tokenizer_path}}))
        identity = RunIdentity(asdict(config), tokenizer.fingerprint, "corpus", 1, 64, "document")
        state = RunState(step=step, tokens=100, rows_per_step=4, world_size=1, identity=identity)
        tensors = files.unique_tensors(model.state_dict())
        files.write_checkpoint(run.artifacts(None), state, tensors, {"step.x": torch.zeros(1)})
        return run, model.eval()

    return made
