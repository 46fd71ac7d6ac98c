"""The decoder as a whole: keys, initialisation, packing, ignored labels, autocast, DDP, compile, generation."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.model.shapes import number, random_ids, small_config, small_decoder, train_on
from trainyard.model.config import ModelConfig
from trainyard.model.decoder import Decoder, SamplingParams, additive, block_diagonal

MOE = {"use_moe": True, "moe_intermediate_size": 24}
BOTH = pytest.mark.parametrize("changes", [{}, MOE], ids=["dense", "moe"])


def test_keys_are_minimind_s() -> None:
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for n in range(2):
        layer = f"model.layers.{n}"
        names |= {f"{layer}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")}
        names |= {f"{layer}.self_attn.{p}.weight" for p in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
        names |= {f"{layer}.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    assert set(small_decoder().state_dict()) == names


def test_keys_of_experts_are_minimind_s() -> None:
    keys = {key for key in small_decoder(**MOE).state_dict() if ".layers.1.mlp." in key}
    prefix = "model.layers.1.mlp"
    experts = {f"{prefix}.experts.{e}.{p}_proj.weight" for e in range(4) for p in ("gate", "up", "down")}
    assert keys == experts | {f"{prefix}.gate.weight"}


def test_tied_head_is_in_the_state_dict_and_is_one_tensor() -> None:
    model = small_decoder()
    state = model.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert "lm_head.weight" not in dict(model.named_parameters())
    apart = small_decoder(tie_word_embeddings=False).state_dict()
    assert apart["lm_head.weight"].data_ptr() != apart["model.embed_tokens.weight"].data_ptr()


def test_state_dict_round_trip_is_strict_and_exact() -> None:
    first, second = small_decoder(seed=0), small_decoder(seed=1)
    second.load_state_dict(first.state_dict(), strict=True)
    ids = random_ids(2, 6)
    assert torch.equal(first(ids).logits, second(ids).logits)


def test_the_generator_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    first = small_decoder(seed=5).state_dict()
    torch.manual_seed(2)
    second = small_decoder(seed=5).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(3)
    third = Decoder(small_config()).state_dict()
    torch.manual_seed(3)
    fourth = Decoder(small_config()).state_dict()
    assert all(torch.equal(third[name], fourth[name]) for name in third)


def test_weights_are_normal_and_norms_are_one() -> None:
    model = small_decoder(hidden_size=256, num_attention_heads=8)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            assert number(parameter.std()) == pytest.approx(0.02, rel=0.05)
            assert number(parameter.mean().abs()) < 0.001
        assert parameter.dtype == torch.float32


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 259, "hidden_size": 64},
        {"vocab_size": 259, "hidden_size": 512},
        {"vocab_size": 6400, "hidden_size": 512},
        {"vocab_size": 6400, "hidden_size": 2048, "num_hidden_layers": 1},
        {"vocab_size": 6400, "hidden_size": 512, "tie_word_embeddings": False},
        {"vocab_size": 6400, "hidden_size": 256, **MOE},
    ],
)
def test_untrained_loss_is_ln_v_within_two_percent(changes: dict[str, Any]) -> None:
    model = small_decoder(**changes)
    vocab_size = changes["vocab_size"]
    # Real text repeats its tokens: half the ids here come from the first ten.
    ids = random_ids(4, 65, vocab_size=vocab_size)
    ids[:, ::2] %= 10
    with torch.no_grad():
        out = model(ids[:, :-1], labels=ids[:, 1:])
    assert number(out.loss_sum) / 256 == pytest.approx(math.log(vocab_size), rel=0.02)


def test_an_invalid_config_names_every_problem() -> None:
    with pytest.raises(ValueError, match=r"num_key_value_heads.*vocab_size"):
        Decoder(ModelConfig(num_key_value_heads=3))


@BOTH
def test_loss_is_torch_s_cross_entropy_of_the_logits(changes: dict[str, Any]) -> None:
    model, ids = small_decoder(**changes), random_ids(3, 12)
    labels = random_ids(3, 12, seed=2)
    labels[:, 5:8] = -100
    out = model(ids, labels=labels, logits=True)
    expected = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(out.loss_sum, expected)
    assert out.loss_sum.dtype == out.aux_sum.dtype == out.logits.dtype == torch.float32


def test_the_output_has_what_was_requested() -> None:
    model, ids = small_decoder(), random_ids(1, 4)
    assert model(ids).loss_sum is None
    assert model(ids).logits.shape == (1, 4, 97)
    assert model(ids, labels=ids).logits is None
    assert number(model(ids, labels=ids).aux_sum) == 0.0


def test_a_later_token_changes_nothing_before_it() -> None:
    model, ids = small_decoder(), random_ids(1, 10)
    other = ids.clone()
    other[0, 6] = (other[0, 6] + 1) % 97
    before, after = model(ids).logits, model(other).logits
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def packed(documents: list[Tensor], rows: list[list[int]], length: int) -> dict[str, Tensor]:
    """Rows of whole documents: what the row table makes, written out."""
    shape = (len(rows), length)
    ids, positions, segments = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    labels = torch.full(shape, -100)
    for b, numbers in enumerate(rows):
        at = 0
        for segment, which in enumerate(numbers, start=1):
            document = documents[which]
            place = slice(at, at + len(document))
            ids[b, place], positions[b, place], segments[b, place] = document, torch.arange(len(document)), segment
            labels[b, at : at + len(document) - 1] = document[1:]
            at += len(document)
    return {"input_ids": ids, "position_ids": positions, "segment_ids": segments, "labels": labels}


def alone(documents: list[Tensor], length: int) -> dict[str, Tensor]:
    inputs = packed(documents, [[number] for number in range(len(documents))], length)
    return {"input_ids": inputs["input_ids"], "labels": inputs["labels"]}


DOCUMENTS = [random_ids(1, length, seed=length)[0] for length in (5, 12, 3, 9, 2, 16, 7)]
ROWS = [[5], [1, 2], [3, 6], [0, 4]]


@BOTH
def test_packed_documents_give_the_loss_and_gradients_of_documents_alone(changes: dict[str, Any]) -> None:
    model = small_decoder(**changes)
    together = train_on(model, **packed(DOCUMENTS, ROWS, 16))
    apart = train_on(model, **alone(DOCUMENTS, 16))
    assert together[0] == pytest.approx(apart[0], rel=1e-5)
    assert together[1] == pytest.approx(apart[1], rel=1e-5)
    for name, grad in together[2].items():
        torch.testing.assert_close(grad, apart[2][name], rtol=1e-5, atol=1e-5)


def test_without_the_mask_packing_would_change_the_loss() -> None:
    model = small_decoder(seed=3)
    inputs = packed(DOCUMENTS, ROWS, 16)
    exact = train_on(model, **inputs)[0]
    leaking = train_on(model, **{**inputs, "segment_ids": torch.ones_like(inputs["segment_ids"])})[0]
    assert abs(leaking - exact) > 1e-3


@BOTH
def test_a_step_cut_into_micro_batches_sums_to_the_whole(changes: dict[str, Any]) -> None:
    model, inputs = small_decoder(**changes), packed(DOCUMENTS, ROWS, 16)
    whole = train_on(model, **inputs)
    parts = [train_on(model, **{k: v[rows] for k, v in inputs.items()}) for rows in (slice(0, 1), slice(1, 4))]
    assert whole[0] == pytest.approx(sum(part[0] for part in parts), rel=1e-5)
    assert whole[1] == pytest.approx(sum(part[1] for part in parts), rel=1e-5)
    for name, grad in whole[2].items():
        torch.testing.assert_close(grad, parts[0][2][name] + parts[1][2][name], rtol=1e-4, atol=1e-5)


@BOTH
@pytest.mark.parametrize("segments", [True, False])
def test_all_ignored_labels_give_zeros_everywhere(changes: dict[str, Any], segments: bool) -> None:
    model = small_decoder(**changes)
    ids = torch.zeros(2, 6, dtype=torch.int64)
    inputs = {"segment_ids": torch.zeros_like(ids), "position_ids": torch.zeros_like(ids)} if segments else {}
    loss, aux, grads = train_on(model, input_ids=ids, labels=torch.full_like(ids, -100), **inputs)
    assert (loss, aux) == (0.0, 0.0)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads.values())


def test_padding_is_finite_and_changes_nothing() -> None:
    model, inputs = small_decoder(), packed(DOCUMENTS[:1], [[0]], 16)
    out = model(**inputs, logits=True)
    assert torch.isfinite(out.logits).all()
    inputs["input_ids"][inputs["segment_ids"] == 0] = 42
    torch.testing.assert_close(model(**inputs).loss_sum, out.loss_sum, rtol=0, atol=0)


def test_block_diagonal_by_hand() -> None:
    seen = block_diagonal(torch.tensor([[1, 1, 2, 0]]))[0, 0].int().tolist()
    assert seen == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    mask = additive(torch.tensor([[[[True, False, True]]]]), torch.zeros(1))
    assert mask.tolist() == [[[[0.0, -math.inf, 0.0]]]]


@BOTH
def test_bfloat16_autocast_is_close_and_keeps_float32_gradients(changes: dict[str, Any]) -> None:
    model, inputs = small_decoder(**changes), packed(DOCUMENTS, ROWS, 16)
    exact = train_on(model, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs)
    assert out.loss_sum.dtype == torch.float32
    assert number(out.loss_sum) == pytest.approx(exact[0], rel=5e-3)
    model.zero_grad()
    out.loss_sum.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_dropout_only_in_training_and_by_the_global_seed() -> None:
    model, ids = small_decoder(dropout=0.3), random_ids(2, 8)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(number(model(ids, labels=ids).loss_sum))
    assert losses[0] == losses[1] != losses[2]
    model.eval()
    plain = small_decoder()
    assert number(model(ids, labels=ids).loss_sum) == number(plain(ids, labels=ids).loss_sum)


@BOTH
def test_a_decoder_memorizes_a_text(changes: dict[str, Any]) -> None:
    model, ids = small_decoder(**changes), random_ids(2, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = math.inf
    for _ in range(60):
        optimizer.zero_grad()
        out = model(ids[:, :-1], labels=ids[:, 1:])
        loss = number(out.loss_sum) / 32
        ((out.loss_sum + 0.001 * out.aux_sum) / 32).backward()
        optimizer.step()
    assert loss < 0.2


# torch's own graph capture warns of what it does itself; taken for errors, its warnings break the capture.
@pytest.mark.filterwarnings("ignore")
@BOTH
def test_a_compiled_decoder_gives_the_same_loss_and_gradients(changes: dict[str, Any]) -> None:
    model, inputs = small_decoder(num_hidden_layers=1, **changes), packed(DOCUMENTS, ROWS, 16)
    plain = train_on(model, **inputs)
    model.zero_grad()
    # aot_eager: the whole graph capture without a C++ compiler.
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs)
    (out.loss_sum + 0.01 * out.aux_sum).backward()
    assert number(out.loss_sum) == pytest.approx(plain[0], rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, plain[2][name], rtol=1e-5, atol=1e-5)


@BOTH
def test_cached_greedy_equals_uncached_greedy(changes: dict[str, Any]) -> None:
    model = small_decoder(seed=2, **changes)
    prompts = random_ids(3, 5)
    expected = prompts
    for _ in range(12):
        with torch.no_grad():
            following = model(expected).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, following], dim=1)
    assert torch.equal(model.generate(prompts, max_new_tokens=12), expected)


def test_cache_filled_in_parts_gives_the_same_logits() -> None:
    model, ids = small_decoder(), random_ids(2, 9)
    cache = model.new_cache(2, 9)
    with torch.no_grad():
        parts = [model(ids[:, part], cache=cache).logits for part in (slice(0, 4), slice(4, 8), slice(8, 9))]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, rtol=1e-4, atol=1e-5)
    assert cache.length == 9


@BOTH
def test_rows_of_different_lengths_are_added_to_and_removed_from_a_batch(changes: dict[str, Any]) -> None:
    model = small_decoder(seed=2, **changes)
    prompts = [random_ids(1, length, seed=length) for length in (5, 2, 70, 9)]
    alone = [model.generate(prompt, max_new_tokens=20)[0, prompt.shape[1] :].tolist() for prompt in prompts]
    cache, rows = model.new_batch_cache(), list[int]()
    written: list[list[int]] = [[] for _ in prompts]
    for step in range(60):
        if step in (0, 3, 4, 30):
            number = (0, 3, 4, 30).index(step)
            own = model.new_cache(1, prompts[number].shape[1])
            written[number].append(int(model.next_logits(prompts[number], own).argmax()))
            cache.add(own, own.length + 20)
            rows.append(number)
        if rows:
            last = torch.tensor([[written[number][-1]] for number in rows])
            for number, token in zip(rows, model.decode_batch(last, cache).argmax(-1).tolist(), strict=True):
                written[number].append(token)
        for row in reversed(range(len(rows))):
            if len(written[rows[row]]) == 20:
                cache.remove(row)
                rows[row] = rows[-1]
                rows.pop()
    assert written == alone
    assert (cache.lengths, cache.capacity) == ([], 0)


def test_generation_changes_neither_the_mode_nor_the_gradients() -> None:
    model = small_decoder(dropout=0.5)
    prompts = random_ids(1, 3)
    model.train()
    first, second = (model.generate(prompts, max_new_tokens=5) for _ in range(2))
    assert model.training
    assert torch.equal(first, second)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model.generate(prompts, max_new_tokens=0), prompts)


def test_a_row_that_ended_stays_ended() -> None:
    model, prompts = small_decoder(seed=2), random_ids(2, 4)
    free = model.generate(prompts, max_new_tokens=10)
    eos = int(free[0, 6])
    ended = model.generate(prompts, max_new_tokens=10, eos_token_id=eos)
    for row, expected in zip(ended[:, 4:].tolist(), free[:, 4:].tolist(), strict=True):
        cut = expected.index(eos) + 1 if eos in expected else len(expected)
        assert row[:cut] == expected[:cut][: len(row)]
        assert set(row[cut:]) <= {eos}


def test_generation_stops_when_every_row_ended() -> None:
    model, prompts = small_decoder(seed=2), random_ids(1, 4)
    eos = int(model.generate(prompts, max_new_tokens=1)[0, -1])
    assert model.generate(prompts, max_new_tokens=50, eos_token_id=eos).shape == (1, 5)


def test_sampling_follows_its_generator() -> None:
    model, prompts = small_decoder(), random_ids(2, 4)

    def sampled(seed: int) -> Tensor:
        drawn = torch.Generator().manual_seed(seed)
        return model.generate(prompts, max_new_tokens=16, temperature=1.0, top_p=0.9, generator=drawn)

    assert torch.equal(sampled(1), sampled(1))
    assert not torch.equal(sampled(1), sampled(2))


def choices(temperature: float, top_p: float, top_k: int) -> dict[int, float]:
    """Shares of 4,000 draws from the probabilities 0.5, 0.3, 0.15, 0.05."""
    logits = torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log().expand(4000, 4)
    drawn = SamplingParams(temperature, top_p, top_k, torch.Generator().manual_seed(7)).sample(logits)
    return {token: number((drawn == token).float().mean()) for token in set(drawn.flatten().tolist())}


def test_choices_follow_temperature_top_p_and_top_k() -> None:
    assert choices(0.0, 1.0, 0) == {1: 1.0}
    assert choices(1.0, 1.0, 0) == pytest.approx({0: 0.05, 1: 0.5, 2: 0.15, 3: 0.3}, abs=0.03)
    assert choices(1.0, 1.0, 2) == pytest.approx({1: 0.625, 3: 0.375}, abs=0.03)
    assert choices(1.0, 0.75, 0) == pytest.approx({1: 0.625, 3: 0.375}, abs=0.03)
    assert choices(1.0, 0.0001, 0) == {1: 1.0}
    total = sum(p**2 for p in (0.5, 0.3, 0.15, 0.05))
    assert choices(0.5, 1.0, 0)[1] == pytest.approx(0.25 / total, abs=0.03)
