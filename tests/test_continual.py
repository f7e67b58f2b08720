"""One text after another: what follows from a matrix of scores, what is read and scored, the script end to end."""
import json
from statistics import mean

import pytest
import torch
from test_scripts import inside

from cli import UsageError
from languages import specimen_text
from learners import LEARNERS, ON_FEATURES, WINDOW, FineTuned, make, steps_for
from metrics import claim, mean_and_error, metrics
from protocols import domain, language, texts
from test_cms import tiny
from test_machine import saved
from tokenizer import get_tokenizer


def test_metrics_of_known_matrices():
    #           base  A   B
    perfect = [[-2.0, 0, 0], [-2.0, 4, 0], [-2.0, 4, 6]]
    assert metrics(perfect, [4, 6], 1) == {'gained': [4, 6], 'kept': [1, 1], 'lost': 0}
    forgets = [[-2.0, 0, 0], [-2.5, 4, 1], [-3.0, 1, 6]]
    assert metrics(forgets, [4, 8], 1) == {'gained': [4, 6], 'kept': [0.25, 0.75], 'lost': 1}
    assert metrics([[1, 1], [3, 1], [2, 5]], [3, 5], 0) == {'gained': [2, 4], 'kept': [0.5, 1], 'lost': 0}
    assert metrics([[1, 1], [1, 1], [1, 1]], [1, 1], 0)['kept'] == [0, 0], 'nothing was gained, nothing is kept'
    assert metrics([[0, 1, 1], [1, 3, 3], [1, 3, 3]], [0, 0], 1, at_once=True) == {
        'gained': [2, 2], 'kept': [1, 1], 'lost': -1}


def test_claims_hold_fail_or_cannot_be_told():
    for numbers, holds in (([1.0, 1.1, 0.9], True), ([-1.0, -1.1, -0.9], False), ([1.0, -1.0], None), ([5.0], None),
                           ([0.0, 0.0, 0.0], None)):
        assert claim('x', numbers, 0)['holds'] is holds, numbers
    mean, error = mean_and_error([1.0, 2.0, 3.0])
    assert mean == 2 and abs(error - (1 / 3) ** 0.5) < 1e-12


def test_nothing_that_is_scored_is_read():
    enc = get_tokenizer('bytes')
    for data in ('pip:torch:.cmake', 'pip:torch:.h'):
        text = domain(data, enc, 1, 50_000)
        (scored, counts, n_bytes), = text.scored
        read, asked = (bytes(x.tolist()) for x in (text.tokens, scored))
        assert len(read) == 50_000 and n_bytes == len(asked) <= len(read) // 5 and counts.all()
        pieces = [asked[i:i + 100] for i in range(0, len(asked) - 100, 100)]
        assert sum(piece in read for piece in pieces) < 0.1 * len(pieces), 'but for what all files begin with'
        assert not torch.equal(domain(data, enc, 2, 50_000).tokens, text.tokens), 'another seed, other documents'
    enc = get_tokenizer('bpe:512', texts=specimen_text(20))
    text = language('A', enc, 1, 600)
    lines = enc.decode(text.tokens.tolist()).splitlines()
    asked = [enc.decode(tokens.tolist()).strip() for tokens, _, _ in text.scored]
    assert len(lines) == 600 and len(asked) == 100
    assert not {line.strip() for line in lines} & {*asked}


def test_texts_that_take_turns():
    enc = get_tokenizer('bytes')
    a, b = (domain(name, enc, 1, 50_000) for name in ('pip:torch:.h', 'pip:torch:.yaml'))
    mixed = domain('pip:torch:.h+pip:torch:.yaml', enc, 1, 50_000)
    assert torch.equal(mixed.tokens[:1000], torch.cat([a.tokens[:500], b.tokens[:500]])) and len(mixed.scored) == 2


class Text:
    name, tokens, night = 'x', torch.arange(3 * WINDOW + 1) % 17, False


