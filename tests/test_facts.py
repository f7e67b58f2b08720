"""Facts: what is told can be answered, rows are made of it, and values are drawn anew in an evaluation."""
import random
import re

import pytest
import torch

from data import weights_for
from facts import OF_A_NAME, VALUES, Facts, asked, draw, told
from tokenizer import get_tokenizer


def answers(passage):
    """What a program makes of a passage: {(name, attribute): value}."""
    found = {(name, attribute): value for attribute, name, value in
             re.findall(r'The (\w+) of (\w+) is (\w+)\.', passage)}
    return found | {(name, attribute): value for attribute, name, value in
                    re.findall(r'As (\w+), (\w+) has (\w+)\.', passage)}


@pytest.fixture(scope='module')
def task():
    enc = get_tokenizer('bytes')
    return Facts(enc, torch.tensor(enc.encode_ordinary('some other text. ' * 500)).numpy())


def test_facts():
    assert all(len({*values}) == 16 for values in VALUES.values()), 'a guess is right one time in sixteen'
    for n in (1, 20, 200):
        facts = draw(n, random.Random(n))
        assert len({fact[:2] for fact in facts}) == n and len({fact[0] for fact in facts}) <= -(-n // OF_A_NAME)
        assert facts == draw(n, random.Random(n)) != draw(n, random.Random(n + 1))
        passage = ''.join(told(fact, random.Random(0)) for fact in facts)
        assert answers(passage) == {fact[:2]: fact[2] for fact in facts}, 'each is told, once'
        assert {asked(fact)[1] for fact in facts} == {f' {fact[2]}' for fact in facts}


@pytest.mark.parametrize('n', [128, 400, 2000])
def test_a_row_can_be_answered(task, n):
    for seed in range(5):
        ids, marks = task.row(n, seed)
        text = task.enc.decode(ids)
        questions = [(*found.groups(), found.start()) for found in
                     re.finditer(r'Question: (\w+) of (\w+)\? (\w+)(?=\W)', text)]
        assert len(ids) == len(marks) == n and questions
        assert all(answers(text[:place])[name, attribute] == value for attribute, name, value, place in questions)
        assert len({(attribute, name) for attribute, name, _, _ in questions}) > 0.9 * len(questions), 'asked once'
        marked = task.enc.decode([i for i, mark in zip(ids, marks) if mark])
        assert marked.startswith(''.join(f' {value}' for _, _, value, _ in questions))


def test_batches(task):
    idx, targets, weights = task.batch(4, 300, torch.Generator().manual_seed(0))
    assert torch.equal(idx[:, 1:], targets[:, :-1]) and abs(weights.mean().item() - 1) < 1e-6
    held_out, wanted = task.held_out(4, 300, torch.Generator().manual_seed(0))
    names = [{name for name, _ in answers(task.enc.decode(row.tolist()))} for row in (idx[0], held_out[0])]
    assert names[0] and names[1] and not names[0] & names[1], 'an evaluation has names of its own, but for chance'
    said = task.enc.decode(wanted[wanted >= 0].tolist())
    assert {*re.findall(r'\w+', said)} <= {value[:n] for values in VALUES.values() for value in values for n in
                                          range(1, 10)}, 'of what is held out answers alone are asked for'


def test_weights_for():
    marks = torch.tensor([[True, False, False, False], [False, False, False, True]])
    weights = weights_for(marks, 0.75)
    assert weights.mean().item() == 1 and abs((weights * marks).sum().item() / 8 - 0.75) < 1e-6
    assert torch.equal(weights_for(marks & False, 0.75), torch.ones(2, 4))
    marks = torch.tensor([[4.0, 0, 0, 0], [0, 1, 0, 3]])
    weights = weights_for(marks, 0.75)
    assert torch.allclose(weights[marks > 0], 6 * marks[marks > 0] / 8)
    assert torch.allclose(weights[marks == 0], torch.tensor(2 / 5))
