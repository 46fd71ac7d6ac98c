import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from trainyard.model.config import ModelConfig
from trainyard.model.cpu_attention import cpu_varlen_attention
from trainyard.model.decoder import Decoder
from trainyard.model.varlen_attention import flash_supports, use_flash, varlen_attention

SEED = 5
LENGTHS = (5, 1, 9, 1, 16, 3, 13)
"""Of the segments of three rows of 16 tokens."""

OFFSETS = torch.tensor([0, 5, 6, 15, 16, 32, 35, 48, 48, 48], dtype=torch.int32)


def heads(seed: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(3, 16, number, 8, generator=random).requires_grad_() for number in (queries, keys, keys))
    return q, k, v


def plainly(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same by a softmax over a mask of all tokens."""
    segment = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    seen = (segment[:, None] == segment).tril()
    q, k, v = (part.flatten(0, 1) for part in (queries, keys, values))
    groups = q.shape[1] // k.shape[1]
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(groups, 1)) / q.shape[2] ** 0.5
    shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", shares, v.repeat_interleave(groups, 1)).view_as(queries)


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (4, 2), (6, 1)])
def test_values_and_gradients_are_those_of_a_masked_softmax(queries: int, keys: int) -> None:
    ours, theirs = heads(SEED, queries, keys), heads(SEED, queries, keys)
    upstream = torch.randn(3, 16, queries, 8, generator=torch.Generator().manual_seed(1))
    attended, expected = varlen_attention(*ours, OFFSETS), plainly(*theirs)
    torch.testing.assert_close(attended, expected, rtol=1e-5, atol=1e-6)
    torch.autograd.backward(attended, upstream)
    torch.autograd.backward(expected, upstream)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_a_segment_does_not_depend_on_its_row() -> None:
    ours = heads(SEED, 4, 2)
    together = varlen_attention(*ours, OFFSETS)
    q, k, v = (part[1:2].detach() for part in ours)
    alone = varlen_attention(q, k, v, torch.tensor([0, 16], dtype=torch.int32))
    torch.testing.assert_close(alone, together[1:2], rtol=0, atol=0)


UNEVEN = (33, 2, 64, 5, 600, 5, 1, 33, 97)
"""Segments of one row: short ones of several padded lengths, some of one length, and one that is too long for that."""


def uneven(dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """(queries, keys, values of one row of `UNEVEN`; the gradient from above; offsets), as ``dtype`` has them."""
    random = torch.Generator().manual_seed(SEED)
    shapes = [(1, sum(UNEVEN), number, 64) for number in (4, 2, 2, 4)]
    q, k, v, upstream = (torch.randn(shape, generator=random).bfloat16().to(dtype) for shape in shapes)
    offsets = torch.tensor([0, *itertools.accumulate(UNEVEN), sum(UNEVEN)], dtype=torch.int32)
    return (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), upstream, offsets


def test_in_bfloat16_values_and_gradients_are_within_its_rounding() -> None:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        parts, upstream, offsets = uneven(dtype)
        attended = varlen_attention(parts[0], parts[1], parts[2], offsets)
        assert attended.dtype == dtype
        torch.autograd.backward(attended, upstream)
        found.append([attended.detach(), *(part.grad for part in parts)])
    for half, exact in zip(*found, strict=True):
        assert half is not None
        assert exact is not None
        # bfloat16 rounds by up to 1 in 256, a third of that on the whole; what is between is rounded as well.
        assert (half.float() - exact).norm() < 6e-3 * exact.norm()


def test_in_bfloat16_a_segment_does_not_depend_on_its_row() -> None:
    (q, k, v), upstream, offsets = uneven(torch.bfloat16)
    together = varlen_attention(q, k, v, offsets)
    torch.autograd.backward(together, upstream)
    for begin, end in itertools.pairwise(offsets[:-1].tolist()):
        alone = [part[:, begin:end].detach().requires_grad_() for part in (q, k, v)]
        attended = varlen_attention(alone[0], alone[1], alone[2], torch.tensor([0, end - begin], dtype=torch.int32))
        torch.autograd.backward(attended, upstream[:, begin:end])
        assert torch.equal(attended, together[:, begin:end])
        for mine, whole in zip(alone, (q, k, v), strict=True):
            assert whole.grad is not None
            assert mine.grad is not None
            assert torch.equal(mine.grad, whole.grad[:, begin:end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_pass_torchs_own_checks(dtype: torch.dtype) -> None:
    flat = [part.detach().flatten(0, 1).to(dtype).requires_grad_() for part in heads(SEED, 4, 2)]
    # By the checks of torch itself: shapes, strides, aliases and gradients with and without real data.
    checked = torch.library.opcheck(cpu_varlen_attention, (*flat, OFFSETS))
    assert set(checked.values()) == {"SUCCESS"}


def decoder(**changes: Any) -> tuple[Decoder, dict[str, Tensor]]:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Decoder(ModelConfig(vocab_size=50, **{**shape, **changes}), torch.Generator().manual_seed(SEED))
    random = torch.Generator().manual_seed(SEED)
    segments = torch.tensor([[1] * 5 + [2] + [3] * 9 + [0], [1] * 16, [1] * 3 + [2] * 13])
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).view(3, 16)
    ids = torch.randint(3, 50, (3, 16), generator=random)
    labels = torch.where(segments > 0, ids.roll(-1, 1), -100)
    return model, {"input_ids": ids, "position_ids": positions, "segment_ids": segments, "labels": labels}


@pytest.mark.parametrize("use_moe", [False, True])
def test_the_decoder_gives_the_loss_and_gradients_of_its_mask(use_moe: bool) -> None:
    found = []
    for more in ({}, {"offsets": OFFSETS}):
        model, inputs = decoder(use_moe=use_moe)
        out = model(**inputs, **more)
        out.loss_sum.backward()
        found.append((float(out.loss_sum.detach()), {name: p.grad for name, p in model.named_parameters()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, rtol=1e-4, atol=1e-5)


def test_with_dropout_the_mask_is_used() -> None:
    model, inputs = decoder(dropout=0.5)
    wrong = torch.tensor([0, 48], dtype=torch.int32)
    torch.manual_seed(SEED)
    masked = model(**inputs).loss_sum
    torch.manual_seed(SEED)
    torch.testing.assert_close(model(**inputs, offsets=wrong).loss_sum, masked, rtol=0, atol=0)
    model.eval()
    assert not torch.equal(model(**inputs, offsets=wrong).loss_sum, model(**inputs).loss_sum)


def test_a_cpu_has_its_kernel_and_other_devices_the_mask() -> None:
    assert use_flash(torch.device("cpu"), torch.float32, head_dim=20)
    assert not use_flash(torch.device("meta"), torch.bfloat16, head_dim=64)


WITHOUT_PRIVATE_OPERATORS = """
import torch
from torch._ops import _OpNamespace

look_up = _OpNamespace.__getattr__

def hidden(self, name):
    if "flash_attention_for_cpu" in name:
        raise AttributeError(name)
    return look_up(self, name)

_OpNamespace.__getattr__ = hidden
for name in [name for name in vars(torch.ops.aten) if "flash_attention_for_cpu" in name]:
    delattr(torch.ops.aten, name)

from trainyard.model import cpu_attention, varlen_attention
from tests.model.test_varlen_attention import OFFSETS, decoder

assert not cpu_attention.AVAILABLE
assert not varlen_attention.use_flash(torch.device("cpu"), torch.float32, 8)
model, inputs = decoder()
print(float(model(**inputs, offsets=OFFSETS).loss_sum.detach()))
"""


def test_without_torchs_private_operators_the_mask_gives_the_same_loss() -> None:
    command = [sys.executable, "-c", WITHOUT_PRIVATE_OPERATORS]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    model, inputs = decoder()
    with_operators = model(**inputs, offsets=OFFSETS).loss_sum.detach()
    assert float(printed) == pytest.approx(float(with_operators), rel=1e-6)


@pytest.mark.parametrize(
    ("generation", "dtype", "head_dim", "known"),
    [
        (8, torch.bfloat16, 64, True),
        (9, torch.float16, 256, True),
        (9, torch.float32, 64, False),
        (7, torch.float16, 64, False),  # a T4 or V100 takes the mask
        (8, torch.bfloat16, 20, False),
        (8, torch.bfloat16, 264, False),
    ],
)
def test_the_limits_of_cudas_flash_kernel(generation: int, dtype: torch.dtype, head_dim: int, known: bool) -> None:
    assert flash_supports(generation, dtype, head_dim) is known


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_cuda_the_decoder_gives_the_loss_of_its_mask(dtype: torch.dtype) -> None:
    model, inputs = decoder(hidden_size=64, head_dim=32)
    model = model.cuda()
    on_device = {name: tensor.cuda() for name, tensor in inputs.items()}
    with torch.autocast("cuda", dtype=dtype):
        masked = model(**on_device).loss_sum
        by_segments = model(**on_device, offsets=OFFSETS.cuda()).loss_sum
    torch.testing.assert_close(by_segments, masked, rtol=1e-2, atol=1e-2)