def test_what_learners_keep():
    """Replay keeps its share and no more, EWC holds weights where they mattered, and each is a reader to score with."""
    checkpoint = saved(tiny(chunks='', mixer='deltanet').float())
    base = type('Base', (), {'name': 'base', 'tokens': torch.arange(40 * WINDOW + 1) % 13})
    moved = {}
    for name, strength in (('finetune', 0), ('ewc', 1e6), ('replay-5', 0), ('replay-1', 0)):
        learner = FineTuned(name, checkpoint, 1e-2, base, strength)
        before = [p.detach().clone() for p in learner.model.parameters()]
        kept = len(learner.kept)
        assert kept == {'replay-5': 40, 'replay-1': 8}.get(name, 0)
        learner.learn(Text)
        assert len(learner.kept) == kept + name.startswith('replay'), 'one window at least'
        moved[name] = sum((p - q).square().sum().item() for p, q in zip(learner.model.parameters(), before)) ** 0.5
        weights = 4 * sum(p.numel() for p in before)
        assert learner.bytes() == 2 * sum(map(len, learner.kept)) + weights * (1 + 2 * (name == 'ewc'))
    assert moved['ewc'] < 0.85 * moved['finetune'], moved
    for name in LEARNERS:
        steps = steps_for(name, {'finetune': 1e-3, 'ewc': 1.0, 'clock': 1.0})
        learner = make(name, checkpoint, steps, base)
        before = learner.to_score()[0](Text.tokens[None, :50])[0].log_softmax(-1)
        learner.learn(Text)
        reader, state = learner.to_score()
        after = reader(Text.tokens[None, :50], None, state)[0].log_softmax(-1)
        assert (name == 'nothing') == torch.equal(before, after), name
        assert after.isfinite().all()


@pytest.mark.parametrize('options', [dict(protocol='intents', n_bytes=2000, n_requests=3, n_tasks=2, n_intents=15),
                                     dict(protocol='facts', n_facts=[2], n_readings=2, n_other=3000)])
def test_texts_of_the_other_protocols(options):
    """The same seed gives the same texts; what is scored is not read, in what is scored and in what chooses steps."""
    enc = get_tokenizer('bytes')
    o = type('Options', (), options)
    (base, tasks, (other, *_)), (_, again, _), (_, another, _) = (texts(o, enc, seed) for seed in (1, 1, 2))
    assert len(base.tokens) > 1000 and not base.scored
    for text, same, different in zip(tasks, again, another):
        if o.protocol == 'facts':
            passage, same, different = text.passages[0], same.passages[0], different.passages[0]
            said = enc.decode(passage.tokens.tolist())
            assert said.count('<|endoftext|>') == 2 and len(text.passages) == 8 and len(passage.scored) == 2
            for tokens, counts, _ in passage.scored:
                question, answer = (enc.decode(tokens[counts == which].tolist()) for which in (0, 1))
                attribute, name = question.split(':')[1].split('?')[0].strip().split(' of ')
                assert said.count(f'The {attribute} of {name} is{answer}.') + \
                    said.count(f'As {attribute}, {name} has{answer}.') == 2 and question not in said
            text = passage
        else:
            read = {prompt for prompt, _ in text.pairs}
            assert len(text.names) == 15 and len(text.pairs) == 45 == len(text.scored)
            assert not read & {prompt for prompt, _ in text.scored}
            assert {name for _, name in text.pairs} == {*text.names}
            assert enc.decode(text.tokens.tolist()).count(' => ') == 45
        assert torch.equal(text.tokens, same.tokens) and not torch.equal(text.tokens, different.tokens)
    if o.protocol == 'intents':
        assert not torch.equal(other.tokens, tasks[0].tokens)
        assert tasks[-1].none and not {*tasks[0].names} & {*tasks[1].names}
        scored = {prompt for text in tasks for prompt, _ in text.scored}
        asked = {prompt for prompt, _ in other.scored}
        assert not (scored | asked) & {prompt for prompt, _ in other.pairs} and not asked & scored


