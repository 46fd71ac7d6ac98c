"""Forward and backward of every attention path against the plain mathematics in float32.

The same weights and tokens go through each path: packed segments by offsets (the flash kernel), packed segments by a
mask, and whole rows. The reference is torch's plain attention (`SDPBackend.MATH`) in float32, not compiled.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainyard.model.config import ModelConfig
from trainyard.model.decoder import Decoder
from trainyard.worker.doctor.bench import SEED, Trial
from trainyard.worker.doctor.report import CheckResult, fault, ok

ROWS = 4
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest relative error of the gradients. Rounding alone gives about a third of it."""

MOE_TOLERANCE = 0.15
"""In half precision a few tokens choose another expert, which gets their whole gradient."""

LOSS_SHARE = 0.2
"""A loss is a sum over all tokens, so its relative error is far below that of a gradient."""


@dataclass(frozen=True)
class PathError:
    """Relative errors of one path in one type. ``gradient``: the larger one of attention's weights and all others."""

    path: str
    dtype: str
    loss: float
    gradient: float
    allowed: float

    @property
    def is_wrong(self) -> bool:
        """Whether an error is too large. Not finite counts as too large."""
        return not (self.gradient <= self.allowed and self.loss <= LOSS_SHARE * self.allowed)


def judge_attention(model: str, mode: str, errors: list[PathError]) -> CheckResult:
    """Return the result for one model, ``mode`` eager or compiled."""
    check, data = "attention", {"model": model, "mode": mode, "paths": [vars(error) for error in errors]}
    worst = max(errors, key=lambda error: error.gradient / error.allowed)
    wrong = [error for error in errors if error.is_wrong]
    if wrong:
        named = ", ".join(f"{error.path} in {error.dtype}: gradient off by {error.gradient:.1%}" for error in wrong)
        advice = "do not train on this card; report it with doctor.json, the driver and the versions of torch and CUDA"
        return fault(check, f"{model}, {mode}: {named}", advice, **data)
    return ok(
        check,
        f"{model}, {mode}: {len(errors)} paths and types agree with float32 mathematics; the worst is {worst.path} in "
        f"{worst.dtype}, gradient off by {worst.gradient:.2%} (allowed {worst.allowed:.2%})",
        **data,
    )


def check_attention(trial: Trial) -> Iterator[CheckResult]:
    """Yield the results of each model: attention, eager and compiled, and generation with a cache."""
    dense = trial.sizes.model
    models = {"dense": dense, "MoE": replace(dense, use_moe=True, num_experts=4, num_experts_per_tok=2)}
    for name, config in models.items():
        yield judge_attention(name, "eager", path_errors(trial, config, compiled=False))
        if name in trial.sizes.compiled:
            yield judge_attention(name, "compiled", path_errors(trial, config, compiled=True))
        yield judge_generation(name, generation_gap(trial, config))


def path_errors(trial: Trial, config: ModelConfig, *, compiled: bool) -> list[PathError]:
    """Return the errors of each path and type. Compiled models are tried in bfloat16 only."""
    model, inputs = build_inputs(config, trial.device, trial.sizes.length)
    dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if trial.device.type == "cuda" else [])
    paths = {
        "offsets": inputs,
        "mask": {name: value for name, value in inputs.items() if name != "offsets"},
        "whole rows": {"input_ids": inputs["input_ids"], "labels": inputs["labels"]},
    }
    if compiled:
        dtypes = [torch.bfloat16]
    found = []
    for path, given in paths.items():
        with sdpa_kernel(SDPBackend.MATH):
            expected = loss_and_gradient(model, model, paths["mask"] if path == "offsets" else given, torch.float32)
        for dtype in dtypes:
            module = torch.compile(model, dynamic=False) if compiled else model
            loss, gradient = loss_and_gradient(model, module, given, dtype)
            allowed = TOLERANCES[dtype]
            if config.use_moe and dtype is not torch.float32:
                allowed = MOE_TOLERANCE
            found.append(
                PathError(
                    path,
                    str(dtype).removeprefix("torch."),
                    abs(loss / expected[0] - 1),
                    max(relative_error(*pair) for pair in zip(gradient, expected[1], strict=True)),
                    allowed,
                )
            )
    return found


