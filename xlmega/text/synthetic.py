"""A made corpus: small artificial languages whose every sentence and word has a known meaning.

There is one world: senses (nouns, verbs, adjectives, adverbs, places) with Zipfian frequencies, verbs that prefer
classes of subjects and objects, and topics that stay for a document. A sentence is first a meaning and then spoken in a
language, so parallel text, a bilingual lexicon and word senses are known without error. The languages differ in what
languages differ in; their codes come from the range qaa-qtz that ISO 639-2 keeps for private use:

    code  script      order  shows
    qla   Latin       SVO    article, plural suffix, adjectives before the noun, prepositions; the largest
    qlb   Latin       SOV    half of its words are cognates of qla's after regular sound changes; postpositions
    qgr   Greek       VSO    words of its own; adjectives follow the noun and agree with its gender and number
    qcy   Cyrillic    SVO    cases instead of an article; a third of its words are qla's, respelt in its own letters
    qhn   Han-like    SVO    words of one or two characters, no spaces, particles instead of endings
    qdv   Devanagari  SOV    words of its own, agreement in gender and number (not in the default set)

Guaranteed: the same arguments give the same bytes of text (PCG64 uniforms and nothing else); no document and no
parallel sentence depends on another; in every language some words have two senses, listed in lexicon.json.
"""

from __future__ import annotations

import json
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from xlmega.errors import ConfigError, nearest
from xlmega.text.corpus import Document, write_documents, write_records

NUM_CLASSES = 6
NUM_TOPICS = 12
NUM_SENSES = {"noun": 360, "verb": 120, "adjective": 80, "adverb": 24, "place": 48}
DRAWS = 24
"""Uniform numbers for one sentence."""


@dataclass(frozen=True)
class Grammar:
    """How one language speaks."""

    script: str
    onsets: tuple[str, ...]
    vowels: tuple[str, ...]
    codas: tuple[str, ...]
    order: str
    """Positions of subject, verb and object."""
    adjective_first: bool
    preposition: bool
    """The place word comes after its preposition; otherwise before its postposition."""
    agreement: bool
    """Adjectives take the gender and number of their noun."""
    case: bool
    """Objects and places take an ending (in qhn: a particle before them)."""
    article: bool
    kin: str = ""
    """The language whose words it shares."""
    kin_share: float = 0.0
    spaced: bool = True
    stop: str = "."


HAN = tuple(chr(0x4E00 + 37 * k) for k in range(1, 111))
GRAMMARS: dict[str, Grammar] = {
    "qla": Grammar(
        "Latin", tuple("bdfgklmnprstv"), tuple("aeiou"), ("", "", "", "n", "r", "s", "l"), "SVO",
        adjective_first=True, preposition=True, agreement=False, case=False, article=True,
    ),
    "qlb": Grammar(
        "Latin", tuple("bcdghjlmnpqtz"), tuple("aeiou"), ("", "", "", "m", "t"), "SOV",
        adjective_first=True, preposition=False, agreement=True, case=False, article=False, kin="qla", kin_share=0.5,
    ),
    "qgr": Grammar(
        "Greek", tuple("βγδθκλμνπρστφχ"), tuple("αειου"), ("", "", "ς", "ν"), "VSO",
        adjective_first=False, preposition=True, agreement=True, case=False, article=True,
    ),
    "qcy": Grammar(
        "Cyrillic", tuple("бвгджзклмнпрст"), tuple("аеиоу"), ("", "", "", "й", "н", "р"), "SVO",
        adjective_first=True, preposition=True, agreement=True, case=True, article=False, kin="qla", kin_share=0.33,
    ),
    "qhn": Grammar(
        "Han-like", HAN, ("",), ("",), "SVO",
        adjective_first=True, preposition=False, agreement=False, case=True, article=False, spaced=False, stop="。",
    ),
    "qdv": Grammar(
        "Devanagari", tuple("कगजतदनपबमरलस"), ("", "ा", "ि", "े", "ो", "ु"), ("",), "SOV",
        adjective_first=True, preposition=False, agreement=True, case=True, article=False, stop="।",
    ),
}  # fmt: skip
LANGUAGES = ("qla", "qlb", "qgr", "qcy", "qhn")
SHARES = (8.0, 4.0, 2.0, 1.0, 1.0)
"""Relative sizes in bytes of the languages in the order given; from the sixth on 1."""

