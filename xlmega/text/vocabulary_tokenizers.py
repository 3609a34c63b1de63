"""tokenizer.json files as vocabularies, and the training of byte-level BPE. The door of Hugging Face's tokenizers.

A byte-level BPE without a normaliser (GPT-2's form, and what `train` makes) is lossless; every other tokenizer.json is
used exactly as the library uses it. The file's truncation, padding and post-processing are left out: a document's
beginning and end are added where documents are tokenised. The names of special tokens in a text are text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers

from xlmega.errors import ConfigError, DataError
from xlmega.text.vocabulary import Ids, Specials, Vocabulary, check_characters

END = "<|endoftext|>"
SEGMENT_CHARACTERS = 1 << 16
"""The library keeps about 100 bytes for each token of a text; longer ones are encoded in segments where they can be."""
_BETWEEN_WORDS = re.compile(r"(?<=\w) (?=\w)")
"""GPT-2's splitting always begins a word before such a space."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenizersVocabulary(Vocabulary):
    """A tokenizer.json."""

    model_file = "tokenizer.json"

    def __init__(self, model: bytes, specials: Specials) -> None:
        super().__init__(model)
        try:
            text = model.decode("utf-8")
            self.table: dict[str, Any] = json.loads(text)
            """The file's content."""
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises a bare Exception for whatever is wrong with the file
            raise DataError(f"not a tokenizer.json ({error}). Copy the file again.") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        by_piece: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if not by_piece:
            raise DataError("the tokenizer.json has no pieces.")
        self.size = max(by_piece.values()) + 1
        self._pieces = [""] * self.size
        for piece, id in by_piece.items():
            self._pieces[id] = piece
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {id for id, token in added.items() if token.special}
        self._added = {id: str(token.content) for id, token in added.items() if not token.special}
        self._is_byte_level = _keeps_text(self.table) and not any(
            token.lstrip or token.rstrip for token in added.values()
        )
        self.lossless = self._is_byte_level and set(_bytes_by_character()) <= by_piece.keys()
        self.kind = "byte_level_bpe" if self.lossless else "tokenizer_json"
        self.specials = dict(specials)
        self._cuts_between_words = self.lossless and _pre_tokenizers(self.table) == ["ByteLevel"]
        self._cuts_between_words &= not self._added

    def piece(self, id: int) -> str:
        return self._pieces[id]

    def text_of(self, id: int) -> bytes:
        return self._table[id]

    @cached_property
    def _table(self) -> list[bytes]:
        table = [self._text_of(piece) for piece in self._pieces]
        for id in {*self._special, *self.specials.values()}:
            table[id] = b""
        for id, content in self._added.items():
            table[id] = content.encode()
        return table

    def _text_of(self, piece: str) -> bytes:
        if self._is_byte_level:
            known = _bytes_by_character()
            if all(character in known for character in piece):
                return bytes(known[character] for character in piece)
        if found := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(found[1], 16)])
        return piece.removeprefix("##").replace("\u2581", " ").encode()

    @cached_property
    def byte_ids(self) -> list[int]:
        if self._is_byte_level:
            known = map(self._tokenizer.token_to_id, _bytes_by_character())
            return [id for id in known if id is not None]
        return [id for id, piece in enumerate(self._pieces) if _BYTE_PIECE.fullmatch(piece)]

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[Ids]:
        """As every kind's; the library's own number of threads is the environment's (TOKENIZERS_PARALLELISM)."""
        segments = [list(self._segments(text)) for text in texts]
        flat = [segment for parts in segments for segment in parts]
        try:
            found = self._tokenizer.encode_batch_fast(flat, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            for text in texts:
                check_characters(text)
            raise
        encoded = iter([np.array(one.ids, dtype=np.int32) for one in found])
        return [np.concatenate([np.empty(0, np.int32), *(next(encoded) for _ in parts)]) for parts in segments]

    def _segments(self, text: str) -> Iterator[str]:
        first = 0
        while self._cuts_between_words and len(text) - first > SEGMENT_CHARACTERS:
            found = _BETWEEN_WORDS.search(text, first + SEGMENT_CHARACTERS)
            if found is None:
                break
            yield text[first : found.start()]
            first = found.start()
        yield text[first:]

    def decode(self, ids: Iterable[int]) -> str:
        known = list(self._known(ids))
        if self.lossless:
            return b"".join(self._table[id] for id in known).decode("utf-8", errors="replace")
        ends = set(self.specials.values())
        return str(self._tokenizer.decode([id for id in known if id not in ends], skip_special_tokens=True))


def train(lines: Sequence[str], size: int) -> bytes:
    """A byte-level BPE of `size` ids: `<|endoftext|>`, the 256 bytes, then merges; texts are given no first space."""
    tokenizer: Any = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((line + "\n" for line in lines), trainer=trainer)
    found = tokenizer.get_vocab_size()
    if found != size:
        raise ConfigError(
            f"size {size} is more than this text has pieces for. The rule: the text must hold enough different "
            f"words. With it, size {found} works; for more, give more text."
        )
    return str(tokenizer.to_str(pretty=True)).encode()


def _keeps_text(table: dict[str, Any]) -> bool:
    """Whether the file is a byte-level BPE that encodes every text as it is."""
    steps = _pre_tokenizers(table)
    settings = table.get("pre_tokenizer") or {}
    inner = settings.get("pretokenizers", [settings])
    return (
        table.get("normalizer") is None
        and table["model"].get("type", "BPE") == "BPE"
        and not table["model"].get("continuing_subword_prefix")
        and not table["model"].get("end_of_word_suffix")
        and not table["model"].get("dropout")
        and "ByteLevel" in steps
        and set(steps) <= {"ByteLevel", "Split", "Digits"}
        and not any(step.get("add_prefix_space") for step in inner)
        and all(step.get("behavior") in ("Isolated", None) for step in inner)
    )


def _pre_tokenizers(table: dict[str, Any]) -> list[str]:
    settings = table.get("pre_tokenizer") or {}
    return [str(step.get("type")) for step in settings.get("pretokenizers", [settings])]


def _bytes_by_character() -> dict[str, int]:
    """GPT-2's spelling of bytes: those that are printable stand for themselves, the rest follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}