def build_inputs(config: ModelConfig, device: torch.device, length: int) -> tuple[Decoder, dict[str, Tensor]]:
    """Return a model with strong attention, and packed rows: segments of uneven lengths, padding in the last row."""
    assert config.vocab_size is not None
    draw = torch.Generator().manual_seed(SEED)
    model = Decoder(config, draw)
    with torch.no_grad():
        # Untrained weights are small, so attention hardly changes the output. Larger ones make errors visible.
        for layer in model.model.layers:
            attention: Any = layer.self_attn
            for part in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                part.weight.mul_(4.0)
    ids = torch.randint(3, config.vocab_size, (ROWS, length), generator=draw)
    segments = torch.ones_like(ids)
    for row in range(ROWS - 1):
        for cut in torch.randperm(length - 1, generator=draw)[: 3 * row].tolist():
            segments[row, cut + 1 :] += 1
    segments[-1, length - length // 5 :] = 0
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    index = torch.arange(length).expand_as(segments)
    positions = index - torch.where(begins, index, 0).cummax(dim=1).values
    starts = begins.flatten().nonzero().flatten().to(torch.int32)
    # Two empty segments pad the offsets, as in a batch of a compiled run.
    offsets = torch.cat([starts, torch.full((3,), ids.numel(), dtype=torch.int32)])
    labels = torch.where((segments > 0) & (segments == segments.roll(-1, 1)), ids.roll(-1, 1), -100)
    labels[:, -1] = -100
    inputs = {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions,
        "segment_ids": segments,
        "offsets": offsets,
    }
    return model.to(device), {name: value.to(device) for name, value in inputs.items()}


def loss_and_gradient(
    model: Decoder, module: Any, inputs: dict[str, Tensor], dtype: torch.dtype
) -> tuple[float, tuple[Tensor, Tensor]]:
    """Return the mean loss, and gradients as float64 vectors on the CPU: of attention's weights, and of all others."""
    model.zero_grad(set_to_none=True)
    device = inputs["input_ids"].device.type
    with torch.autocast(device, dtype=dtype, enabled=dtype is not torch.float32):
        output = module(**inputs)
        loss = output.loss_sum / (inputs["labels"] >= 0).sum()
    loss.backward()
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        parts["self_attn" not in name].append(parameter.grad.flatten().double().cpu())
    return float(loss.detach()), (torch.cat(parts[0]), torch.cat(parts[1]))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the length of the difference over the length of what was expected."""
    return float((found - expected).norm() / expected.norm())


def generation_gap(trial: Trial, config: ModelConfig) -> float:
    """Return by how much the likeliest next token, without a cache, exceeds the one that was generated with it."""
    model, inputs = build_inputs(config, trial.device, trial.sizes.length)
    prompt = inputs["input_ids"][:2, :16]
    tokens = model.generate(prompt, max_new_tokens=16)
    with torch.no_grad():
        scores = model(tokens).logits[:, prompt.shape[1] - 1 : -1]
    chosen = scores.gather(2, tokens[:, prompt.shape[1] :, None])[..., 0]
    return float((scores.max(dim=-1).values - chosen).max())


def judge_generation(model: str, gap: float) -> CheckResult:
    """Return a fault if ``gap`` is larger than the rounding of logits."""
    if gap <= 1e-2:
        return ok("generation", f"{model}: with and without a cache the same tokens", model=model, gap=gap)
    advice = "samples on this card are wrong, though training is not; report it with doctor.json"
    message = f"{model}: a token generated with a cache is {gap:.3g} below the likeliest"
    return fault("generation", message, advice, model=model, gap=gap)
