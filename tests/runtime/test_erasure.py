"""A proof of erasure says yes only where nothing is left, and where it would have seen what is."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import memtier
from memtier.errors import StorageError
from memtier.recovery import erasure
from memtier.recovery.quotations import quotations
from memtier_backends.journal_derived import DerivedRecords

pytestmark = pytest.mark.anyio

RAIN = "It rained on the hills, and the river rose slowly. "
SECRET = "The code for Bodiv is 4821, and nobody may know of it. "
SUN = "Later on the sun came out over fields of barley. "


async def tell(session) -> None:
    await session.observe(RAIN * 4)
    await session.observe(SECRET, source="a letter of B.", metadata={"to": ["his mother"], "n": 1})
    await session.observe(SUN * 3, source="a postcard")
    await session.flush()


async def test_a_snapshot_that_read_it_and_stayed_is_no_faded_memory(open_store, monkeypatch) -> None:
    drop_after = DerivedRecords.drop_after
    async with open_store(snapshot_every_tokens=64) as runtime:
        session = await runtime.session("a")
        await tell(session)
        stale = [record for record in session.folder.journal.snapshots() if record.position > 204][-2]

        def leaves_one(self, position: int) -> None:
            drop_after(self, position)
            if position < stale.position <= self._rows.head().position:
                self._rows.put_record("snapshot", stale.name, stale.position, asdict(stale))

        monkeypatch.setattr(DerivedRecords, "drop_after", leaves_one)
        report = await session.forget(turn=1, verify=True)
        assert report.proof is not None and not report.proof.proven
        assert any(f"snapshots of session 'a' still hold {stale.name}" in reason for reason in report.proof.reasons)
        assert any(path.endswith(stale.name) for path in report.proof.remains)


async def test_a_fork_is_proven_by_its_own_numbers(open_store, monkeypatch) -> None:
    drop_after = DerivedRecords.drop_after
    async with open_store(snapshot_every_tokens=64) as runtime:
        session = await runtime.session("a")
        await tell(session)
        fork = await session.fork("b")
        # from here on it reads the same text, with other keys and values
        await fork.forget(start=5, end=8, forks=False)
        await fork.flush()
        path = fork.folder.paths.journal

        def not_in_the_fork(self, position: int) -> None:
            if self._rows.path != path or position >= self._rows.head().position:
                drop_after(self, position)

        monkeypatch.setattr(DerivedRecords, "drop_after", not_in_the_fork)
        report = await session.forget(turn=1, verify=True)
        assert report.proof is not None and not report.proof.proven
        assert any("segments of session 'b' still hold" in reason for reason in report.proof.reasons)
        assert not any("session 'a'" in reason for reason in report.proof.reasons)


async def test_each_copy_is_looked_through(open_store) -> None:
    async with open_store(snapshot_every_tokens=64) as runtime:
        session = await runtime.session("a")
        await tell(session)
        await session.observe("Seven swans swam over the silver sea, at six minutes past noon. ")
        alone = (await session.forget(turn=3, verify=True)).proof
        await session.checkpoint("kept")
        await session.fork("b")
        report = await session.forget(turn=1, verify=True)
        assert alone is not None and alone.proven, alone
        assert report.proof is not None and report.proof.proven, report.proof
        journal = report.proof.found_before["journal"]
        # in the session, its checkpoint, its fork, and in no checkpoint of the fork
        assert journal["source and metadata"] == 3 * 2
        assert journal["ids"] % 3 == 0 and journal["text"] % 3 == 0
        assert report.proof.looked_for["snapshots"]["state"] > 2 * alone.looked_for["snapshots"]["state"] > 0


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=260, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=256, initializer_range=0.3, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


SIZES = {"window_tokens": 64, "span_block_tokens": 16, "span_refresh_tokens": 16, "span_blocks": 2, "sink_tokens": 2}


async def test_keys_that_depend_on_their_token_alone_tell_nothing(open_store, llama) -> None:
    """Those of an attention model's first layer are in memory, too, and the same words come again."""
    async with open_store(model=llama, snapshot_every_tokens=64, **SIZES) as runtime:
        session = await runtime.session("a")
        await tell(session)
        assert 0 in runtime._settings.memory_layers
        report = await session.forget(turn=1, verify=True)
        assert report.proof is not None and report.proof.proven, report.proof


