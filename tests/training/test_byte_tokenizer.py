"""nano's tokenizer: a token a byte, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import memtier.models
from memtier.training.tokenizer import BOS_ID, EOS_ID, VOCAB_SIZE, make_byte_tokenizer, write_byte_tokenizer

TOKENIZER = make_byte_tokenizer()


@given(st.text())
def test_any_text_is_its_utf8_bytes_and_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize("text", ["<|bos|>", "a<|eos|>b", " x", "it 's . , !", "\r\n\t", "e\u0301\ufb01", "\x00"])
def test_text_that_looks_special_stays_text(text: str) -> None:
    assert TOKENIZER(text)["input_ids"] == list(text.encode())
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("text", ["a" * 200_000, " \n" * 100_000, "日本🎉" * 20_000], ids=["word", "space", "wide"])
@pytest.mark.timeout(20)
def test_long_runs_are_read_in_linear_time(text: str) -> None:
    assert len(TOKENIZER.encode(text)) == len(text.encode())


def test_a_written_folder_loads_with_auto_tokenizer(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    assert (loaded.bos_token_id, loaded.eos_token_id, len(loaded)) == (BOS_ID, EOS_ID, VOCAB_SIZE)
    assert loaded.encode("<|bos|> né") == list("<|bos|> né".encode())


def test_the_shipped_tokenizer_is_the_one_that_the_recipe_writes(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    shipped = Path(memtier.models.__path__[0]) / "nano" / "tokenizer.json"
    assert shipped.read_text() == (tmp_path / "tokenizer.json").read_text()
