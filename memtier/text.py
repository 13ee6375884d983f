"""Between text and token ids: what a session is given, checked and encoded; what it says, as whole characters."""

from __future__ import annotations

import codecs
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memtier.errors import ConfigError

__all__ = ["IncrementalText", "Piece", "StopText", "TextCodec", "as_pieces", "check_metadata", "check_text"]

# A character is at most 4 bytes; a token that still ends in an incomplete one after this many more never will complete.
MAX_HELD_TOKENS = 8

DEEPEST_METADATA = 64
"""Levels of lists and mappings in one another: what every reader of JSON can follow."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that came together; `text` is the original, None for ids; `text_bytes` its length in UTF-8.

    `framed` tokens bring their own special tokens: no BOS is put before them.
    """

    tokens: NDArray[np.int32]
    text: str | None
    text_bytes: int
    framed: bool = False


def check_metadata(metadata: Any) -> None:
    """Refuse what is no mapping, or could not be told again as JSON: too deep, or with characters that are none.

    Raises:
        ConfigError: says what is wrong with it.
    """
    if metadata is None:
        return
    if not isinstance(metadata, Mapping):
        raise ConfigError(f"metadata is {metadata!r}; it must be a mapping of JSON values, or None.")
    level: list[Any] = [metadata]
    for _ in range(DEEPEST_METADATA):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, Mapping):
                inner += [*value.keys(), *value.values()]
            elif isinstance(value, (list, tuple)):
                inner += value
            elif isinstance(value, str):
                check_text(value, "metadata")
        if not inner:
            return
        level = inner
    raise ConfigError(
        f"metadata has more than {DEEPEST_METADATA} lists and mappings in one another; give flatter ones."
    )


def check_text(text: str, what: str = "text") -> str:
    """`text`, if it can be written as UTF-8.

    Raises:
        ConfigError: it holds a lone surrogate.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{what} holds a lone surrogate {text[error.start]!r} at character {error.start}, which UTF-8 cannot "
            f"write. Decode the input with errors='replace', or drop that character."
        ) from error
    return text


class TextCodec:
    """A tokenizer with the rules of a session: checked input, no special tokens inside, BOS once.

    Args:
        tokenizer: a Hugging Face tokenizer, or None for a model that takes and yields token ids.
        vocab_size: ids are in [0, vocab_size).
        bos_token_id: stands at position 0 of a session that begins with text.

    Raises:
        ConfigError: no tokenizer.
    """

    def __init__(self, tokenizer: Any | None, vocab_size: int, bos_token_id: int | None) -> None:
        if tokenizer is not None and not all(hasattr(tokenizer, name) for name in ("__call__", "all_special_ids")):
            raise ConfigError(
                f"tokenizer is {_short(tokenizer)}; give a tokenizer of transformers, its id or folder, or None."
            )
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.bos_token_id = bos_token_id if tokenizer is not None else None
        self._special = frozenset(tokenizer.all_special_ids) if tokenizer is not None else frozenset()

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token ids of a text, tokenised as one piece, without special tokens.

        Raises:
            ConfigError: there is no tokenizer, or the text is not valid.
        """
        if self.tokenizer is None:
            raise ConfigError(
                "text was given, but this model has no tokenizer. Give token ids, or pass tokenizer= to memtier.open."
            )
        check_text(text)
        ids = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int32)

    @property
    def begin_text(self) -> str:
        """How a template writes BOS; '' if there is none."""
        return str(getattr(self.tokenizer, "bos_token", None) or "")

    def special_text(self, token: int) -> str:
        """How a template writes a special token; '' for any other token."""
        return self.tokenizer.convert_ids_to_tokens(token) if self.is_special(token) and self.tokenizer else ""

    def decode(self, ids: Sequence[int] | NDArray[np.int32]) -> str:
        """Text of token ids, special tokens left out; '' without a tokenizer."""
        if self.tokenizer is None:
            return ""
        plain = [int(i) for i in ids]
        return self.tokenizer.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def is_special(self, token: int) -> bool:
        """True for a token that is no text (BOS, EOS ...)."""
        return token in self._special

    def check_ids(self, ids: Any) -> NDArray[np.int32]:
        """Token ids as an array.

        Raises:
            ConfigError: they are not whole numbers in [0, vocab_size).
        """
        try:
            array = np.asarray(ids if hasattr(ids, "__array__") else [index(i) for i in ids])
        except TypeError as error:
            raise ConfigError(f"token ids must be whole numbers, got {_short(ids)}: {error}.") from error
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ConfigError(
                f"token ids must be one row of integers, got shape {array.shape} and dtype {array.dtype}. "
                f"Flatten them and cast to int64."
            )
        if array.size and not (int(array.min()) >= 0 and int(array.max()) < self.vocab_size):
            at = int(np.flatnonzero((array < 0) | (array >= self.vocab_size))[0])
            raise ConfigError(
                f"token id {int(array[at])} at index {at} is outside [0, {self.vocab_size}), the model's vocabulary. "
                f"Were these ids made by another tokenizer?"
            )
        return array.astype(np.int32)

    def piece(self, value: Any) -> Piece:
        """One piece of input: text, UTF-8 bytes, one id, or a row of ids.

        Raises:
            ConfigError: none of these, or invalid.
        """
        if isinstance(value, Piece):
            return value
        if isinstance(value, (bytes, bytearray, memoryview)):
            value = _decode_utf8(bytes(value))
        if isinstance(value, str):
            return Piece(self.encode(value), value, len(value.encode()))
        if isinstance(value, Sequence) or hasattr(value, "__array__"):
            if getattr(value, "ndim", 1) == 0:
                value = [value]
        elif hasattr(value, "__index__"):
            value = [value]
        else:
            raise ConfigError(
                f"cannot read {_short(value)}: give text, UTF-8 bytes, token ids, or an (async) iterator of these."
            )
        ids = self.check_ids(value)
        return Piece(ids, None, len(self.decode(ids).encode()))