async def test_a_window_in_a_snapshot_is_looked_for_where_nothing_is_in_segments(open_store, llama) -> None:
    async with open_store(model=llama, **SIZES) as runtime:
        session = await runtime.session("a")
        await session.observe("ab")
        await session.observe("Qz9#kv7!Wx3@pj5%Yg1&hd8^Mf2*tb4(LnDsUcAo0Ei6RZqK")
        await session.checkpoint("kept")
        report = await session.forget(turn=1, verify=True)
        assert report.proof is not None and report.proof.proven, report.proof
        assert report.proof.looked_for["segments"] == {}
        assert report.proof.found_before["snapshots"]["state"] > 0


async def test_a_snapshot_without_numbers_is_no_proof(open_store, monkeypatch) -> None:
    monkeypatch.setattr("memtier.recovery.evidence.state_windows", lambda *_: iter(()))
    async with open_store(snapshot_every_tokens=64) as runtime:
        session = await runtime.session("a")
        await tell(session)
        report = await session.forget(turn=1, verify=True)
        assert report.proof is not None and not report.proof.proven
        assert report.proof.reasons == ("the snapshots of session 'a' hold no numbers that could be looked for",)


async def test_what_doctor_put_aside_is_named_and_refuses_the_proof(open_store) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await tell(session)
        aside = session.folder.paths.folder / "quarantine" / "journal.sqlite3.abc"
        aside.parent.mkdir()
        aside.write_bytes(SECRET.encode())
        report = await session.forget(turn=1, verify=True)
        assert report.put_aside == (str(aside),)
        assert report.proof is not None and report.proof.remains == (str(aside),)
        assert aside.exists()


async def test_a_scan_that_fails_afterwards_is_told_with_what_was_done(open_store, monkeypatch) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await tell(session)

        def fails(*_: object) -> memtier.ErasureProof:
            raise StorageError("the disk does not answer.")

        monkeypatch.setattr(erasure, "prove", fails)
        report = await session.forget(turn=1, verify=True)
        assert report.tokens == len(SECRET)
        assert report.proof is not None and not report.proof.proven
        assert "the span is forgotten" in report.proof.reasons[0] and "does not answer" in report.proof.reasons[0]
        assert [turn.text for turn in await session.history()] == [RAIN * 4, SUN * 3]


# -- quotations


def as_bytes(ids: np.ndarray) -> str:
    return bytes(ids.tolist()).decode(errors="replace")


def ids_of(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


@pytest.mark.parametrize(
    ("span", "rest", "quoted"),
    [
        (SECRET, f"{RAIN}You said: {SECRET}{SUN}", [SECRET]),
        (SECRET, f"{RAIN}is 4821, and nobody may say{SUN}", [" is 4821, and nobody may "]),
        (" 4821", f"{RAIN}the code is 4821, yes, 4821.{SUN}", [" 4821", " 4821"]),
        (" 4821", f"{RAIN}and:4821.", ["4821"]),
        ("ab", "ab ab ab", []),
        (SECRET, RAIN * 100 + SECRET + SUN * 100, [SECRET]),
    ],
    ids=["whole", "a part", "a short span", "without its space", "too short", "over two stretches"],
)
def test_what_is_said_again_is_told(span, rest, quoted) -> None:
    found = quotations(ids_of(span), ids_of(rest), as_bytes)
    told = [rest.encode()[start:end].decode() for start, end in found]
    assert len(told) == len(quoted)
    assert all(one.strip() in other for one, other in zip(quoted, told, strict=True)), told


def test_a_quotation_may_be_cut_into_other_tokens() -> None:
    words = ["The ", "code", " is 4821", "The code", " is", " 4821", " rain", "."]

    def decode(ids: np.ndarray) -> str:
        return "".join(words[i] for i in ids)

    said, rest = np.array([0, 1, 2], np.int32), np.array([6, 7, 3, 4, 5, 7], np.int32)
    assert quotations(said, rest, decode) == [(2, 5)]
    assert quotations(said, rest, None) == []
