"""The cloze test: the last word of a passage is taken away, and the model goes on from there with a beam of three.

In: a Scorer, its vocabulary, and items (passage without its last word, and that word) of any language, read from JSON
lines or made from documents. Out: for each language the share of items whose word is in the best continuation (top-1),
and in any of the three (top-3). A continuation has as many tokens as the word; punctuation is no candidate.
The published script drops the prompt's last token, as if it were BERT's [SEP]; here the model reads all of it.
Source: METHODS §4.7.
"""

from __future__ import annotations

import json
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from xlmega.errors import ConfigError, DataError
from xlmega.evaluation.scoring import Scorer
from xlmega.text.corpus import Document
from xlmega.text.records import read_text_lines
from xlmega.text.vocabulary import Vocabulary
from xlmega.weights.directory import replace_text

BEAMS = 3
EXPANDED = 5
"""Next tokens that are tried for each beam."""
MIN_CONTEXT_WORDS, MAX_CONTEXT_WORDS = 10, 60
MIN_ANSWER_LETTERS = 3
# Where a sentence ends: scripts with spaces only, for a last word has to be one.
_SENTENCE = re.compile(r"[^.!?…\n]+[.!?…]")
_WORD = re.compile(r"\S+")
_LETTER = re.compile(r"\w")
_ANSWER = re.compile(r"(?P<answer>[^\W\d_]+)\W*")


@dataclass(frozen=True)
class Item:
    """A passage and the word that ends it."""

    prompt: str
    """What comes before the word, without the space between."""
    answer: str
    language: str


@dataclass(frozen=True)
class Result:
    """What a model found in the items of one language."""

    items: int
    top1: int
    """Items whose word is in the best continuation."""
    top3: int
    """Items whose word is in one of three."""

    def describe(self) -> str:
        return f"top-1 {self.top1 / self.items:.1%}, top-3 {self.top3 / self.items:.1%} of {self.items} items"


def make_items(documents: Iterable[Document], count: int, seed: int = 0) -> list[Item]:
    """At most `count` items of each language from the documents, one from a document, drawn without regard to order.

    The passage is the document up to the end of a sentence, its last words only (10 to 60); the answer is the
    sentence's last word, of 3 letters at least.
    """
    if count < 1 or seed < 0:
        raise ConfigError(
            f"the number of items must be at least 1 and the seed at least 0, but they are {count} and {seed}."
        )
    found: dict[str, list[Item]] = {}
    for index, document in enumerate(documents):
        candidates = list(_candidates(document))
        if candidates:
            draw = np.random.default_rng((seed, index))
            found.setdefault(document.language, []).append(candidates[draw.integers(len(candidates))])
    chosen: list[Item] = []
    for _, items in sorted(found.items()):
        order = np.random.default_rng((seed, len(items))).permutation(len(items))[:count]
        chosen += [items[index] for index in sorted(order)]
    if not chosen:
        raise DataError(
            f"no document holds a sentence of {MIN_CONTEXT_WORDS + 1} words or more whose last has "
            f"{MIN_ANSWER_LETTERS} letters: there is nothing to take a word away from."
        )
    return chosen


def _candidates(document: Document) -> Iterator[Item]:
    # Where words begin and end, once: a book is not gone through anew for each of its sentences.
    words = [word.span() for word in _WORD.finditer(document.text)]
    begins = [begin for begin, _ in words]
    for sentence in _SENTENCE.finditer(document.text):
        last = bisect_left(begins, sentence.end()) - 1
        while last >= MIN_CONTEXT_WORDS and not _LETTER.search(document.text, words[last][0], sentence.end()):
            last -= 1  # a mark that stands apart
        if last < MIN_CONTEXT_WORDS or len(sentence[0].split()) < 2:
            continue
        match = _ANSWER.fullmatch(document.text, words[last][0], min(words[last][1], sentence.end()))
        if match is not None and len(match["answer"]) >= MIN_ANSWER_LETTERS:
            context = (document.text[begin:end] for begin, end in words[max(0, last - MAX_CONTEXT_WORDS) : last])
            yield Item(" ".join(context), match["answer"], document.language)


