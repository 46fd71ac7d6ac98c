"""Loads a checkpoint for generation: verified weights in float32, the tokenizer of the run, and its chat template."""

import os
from pathlib import Path

import torch

from trainyard.contract.tokenizer_info import TokenizerInvalid
from trainyard.model.kv_cache import bytes_per_position
from trainyard.worker.checkpoint.export import ExportError, find_export_source
from trainyard.worker.data.tokenizers import load_tokenizer
from trainyard.worker.distributed import GpuUnusable, assigned_device
from trainyard.worker.generation.chat import read_template
from trainyard.worker.generation.engine import Emit, Engine
from trainyard.worker.paths import data_roots


class CannotGenerate(Exception):
    """The checkpoint cannot be used. The message says why."""


def load_engine(checkpoint: Path, tokenizer_path: str, cache_bytes: int, emit: Emit) -> Engine:
    """Load ``checkpoint`` on the GPU that is visible, or on the CPU. Raises CannotGenerate."""
    torch.set_num_threads(int(os.environ.get("TRAINYARD_THREADS", "1")))
    try:
        source = find_export_source(checkpoint)
        # "tokens": a special token in a prompt is meant, as for transformers.
        tokenizer = load_tokenizer(tokenizer_path, "tokens", data_roots())
        template = read_template(tokenizer_path, data_roots())
        if tokenizer.fingerprint != source.state.identity.tokenizer:
            raise CannotGenerate(f"the tokenizer {tokenizer_path} is not the one that the checkpoint was trained with")
        model = source.load_model(assigned_device())
    except (GpuUnusable, ExportError, TokenizerInvalid, OSError, ValueError) as error:
        raise CannotGenerate(str(error)) from error
    positions = cache_bytes // bytes_per_position(source.model, torch.float32)
    return Engine(model, tokenizer, emit, positions, template)
