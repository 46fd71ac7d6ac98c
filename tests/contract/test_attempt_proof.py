"""Proofs between an agent and its service: who can make them, and for what they count."""

import secrets
from dataclasses import replace

import pytest

from trainyard.contract.attempt_proof import SCHEME, RequestProof, key_of

TOKEN = "the-token-of-an-attempt"
BODY = b'{"step": 3}'


def test_the_service_finds_the_token_that_was_not_sent() -> None:
    sent = RequestProof.of(TOKEN, "att_1/events", BODY)
    assert TOKEN not in sent.header
    assert TOKEN.encode() not in sent.proof
    received = RequestProof.parse("att_1/events", sent.header)
    assert received == sent
    assert received.token(key_of(TOKEN)) == TOKEN
    assert received.covers(BODY)
    assert not received.covers(BODY + b" ")


@pytest.mark.parametrize("length", [1, 43, 64])
def test_tokens_of_every_length(length: int) -> None:
    token = secrets.token_hex(32)[:length]
    assert RequestProof.of(token, "att_1/exit", b"").token(key_of(token)) == token


def test_a_token_that_is_too_long_is_an_error() -> None:
    with pytest.raises(ValueError, match="at most 64 bytes"):
        RequestProof.of("x" * 65, "att_1/exit", b"")


def test_a_proof_counts_for_one_request() -> None:
    sent = RequestProof.of(TOKEN, "att_1/events", BODY)
    other = RequestProof.of(TOKEN, "att_1/events", BODY)
    assert other.nonce != sent.nonce
    for changed in (
        replace(sent, path="att_1/exit"),
        replace(sent, path="att_2/events"),
        replace(sent, nonce=other.nonce),
        replace(sent, body_sha256="0" * 64),
        replace(sent, proof=other.proof),
    ):
        assert changed.token(key_of(TOKEN)) != TOKEN
    assert sent.token(key_of("another token")) != TOKEN


def test_an_answer_counts_for_one_request() -> None:
    sent = RequestProof.of(TOKEN, "att_1/heartbeat", BODY)
    key = key_of(TOKEN)
    answer = sent.answer(key, b"{}")
    assert sent.is_answered_by(key, answer, b"{}")
    assert not sent.is_answered_by(key, answer, b'{"desired": "kill"}')
    assert not sent.is_answered_by(key, sent.answer(key_of("a guess"), b"{}"), b"{}")
    assert not RequestProof.of(TOKEN, "att_1/heartbeat", BODY).is_answered_by(key, answer, b"{}")
    for header in (None, "", "é", answer[:-1], answer.upper()):
        assert not sent.is_answered_by(key, header, b"{}"), header


@pytest.mark.parametrize(
    "header", ["", SCHEME, f"{SCHEME} ", f"{SCHEME} a.b.c", "Bearer token", f"{SCHEME} {'0' * 32}.{'0' * 64}."]
)
def test_what_is_no_proof(header: str) -> None:
    assert RequestProof.parse("att_1/events", header) is None


def test_any_bytes_are_a_proof_of_nothing() -> None:
    for _ in range(50):
        guess = RequestProof("att_1/events", secrets.token_hex(16), secrets.token_hex(32), secrets.token_bytes(43))
        parsed = RequestProof.parse("att_1/events", guess.header)
        assert parsed == guess
        assert key_of(guess.token(key_of(TOKEN))) != key_of(TOKEN)
