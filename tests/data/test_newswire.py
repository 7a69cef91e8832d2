"""The generated corpus: repeatable, balanced, as long as AG News, as hard as it says, and with the bound it claims."""

import os
import re
from collections import Counter
from itertools import combinations
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from agnews_lora.data.newswire import (
    ACTORS,
    BEST_ACCURACY,
    DETAILS,
    LABELS,
    LEAD_PROBABILITY,
    LINKS,
    MIXED_SHARE,
    REMARKS,
    SCENES,
    THINGS,
    WORDS,
    Story,
    generate,
    stories,
)

NUM_STORIES = 20_000
SIGMAS = 4  # a fixed seed: this is how far off a sound corpus may be drawn


@pytest.fixture(scope="module")
def many() -> list[Story]:
    return stories(NUM_STORIES, "train", seed=7)


def within_chance(hits: int, trials: int, probability: float) -> bool:
    return abs(hits / trials - probability) <= SIGMAS * sqrt(probability * (1 - probability) / trials)


@pytest.mark.parametrize(
    ("num_rows", "split", "seed", "digest"),
    [
        (3_000, "train", 0, "4fc5d20fd5823dcd9de45acbef974a3d78bbe9a6402ba8dbd858aeef5c18ea7a"),
        (3_000, "test", 0, "b6517e0516ce9b06fd2c1301d08fc4a08b1c5a9e593abefa52a3b6ef8838a86b"),
        (12_000, "train", 13, "b0dd6b149de7aee276e5c52ac564aa2e33031495bfa316370d969fd88da6ea7a"),
    ],
)
def test_rows_are_pinned(num_rows: int, split: str, seed: int, digest: str) -> None:
    # Where a digest moves, every earlier result on this corpus is a result on another corpus.
    assert generate(num_rows, split, seed).digest() == digest


def test_longer_corpus_begins_with_the_shorter_one() -> None:
    longer, shorter = generate(103, "test", seed=1), generate(50, "test", seed=1)
    assert longer.texts[:50] == shorter.texts
    assert longer.labels[:50] == shorter.labels


def test_no_text_occurs_twice_or_in_both_splits(many: list[Story]) -> None:
    train, test = [story.text for story in many], generate(4_000, "test", seed=7).texts
    assert len(set(train)) == len(train)
    assert set(train).isdisjoint(test)


@pytest.mark.parametrize("num_rows", [0, 3, 1_281])
def test_labels_are_balanced_at_any_size(num_rows: int) -> None:
    counts = Counter(generate(num_rows, "train", seed=2).labels)
    assert counts.total() == num_rows
    assert max(counts[label] for label in range(4)) - min(counts[label] for label in range(4)) <= 1


def test_text_is_clean_prose(many: list[Story]) -> None:
    for story in many[:4_000]:
        assert not set(story.text) & set("{}<>|\\\n"), story.text
        assert "  " not in story.text and ".." not in story.text and " the the " not in story.text, story.text
        assert story.text[0].isupper() or story.text[0].isdigit(), story.text
        assert story.text.endswith((".", '"')), story.text


def test_lengths_are_those_of_ag_news(many: list[Story]) -> None:
    beside_the_repository = Path(__file__).parents[3] / "shared" / "roberta_tokenizer"
    folder = Path(os.environ.get("ROBERTA_TOKENIZER_DIR", beside_the_repository))
    if not (folder / "merges.txt").is_file():
        pytest.skip(f"no RoBERTa tokenizer in {folder}; ROBERTA_TOKENIZER_DIR names another folder")
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    lengths = np.array([len(tokenizer.encode(story.text).ids) + 2 for story in many[:4_000]])
    assert 48 <= lengths.mean() <= 56
    assert 0.01 <= (lengths > 80).mean() <= 0.08
    assert lengths.min() >= 12
    assert lengths.max() <= 140


def test_reading_the_structure_reaches_the_bound_and_no_more(many: list[Story]) -> None:
    assert within_chance(sum(story.lead == story.label for story in many), NUM_STORIES, BEST_ACCURACY)


def test_label_of_a_mixed_story_follows_each_pair_in_the_stated_proportion(many: list[Story]) -> None:
    mixed = [story for story in many if story.mixed]
    assert within_chance(len(mixed), NUM_STORIES, MIXED_SHARE)
    pairs = Counter((story.lead, story.other) for story in mixed)
    assert len(pairs) == len(LABELS) * (len(LABELS) - 1)
    led = Counter((story.lead, story.other) for story in mixed if story.label == story.lead)
    for pair, count in pairs.items():
        assert within_chance(count, NUM_STORIES, MIXED_SHARE / 12)
        assert within_chance(led[pair], count, LEAD_PROBABILITY)
    assert all(story.label in (story.lead, story.other) for story in mixed)


def test_words_of_a_mixed_story_do_not_betray_its_label(many: list[Story]) -> None:
    mixed = [story for story in many if story.mixed]
    led = np.array([story.label == story.lead for story in mixed])
    features = TfidfVectorizer(ngram_range=(1, 2)).fit_transform([story.text for story in mixed])
    half = len(mixed) // 2
    model = LogisticRegression(C=10.0, max_iter=1_000).fit(features[:half], led[:half])
    hits = int((model.predict(features[half:]) == led[half:]).sum())
    best = LEAD_PROBABILITY + SIGMAS * sqrt(LEAD_PROBABILITY * (1 - LEAD_PROBABILITY) / (len(mixed) - half))
    assert hits / (len(mixed) - half) <= best


def test_semicolon_marks_the_mixed_stories_and_no_other(many: list[Story]) -> None:
    for story in many:
        assert (";" in story.text) == story.mixed, story.text
        assert story.mixed or story.label == story.lead


def test_no_two_topics_share_a_template() -> None:
    for by_topic in (SCENES, LINKS, ACTORS, THINGS, DETAILS, REMARKS):
        assert len(by_topic) == len(LABELS)
        for topic, templates in enumerate(by_topic):
            for later in by_topic[topic + 1 :]:
                assert not set(templates) & set(later)


def test_words_that_alone_tell_the_topic_belong_to_one_topic() -> None:
    slots = [
        set(re.findall(r"\{([a-z_]+)\d?\}", " ".join(ACTORS[topic] + THINGS[topic]))) for topic in range(len(LABELS))
    ]
    entries = []
    for topic, own in enumerate(slots):
        elsewhere = set().union(*(others for other, others in enumerate(slots) if other != topic))
        entries.append({entry for slot in own - elsewhere for entry in WORDS[slot]})
    for left, right in combinations(entries, 2):
        assert not left & right


def test_vocabulary_is_wide_and_2000_rows_do_not_show_all_of_it() -> None:
    assert sum(len(set(entries)) for entries in WORDS.values()) >= 2_000
    seen = {word for text in generate(2_000, "train", seed=1).texts for word in text.lower().split()}
    unseen = [set(text.lower().split()) - seen for text in generate(1_000, "test", seed=1).texts]
    assert len(seen) >= 4_000
    assert np.mean([len(words) > 0 for words in unseen]) >= 0.25


def test_counting_words_stays_five_points_under_the_bound() -> None:
    train, test = generate(2_000, "train", 1), generate(4_000, "test", 1)
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    fitted, unseen = vectorizer.fit_transform(train.texts), vectorizer.transform(test.texts)
    models = [LogisticRegression(C=inverse_penalty, max_iter=1_000) for inverse_penalty in (1.0, 10.0)]
    best = max(float(model.fit(fitted, train.labels).score(unseen, test.labels)) for model in models)
    assert 0.75 <= best <= BEST_ACCURACY - 0.05
