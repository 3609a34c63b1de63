"""Terms of words, of scripts without spaces and of numbers; and a growing text against the whole one."""

from __future__ import annotations

import random

import pytest

from xlmega.experts.segmentation import SEGMENTATIONS, GrowingText, terms

MIXED = (
    "Hello WORLD a b2 3d 1999\n世界和平。カタカナ漢字ーとかな ภาษาไทย हिन्दी में नमस्ते, "
    "ΟΔΟΣ ΌΣ'Α Straße ein\u0301e x" + "中文" * 60 + " ok 한국어 문장 ١٢٣ \ufffd zum\u3000Ende"
)


def test_words_of_spaced_scripts() -> None:
    assert sorted(terms("The cat, the CAT; a 3d 1999 x_y", "words")) == [
        "#NUMBER", "#NUMBER", "cat", "cat", "the", "the", "x_y",
    ]  # fmt: skip


def test_scripts_without_spaces_give_pairs_and_marks_stay_in_words() -> None:
    assert terms("世界和平 world", "words") == ["世界和平", "world"]
    assert sorted(terms("世界和平 world 世", "scripts")) == ["world", "世界", "和平", "界和"]
    assert terms("हिन्दी", "scripts") == ["हिन्दी"]
    assert "हिन्दी" not in terms("हिन्दी", "words")
    assert sorted(terms("ab 世界", "characters")) == [" ab", "ab ", "世界"]


@pytest.mark.parametrize("segmentation", SEGMENTATIONS)
def test_a_growing_text_has_the_terms_of_the_whole(segmentation: str) -> None:
    generator = random.Random(0)
    for _ in range(20):
        growing, settled, end = GrowingText(segmentation), [], 0
        while end < len(MIXED):
            step = generator.choice((1, 1, 2, 5, 30))
            settled += growing.add(MIXED[end : end + step])
            end += step
            assert sorted(settled + growing.open_terms()) == sorted(terms(MIXED[:end], segmentation))
