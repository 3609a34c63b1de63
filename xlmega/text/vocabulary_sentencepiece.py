"""SentencePiece models as vocabularies, and their training. The door of sentencepiece.

A model that neither normalises nor adds or removes spaces, with pad, unk, `<D>` and the 256 bytes first (what `train`
makes), is lossless: what no piece spells is spelt in bytes, and U+2581, which SentencePiece would return as a space,
goes to bytes as well. Any other model is used exactly as the library uses it. XGLM's has its ids renumbered as fairseq
does.

Long texts are cut where no piece spans the cut, which changes no segmentation and keeps sums of scores short. `train`
rounds unigram scores to multiples of 1/256, so that SentencePiece's sums in single precision (below 2^16) and those of
Hugging Face's tokenizers in double precision are both exact, and the two never differ by a rounding.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import sentencepiece

from xlmega.errors import ConfigError, DataError
from xlmega.text.vocabulary import MAX_LINE_CHARACTERS, Ids, Specials, Vocabulary, check_characters

OWN_SPECIALS = {"pad": 0, "unk": 1, "eod": 2}
OWN_PIECES = ("<pad>", "<unk>", "<D>")
FIRST_PIECE = 259
"""Behind the three specials and the 256 bytes of a vocabulary that we trained."""
SPACE = "\u2581"
"""What SentencePiece writes for a space in its pieces."""
SEGMENT_CHARACTERS = 2048
"""Texts are encoded in segments of about this length."""
SCORE_STEPS = 256
UNIGRAM = 1
"""SentencePiece's number of that model type."""
XGLM_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
XGLM_MADE_UP_WORDS = 7


