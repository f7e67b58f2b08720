"""Sleep: dreams of a level's own, levels that become one, what stays as it was (sleep.py)."""
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near
from test_cms import ids
from test_evidence import copies
from test_scripts import TINY, inside

import evidence
from cli import UsageError
from cms import Learner, cleared, learn, weights_of
from machine import load_memory
from sleep import Sleeper, answers, asleep, begin, divergence, dream, dreamers, level_of

NIGHT = dict(n_dreams=128, length=20, steps=40, rate=3e-3)


@pytest.fixture
def day(monkeypatch):
    """A model of small windows, and its state after two texts that its levels know by heart: one of 3, one of 4 ids."""
    monkeypatch.setattr(evidence, 'WINDOW', 2)
    monkeypatch.setattr(evidence, 'LEAST', 0.0)
    model = copies('4,change,night', mixer='gated_deltanet', cms_step=2.0).requires_grad_(False)
    text = torch.cat([ids(1, 60) % 3, 9 + ids(1, 60) % 4], dim=1)
    return model, text, learn(model, text)[1]


def own_answers(model, state, level, idx):
    """A level of a state at a text, by the reader of one row: the model with the level's weights in the place of its own."""
    weights = {name: p[None] + state['delta'][name][:, level] for name, (_, p) in weights_of(model).items()}
    recurrent = model.init_state(1)
    for block, kept in zip(recurrent[1:], state['kept']):
        block |= {name: x[level:level + 1] for name, x in kept.items()}
    return model(idx, state=recurrent, fast=weights)[0].log_softmax(-1)


@torch.no_grad()
def test_a_level_by_itself(day):
    model, text, state = day
    state = cleared(model, state)
    assert any(x[1].any() for block in state['kept'] for x in block.values()), 'a slow level keeps a recurrent memory'
    for level in range(3):
        known = level_of(model, state, level)
        assert_near(f'level {level}', answers(model, known, text), own_answers(model, state, level, text), 1e-12)
    assert_near('the start', answers(model, level_of(model, state, 3), text), model(text)[0].log_softmax(-1), 1e-12)


@torch.no_grad()
def test_dreams_are_the_levels_own(day):
    """As often as the level says: the frequency of the first token against its probability."""
    model, _, state = day
    known, generator = level_of(model, cleared(model, state), 0), torch.Generator().manual_seed(0)
    texts = dream(model, known, 5, 4000, 2, generator)
    assert texts.shape == (4000, 3) and (texts[:, 0] == 5).all()
    share = F.one_hot(texts[:, 1], 17).double().mean(0)
    want = model(torch.tensor([[5]]), state=begin(model, known[1], 1), fast=known[0])[0][0, 0].softmax(-1)
    assert (share - want).abs().max() < 4 * (0.25 / 4000) ** 0.5
    again = dream(model, known, 5, 4000, 2, torch.Generator().manual_seed(0))
    assert torch.equal(texts, again), 'the same seed, the same dreams'


def test_divergence_is_kl(day):
    model, text, state = day
    a, b = (level_of(model, cleared(model, state), level) for level in (0, 3))
    log_p, log_q = answers(model, a, text), answers(model, b, text)
    assert_near('KL', divergence(model, a, b, text), F.kl_div(log_q, log_p, log_target=True, reduction='sum') / 120, 1e-12)
    assert divergence(model, a, a, text).abs() < 1e-12


def test_one_night(day):
    """All that levels held is one level's, the others are at the start, and the start answers as before, bit for bit."""
    model, text, state = day
    before = {name: x.clone() for name, x in model.state_dict().items()}
    shares = dreamers(state)
    assert sum(shares.values()) == pytest.approx(1) and 0 in shares and 1 in shares
    new, found = asleep(model, state, 5, **NIGHT)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert [row['level'] for row in found] == list(shares)
    for row in found:                                   # it answers as they did, on dreams that it has not learned from
        assert max(row['left'], row['mean']) < 0.6 * row['start'], row
    left, mean = (sum(row['share'] * row[name] for row in found) for name in ('left', 'mean'))
    assert left < 0.97 * mean, 'learning from dreams is more than taking the mean'
    moved = torch.stack([x.abs().sum((0, 2, 3)) for x in new['delta'].values()]).sum(0)
    assert moved[:2].eq(0).all() and moved[2] > 0
    assert new['learned'] == 120 and not new['pending'].numel() and not new['book']['saved'].any()
    assert_near('what was saved', new['book']['slept'], state['book']['saved'].sum(1), 1e-6)
    assert {*new} == {*state} - {'trace'}, 'a state that a reader can go on from'
    learn(model, text, new)
    again, _ = asleep(model, state, 5, **NIGHT)
    assert all(torch.equal(x, again['delta'][name]) for name, x in new['delta'].items()), 'the same seed, the same night'


