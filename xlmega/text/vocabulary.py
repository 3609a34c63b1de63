"""Text in, a SentencePiece vocabulary out; then text to ids and back, without loss. The door of sentencepiece.

Ids: 0 `<pad>`, 1 `<unk>` (never produced), 2 `<D>` the end of a document, 3-258 the bytes, then the pieces by
falling probability. A vocabulary is a folder: `tokenizer.model` (SentencePiece's own file), `vocabulary.json`
(kind, size, specials, hash) and `piece_bytes.npy` (what each id stands for, in UTF-8 bytes).

Guaranteed for every text of Unicode characters: decode(encode(text)) == text, and the piece_bytes of its ids add up to
its UTF-8 length. Nothing is normalised and no space is added or removed; what no piece spells is spelt in bytes. That
includes NUL, tabs, runs of spaces and U+2581, which SentencePiece itself would return as a space. The ids of a text
depend on that text alone, not on threads or on what is encoded with it. Training is a function of texts and settings.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece

from xlmega.errors import ConfigError, DataError

PAD_ID, UNK_ID, EOD_ID = 0, 1, 2
SPECIALS = {"pad": "<pad>", "unk": "<unk>", "eod": "<D>"}
SPACE = "\u2581"
"""What SentencePiece writes for a space in its pieces."""
SEGMENT_CHARACTERS = 4096
"""Texts are encoded in segments of about this length: float32 path scores lose their precision on megabytes."""
MAX_LINE_CHARACTERS = 4096
"""Training lines are cut here; SentencePiece drops those longer than its limit without a word."""
Ids = npt.NDArray[np.int32]


class Vocabulary:
    """A vocabulary in memory; made by `load_vocabulary` and `train_vocabulary`."""

    def __init__(self, model: bytes) -> None:
        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"not a SentencePiece model ({error}). Train or copy the vocabulary again.") from None
        self.size: int = self._processor.get_piece_size()
        self.eod_id, self.pad_id = EOD_ID, PAD_ID
        specials = [self.piece(k) for k in range(min(3, self.size))]
        byte_pieces = [self.piece(k) for k in range(3, min(259, self.size))]
        if specials != list(SPECIALS.values()) or byte_pieces != [f"<0x{k:02X}>" for k in range(256)]:
            raise DataError(
                f"the SentencePiece model begins with {specials}; a vocabulary of xlmega begins with <pad>, <unk>, <D> "
                "and the 256 bytes <0x00> to <0xFF>. Train one with tools/train_vocabulary.py."
            )
        # Characters that SentencePiece would not give back as they are; these go straight to byte pieces.
        outside = SPACE if self._processor.piece_to_id(SPACE) != UNK_ID else SPACE + " "
        self._outside = re.compile(f"[{outside}]+")

    def piece(self, id: int) -> str:
        """The piece as SentencePiece spells it (spaces as U+2581)."""
        return str(self._processor.id_to_piece(id))

    def score(self, id: int) -> float:
        """The logarithm of the piece's probability in the unigram model; 0 for specials and bytes."""
        return float(self._processor.get_score(id))

    def text_of(self, id: int) -> bytes:
        """The UTF-8 bytes that an id stands for; specials stand for none."""
        return self._table[id]

    @cached_property
    def _table(self) -> list[bytes]:
        pieces = (self.piece(k) for k in range(259, self.size))
        return [b"", b"", b"", *(bytes([k]) for k in range(256)), *(p.replace(SPACE, " ").encode() for p in pieces)]

    @cached_property
    def piece_bytes(self) -> npt.NDArray[np.int32]:
        """[size]: how many UTF-8 bytes of text each id stands for."""
        return np.array([len(text) for text in self._table], dtype=np.int32)

    @cached_property
    def hash(self) -> str:
        """sha256 over the model file and over what vocabulary.json says of it."""
        described = json.dumps(self._description(), sort_keys=True).encode()
        return hashlib.sha256(hashlib.sha256(self._model).digest() + described).hexdigest()

    def _description(self) -> dict[str, Any]:
        specials = {name: {"id": id, "piece": piece} for id, (name, piece) in enumerate(SPECIALS.items())}
        return {"format_version": 1, "kind": "sentencepiece_unigram", "size": self.size, "specials": specials}

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without an end-of-document id."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[Ids]:
        """The ids of each text as int32 [tokens]; the threads change the speed and nothing else."""
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
        try:
            encoded = self._processor.encode(segments, return_type="numpy", num_threads=num_threads) if segments else []
        except TypeError:
            for segment in segments:
                _check_characters(segment)
            raise

        def ids(item: str | int) -> Ids:
            if isinstance(item, int):
                found: Ids = encoded[item]
                return found
            return np.frombuffer(item.encode("utf-8"), dtype=np.uint8).astype(np.int32) + 3

        return [
            ids(plan[0]) if len(plan) == 1 else np.concatenate([np.empty(0, np.int32), *map(ids, plan)])
            for plan in plans
        ]

    def _parts(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text cut into (segment, is outside SentencePiece's alphabet); a function of the text alone."""
        for segment in segments_of(text, SEGMENT_CHARACTERS):
            first = 0
            if self._outside.search(segment):
                for found in self._outside.finditer(segment):
                    if found.start() > first:
                        yield segment[first : found.start()], False
                    yield found.group(), True
                    first = found.end()
            if first < len(segment):
                yield segment[first:], False

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; specials give nothing, and bytes that are no UTF-8 give U+FFFD."""
        table, parts = self._table, []
        for id in ids:
            if not 0 <= id < self.size:
                raise DataError(f"id {id} is not in the vocabulary of {self.size} ids, 0 to {self.size - 1}.")
            parts.append(table[id])
        return b"".join(parts).decode("utf-8", errors="replace")

    def save(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write the folder, whole or not at all; only another vocabulary is ever overwritten."""
        _check_output(folder, overwrite)
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        sizes = io.BytesIO()
        np.save(sizes, self.piece_bytes, allow_pickle=False)
        described = json.dumps({**self._description(), "hash": self.hash}, indent=1) + "\n"
        for name, content in (
            ("tokenizer.model", self._model),
            ("piece_bytes.npy", sizes.getvalue()),
            ("vocabulary.json", described.encode()),
        ):
            with (part / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        part.replace(folder)


def load_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary in a folder, after checking that its files belong together."""
    paths = [folder / name for name in ("vocabulary.json", "tokenizer.model", "piece_bytes.npy")]
    for path in paths:
        if not path.is_file():
            raise DataError(f"there is no '{path}'. A vocabulary folder is what tools/train_vocabulary.py writes.")
    vocabulary = Vocabulary(paths[1].read_bytes())
    try:
        described = json.loads(paths[0].read_text(encoding="utf-8"))
        sizes = np.load(paths[2], allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"'{folder}' is damaged: {error}. Copy or train it again.") from None
    due = {**vocabulary._description(), "hash": vocabulary.hash}
    if described != due or not np.array_equal(sizes, vocabulary.piece_bytes):
        found = described.get("hash") if isinstance(described, dict) else described
        raise DataError(
            f"the files in '{folder}' do not belong together: vocabulary.json has hash {found}, but tokenizer.model "
            f"has {vocabulary.hash}. Copy or train the vocabulary again."
        )
    return vocabulary


def train_vocabulary(
    texts: Iterable[str],
    size: int,
    output: Path,
    *,
    character_coverage: float = 0.9995,
    input_sentence_size: int = 2_000_000,
    seed: int = 0,
    num_threads: int = 2,
    overwrite: bool = False,
) -> Vocabulary:
    """Train a unigram vocabulary of exactly `size` ids and save it to the new folder `output`.

    The texts are streamed; when they have more than `input_sentence_size` lines, that many are drawn uniformly.
    `num_threads` is a setting like the others: another number sums in another order and may give other pieces.
    """
    if size < 260:
        raise ConfigError(
            f"a vocabulary has 3 specials and 256 bytes before its first piece, so size {size} is too small."
        )
    if not 0.5 < character_coverage <= 1.0 or input_sentence_size < 1 or num_threads < 1:
        raise ConfigError(
            "character_coverage must be above 0.5 and at most 1, input_sentence_size and num_threads at least 1, but "
            f"they are {character_coverage}, {input_sentence_size} and {num_threads}."
        )
    _check_output(output, overwrite)
    lines = sample_lines(texts, input_sentence_size, seed)
    if not lines:
        raise DataError("there is no text to train a vocabulary on: every document was empty.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            character_coverage=character_coverage,
            required_chars=SPACE,  # so that a space always has a piece
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            eos_id=EOD_ID,
            pad_piece=SPECIALS["pad"],
            unk_piece=SPECIALS["unk"],
            eos_piece=SPECIALS["eod"],
            max_sentence_length=8 * MAX_LINE_CHARACTERS,  # in bytes, more than a cut line can have
            shuffle_input_sentence=False,
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), size, character_coverage) from None
    vocabulary = Vocabulary(model.getvalue())
    vocabulary.save(output, overwrite=overwrite)
    return vocabulary


def segments_of(text: str, length: int) -> Iterator[str]:
    """The text cut into segments of at most `length` characters, after the last newline or before the last space of
    each where it has one; joined they are the text."""
    first = 0
    while len(text) - first > length:
        cut = text.rfind("\n", first, first + length) + 1
        if cut <= first:
            cut = text.rfind(" ", first + 1, first + length)
        if cut <= first:
            cut = first + length
        yield text[first:cut]
        first = cut
    if first < len(text):
        yield text[first:]


def sample_lines(texts: Iterable[str], count: int, seed: int) -> list[str]:
    """At most `count` of the non-empty lines of the texts, each line equally likely, in a fixed order."""
    kept: list[str] = []
    generator = np.random.default_rng((seed, 0x4C494E45))
    # Algorithm L (Li 1994): skip ahead to the next line that enters, instead of a draw for every line.
    weight, due = 1.0, count - 1
    for seen, line in enumerate(_training_lines(texts)):
        if seen < count:
            kept.append(line)
        elif seen == due:
            kept[int(generator.random() * count)] = line
        if seen == due:
            weight *= (1.0 - generator.random()) ** (1.0 / count)
            due += int(np.log(1.0 - generator.random()) / np.log1p(-weight)) + 1 if weight < 1.0 else 1
    return kept


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for piece in segments_of(line, MAX_LINE_CHARACTERS):
                if "\0" not in piece:  # SentencePiece refuses NUL in training
                    yield piece


def _check_characters(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"a text cannot be encoded: {error}. Text is made of whole Unicode characters; "
            "text.encode('utf-8', 'replace').decode() makes it so."
        ) from None


def _check_output(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not (overwrite and (folder / "vocabulary.json").is_file()):
        hint = "it holds no vocabulary, so it is not removed" if overwrite else "or add --overwrite"
        raise ConfigError(f"'{folder}' exists. Choose another output ({hint}).")


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