@dataclass(frozen=True)
class Form:
    """What a model's file says of its algorithm and of what happens to a text first."""

    model_type: int
    """1 is unigram, 2 is BPE."""
    byte_fallback: bool
    character_map: bytes
    """SentencePiece's compiled normalisation, empty for none."""
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool

    @property
    def keeps_text(self) -> bool:
        changes = self.character_map or self.add_dummy_prefix or self.remove_extra_whitespaces
        return not changes and self.escape_whitespaces and self.byte_fallback


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model; `specials` is not needed for one that `train` made."""

    model_file = "tokenizer.model"

    def __init__(self, model: bytes, specials: Specials | None = None, *, xglm: bool = False) -> None:
        super().__init__(model)
        try:
            if not model:  # which the library takes, and complains of at every call
                raise RuntimeError("the file is empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"not a SentencePiece model ({error}). Train or copy the vocabulary again.") from None
        num_pieces: int = self._processor.get_piece_size()
        pieces = [str(self._processor.id_to_piece(id)) for id in range(num_pieces)]
        self.form = form = _form(model)
        named = [*OWN_PIECES, *(f"<0x{k:02X}>" for k in range(256))]
        self.lossless = form.keeps_text and not xglm and pieces[:FIRST_PIECE] == named
        self._numbering: Ids | None = None
        if xglm:
            if pieces[:3] != ["<unk>", "<s>", "</s>"]:
                raise DataError(
                    f"the SentencePiece model begins with {pieces[:3]}; XGLM's begins with <unk>, <s>, </s>. "
                    "Import it without the folder's config.json to take its ids as they are."
                )
            self._numbering = np.arange(1, num_pieces + 1, dtype=np.int32)
            self._numbering[:3] = [3, 0, 2]
            words = [f"<madeupword{k}>" for k in range(XGLM_MADE_UP_WORDS)]
            pieces = [*XGLM_SPECIALS, *pieces[3:], *words]
        self._pieces = pieces
        self.size = len(pieces)
        own = "sentencepiece_unigram" if form.model_type == UNIGRAM else "sentencepiece_bpe"
        self.kind = own if self.lossless else "xglm" if xglm else "sentencepiece"
        if self.lossless:
            specials = OWN_SPECIALS
        elif specials is None:
            raise DataError(
                f"the SentencePiece model begins with {pieces[:3]} or normalises; one trained by xlmega begins with "
                "<pad>, <unk>, <D> and the 256 bytes <0x00> to <0xFF>. tools/import_vocabulary.py takes others."
            )
        self.specials = dict(specials)
        # Characters that SentencePiece would not give back as they are; these go straight to byte pieces.
        unk = self._processor.unk_id()
        self._outside_characters = SPACE if self._processor.piece_to_id(SPACE) != unk else SPACE + " "
        self._outside = re.compile(f"[{self._outside_characters}]+")

    def piece(self, id: int) -> str:
        return self._pieces[id]

    def score(self, id: int) -> float:
        """The logarithm of the piece's probability in the unigram model, or the rank of its merge; 0 for specials."""
        if self._numbering is None:
            return float(self._processor.get_score(id))
        return float(self._processor.get_score(id - 1)) if 3 < id <= len(self._numbering) else 0.0

    def is_matched(self, id: int) -> bool:
        """Whether the piece is found in texts, as bytes, specials and unused pieces are not."""
        inner = id if self._numbering is None else id - 1
        if self._numbering is not None and not 3 < id <= len(self._numbering):
            return False
        processor = self._processor
        return not any(
            kind(inner) for kind in (processor.is_byte, processor.is_control, processor.is_unknown)
        ) and not (processor.is_unused(inner))

    def text_of(self, id: int) -> bytes:
        return self._table[id]

    @cached_property
    def _table(self) -> list[bytes]:
        table = [piece.replace(SPACE, " ").encode() for piece in self._pieces]
        shift = 0 if self._numbering is None else 1
        for id in range(self.size):
            inner = id - shift
            if not 0 <= inner < self._processor.get_piece_size() or (shift and id <= 3):
                table[id] = b""
            elif self._processor.is_byte(inner):
                table[id] = bytes([int(self._pieces[id][3:5], 16)])
            elif self._processor.is_control(inner) or self._processor.is_unknown(inner):
                table[id] = b""
        return table

    @cached_property
    def byte_ids(self) -> list[int]:
        shift = 0 if self._numbering is None else 1
        return [id + shift for id in range(self._processor.get_piece_size()) if self._processor.is_byte(id)]

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[Ids]:
        if not self.lossless:
            found = self._encode(list(texts), num_threads)
            return found if self._numbering is None else [self._numbering[ids] for ids in found]
        segments: list[str] = []  # for SentencePiece, over all texts
        plans: list[list[str | int]] = []  # of each text: an index into segments, or characters for byte pieces
        for text in texts:
            plan: list[str | int] = []
            for part, is_outside in self._parts(text):
                if is_outside:
                    plan.append(part)
                else:
                    plan.append(len(segments))
                    segments.append(part)
            plans.append(plan)
        encoded = self._encode(segments, num_threads)

        def ids(item: str | int) -> Ids:
            if isinstance(item, int):
                return encoded[item]
            return np.frombuffer(item.encode("utf-8"), dtype=np.uint8).astype(np.int32) + len(OWN_PIECES)

        return [
            ids(plan[0]) if len(plan) == 1 else np.concatenate([np.empty(0, np.int32), *map(ids, plan)])
            for plan in plans
        ]

    def _encode(self, texts: list[str], num_threads: int) -> list[Ids]:
        try:
            found: list[Ids] = self._processor.encode(texts, return_type="numpy", num_threads=num_threads)
        except TypeError:
            for text in texts:
                check_characters(text)
            raise
        return found

    def _parts(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text cut into (segment, is outside SentencePiece's alphabet); a function of the text alone."""
        for segment in self._segments(text):
            first = 0
            if any(character in segment for character in self._outside_characters):
                for found in self._outside.finditer(segment):
                    if found.start() > first:
                        yield segment[first : found.start()], False
                    yield found.group(), True
                    first = found.end()
            if first < len(segment):
                yield segment[first:], False

    def _segments(self, text: str) -> Iterator[str]:
        """The text in segments, cut between characters that stand side by side in no piece."""
        first = 0
        while len(text) - first > SEGMENT_CHARACTERS:
            cut = first + SEGMENT_CHARACTERS
            while cut > first and text[cut - 1 : cut + 1] in self._neighbours:
                cut -= 1
            if cut == first:
                cut = first + SEGMENT_CHARACTERS + 1
                while cut < len(text) and text[cut - 1 : cut + 1] in self._neighbours:
                    cut += 1
            yield text[first:cut]
            first = cut
        if first < len(text):
            yield text[first:]

    @cached_property
    def _neighbours(self) -> frozenset[str]:
        spelt = [piece.replace(SPACE, " ") for piece in self._pieces[FIRST_PIECE:]]
        return frozenset(piece[k : k + 2] for piece in spelt for k in range(len(piece) - 1))

    def decode(self, ids: Iterable[int]) -> str:
        if self.lossless:
            return b"".join(self._table[id] for id in self._known(ids)).decode("utf-8", errors="replace")
        known = list(self._known(ids))
        if self._numbering is not None:
            back = {int(ours): inner for inner, ours in enumerate(self._numbering)}
            known = [back[id] for id in known if id in back]
        return str(self._processor.decode(known))


def train(lines: Sequence[str], size: int, model_type: str, character_coverage: float, num_threads: int) -> bytes:
    """A lossless model of `size` ids, 'unigram' or 'bpe'."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=model_type,
            vocab_size=size,
            character_coverage=character_coverage,
            required_chars=SPACE,  # so that a space always has a piece
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=2,
            pad_piece=OWN_PIECES[0],
            unk_piece=OWN_PIECES[1],
            eos_piece=OWN_PIECES[2],
            max_sentence_length=8 * MAX_LINE_CHARACTERS,  # in bytes, more than a cut line can have
            shuffle_input_sentence=False,
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), size, character_coverage) from None
    return _with_rounded_scores(model.getvalue())


def _training_error(message: str, size: int, character_coverage: float) -> Exception:
    if found := re.search(r"Please set it to a value <= (\d+)", message):
        return ConfigError(
            f"size {size} is more than this text has pieces for. The rule: the text must hold enough different "
            f"words. With it, size {found[1]} works; for more, give more text."
        )
    if found := re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message):
        return ConfigError(
            f"size {size} does not hold the {int(found[2]) - 259} different characters that character_coverage "
            f"{character_coverage} asks for, and 259 ids for specials and bytes. "
            f"Take size {found[2]} or more, or a lower character_coverage (other characters become bytes)."
        )
    return DataError(f"SentencePiece could not train on this text: {message}. Is there enough of it, and is it text?")


# -------------------------------------------------------------------- the model file
# A protocol buffer (sentencepiece_model.proto): 1 = a piece {1 text, 2 score, 3 type}, 2 = trainer {3 model type,
# 35 byte fallback}, 3 = normalizer {2 character map, 3 adds a space in front, 4 removes extra ones, 5 escapes them}.
# Read by hand: the protobuf package is no dependency of SentencePiece.


def _form(model: bytes) -> Form:
    model_type, byte_fallback = UNIGRAM, False
    normalizer: dict[int, memoryview | int] = {2: memoryview(b""), 3: 1, 4: 1, 5: 1}
    for number, value, _ in _fields(memoryview(model)):
        if number == 2 and isinstance(value, memoryview):
            trainer = {inner: content for inner, content, _ in _fields(value)}
            model_type, byte_fallback = int(trainer.get(3, UNIGRAM)), bool(trainer.get(35, 0))
        elif number == 3 and isinstance(value, memoryview):
            normalizer |= {inner: content for inner, content, _ in _fields(value)}
    character_map = normalizer[2]
    return Form(
        model_type,
        byte_fallback,
        bytes(character_map) if isinstance(character_map, memoryview) else b"",
        add_dummy_prefix=normalizer[3] == 1,
        remove_extra_whitespaces=normalizer[4] == 1,
        escape_whitespaces=normalizer[5] == 1,
    )


def _with_rounded_scores(model: bytes) -> bytes:
    rounded = bytearray(model)
    for number, value, at in _fields(memoryview(model)):
        if number == 1 and isinstance(value, memoryview):
            for inner, _, score_at in _fields(value):
                if inner == 2:
                    (score,) = struct.unpack_from("<f", rounded, at + score_at)
                    struct.pack_into("<f", rounded, at + score_at, round(score * SCORE_STEPS) / SCORE_STEPS)
    return bytes(rounded)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int, int]]:
    """(number, content, where the content begins) of each field of a message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, end = _varint(message, at)
            yield key >> 3, value, at
            at = end
            continue
        if wire == 2:
            size, at = _varint(message, at)
        else:
            size = {1: 8, 5: 4}[wire]
        yield key >> 3, message[at : at + size], at
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
