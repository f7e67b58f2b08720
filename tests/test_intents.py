"""The likeliest name against a full enumeration, where requests come from, and what they are cut into."""
import json

import pytest
import torch

import intents
from cli import UserError
from cms import Learner, learn
from intents import (PLAIN, Requests, classes, content_words, invented, likeliest, load_intents, name_of, prompt_of,
                     ranked_above)
from test_cms import ids, tiny
from tokenizer import get_tokenizer


def test_the_likeliest_name_is_that_of_a_full_enumeration():
    """Of a model that has learned and is read out by evidence, from its state, for names that share beginnings."""
    model = tiny(cms_topology='copies', chunks='4,change', mixer='deltanet', cms_share=0.01).eval()
    with torch.no_grad():
        state = learn(model, ids(1, 21))[1]
    reader = Learner(model, moves=False)
    rng = torch.Generator().manual_seed(0)
    for trial in range(5):
        rows = torch.randint(4, (40, 4), generator=rng).tolist()
        names = sorted({(*row[:1 + i % 4], 16) for i, row in enumerate(rows)})          # 16 ends a name
        prompt = tuple(torch.randint(16, (5,), generator=rng).tolist())

        def log_p(name):
            with torch.no_grad():
                said = reader(torch.tensor([[*prompt, *name]]), None, state)[0][0].log_softmax(-1)
            return sum(said[len(prompt) - 1 + i, token].item() for i, token in enumerate(name))
        found, nats = likeliest(reader, prompt, names, state)
        scores = {name: log_p(name) for name in names}
        assert found == max(scores, key=scores.get) and abs(nats - scores[found]) < 1e-4, trial
    assert len({len(name) for name in names}) > 2


def test_without_a_network_intents_are_invented_and_it_says_so(monkeypatch, capsys):
    def offline(url, path, sha256):
        raise UserError(f'could not download {url}')
    monkeypatch.setattr(intents, 'download', offline)
    source, found, none = load_intents()
    said = capsys.readouterr().out
    assert source == 'invented' and 'could not download' in said and 'invented' in said
    assert len(found) == 150 and all(len(its['read']) == 60 and len(its['scored']) == 20 for its in found.values())
    assert all(not {*its['read']} & {*its['scored']} for its in found.values())
    requests = {request for its in found.values() for request in its['read'] + its['scored']}
    assert not requests & {*none} and len(none) == 30


def test_a_downloaded_file_is_held_to_its_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(intents, 'DOWNLOADS', str(tmp_path))
    (tmp_path / 'clinc150.json').write_text(json.dumps({'train': [['hello', 'greeting']]}))
    source, _, _ = load_intents()                       # it is not the file: refused, and left where it is
    assert source == 'invented' and (tmp_path / 'clinc150.json').exists()


def test_what_clinc_is_read_as(tmp_path, monkeypatch):
    data = {'train': [['wake me at six', 'alarm_set'], ['bye', 'goodbye']], 'test': [['set an alarm', 'alarm_set']],
            'oos_test': [['who is the king', 'oos']]}
    (tmp_path / 'x.json').write_text(json.dumps(data))
    monkeypatch.setattr(intents, 'download', lambda *args: str(tmp_path / 'x.json'))
    assert load_intents() == ('clinc150', {'alarm set': {'read': ['wake me at six'], 'scored': ['set an alarm']},
                                           'goodbye': {'read': ['bye'], 'scored': []}}, ['who is the king'])


def test_classes_are_dealt_out():
    found = invented()
    orders = [classes(found, seed) for seed in range(5)]
    for parts in orders:
        assert [len(part) for part in parts] == [15] * 10 and {*sum(parts, [])} == {*found}
    assert len({str(parts) for parts in orders}) == 5 and classes(found, 0) == orders[0]


@pytest.mark.parametrize('name', ['bytes'])
def test_a_line_is_what_its_parts_are(name):
    enc = get_tokenizer(name)
    prompt, said = prompt_of(enc, 'hello there'), name_of(enc, 'greeting')
    assert enc.decode([*prompt, *said]) == '\n hello there => greeting\n'


def test_ranked_above():
    assert ranked_above([3, 4], [1, 2]) == 1 and ranked_above([1], [2]) == 0 and ranked_above([1, 2], [1]) == 0.75


@pytest.mark.parametrize('n', [120, 1000])
def test_rows_are_named_by_the_lines_before(n):
    """A program that looks for the line before that shares a word knows every name that is marked."""
    enc, words = get_tokenizer('bytes'), content_words()
    assert len({*words}) == 3000 and not {*words} & {*PLAIN}
    task, asked = Requests(enc, words), 0
    for seed in range(5):
        ids, marks = task.row(n, seed)
        marked = enc.decode([i for i, mark in zip(ids, marks) if mark])
        known, right = [], ''
        for line in enc.decode(ids).replace('<|endoftext|>', '').strip().split('\n')[:-1]:     # the last may be cut
            request, name = line.split(' => ')
            alike = [other for before, other in known if {*before} & {*request.split()} - {*PLAIN}]
            right += f' {alike[-1]}' if name in {other for _, other in known} else ''
            known.append((tuple(request.split()), name))
        assert len(ids) == len(marks) == n and marked.startswith(right)
        asked += len(right)
    assert asked
    idx, targets = task.held_out(2, n, torch.Generator().manual_seed(0))
    assert not torch.equal(idx, task.batch(2, n, torch.Generator().manual_seed(0))[0]) and (targets >= 0).any()