def test_nothing_to_dream_of():
    model = copies('4,change,night')
    state = learn(model.requires_grad_(False), ids(1, 3))[1]
    assert asleep(model, state, 5) == (state, [])
    state = learn(model, ids(1, 9))[1]                  # and one night after another, with hardly a day between
    for levels in ([0], [2], [2]):
        state, found = asleep(model, state, 5, n_dreams=16, length=4, steps=1)
        assert [row['level'] for row in found] == levels


def test_what_sleep_made_stays_by_day(day):
    """The level of the night is read and never moves, whatever is read; a second night begins with it."""
    model, text, state = day
    new, _ = asleep(model, state, 5, **NIGHT)
    later = learn(model, torch.cat([text, ids(1, 80, seed=3)], dim=1), new)[1]
    for name, x in new['delta'].items():
        assert torch.equal(x[:, 2], later['delta'][name][:, 2])
    assert all(torch.equal(x[2], y[name][2]) for a, y in zip(new['kept'], later['kept']) for name, x in a.items())
    assert 2 in dreamers(later)
    assert asleep(model, later, 5, **NIGHT)[0]['book']['slept'] >= new['book']['slept']


@torch.no_grad()
def test_a_sleeper_reads_the_same_in_any_split(monkeypatch):
    monkeypatch.setattr('sleep.asleep', lambda model, state, *args, **kwargs: asleep(model, state, 5, 8, 6, 2))
    reader = Sleeper(Learner(copies('4,change,night').requires_grad_(False)), 20, first=5)
    idx, nights = ids(1, 50), []
    monkeypatch.setattr(reader, 'note', nights.append)
    logits, loss, state = reader(idx, idx)
    parts, other = [], None
    for part in idx.split([1, 19, 3, 17, 10], dim=1):
        y, _, other = reader(part, None, other)
        parts.append(y)
    assert_near('logits', torch.cat(parts, dim=1), logits, 1e-9)
    assert state['learned'] == other['learned'] == 48
    assert state['book']['slept'].shape == (1,) and state['delta']['0.0.up'][:, 2].any()
    for chunks, every, said in (('4,change', 20, 'a level that it makes'), ('4,change,night', 18, 'a multiple')):
        with pytest.raises(UsageError, match=said):
            Sleeper(Learner(copies(chunks)), every, first=5)


def test_end_to_end(text, tmp_path, capsys):
    """A day of sample.py, a night, another day that goes on from it; then nights while reading."""
    out_dir, memory = tmp_path / 'out', tmp_path / 'me.pt'
    inside('train.py', f'--data={text}', f'--out_dir={out_dir}', *TINY)
    text = tmp_path / 'day.txt'
    text.write_bytes(b'the sea, the ship, the sea and the ship. ' * 8)
    learned = ['--learn', f'--memory={memory}', f'--out_dir={out_dir}', f'--score={text}', '--cms_step=1']
    night = [f'--memory={memory}', f'--out_dir={out_dir}', '--dreams=16', '--length=8', '--steps=2']
    inside('sample.py', *learned)
    inside('sleep.py', *night)
    said = capsys.readouterr().out
    assert 'level_3:' in said and 'made in sleep' in said and '% is left of it' in said
    kept = torch.load(memory, weights_only=False)
    assert kept['cms_chunks'] == '128,change,change,night' and kept['state']['delta']['0.0.up'][:, 3].any()
    inside('sample.py', *learned)
    inside('sleep.py', *night)
    assert load_memory(memory, kept['owner'])['state']['learned'] > kept['state']['learned']
    inside('sample.py', '--learn', f'--out_dir={out_dir}', f'--score={text}', '--cms_step=1', '--sleep_every=256')
