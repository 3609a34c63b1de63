"""A vocabulary as the tokenizer.json that AutoTokenizer loads: tokenizers' Unigram over the same pieces and scores.

In: a Vocabulary. Out: the content of tokenizer.json and tokenizer_config.json; only JSON is written, so
neither tokenizers nor transformers is needed. Guaranteed: a text is cut into the same segments, whitespace and U+2581
stay as they are, and marker names in a text ('<D>', '<0x0A>') are plain text, all as `Vocabulary.encode` has it.

The one difference: tokenizers adds scores in double precision and SentencePiece in single. Where two segmentations tie
but for rounding (in 'thethethe': het|he|th|e or th|e|thet|he), the ids can differ; they decode to the same text. Of the
17,988 documents of the development corpus, none differs.
"""

from __future__ import annotations

from typing import Any

from xlmega.text.vocabulary import SEGMENT_CHARACTERS, UNK_ID, Vocabulary

# Behind the three specials and the 256 bytes.
FIRST_PIECE = 259

# `segments_of` of text.vocabulary as a regular expression: all of a short rest; else up to the last newline; else up to
# the last space; else a full segment.
_SEGMENTS = "|".join(
    (
        rf"[\s\S]{{1,{SEGMENT_CHARACTERS}}}\z",
        rf"[\s\S]{{0,{SEGMENT_CHARACTERS - 1}}}\n",
        rf"[\s\S]{{1,{SEGMENT_CHARACTERS - 1}}}(?= )",
        rf"[\s\S]{{1,{SEGMENT_CHARACTERS}}}",
    )
)


def tokenizer_files(vocabulary: Vocabulary, max_positions: int) -> dict[str, Any]:
    """tokenizer.json and tokenizer_config.json: Unigram with the vocabulary's own pieces and scores.

    Pieces are spelt with real spaces, so that nothing needs normalising and U+2581 is a character like any other.
    """
    markers = [vocabulary.piece(id) for id in range(FIRST_PIECE)]
    pieces = [vocabulary.text_of(id).decode() for id in range(FIRST_PIECE, vocabulary.size)]
    scores = [vocabulary.score(id) for id in range(FIRST_PIECE, vocabulary.size)]
    # tokenizers would match '<0x0A>' or '<D>' in a text as such, SentencePiece never. Here such a piece costs more than
    # spelling it letter by letter, and letters that have no piece are cut out first: no piece can span them anyway.
    # (tokenizers' score of an unknown letter follows the lowest score. That decides nothing: each letter of a piece is
    # a piece itself, so to leave it unknown is never a choice.)
    hidden = min(scores) * (1 + max(map(len, markers)))
    without_piece = sorted(set("".join(markers)) - set(pieces))
    cuts = [_split(_SEGMENTS)] + ([_split(f"[{''.join(without_piece)}]")] if without_piece else [])
    special = {"unk_token": UNK_ID, "pad_token": vocabulary.pad_id, "eos_token": vocabulary.eod_id}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": markers[id], **added} for id in sorted(special.values())],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "Unigram",
            "unk_id": UNK_ID,
            "vocab": [[marker, hidden] for marker in markers]
            + [[piece, score] for piece, score in zip(pieces, scores, strict=True)],
            "byte_fallback": True,
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        **{name: markers[id] for name, id in special.items()},
        "bos_token": markers[vocabulary.eod_id],
        # Marker names inside a text are text; the ids themselves are for the caller to place.
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
