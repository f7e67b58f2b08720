"""
Puzzles: each against a program that solves it, formal languages against all words that there are; chance, counted and
worked out; how rows are made.
"""
import itertools
import math
import random
import re

import pytest
import torch
from test_data import fails
from test_tasks import Program

import formal
import puzzles
import tasks
from formal import ALL_PUZZLES, FORMAL
from puzzles import Permutations, Puzzle, Recall


# -----------------------------------------------------------------------------
# what solves them: (text) -> the answer at each place, whatever is asked; None where it knows none


def remember(text, is_key, is_value):
    """Runs of key symbols, each followed by a run of value symbols: what followed the same key the last time."""
    said, value_of, key, value = [], {}, '', ''
    for symbol in text:
        if is_key(symbol):
            if value:
                value_of[key], key, value = value, '', ''
            key += symbol
        elif is_value(symbol):
            value += symbol
        known = value_of.get(key, '')
        said.append(known[len(value)] if len(value) < len(known) else None)
    return said


def copy(text):
    letters = [symbol for symbol in text if symbol not in '.|']
    return [letters[text[:t].count('|')] if symbol == '|' else None for t, symbol in enumerate(text)]


def look_up(text):
    return [text[t // 16 * 16 + int(symbol)] if symbol.isdigit() else None for t, symbol in enumerate(text)]


def learned(text):
    """By a table that is made from rows for training, and no others."""
    facts = {}
    for seed in range(40):
        idx, targets, _ = ALL_PUZZLES['memorisation']().batch(8, 64, torch.Generator().manual_seed(seed))
        for a, b, fact in zip(idx[:, ::2].flatten().tolist(), idx[:, 1::2].flatten().tolist(),
                              targets[:, 1::2].flatten().tolist()):
            assert facts.setdefault((a, b), fact) == fact
    symbols = ALL_PUZZLES['memorisation']().symbols
    return [symbols[facts[symbols.index(text[t - 1]), symbols.index(text[t])]] if t % 2 else None
            for t in range(len(text))]


def multiply(n):
    """By products of matrices."""
    def solve(text):
        matrices = {name: torch.eye(n)[:, order] for name, order in orders_of(n).items()}
        names = {matrix.int().numpy().tobytes(): name for name, matrix in matrices.items()}
        product, said = torch.eye(n), []
        for symbol in text:
            product = matrices[symbol] @ product                # the step that comes later stands in front
            said.append(names[product.int().numpy().tobytes()])
        return said
    return solve


def orders_of(n):
    return {name: list(order) for order, name in Permutations(n).name_of.items()}


def follow(text):
    """What came after the same letter the last time, in the same word."""
    after, said = {}, []
    for t, letter in enumerate(text):
        if t and text[t - 1] != '.' != letter:
            after[text[t - 1]] = letter
        said.append(after.get(letter))
    return said


def walk(text):
    """To a room, which is upper case, by the first place that each thing was said to be in."""
    inside, said = {}, []
    for t, thing in enumerate(text):
        while thing in inside:
            thing = inside[thing]
        said.append(thing if thing.isupper() else None)
        if t % 2 and text[t] != '.':
            inside.setdefault(text[t - 1], text[t])
    return said


def by_any_name(text):
    """What was told of a thing whose name stands there, or of the other name that was paired with it."""
    same, value_of, said = {}, {}, []
    for t, symbol in enumerate(text):
        said.append(value_of.get(symbol, value_of.get(same.get(symbol))))
        if t % 2 and symbol.islower():
            same[symbol] = text[t - 1]
        elif t % 2 and symbol.isupper():
            value_of[text[t - 1]] = symbol
    return said


def believe(text):
    """The value that one of those with a + gave the key."""
    honest, value_of, said = {*re.findall(r'(.)\+', text)}, {}, []
    for t, symbol in enumerate(text):
        said.append(value_of.get(symbol))
        if symbol.isupper() and text[t - 2] in honest:
            value_of[text[t - 1]] = symbol
    return said


def in_language(name, word):
    """Whether a word is in the language, by its definition."""
    if name == 'shuffle-2':
        for kind in ('()', '[]'):
            one = ''.join(symbol for symbol in word if symbol in kind)
            while kind in one:
                one = one.replace(kind, '')
            if one:
                return False
        return True
    if name in ('anbn', 'anbncn'):
        n = word.count('a')
        return n > 0 and word == ''.join(n * letter for letter in ('ab', 'abc')[name == 'anbncn'])
    return re.fullmatch({'parity': '(0*10*10*)*|0*', 'aa': '(aa)*', 'abab': '(abab)*'}[name], word) is not None


SOLVERS = {
    'in-context-recall': lambda text: remember(text, str.islower, str.isupper),
    'fuzzy-recall': lambda text: remember(text, str.islower, str.isupper),
    'noisy-recall': lambda text: remember(text, str.islower, str.isupper),
    'selective-copying': copy, 'compression': look_up, 'memorisation': learned, 's3': multiply(3), 's5': multiply(5),
    'shift': follow, 'hop-1': walk, 'hop-2': walk, 'hop-3': walk,
    'names': by_any_name, 'trust': believe,
}


@pytest.mark.parametrize('name', SOLVERS)
def test_a_program_solves_it(name):
    puzzle, asked = ALL_PUZZLES[name](), 0
    for T in (puzzle.shortest, 64, 97, 200):
        for seed in range(6):
            text, answers = puzzle.row(max(T, puzzle.shortest), random.Random(seed))
            said = SOLVERS[name](text)
            places = [t for t, answer in enumerate(answers) if answer != ' ']
            assert [said[t] for t in places] == [answers[t] for t in places], (T, seed, text, answers)
            asked += len(places)
    assert asked > 40


@pytest.mark.parametrize('name', FORMAL)
def test_sets_are_those_of_all_words(name):
    """What may follow each beginning of three symbols or less, from all words of up to 8 (12 of a^n b^n c^n)."""
    puzzle = ALL_PUZZLES[name]()
    if name == 'anbncn':
        words = [n * 'a' + n * 'b' + n * 'c' for n in range(1, 5)]
    else:
        strings = (''.join(s) for n in range(1, 9) for s in itertools.product(puzzle.alphabet, repeat=n))
        words = [word for word in strings if in_language(name, word)]
    follows = {}
    for word in words:
        for t in range(1, min(4, len(word) + 1)):
            follows.setdefault(word[:t], set()).add(word[t] if t < len(word) else '.')
    assert {start: {*puzzle.may_follow(start)} for start in follows} == follows
    if name != 'abab':                                      # where the word's end is one further on
        assert {puzzle.may_follow(start) for start in follows} == {*puzzle.sets}


@pytest.mark.parametrize('name', FORMAL)
def test_rows_of_a_formal_language(name):
    puzzle = ALL_PUZZLES[name]()
    for T in (puzzle.shortest, 8, 33, 64):
        text, answers = puzzle.row(T, random.Random(T))
        word = text.rstrip('.')
        assert len(text) == len(answers) == T and len(word) > T / 2 and answers[len(word):].strip() == ''
        for t in range(len(word)):
            assert set(puzzle.sets[ord(answers[t]) - ord('A')]) == set(puzzle.may_follow(word[:t + 1]))
            assert t + 1 == len(word) or word[t + 1] in puzzle.may_follow(word[:t + 1])
        if name in ('anbn', 'anbncn'):
            assert in_language(name, word)


# -----------------------------------------------------------------------------
# chance, reports


CHANCE = {'in-context-recall': 1 / 8, 'fuzzy-recall': 1 / 8, 'noisy-recall': 1 / 8, 'selective-copying': 1 / 16,
          'compression': 1 / 16, 'memorisation': 0.28, 'parity': 1 / 2, 'aa': 1 / 2, 'abab': 3 / 4, 's3': 1 / 6,
          's5': 1 / 120, 'shift': 1 / 7, 'hop-1': 1 / 8, 'hop-2': 1 / 8, 'hop-3': 1 / 8, 'names': 1 / 8,
          'trust': 1 / 8, 'anbn': 1 - 1 / 49, 'anbncn': 1 - 2 / 3 / 16.5}


@pytest.mark.parametrize('name', ALL_PUZZLES)
def test_chance(name):
    """As it is worked out; and what the most frequent answer to each symbol gets, counted in another way."""
    puzzle = ALL_PUZZLES[name]()
    chance = puzzle.chance(64, 128)
    if name in CHANCE:
        assert abs(chance - CHANCE[name]) < 0.03, (chance, CHANCE[name])
    counts, rows = {}, [puzzle.row(64, random.Random(seed)) for seed in range(300)]
    for text, answers in rows[:150]:
        for symbol, answer in zip(text, answers):
            counts.setdefault(symbol, []).append(answer)
    best = {symbol: max({*found} - {' '} or ' ', key=found.count) for symbol, found in counts.items()}
    pairs = [(best.get(symbol), answer) for text, answers in rows[150:] for symbol, answer in zip(text, answers)]
    right = [said == answer for said, answer in pairs if answer != ' ']
    assert abs(chance - sum(right) / len(right)) < 0.05


def test_chance_of_recall_is_a_guess_among_the_values_shown():
    task = Recall(8, torch.arange(26), torch.arange(26) + 26, 52)
    idx, targets, _ = task.batch(500, 64, torch.Generator().manual_seed(0))
    shown, asked = idx[:, 1:16:2], targets >= 0
    guess = shown.gather(1, torch.randint(8, (500, 64), generator=torch.Generator().manual_seed(1)))
    assert abs((guess == targets)[asked].float().mean().item() - task.chance(64)) < 0.05 and task.chance(64) == 1 / 8


@pytest.mark.parametrize('name', ALL_PUZZLES)
def test_a_report_of_who_knows_and_of_who_does_not(name):
    """Also in a vocabulary of bytes; a word counts as whole if all its sets are right."""
    task = tasks.load(name, quiet=True)[0]
    answers = dict(zip(map(tuple, task.batch(64, 64, torch.Generator().manual_seed(2 ** 40))[0].tolist()),
                       task.batch(64, 64, torch.Generator().manual_seed(2 ** 40))[1].clamp(min=0).tolist()))
    def knows(idx): return torch.tensor([answers[tuple(row)] for row in idx.tolist()])
    right = task.report(Program(knows), 64, 10)
    assert set(right.values()) == {1.0} and list(right) == [task.asked] + ['whole words'] * (name in FORMAL)
    assert set(task.report(Program(lambda idx: 0 * idx), 64, 10).values()) == {0.0}
    if name in FORMAL:
        def all_but_one(idx):
            said = knows(idx)
            said[::2, 20] = 0                                   # a place that every row asks about
            return said
        share = task.report(Program(all_but_one), 64, 64)
        assert share['whole words'] == 0.5 and 0.98 < share['sets'] < 1


# -----------------------------------------------------------------------------
# the interface, by name


@pytest.mark.parametrize('name', ALL_PUZZLES)
def test_rows_to_train_on_and_others(name):
    for task in (ALL_PUZZLES[name](), tasks.load(name, quiet=True)[0]):
        for T in (task.shortest, 70):
            one, two = (task.batch(6, T, torch.Generator().manual_seed(3)) for _ in range(2))
            assert all(map(torch.equal, one, two)), 'the same seed, the same rows'
            idx, targets, weights = one
            assert idx.shape == targets.shape == weights.shape == (6, T) and idx.is_contiguous()
            assert idx.dtype == targets.dtype == torch.int64 and idx.min() >= 0 and (targets >= 0).any()
            assert weights.mean().item() == pytest.approx(1, abs=1e-5) and torch.equal(weights > 0, targets >= 0)
        rows, held_out = (f(6, 70, torch.Generator().manual_seed(3))[0] for f in (task.batch, task.held_out))
        if name not in ('aa', 'abab'):                          # of which there is one row of a length
            assert not torch.equal(rows, held_out)
    assert task.batch(2, 70, torch.Generator())[0].max() < 256 and not task.is_text
    with pytest.raises(AssertionError, match=f'at least {task.shortest} tokens'):
        task.batch(1, task.shortest - 1, torch.Generator())


def test_symbols_are_distinct_and_one_byte_each():
    for name, make in ALL_PUZZLES.items():
        symbols = make().symbols
        assert len({*symbols}) == len(symbols) == len(symbols.encode('latin-1')) and ' ' not in symbols, name
        assert make().token_of.max() == len(symbols) - 1
    assert len(puzzles.NAMES) == math.factorial(5)


def test_names(capsys):
    task, _, enc, info = tasks.load('parity')
    idx, targets, _ = task.batch(1, 20, torch.Generator())
    assert {*enc.decode(idx[0].tolist())} == {*'01'} and {*enc.decode(targets[0].tolist())} == {*'AB'}
    assert info['name'] == 'parity' and info['sha256'] and 'data parity | 5 symbols' in capsys.readouterr().out
    fails('--tokenizer=bytes', tasks.load, 'shift', 'gpt2')
    fails('parity:3', tasks.load, 'parity:3')
    for module, names in ((puzzles, {*puzzles.PUZZLES, 'recall'}), (formal, {*FORMAL})):
        named = re.findall(r'^    ([a-z].*?)   ', module.__doc__, flags=re.M)
        assert {*' '.join(named).split()} >= names, module


def test_the_rows_that_are_shown(capsys):
    puzzles.show(ALL_PUZZLES)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1][:-1] for line in lines[::3]] == [*ALL_PUZZLES] and {*map(len, lines[1::3])} == {96}


def test_the_least_puzzle():
    """As the docstring says: symbols, asked and row are all that one needs."""
    class Twice(Puzzle):
        symbols, asked = 'ab', 'letters'
        def row(self, T, rng):
            text = ''.join(rng.choices('ab', k=T))
            return text, text
    assert Twice().report(Program(lambda idx: idx), 10, 4) == {'letters': 1.0} and Twice().chance(10) == 1