# qla's letters in the letters of its kin: a sound change for qlb, another alphabet for qcy.
RESPELLING: dict[str, dict[int, int]] = {
    "qlb": str.maketrans("ksfvr", "czpbl"),
    "qcy": str.maketrans("bdfgklmnprstvaeiou", "бдфгклмнпрстваеиоу"),
}


@dataclass(frozen=True)
class Summary:
    """What `make_corpus` wrote."""

    output: Path
    documents: dict[str, int]
    """Training documents of each language."""
    train_bytes: dict[str, int]
    """UTF-8 bytes of training text of each language."""
    parallel_pairs: int
    """Training pairs of each parallel file."""


@dataclass(frozen=True)
class World:
    """The senses, their frequencies and what goes with what; the same for every language."""

    senses: list[str]
    """Sense ids such as 'noun.017', the most frequent of each part of speech first."""
    classes: dict[str, int]
    """Semantic class of a noun."""
    genders: dict[str, int]
    """0 or 1 for a noun; languages without agreement do not show it."""
    nouns: list[list[list[str]]]
    """[topic][class]: the nouns that a document of that topic takes from that class."""
    noun_steps: list[list[list[float]]]
    """Cumulative frequencies for `nouns`, ending in 1."""
    preferences: dict[str, tuple[int, int]]
    """The (subject class, object class) of a verb; object class -1 for a verb without one."""
    others: dict[str, tuple[list[str], list[float]]]
    """Senses of the other parts of speech with their cumulative frequencies."""


