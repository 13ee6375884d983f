"""A session given to another model is one that this model has read itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memtier.errors import IncompatibleMemoryError
from memtier.recovery.forget import begin
from memtier.testing import tiny_model
from memtier.training.tokenizer import write_byte_tokenizer

pytestmark = pytest.mark.anyio

EXACT = {"rtol": 0.0, "atol": 1e-9}
TEXT = "The code for Bodiv is 4821. It rained on the hills, and the river rose slowly. "


@pytest.fixture
def shifted_tokenizer(tmp_path: Path):
    """Another tokenizer: 'a' and 'b' have changed places."""
    from transformers import AutoTokenizer

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_byte_tokenizer(folder)
    path = folder / "tokenizer.json"
    text = path.read_text()
    import json

    plain = json.loads(text)
    vocab = plain["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(plain))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("tokenizers", ["the same", "another"])
async def test_the_session_is_one_that_the_other_model_read(open_store, tokenizers, tokenizer, request) -> None:
    other = tiny_model(seed=5, dtype=torch.float64)
    its = tokenizer if tokenizers == "the same" else request.getfixturevalue("shifted_tokenizer")
    async with open_store(snapshot_every_tokens=64) as runtime:
        session = await runtime.session("a")
        await session.observe(TEXT, source="book", metadata={"page": 1})
        await session.checkpoint("of the first model")
        await session.observe(TEXT * 2)
        before = await session.history()
    async with open_store(model=other, tokenizer=its, window_tokens=32) as runtime:
        with pytest.raises(IncompatibleMemoryError):
            await runtime.session("a")
        session = await runtime.session("a", reread=True)
        never = await runtime.session("never")
        await never.observe(TEXT, source="book", metadata={"page": 1})
        await never.observe(TEXT * 2)
        tokens = [(await one.timeline.tokens(0, one.position)).tolist() for one in (session, never)]
        assert tokens[0] == tokens[1]
        assert [t.model_dump() for t in await session.history()] == [t.model_dump() for t in before]
        logits = [(await one.observe("Bodiv", logits=True)).logits for one in (session, never)]
        torch.testing.assert_close(*logits, **EXACT)
        with pytest.raises(IncompatibleMemoryError, match="checkpoint 'of the first model'"):
            await session.restore("of the first model")
        await session.flush()
        await session.close()
        # it is this model's now: nothing has to be read again
        again = await runtime.session("a", reread=True)
        assert again.position - again.timeline.restored_from == 0
        await again.flush()
        assert (await again.recall("river"))[0].tier in ("storage", "context")


async def test_answers_are_read_again_too(open_store, shifted_tokenizer) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(TEXT)
        generation = session.generate("What? ", max_new_tokens=12)
        async for _ in generation:
            pass
        *_, answer = await session.history()
        assert (answer.role, answer.text) == ("assistant", generation.text)
    async with open_store(tokenizer=shifted_tokenizer) as runtime:
        session = await runtime.session("a", reread=True)
        *_, asked, answer = await session.history()
        assert (asked.text, answer.text) == ("What? ", generation.text)
        marks = await session.timeline.history.marks(0, session.position)
        assert marks == [asked.end - 1]


async def test_token_ids_cannot_be_read_by_another_tokenizer(open_store, ids, shifted_tokenizer) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:50])
    async with open_store(tokenizer=shifted_tokenizer) as runtime:
        with pytest.raises(IncompatibleMemoryError, match=r"turn 0 .*token ids"):
            await runtime.session("a", reread=True)
    async with open_store() as runtime:
        assert (await runtime.session("a")).position == 50


async def test_a_new_session_needs_no_rereading(open_store) -> None:
    async with open_store() as runtime:
        assert (await runtime.session("new", reread=True)).position == 0


async def test_turns_keep_their_numbers_and_what_was_forgotten_and_forks_are_known(
    open_store, shifted_tokenizer
) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        for text in ("The first. ", TEXT, "Something else. ", "The last. "):
            await session.observe(text)
        await session.fork("b")
        await session.forget(turn=1, forks=False)
        (turn, *_) = await session.history()
        await session.forget(start=turn.start + 4, end=turn.start + 8, forks=False)
        before = session.folder.journal.turns()
        assert [turn.turn for turn in before] == [0, 2, 3] and before[0].forgotten == ((4, 8),)
    async with open_store(model=tiny_model(seed=5, dtype=torch.float64)) as runtime:
        session = await runtime.session("a", reread=True)
        after = session.folder.journal.turns()
        assert [(turn.turn, turn.forgotten) for turn in after] == [(turn.turn, turn.forgotten) for turn in before]
        # the fork is another model's still, and is found
        report = await session.forget(turn=2, forks=False)
        assert report.still_held_by == ("b",)
        await session.close()
    async with open_store(tokenizer=shifted_tokenizer) as runtime:
        session = await runtime.session("b", reread=True)
        assert [turn.turn for turn in await session.history()] == [0, 1, 2, 3]
        assert await runtime.delete_session("a") == ["b"]


async def test_a_forget_that_was_cut_off_goes_on_before_another_model_reads_the_session(open_store) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(TEXT * 2)
        fork = await session.fork("b")
        await fork.close()
        kept = (await session.timeline.tokens(0, session.position)).tolist()
        # as it is left by who died after writing it down
        begin(session.folder, 10, 30, keep_first=True, wide=True)
        await session.close_within(write=False)
    async with open_store(model=tiny_model(seed=5, dtype=torch.float64)) as runtime:
        for session_id in ("a", "b"):
            session = await runtime.session(session_id, reread=True)
            tokens = (await session.timeline.tokens(0, session.position)).tolist()
            assert tokens == kept[:10] + kept[30:]
