"""nano's tokenizer: one token a UTF-8 byte, ids 0..255.

256 starts a session, 257 ends a text, 258 and 259 are reserved.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from memtier.errors import ConfigError

__all__ = ["BOS_ID", "EOS_ID", "VOCAB_SIZE", "make_byte_tokenizer", "write_byte_tokenizer"]

BOS_ID = 256
EOS_ID = 257
VOCAB_SIZE = 260
_SPECIALS = ("<|bos|>", "<|eos|>", "<|reserved-258|>", "<|reserved-259|>")


def write_byte_tokenizer(folder: Path | str) -> None:
    """Write tokenizer.json and tokenizer_config.json, so that AutoTokenizer loads the folder."""
    make_byte_tokenizer().save_pretrained(str(folder))


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer.

    It adds no special token by itself, and text that spells one, such as "<|bos|>", stays text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    # Words, not the whole text, reach the (merge-free) model: long text stays linear in time.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in _SPECIALS])
    if tokenizer.get_vocab_size() != VOCAB_SIZE or tokenizer.token_to_id("<|bos|>") != BOS_ID:
        raise ConfigError(
            f"this release of tokenizers gave {tokenizer.get_vocab_size()} ids; {VOCAB_SIZE} were expected."
            " Install tokenizers >= 0.22."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_SPECIALS[0],
        eos_token=_SPECIALS[1],
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (the GPT-2 table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
