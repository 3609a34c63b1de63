"""A vocabulary as the tokenizer.json that AutoTokenizer loads, whatever its kind.

In: a Vocabulary. Out: the content of tokenizer.json and tokenizer_config.json; only JSON is written, so transformers is
not needed. A tokenizer.json stays what it was; a SentencePiece model becomes tokenizers' Unigram or BPE over the same
pieces, with the model's own normalisation where it has one. Guaranteed for vocabularies that xlmega trained: whitespace
and U+2581 stay as they are, and marker names in a text ('<D>', '<0x0A>') are plain text, all as `Vocabulary.encode` has
it. Unigram scores trained here are multiples of 1/256, whose sums are exact in SentencePiece's single precision and in
tokenizers' double; a model with other scores can differ where two segmentations tie but for rounding, and a special's
name in a text can be taken for it where the model lacks one of its letters.
"""

from __future__ import annotations

import base64
from typing import Any

from xlmega.errors import ConfigError
from xlmega.text.vocabulary import Vocabulary
from xlmega.text.vocabulary_sentencepiece import SPACE, UNIGRAM, SentencePieceVocabulary
from xlmega.text.vocabulary_tokenizers import TokenizersVocabulary

ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def tokenizer_files(vocabulary: Vocabulary, max_positions: int) -> dict[str, Any]:
    """tokenizer.json and tokenizer_config.json of a vocabulary."""
    if isinstance(vocabulary, TokenizersVocabulary):
        tokenizer = {**vocabulary.table, "truncation": None, "padding": None}
    elif isinstance(vocabulary, SentencePieceVocabulary):
        tokenizer = _of_sentencepiece(vocabulary)
    else:
        raise ConfigError(f"a vocabulary of kind '{vocabulary.kind}' cannot be written as a tokenizer.json.")
    names = {"eos_token": "eod", "bos_token": "eod", "pad_token": "pad", "unk_token": "unk"}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        **{
            name: vocabulary.piece(vocabulary.specials[role])
            for name, role in names.items()
            if role in vocabulary.specials
        },
        # Marker names inside a text are text; the ids themselves are for the caller to place.
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


def _of_sentencepiece(vocabulary: SentencePieceVocabulary) -> dict[str, Any]:
    """Of a lossless vocabulary, pieces are spelt with real spaces, so that nothing needs normalising and U+2581 is a
    character like any other; of others as SentencePiece spells them."""
    if vocabulary.lossless:
        pieces = [vocabulary.piece(id).replace(SPACE, " ") for id in range(vocabulary.size)]
    else:
        pieces = [vocabulary.piece(id) for id in range(vocabulary.size)]
    is_matched = [vocabulary.is_matched(id) for id in range(vocabulary.size)]
    model = (_unigram if vocabulary.form.model_type == UNIGRAM else _bpe)(vocabulary, pieces, is_matched)
    # tokenizers would match '<0x0A>' or '<D>' in a text as such, SentencePiece never: letters that have no piece are
    # cut out first (no piece can span them anyway), and what is left of such a name costs more than its letters.
    found = {piece for piece, matched in zip(pieces, is_matched, strict=True) if matched}
    names = [piece for piece, matched in zip(pieces, is_matched, strict=True) if not matched]
    without_piece = sorted(set("".join(names)) - found)
    specials = {id: pieces[id] for id in vocabulary.specials.values()}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": piece, **ADDED, "special": True} for id, piece in sorted(specials.items())
        ],
        "normalizer": None if vocabulary.lossless else _normalizer(vocabulary),
        "pre_tokenizer": _split(f"[{''.join(without_piece)}]") if without_piece and vocabulary.lossless else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": _decoders(vocabulary)},
        "model": model,
    }


def _unigram(vocabulary: SentencePieceVocabulary, pieces: list[str], is_matched: list[bool]) -> dict[str, Any]:
    # tokenizers' score of an unknown letter follows the lowest score. That decides nothing in a lossless vocabulary:
    # each letter of a piece is a piece itself, so to leave it unknown is never a choice.
    scores = [vocabulary.score(id) for id in range(vocabulary.size)]
    lowest = min(score for score, matched in zip(scores, is_matched, strict=True) if matched)
    hidden = lowest * (1 + max(map(len, pieces)))
    return {
        "type": "Unigram",
        "unk_id": vocabulary.unk_id,
        "vocab": [
            [piece, score if ok else hidden] for piece, score, ok in zip(pieces, scores, is_matched, strict=True)
        ],
        "byte_fallback": vocabulary.form.byte_fallback,
    }


def _bpe(vocabulary: SentencePieceVocabulary, pieces: list[str], is_matched: list[bool]) -> dict[str, Any]:
    """SentencePiece joins the neighbours whose union ranks first; tokenizers wants each pair that gives the union."""
    found = {piece for piece, matched in zip(pieces, is_matched, strict=True) if matched}
    ranked = sorted((id for id, matched in enumerate(is_matched) if matched), key=lambda id: -vocabulary.score(id))
    merges = [
        [piece[:k], piece[k:]]
        for piece in (pieces[id] for id in ranked)
        for k in range(1, len(piece))
        if piece[:k] in found and piece[k:] in found
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if vocabulary.unk_id is None else pieces[vocabulary.unk_id],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": vocabulary.form.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece: id for id, piece in enumerate(pieces)},
        "merges": merges,
    }


def _normalizer(vocabulary: SentencePieceVocabulary) -> dict[str, Any]:
    form, steps = vocabulary.form, []
    if form.character_map:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(form.character_map).decode()})
    if form.remove_extra_whitespaces:
        steps += [_replace({"Regex": "^ +"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if form.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": " "})
    if form.escape_whitespaces:
        steps.append(_replace({"String": " "}, SPACE))
    if form.remove_extra_whitespaces:
        steps.append(_replace({"Regex": f"{SPACE if form.escape_whitespaces else ' '}+$"}, ""))
    return {"type": "Sequence", "normalizers": steps}


def _decoders(vocabulary: SentencePieceVocabulary) -> list[dict[str, Any]]:
    ends = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if vocabulary.lossless:
        return ends
    spaces = [_replace({"String": SPACE}, " ")]
    first = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if vocabulary.form.add_dummy_prefix else []
    return [*spaces, *ends, *first]


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