def make_corpus(
    output: Path,
    *,
    seed: int = 0,
    languages: Sequence[str] = LANGUAGES,
    megabytes: float = 3.0,
    shares: Sequence[float] = (),
    frac_valid: float = 0.05,
    parallel_pairs: int = 1000,
    overwrite: bool = False,
) -> Summary:
    """Write a corpus of about `megabytes` (10^6 UTF-8 bytes of training text) to the new folder `output`.

    train/LANG/00000.jsonl.gz, valid/LANG/00000.jsonl.gz, parallel/A-B.{train,valid}.jsonl.gz for the first language A
    with each other B, and lexicon.json.
    """
    languages = tuple(languages)
    for code in languages:
        if code not in GRAMMARS:
            raise ConfigError(f"'{code}' is not a made language.{nearest(code, GRAMMARS)}")
    if not languages or len(set(languages)) < len(languages):
        raise ConfigError(f"languages must be one or more different codes, but are {', '.join(languages) or 'none'}.")
    shares = tuple(shares) or (*SHARES, *[1.0] * len(languages))[: len(languages)]
    if len(shares) != len(languages) or min(shares) <= 0:
        raise ConfigError(f"{len(languages)} languages need as many shares above 0, but shares are {list(shares)}.")
    if not megabytes > 0 or not 0 < frac_valid < 1 or parallel_pairs < 0 or seed < 0:
        raise ConfigError(
            f"megabytes must be above 0, frac_valid in (0, 1), parallel_pairs and seed not negative, but they are "
            f"{megabytes}, {frac_valid}, {parallel_pairs} and {seed}."
        )
    if output.exists() and not (overwrite and (output / "lexicon.json").is_file()):
        hint = (
            "it has no lexicon.json, so it is no made corpus and is not removed" if overwrite else "or add --overwrite"
        )
        raise ConfigError(f"'{output}' exists. Choose another output ({hint}).")
    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    world = make_world(seed)
    speakers = {code: Speaker(code, world, seed) for code in languages}
    counts, sizes = {}, {}
    for code, share in zip(languages, shares, strict=True):
        size = int(megabytes * 1e6 * share / sum(shares))
        sizes[code] = 0
        for split, due in (("train", size), ("valid", max(1, int(size * frac_valid)))):
            documents = list(_documents(speakers[code], world, seed, split, due))
            write_documents(part / split / code / "00000.jsonl.gz", documents)
            if split == "train":
                counts[code] = len(documents)
                sizes[code] = sum(len(document.text.encode()) for document in documents)
    first, *rest = (speakers[code] for code in languages)
    for second in rest:
        for split, pairs in (("train", parallel_pairs), ("valid", parallel_pairs // 10)):
            records = _parallel(first, second, world, seed, split, pairs)
            write_records(part / "parallel" / f"{first.code}-{second.code}.{split}.jsonl.gz", records)
    lexicon = {
        "format_version": 1,
        "seed": seed,
        "senses": {
            sense: {"part_of_speech": sense.split(".")[0]}
            | ({"class": world.classes[sense]} if sense in world.classes else {})
            for sense in world.senses
        },
        "languages": {code: speaker.lexicon() for code, speaker in speakers.items()},
    }
    (part / "lexicon.json").write_text(json.dumps(lexicon, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if output.exists():
        shutil.rmtree(output)
    part.replace(output)
    return Summary(output, counts, sizes, parallel_pairs if rest else 0)


def make_world(seed: int) -> World:
    """The senses and their company."""
    draw = Draws(seed, "world")
    senses = [f"{kind}.{k:03d}" for kind, number in NUM_SENSES.items() for k in range(number)]
    classes = {sense: draw.below(NUM_CLASSES) for sense in senses if sense.startswith("noun")}
    genders = {sense: draw.below(2) for sense in classes}
    rank_weight = {sense: 1.0 / (int(sense.split(".")[1]) + 2.7) for sense in senses}
    nouns: list[list[list[str]]] = []
    steps: list[list[list[float]]] = []
    for topic in range(NUM_TOPICS):
        nouns.append([])
        steps.append([])
        for group in range(NUM_CLASSES):
            members = [sense for sense in classes if classes[sense] == group]
            # A sixth of the nouns are at home in a topic and eight times as frequent there.
            weights = [rank_weight[s] * (8.0 if (int(s[-3:]) + topic) % 6 == 0 else 1.0) for s in members]
            nouns[topic].append(members)
            steps[topic].append(_cumulative(weights))
    preferences = {}
    for sense in senses:
        if sense.startswith("verb"):
            subject, target = draw.below(NUM_CLASSES), draw.below(NUM_CLASSES)
            preferences[sense] = (subject, -1 if draw.below(4) == 0 else target)
    others = {}
    for kind in ("verb", "adjective", "adverb", "place"):
        members = [sense for sense in senses if sense.startswith(kind)]
        others[kind] = (members, _cumulative([rank_weight[sense] for sense in members]))
    return World(senses, classes, genders, nouns, steps, preferences, others)


@dataclass(frozen=True)
class Thing:
    """A noun with what is said about it."""

    noun: str
    plural: bool
    adjective: str | None


@dataclass(frozen=True)
class Meaning:
    """What one sentence says, in no language."""

    subject: Thing
    verb: str
    object: Thing | None
    place: str | None
    adverb: str | None
    past: bool
    negated: bool

    def record(self) -> dict[str, Any]:
        """As JSON, without what is absent."""

        def thing(value: Thing) -> dict[str, Any]:
            adjective = {"adjective": value.adjective} if value.adjective else {}
            return {"noun": value.noun, "plural": value.plural} | adjective

        result: dict[str, Any] = {"subject": thing(self.subject), "verb": self.verb}
        if self.object:
            result["object"] = thing(self.object)
        for name in ("place", "adverb"):
            if value := getattr(self, name):
                result[name] = value
        return result | {"past": self.past, "negated": self.negated}


class Draws:
    """Uniform numbers fixed by (seed, names): blocks of PCG64 doubles, the part of numpy that does not change."""

    def __init__(self, seed: int, *names: str | int) -> None:
        key = [name if isinstance(name, int) else zlib.crc32(name.encode()) for name in names]
        self._generator = np.random.default_rng((seed, *key))
        self._block: list[float] = []

    def uniform(self) -> float:
        if not self._block:
            self._block = self._generator.random(256).tolist()
        return self._block.pop()

    def below(self, size: int) -> int:
        return int(self.uniform() * size)

    def block(self, rows: int, columns: int) -> list[list[float]]:
        return self._generator.random((rows, columns)).tolist()  # type: ignore[no-any-return]


def draw_meaning(world: World, topic: int, u: Sequence[float], subject: Thing | None = None) -> Meaning:
    """The meaning that the DRAWS uniforms `u` stand for; `subject` is kept where a sentence goes on about it."""
    verbs, verb_steps = world.others["verb"]
    verb = _pick(verbs, verb_steps, u[0])
    subject_class, object_class = world.preferences[verb]

    def thing(kind: int, u: Sequence[float]) -> Thing:
        noun = _pick(world.nouns[topic][kind], world.noun_steps[topic][kind], u[0])
        adjective = _pick(*world.others["adjective"], u[2]) if u[1] < 0.35 else None
        return Thing(noun, u[3] < 0.3, adjective)

    return Meaning(
        subject=subject or thing(subject_class, u[1:5]),
        verb=verb,
        object=thing(object_class, u[5:9]) if object_class >= 0 else None,
        place=_pick(*world.others["place"], u[10]) if u[9] < 0.3 else None,
        adverb=_pick(*world.others["adverb"], u[12]) if u[11] < 0.2 else None,
        past=u[13] < 0.5,
        negated=u[14] < 0.1,
    )


class Speaker:
    """One language: its words, its endings and how it puts a meaning into a sentence."""

    def __init__(self, code: str, world: World, seed: int) -> None:
        self.code, self.grammar, self._genders = code, GRAMMARS[code], world.genders
        grammar, draw = self.grammar, Draws(seed, "words", code)
        kin = Speaker(grammar.kin, world, seed) if grammar.kin else None
        self._grammar_words: dict[str, str] = {}
        for name in ("article", "not", "past", "in", "plural", "object"):
            word = self._new_word(draw, 1)
            while word in self._grammar_words.values():
                word = self._new_word(draw, 1)
            self._grammar_words[name] = word
        endings = (
            "plural",
            "gender0",
            "gender1",
            "object",
            "place",
            "past",
            "present",
            "past plural",
            "present plural",
        )
        shapes = [onset + vowel for onset in grammar.onsets for vowel in grammar.vowels]
        self._endings = {name: shapes.pop(draw.below(len(shapes))) for name in endings}
        self.words: dict[str, str] = {}
        self.cognates: list[str] = []
        used = dict.fromkeys(self._grammar_words.values(), "grammar")
        previous: dict[str, str] = {}
        for sense in world.senses:
            kind, rank = sense.split(".")[0], int(sense.split(".")[1])
            word = cognate = ""
            if kin and draw.uniform() < grammar.kin_share:
                word = cognate = kin.words[sense].translate(RESPELLING[code])
            elif draw.uniform() < 0.06 and kind in previous:
                word = previous[kind]  # one word, two senses of one part of speech
            while not word or (word in used and used[word] != kind):
                word = self._new_word(draw, 1 if rank < 6 else 2 if rank < 60 else 3)
            if word not in used:
                previous[kind] = word
            if word == cognate:
                self.cognates.append(sense)
            used[word] = kind
            self.words[sense] = word

    def _new_word(self, draw: Draws, syllables: int) -> str:
        g = self.grammar
        if not g.spaced:
            syllables = min(syllables, 2)
        word = "".join(
            g.onsets[draw.below(len(g.onsets))] + g.vowels[draw.below(len(g.vowels))] for _ in range(syllables)
        )
        return word + g.codas[draw.below(len(g.codas))]

    def lexicon(self) -> dict[str, Any]:
        """The language's entry in lexicon.json."""
        senses: dict[str, list[str]] = {}
        for sense, word in self.words.items():
            senses.setdefault(word, []).append(sense)
        return {
            "script": self.grammar.script,
            "order": self.grammar.order,
            "kin": self.grammar.kin,
            "cognates": self.cognates,
            "words": senses,
            "ambiguous": sorted(word for word, of in senses.items() if len(of) > 1),
            "grammar_words": self._grammar_words,
            "endings": self._endings if self.grammar.spaced else {},
        }

    def say(self, meaning: Meaning) -> str:
        """The sentence, with its stop and without a space at either end."""
        g, function = self.grammar, self._grammar_words
        plural = meaning.subject.plural
        verb = [self.words[meaning.verb]]
        if g.spaced:
            verb[0] += self._endings[("past" if meaning.past else "present") + (" plural" if plural else "")]
        elif meaning.past:
            verb.append(function["past"])
        if meaning.negated:
            verb.insert(0, function["not"])
        phrases = {
            "S": self._thing(meaning.subject, is_object=False),
            "V": verb,
            "O": self._thing(meaning.object, is_object=True) if meaning.object else [],
        }
        words = [word for position in g.order for word in phrases[position]]
        if meaning.place:
            place = self.words[meaning.place] + (self._endings["place"] if g.case and g.spaced else "")
            words += [function["in"], place] if g.preposition else [place, function["in"]]
        if meaning.adverb:
            words.insert(0, self.words[meaning.adverb])
        return (" " if g.spaced else "").join(words) + g.stop

    def _thing(self, thing: Thing, *, is_object: bool) -> list[str]:
        g, function, ending = self.grammar, self._grammar_words, self._endings
        noun = self.words[thing.noun]
        if g.spaced:
            noun += (ending["plural"] if thing.plural else "") + (ending["object"] if is_object and g.case else "")
        phrase = [noun]
        if not g.spaced and thing.plural:
            phrase.append(function["plural"])
        if thing.adjective:
            adjective = self.words[thing.adjective]
            if g.agreement:
                adjective += ending[f"gender{self._genders[thing.noun]}"] + (ending["plural"] if thing.plural else "")
            phrase.insert(0 if g.adjective_first else len(phrase), adjective)
        if g.article:
            phrase.insert(0, function["article"])
        if not g.spaced and is_object:
            phrase.insert(0, function["object"])
        return phrase


def _documents(speaker: Speaker, world: World, seed: int, split: str, num_bytes: int) -> Iterator[Document]:
    """Documents until their text has `num_bytes`."""
    number = 0
    while num_bytes > 0:
        draw = Draws(seed, "document", speaker.code, split, number)
        topic, num_sentences = draw.below(NUM_TOPICS), 6 + draw.below(18)
        space = " " if speaker.grammar.spaced else ""
        text, before = "", None
        for k, u in enumerate(draw.block(num_sentences, DRAWS)):
            # One sentence in four goes on about the subject of the one before it; one in six ends a paragraph.
            meaning = draw_meaning(world, topic, u, before.subject if before and u[15] < 0.25 else None)
            text += speaker.say(meaning)
            if k + 1 < num_sentences:
                text += "\n" if u[16] < 1 / 6 else space
            before = meaning
        yield Document(text, speaker.code, f"{speaker.code}-{split}-{number:06d}")
        num_bytes -= len(text.encode("utf-8"))
        number += 1


def _parallel(a: Speaker, b: Speaker, world: World, seed: int, split: str, pairs: int) -> Iterator[dict[str, Any]]:
    """The same meanings for every pair of languages, so that pair files are parallel to each other too."""
    for number in range(pairs):
        draw = Draws(seed, "parallel", split, number)
        meaning = draw_meaning(world, draw.below(NUM_TOPICS), draw.block(1, DRAWS)[0])
        yield {
            "id": f"{split}-{number:06d}",
            "translation": {a.code: a.say(meaning), b.code: b.say(meaning)},
            "meaning": meaning.record(),
        }


def _cumulative(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [value / total for value in accumulate(weights)]


def _pick(members: Sequence[str], steps: Sequence[float], uniform: float) -> str:
    return members[min(bisect_right(steps, uniform), len(members) - 1)]