def as_pieces(x: Any) -> Any | AsyncGenerator[Any]:
    """`x` itself if it is one piece, else an async iterator over its pieces.

    A plain iterator is advanced on the event loop. Bytes may be cut anywhere, also inside a character.

    Raises:
        ConfigError: a mapping or a set, whose order, or whose values, would be lost.
    """
    if isinstance(x, (Mapping, Set)):
        raise ConfigError(f"cannot read {_short(x)}: it is no text. Give the text of it, or a list in the order meant.")
    one = isinstance(x, (str, bytes, bytearray, memoryview, Sequence)) or hasattr(x, "__array__")
    if isinstance(x, (list, tuple)) and x and isinstance(x[0], (str, bytes)):
        one = False
    if one or not isinstance(x, (Iterable, AsyncIterable)):
        return x
    return _whole_characters(x)


async def _whole_characters(x: Iterable[Any] | AsyncIterable[Any]) -> AsyncGenerator[Any]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    if isinstance(x, AsyncIterable):
        async for value in x:
            yield _completed(value, decoder)
    else:
        for value in x:
            yield _completed(value, decoder)
    _decode_utf8(b"", decoder, final=True)


def _completed(value: Any, decoder: codecs.IncrementalDecoder) -> Any:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _decode_utf8(bytes(value), decoder)
    return value


def _decode_utf8(data: bytes, decoder: codecs.IncrementalDecoder | None = None, final: bool = False) -> str:
    try:
        return data.decode("utf-8") if decoder is None else decoder.decode(data, final)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the bytes are not UTF-8: {error.reason} at byte {error.start} of the piece. "
            f"Decode them yourself, with errors='replace' if need be, and give text."
        ) from error


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


class IncrementalText:
    """Text of a growing row of ids, handed out in whole characters.

    Decoding only the last few ids would lose spaces between words, so each piece is the difference of two decodings
    that begin at the same id.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._ids: list[int] = []
        self._shown = 0  # ids whose text was handed out

    def push(self, token: int) -> str:
        """The text that `token` completes; '' while a character is incomplete."""
        self._ids.append(token)
        before = self._codec.decode(self._ids[: self._shown])
        text = self._codec.decode(self._ids)
        held = len(self._ids) - self._shown
        if text.endswith("\ufffd") and held <= MAX_HELD_TOKENS:
            return ""
        # the ids just shown stay as context for the next decoding, all before them go
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return text[len(before) :]


class StopText:
    """Holds back what might become a stop text.

    Args:
        stop: texts that end a generation; none of them is ever handed out.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The part of all that came that can be shown; `found` is set once a stop text stands in it."""
        held = self._held + text
        first = min((at for s in self._stop if (at := held.find(s)) >= 0), default=-1)
        if first >= 0:
            self.found, self._held = True, ""
            return held[:first]
        keep = max((n for s in self._stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def rest(self) -> str:
        """What was held back, once nothing more can come."""
        held, self._held = self._held, ""
        return held