def write_items(items: Sequence[Item], path: Path) -> None:
    """One JSON object a line."""
    replace_text(path, "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items))


def read_items(path: Path) -> list[Item]:
    """What `write_items` wrote, or anybody else with the fields prompt, answer and language."""
    items = []
    for number, line in enumerate(read_text_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            item = Item(record["prompt"].strip(), record["answer"].strip(), record["language"])
            if not (item.prompt and item.answer and isinstance(item.language, str)):
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DataError(
                f'{path}:{number} is no item. Each line needs {{"prompt": "...", "answer": "...", "language": "en"}}.'
            ) from None
        items.append(item)
    if not items:
        raise DataError(f"'{path}' holds no items.")
    return items


def evaluate_cloze(
    scorer: Scorer, vocabulary: Vocabulary, items: Sequence[Item], *, batch_items: int = 16
) -> dict[str, Result]:
    """Results by language, and over all under 'all' where there are several."""
    hits: dict[str, list[tuple[bool, bool]]] = {}
    allowed_V = torch.from_numpy(_allowed(vocabulary, scorer.vocab_size))
    # Items whose words have as many tokens share a batch.
    encoded = [(vocabulary.encode(item.prompt), len(answer_ids(vocabulary, item))) for item in items]
    order = sorted(range(len(items)), key=lambda index: (encoded[index][1], len(encoded[index][0])))
    start = 0
    while start < len(order):
        length = encoded[order[start]][1]
        batch = [index for index in order[start : start + batch_items] if encoded[index][1] == length]
        start += len(batch)
        most = scorer.max_positions - length
        if most < 1:
            raise DataError(
                f"the word {items[batch[0]].answer!r} has {length} tokens, and the model {scorer.max_positions} "
                "positions: with what it goes on from it does not fit. Leave the item out."
            )
        prompts = [[vocabulary.eod_id, *encoded[index][0]][-most:] for index in batch]
        for index, beams in zip(batch, _continuations(scorer, prompts, length, allowed_V), strict=True):
            answer = items[index].answer
            found = [answer in vocabulary.decode(beam) for beam in beams]
            hits.setdefault(items[index].language, []).append((found[0], any(found)))
    if len(hits) > 1:
        hits["all"] = [hit for one in hits.values() for hit in one]
    return {
        language: Result(len(one), sum(first for first, _ in one), sum(some for _, some in one))
        for language, one in sorted(hits.items(), key=lambda pair: (pair[0] == "all", pair[0]))
    }


def answer_ids(vocabulary: Vocabulary, item: Item) -> list[int]:
    """The word's tokens where it stands: what the passage has with it that it has not without."""
    with_word, without = vocabulary.encode(f"{item.prompt} {item.answer}"), vocabulary.encode(item.prompt)
    return with_word[len(without) :] or with_word[-1:]


def _allowed(vocabulary: Vocabulary, vocab_size: int) -> np.ndarray:
    """Ids that may go on: no specials, and nothing that is punctuation alone."""
    allowed = np.zeros(vocab_size, dtype=bool)
    specials = set(vocabulary.specials.values())
    for id in range(min(vocabulary.size, vocab_size)):
        text = vocabulary.text_of(id).decode("utf-8", errors="replace").strip()
        allowed[id] = id not in specials and not (text and all(unicodedata.category(c)[0] in "PS" for c in text))
    return allowed


def _continuations(
    scorer: Scorer, prompts: Sequence[list[int]], length: int, allowed_V: torch.Tensor
) -> list[list[list[int]]]:
    """For each prompt its three best continuations of `length` tokens, the best first."""
    beams: list[list[tuple[float, list[int]]]] = [[(0.0, [])] for _ in prompts]
    for _ in range(length):
        texts = [prompts[k] + tail for k, some in enumerate(beams) for _, tail in some]
        longest = max(map(len, texts))
        inputs_BL = torch.zeros(len(texts), longest, dtype=torch.int64)
        for row, ids in enumerate(texts):
            inputs_BL[row, : len(ids)] = torch.tensor(ids)
        lengths_B = torch.tensor([len(ids) for ids in texts])
        log_p_BV = scorer.next_distribution(inputs_BL, lengths_B).masked_fill(~allowed_V, float("-inf"))
        best_BE, ids_BE = log_p_BV.topk(min(EXPANDED, log_p_BV.shape[1]), dim=1)
        row = 0
        for k, some in enumerate(beams):
            grown = []
            for score, tail in some:
                grown += [
                    (score + p, [*tail, id]) for p, id in zip(best_BE[row].tolist(), ids_BE[row].tolist(), strict=True)
                ]
                row += 1
            beams[k] = sorted(grown, key=lambda one: -one[0])[:BEAMS]
    return [[tail for _, tail in some] for some in beams]
