"""A vocabulary: text to ids and back, whatever library does it, and what each id stands for.

A vocabulary is a folder: the library's own file, `vocabulary.json` (kind, size, specials, hash) and `piece_bytes.npy`
(how many UTF-8 bytes of text each id stands for). Kinds:

| kind | made by | ids |
|---|---|---|
| sentencepiece_unigram | training | 0 `<pad>`, 1 `<unk>` (never produced), 2 `<D>`, 3 to 258 the bytes, pieces |
| sentencepiece_bpe | training | the same |
| byte_level_bpe | training; importing such a tokenizer.json | 0 `<|endoftext|>`, bytes, pieces; the file's own |
| sentencepiece | importing a SentencePiece model | the model's own |
| xglm | importing XGLM's SentencePiece model | fairseq's: `<s>` `<pad>` `</s>` `<unk>`, pieces, 7 made-up words |
| tokenizer_json | importing any other tokenizer.json | the file's own |

Guaranteed of every kind: ids are those that the vocabulary's own library gives for the text, and depend on that text
alone, not on threads or on what is encoded with it; the name of a special piece in a text is text, never the special.
Of kinds that are `lossless` also: decode(encode(text)) == text for every text of Unicode characters, and the
piece_bytes of its ids add up to its UTF-8 length. The others normalise, or know an unknown piece.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from xlmega.errors import ConfigError, DataError, nearest

KINDS = ("sentencepiece_unigram", "sentencepiece_bpe", "byte_level_bpe")
"""Kinds that can be trained."""
MAX_LINE_CHARACTERS = 4096
"""Training lines are cut here; SentencePiece drops those longer than its limit without a word."""
Ids = npt.NDArray[np.int32]
Specials = Mapping[str, int]
"""Ids by role: 'eod' always, 'pad' and 'unk' where there are such."""


class Vocabulary(ABC):
    """A vocabulary in memory; made by `load_vocabulary`, `train_vocabulary` and `import_vocabulary`."""

    model_file: ClassVar[str]
    """The name of the library's file in a vocabulary's folder."""
    kind: str
    size: int
    specials: Specials
    lossless: bool

    def __init__(self, model: bytes) -> None:
        self._model = model

    @property
    def eod_id(self) -> int:
        """The id that ends a document."""
        return self.specials["eod"]

    @property
    def pad_id(self) -> int | None:
        return self.specials.get("pad")

    @property
    def unk_id(self) -> int | None:
        return self.specials.get("unk")

    @abstractmethod
    def piece(self, id: int) -> str:
        """The piece as the library spells it (spaces as U+2581, or bytes as GPT-2 writes them)."""

    @abstractmethod
    def text_of(self, id: int) -> bytes:
        """The UTF-8 bytes that an id stands for; specials stand for none."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[Ids]:
        """The ids of each text as int32 [tokens], nothing added; threads change the speed and nothing else."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; specials give nothing, and bytes that are no UTF-8 give U+FFFD."""

    @property
    @abstractmethod
    def byte_ids(self) -> range | list[int]:
        """Ids of single bytes that stand in for characters without a piece."""

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without an end-of-document id."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def id_of(self, piece: str) -> int:
        """The id of a piece by its own spelling, for specials named on a command line."""
        for id in range(self.size):
            if self.piece(id) == piece:
                return id
        raise ConfigError(
            f"the vocabulary has no piece '{piece}'.{nearest(piece, [self.piece(id) for id in self.specials.values()])}"
        )

    @cached_property
    def piece_bytes(self) -> npt.NDArray[np.int32]:
        """[size]: how many UTF-8 bytes of text each id stands for."""
        return np.array([len(self.text_of(id)) for id in range(self.size)], dtype=np.int32)

    @cached_property
    def hash(self) -> str:
        """sha256 over the model file and over what vocabulary.json says of it."""
        described = json.dumps(self._description(), sort_keys=True).encode()
        return hashlib.sha256(hashlib.sha256(self._model).digest() + described).hexdigest()

    def _description(self) -> dict[str, Any]:
        specials = {name: {"id": id, "piece": self.piece(id)} for name, id in self.specials.items()}
        return {"format_version": 1, "kind": self.kind, "size": self.size, "specials": specials}

    def _known(self, ids: Iterable[int]) -> Iterator[int]:
        for id in ids:
            if not 0 <= id < self.size:
                raise DataError(f"id {id} is not in the vocabulary of {self.size} ids, 0 to {self.size - 1}.")
            yield int(id)

    def save(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write the folder, whole or not at all; only another vocabulary is ever overwritten."""
        check_output(folder, overwrite)
        part = folder.with_name(folder.name + ".part")
        sizes = io.BytesIO()
        np.save(sizes, self.piece_bytes, allow_pickle=False)
        described = json.dumps({**self._description(), "hash": self.hash}, indent=1) + "\n"
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            for name, content in (
                (self.model_file, self._model),
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
        except OSError as error:
            raise DataError(f"the vocabulary '{folder}' cannot be written: {error.strerror or error}.") from None


def load_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary in a folder, after checking that its files belong together."""
    told, sizes_file = _present(folder, "vocabulary.json"), _present(folder, "piece_bytes.npy")
    try:
        described = json.loads(told.read_text(encoding="utf-8"))
        sizes = np.load(sizes_file, allow_pickle=False)
        kind, specials = described["kind"], {name: int(s["id"]) for name, s in described["specials"].items()}
    except (ValueError, EOFError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise DataError(f"'{folder}' is damaged: {error}. Copy or train it again.") from None
    if kind in ("byte_level_bpe", "tokenizer_json"):
        vocabulary = _tokenizers(_present(folder, "tokenizer.json").read_bytes(), specials)
    elif kind in ("sentencepiece_unigram", "sentencepiece_bpe", "sentencepiece", "xglm"):
        vocabulary = _sentencepiece(_present(folder, "tokenizer.model").read_bytes(), specials, xglm=kind == "xglm")
    else:
        raise DataError(f"'{folder}' is of kind '{kind}', which this xlmega does not know.")
    due = {**vocabulary._description(), "hash": vocabulary.hash}
    if described != due or not np.array_equal(sizes, vocabulary.piece_bytes):
        raise DataError(
            f"the files in '{folder}' do not belong together: vocabulary.json has hash {described.get('hash')}, but "
            f"{vocabulary.model_file} has {vocabulary.hash}. Copy or train the vocabulary again."
        )
    return vocabulary


def _present(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise DataError(f"there is no '{folder / name}'. A vocabulary folder is what tools/train_vocabulary.py writes.")
    return folder / name


# The libraries are loaded when a vocabulary of theirs is.


def _sentencepiece(model: bytes, specials: Specials | None = None, *, xglm: bool = False) -> Vocabulary:
    from xlmega.text.vocabulary_sentencepiece import SentencePieceVocabulary

    return SentencePieceVocabulary(model, specials, xglm=xglm)


def _tokenizers(model: bytes, specials: Specials) -> Vocabulary:
    from xlmega.text.vocabulary_tokenizers import TokenizersVocabulary

    return TokenizersVocabulary(model, specials)


# -------------------------------------------------------------------- training


def train_vocabulary(
    texts: Iterable[str],
    size: int,
    output: Path,
    *,
    kind: str = "sentencepiece_unigram",
    character_coverage: float = 0.9995,
    input_sentence_size: int = 2_000_000,
    seed: int = 0,
    num_threads: int = 2,
    overwrite: bool = False,
) -> Vocabulary:
    """Train a vocabulary of exactly `size` ids and save it to the new folder `output`.

    The texts are streamed; when they have more than `input_sentence_size` lines, that many are drawn uniformly. For
    SentencePiece `num_threads` is a setting like the others: another number sums in another order and may give other
    pieces. A byte-level BPE needs no `character_coverage`.
    """
    if kind not in KINDS:
        raise ConfigError(f"a vocabulary of kind '{kind}' cannot be trained.{nearest(kind, KINDS)}")
    if size < 260:
        raise ConfigError(
            f"a vocabulary has 3 specials and 256 bytes before its first piece, so size {size} is too small."
        )
    if not 0.5 < character_coverage <= 1.0 or input_sentence_size < 1 or num_threads < 1:
        raise ConfigError(
            "character_coverage must be above 0.5 and at most 1, input_sentence_size and num_threads at least 1, but "
            f"they are {character_coverage}, {input_sentence_size} and {num_threads}."
        )
    check_output(output, overwrite)
    lines = sample_lines(texts, input_sentence_size, seed)
    if not lines:
        raise DataError("there is no text to train a vocabulary on: every document was empty.")
    if kind == "byte_level_bpe":
        from xlmega.text import vocabulary_tokenizers

        vocabulary = _tokenizers(vocabulary_tokenizers.train(lines, size), {"eod": 0})
    else:
        from xlmega.text import vocabulary_sentencepiece

        model_type = kind.removeprefix("sentencepiece_")
        vocabulary = _sentencepiece(
            vocabulary_sentencepiece.train(lines, size, model_type, character_coverage, num_threads)
        )
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


def check_characters(text: str) -> None:
    """Refuse half of a surrogate pair, which no library can encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"a text cannot be encoded: {error}. Text is made of whole Unicode characters; "
            "text.encode('utf-8', 'replace').decode() makes it so."
        ) from None


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that exists, unless it is a vocabulary to be overwritten."""
    if folder.exists() and not (overwrite and (folder / "vocabulary.json").is_file()):
        hint = "it holds no vocabulary, so it is not removed" if overwrite else "or add --overwrite"
        raise ConfigError(f"'{folder}' exists. Choose another output ({hint}).")


# -------------------------------------------------------------------- importing

END_NAMES = ("<|endoftext|>", "</s>", "<D>", "<|end_of_text|>", "<eos>")
"""What ends a document where neither the command nor the tokenizer says so."""


def import_vocabulary(
    source: Path, output: Path, *, eod: str = "", pad: str = "", overwrite: bool = False
) -> Vocabulary:
    """Save an existing vocabulary as one of ours: a Hugging Face folder, a tokenizer.json or a SentencePiece model.

    In a folder of XGLM the SentencePiece model comes first, with fairseq's numbering; else tokenizer.json does. `eod`
    and `pad` are pieces; where they are empty, the tokenizer's own end and padding are taken.
    """
    check_output(output, overwrite)
    settings: dict[str, Any] = {}
    xglm = False
    if source.is_dir():
        config, settings = _json(source / "config.json"), _json(source / "tokenizer_config.json")
        xglm = config.get("model_type") == "xglm" or "XGLM" in str(settings.get("tokenizer_class"))
        names = ["tokenizer.json", "tokenizer.model", "sentencepiece.bpe.model", "spiece.model"]
        names = ["sentencepiece.bpe.model", *names] if xglm else names
        found = [source / name for name in names if (source / name).is_file()]
        if not found:
            raise DataError(f"'{source}' holds no vocabulary: none of {', '.join(dict.fromkeys(names))}.")
        source = found[0]
    try:
        model = source.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read '{source}': {error.strerror or error}.") from None
    is_json = source.suffix == ".json"
    make = _tokenizers if is_json else lambda model, specials: _sentencepiece(model, specials, xglm=xglm)
    bare = make(model, {"eod": 0})
    ends = [eod or _content(settings.get("eos_token")), *([] if eod else END_NAMES)]
    pads = [pad or _content(settings.get("pad_token")), *([] if pad else ["<pad>", "<|padding|>"])]
    unks = [_content(settings.get("unk_token")), "<unk>"]
    pieces = {bare.piece(id): id for id in reversed(range(bare.size))}
    specials = {}
    for role, names, asked in (("pad", pads, pad), ("unk", unks, ""), ("eod", ends, eod)):
        known = [pieces[name] for name in names if name in pieces]
        if known:
            specials[role] = known[0]
        elif asked:
            raise ConfigError(f"'{source}' has no piece '{asked}' for --{role}.{nearest(asked, pieces)}")
    if "eod" not in specials:
        raise ConfigError(f"'{source}' does not say which piece ends a document. Give --eod PIECE.")
    vocabulary = make(model, specials)
    vocabulary.save(output, overwrite=overwrite)
    return vocabulary


def _json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read '{path}': {error}.") from None
    return table if isinstance(table, dict) else {}


def _content(token: Any) -> str:
    """A special as tokenizer_config.json writes it: the piece itself, or a table around it."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")
