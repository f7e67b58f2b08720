import pytest
import torch

import tasks
from languages import ADJECTIVES, NOUNS, VERBS, Language, Languages, chrf, specimen_text, written
from tokenizer import get_tokenizer


def gloss(language, word):
    """What a program that knows the language makes of a word, from its stem and its affix alone."""
    ours, parts = {stem: word for word, stem in language.words.items()}, word.split('-')
    stem = parts[-1 if language.prefix else 0]
    return ours[stem] + ('' if len(parts) == 1 else 's' if ours[stem] in NOUNS else 'ed')


def test_a_language_can_be_glossed():
    """Words mean what their stems and affixes say, in the order of the language."""
    for seed in range(30):
        language = Language(seed)
        assert len(set(language.words.values())) == 36 and len(set(language.affixes)) == 2
        for line in language.lines(50, seed):
            assert all(gloss(language, word) == meaning for word, meaning in line), (seed, line)
            stems = [{stem: word for word, stem in language.words.items()}[
                word.split('-')[-1 if language.prefix and '-' in word else 0]] for word, _ in line]
            kinds = ''.join('V' if word in VERBS else 'N' if word in NOUNS else 'A' for word in stems)
            bare = kinds.replace('A', '')
            assert bare == ''.join('V' if part == 'V' else 'N' for part in language.order), (seed, line)
            assert not kinds.startswith('A') or language.adjective_first


def test_languages_differ_and_lines_do_not_repeat():
    a, b = Language(0), Language(1)
    assert sum(a.words[word] == b.words[word] for word in a.words) < 3
    learned = a.lines(300, 0)
    asked = a.lines(100, 1, but=learned)
    assert len({*learned}) == 300 and not {*learned} & {*asked}
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
        said = enc.decode([t for t, w in zip(row.tolist(), weight) if w > 1]).split()[:-1]      # the last may be cut
        known = {*NOUNS, *VERBS, *ADJECTIVES, *(noun + 's' for noun in NOUNS), *(verb + 'ed' for verb in VERBS)}
        assert said and {*said} <= known
        rest = enc.decode([t for t, w in zip(row.tolist(), weight) if w < 1])
        assert not {*rest.replace(',', '').split()} & {*NOUNS, *VERBS}
    few, many = ([len({*task.row(n, seed)[0]}) / n for seed in range(5)] for n in (100, 800))
    assert sum(few) < 5 * 0.3 and sum(many) < 5 * 0.2, 'words come back'
    a, b = (task.held_out(2, 100, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(a[0], b[0]) and not torch.equal(a[0], task.batch(2, 100, torch.Generator().manual_seed(0))[0])
    assert ((a[1] < 0) | (a[1] < enc.n_vocab)).all() and (a[1] < 0).any()


def test_task_is_found_by_name():
    task, _, enc, info = tasks.load('languages', 'auto', quiet=True)
    assert enc.name == 'bpe:512' and info['name'] == 'languages' and not task.is_text
    parts = [*written((('bako', 'red'), ('tidu-lo', 'dogs')))]
    assert ''.join(text for text, _ in parts) == ' bako red, tidu-lo dogs.\n'
    assert [text for text, is_meaning in parts if is_meaning] == [' red', ' dogs']


def test_chrf():
    assert chrf('red dogs', 'red dogs') == 1 and chrf('', 'red dogs') == 0 and chrf('xyz', 'red dogs') == 0
    # 'ab' for 'abc': precision 1 of 1-grams and 2-grams, recall 2/3 and 1/2
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    assert abs(chrf('ab', 'abc', n=2) - 5 * precision * recall / (4 * precision + recall)) < 1e-12
    assert chrf('red dogs pulled star', 'red dogs pulled stars') > chrf('red dog', 'red dogs pulled stars') > 0
    assert chrf('a b', 'ab') == 1                       # without blanks