def test_answers_of_least_squares_do_not_depend_on_the_order():
    """As a learner of intents, in three orders and beside ridge regression on all requests; means separate classes."""
    checkpoint = saved(tiny(chunks='', mixer='deltanet').float())
    rng = torch.Generator().manual_seed(0)
    def requests(n): return [tuple(row) for row in torch.randint(17, (n, 9), generator=rng).tolist()]
    def part(i):
        pairs = [((7,) * 9 + prompt, (i, 1)) if j % 2 else (prompt, (i,)) for j, prompt in enumerate(requests(30))]
        return type('Text', (), {'names': [(i,), (i, 1)], 'pairs': pairs})
    parts = [part(i) for i in range(3)]
    names = [name for part in parts for name in part.names]
    said = {}
    for name in ON_FEATURES:
        for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
            learner = make(name, checkpoint, steps_for(name, {}), None)
            for i in order:
                learner.learn(parts[i])
            said[name, order] = [learner.choose(parts[i].pairs[i][0], names)[1] for i in range(3)]
    for name in ON_FEATURES:
        first, *rest = (x for (key, _), x in said.items() if key == name)
        for other in rest:
            assert torch.allclose(torch.tensor(first), torch.tensor(other), atol=1e-3), name
    assert torch.allclose(*(torch.tensor(said[name, (0, 1, 2)]) for name in ('least-squares', 'ridge')), atol=1e-3)
    means = make('means', checkpoint, {}, None)
    for part in parts:
        means.learn(part)
    right = [means.choose(prompt, part.names)[0] == name for part in parts for prompt, name in part.pairs]
    assert sum(right) > 0.9 * len(right), 'one name of two is of requests that begin alike'


def test_quick_end_to_end(tmp_path, capsys):
    """It prints and writes what it says, and what was done is not done again."""
    args = ['--quick', f'--out_dir={tmp_path}', '--n_bytes=2000', '--learners=nothing,finetune,hope-1']
    inside('eval_continual.py', *args)
    out = capsys.readouterr().out
    assert 'python train.py --seed=1' in out and 'hope-1: R, bits per byte' in out
    found = json.loads((tmp_path / 'domains.json').read_text())
    assert list(found['learners']) == ['nothing', 'finetune', 'hope-1'] and len(found['about']['steps']['clock']) == 2
    for name, learner in found['learners'].items():
        run, = learner['seeds']
        assert len(run['R']) == 4 and all(len(row) == 4 for row in run['R'])
        assert {'gained', 'lost', 'kept', 'state_bytes', 'passes', 'seconds'} <= {*run}
    assert found['learners']['nothing']['gained'] == [0, None] and found['learners']['hope-1']['gained'][0] > 0
    assert all(line['holds'] in (True, False, None) for line in found['verdict'])
    inside('eval_continual.py', *args)
    again = capsys.readouterr().out
    assert 'train.py' not in again and again.splitlines()[-30:-1] == out.splitlines()[-30:-1]


@pytest.mark.parametrize('protocol, learners, scored, more', [
    ('languages', 'nothing,icl', 2, []), ('intents', 'means,least-squares,ridge', 2, []),
    ('facts', 'nothing,finetune,joint', 1, ['--facts=2', '--n_other=260']),
    ('days', 'nothing,sleep-1', 3, ['--facts=2', '--n_other=260'])])
def test_quick_of_the_other_protocols(tmp_path, capsys, protocol, learners, scored, more):
    inside('eval_continual.py', '--quick', f'--protocol={protocol}', f'--learners={learners}', f'--out_dir={tmp_path}',
           *more)
    out = capsys.readouterr().out
    found = json.loads((tmp_path / f'{protocol}.json').read_text())
    assert list(found['learners']) == learners.split(',') and len(found['about']['scored']) == scored
    for name, learner in found['learners'].items():
        run, = learner['seeds']
        assert f'{name}: R, % of ' in out and len(run['R']) == 3 and len(run['R'][-1]) == scored
        if protocol == 'days':
            assert [[x is None for x in row] for row in run['R']] == [[False] * 3, [False, False, True], [False] * 3]
        assert learner['final'][0] == mean(x['right'] for x in run['R'][-1] if 'right' in x)
    if protocol == 'intents':
        assert 'requests of none' in out and found['learners']['ridge']['gained'][0] >= 50
        assert found['learners']['ridge']['final'] == found['learners']['least-squares']['final']
        assert [line['claim'][:27] for line in found['verdict']] == ['the memory of least squares']


@pytest.mark.parametrize('args, said', [
    (['--protocol=fact'], 'protocol is one of domains, languages'), (['--learners=hope-9'], 'learners'),
    (['--seeds=0'], 'seeds must be at least 1'),
    (['--learners=means'], 'learners'), (['--protocol=facts', '--facts=0'], '--facts'),
    (['--protocol=intents', '--n_tasks=11'], 'n_tasks must be at most 10'),
    (['--protocol=levels', '--learners=clock'], 'no --learners'), (['--json=/tmp'], 'is a folder')])
def test_refuses(args, said):
    with pytest.raises(UsageError, match=said):
        inside('eval_continual.py', *args)
