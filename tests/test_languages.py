import pytest
import torch

import tasks
from languages import (ADJECTIVES, NOUNS, PAST, VERBS, Language, Languages, chrf, specimen_text, written)
from tokenizer import get_tokenizer


def translate(language, sentence):
    """What a program that knows the language makes of a sentence: from its words, order and affixes alone."""
    ours, phrases = {stem: word for word, stem in language.words.items()}, []
    for word in sentence.split():
        parts = word.split('-')
        stem = parts[-1 if language.prefix else 0]
        phrases.append((ours[stem], len(parts) > 1))
    verb = next(i for i, (word, _) in enumerate(phrases) if word in VERBS)
    groups = phrases[:verb], phrases[verb:verb + 1], phrases[verb + 1:]

    def noun_phrase(words):
        adjective = [word for word, _ in words if word in ADJECTIVES]
        return adjective + [word + 's' * plural for word, plural in words if word in NOUNS]
    if 'V' != language.order[1]:                        # both nouns stand together, with their adjectives
        rest = groups[0] + groups[2]
        nouns = [i for i, (word, _) in enumerate(rest) if word in NOUNS]
        cut = nouns[0] + 1 if language.adjective_first else nouns[1]
        groups = rest[:cut], groups[1], rest[cut:]
    first, second = noun_phrase(groups[0]), noun_phrase(groups[2])
    word, past = groups[1][0]
    ours = [PAST.get(word, word + 'ed')] if past else ['will', word]
    subject_first = language.order.index('S') < language.order.index('O')
    return ' '.join((first if subject_first else second) + ours + (second if subject_first else first))


def test_a_language_can_be_translated():
    """Lines mean what their words, order and affixes say: a program that knows these gets all of them right."""
    for seed in range(30):
        language = Language(seed)
        assert len(set(language.words.values())) == 36
        for sentence, meaning in language.lines(50, seed):
            assert translate(language, sentence) == meaning, (seed, sentence)


def test_languages_differ_and_lines_do_not_repeat():
    a, b = Language(0), Language(1)
    assert sum(a.words[word] == b.words[word] for word in a.words) < 3
    learned = a.lines(300, 0)
    asked = a.lines(100, 1, but=learned)
    assert len(dict(learned)) == 300 and not {*learned} & {*asked}
    assert learned == Language(0).lines(300, 0) != a.lines(300, 2)


@pytest.fixture(scope='module')
def enc():
    return get_tokenizer('bpe:512', texts=specimen_text())


def test_rows(enc):
    """A row is one language, what weighs is the meaning, and training never sees what is held out."""
    task = Languages(enc)
    idx, targets, weights = task.batch(3, 200, torch.Generator().manual_seed(0))
    assert idx.shape == targets.shape == weights.shape == (3, 200) and abs(weights.mean().item() - 1) < 1e-5
    assert torch.equal(idx[:, 1:], targets[:, :-1]) and (idx[:, 0] == enc.eot_token).all()
    for row, weight in zip(targets, weights):
        said = enc.decode([t for t, w in zip(row.tolist(), weight) if w > 1])
        lines = said.split('\n')
        assert all(word.removesuffix('s') in NOUNS + ADJECTIVES + VERBS + ['will'] or word.endswith(('ed', 'led'))
                   for line in lines[:-1] for word in line.split()), said
        rest = enc.decode([t for t, w in zip(row.tolist(), weight) if w < 1])
        assert not {*rest.replace('>', '').split()} & {*NOUNS, *VERBS}
    few = [len({*task.row(400, seed, 0.0)[0]}) for seed in range(5)]
    many = [len({*task.row(400, seed, 1.0)[0]}) for seed in range(5)]
    assert sum(few) < sum(many), 'lessons have fewer words'
    a, b = (task.held_out(2, 100, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(a[0], b[0]) and not torch.equal(a[0], task.batch(2, 100, torch.Generator().manual_seed(0))[0])
    assert ((a[1] < 0) | (a[1] < enc.n_vocab)).all() and (a[1] < 0).any()


def test_task_is_found_by_name():
    task, _, enc, info = tasks.load('languages', 'auto', quiet=True)
    assert enc.name == 'bpe:512' and info['name'] == 'languages' and not task.is_text
    line = written('bako tidu', 'red dogs')
    assert line == ' bako tidu > red dogs\n' and line.startswith(written('bako tidu'))


def test_chrf():
    assert chrf('red dogs', 'red dogs') == 1 and chrf('', 'red dogs') == 0 and chrf('xyz', 'red dogs') == 0
    # 'ab' for 'abc': precision 1 of 1-grams and 2-grams, recall 2/3 and 1/2
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    assert abs(chrf('ab', 'abc', n=2) - 5 * precision * recall / (4 * precision + recall)) < 1e-12
    assert chrf('red dogs pulled star', 'red dogs pulled stars') > chrf('red dog', 'red dogs pulled stars') > 0
    assert chrf('a b', 'ab') == 1                       # without blanks
