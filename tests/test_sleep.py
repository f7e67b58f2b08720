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
from cms import Learner, between_texts, empty_state, fast_weights, learn
from machine import load_memory
from sleep import Sleeper, answers, asleep, begin, divergence, dream, dreamers, level_of

A_NIGHT = dict(n_dreams=128, length=20, steps=40, rate=3e-3)


@pytest.fixture
def day(monkeypatch):
    """A model of small windows, and its state after two texts that its levels know by heart: one of 3, one of 4 ids."""
    monkeypatch.setattr(evidence, 'WINDOW', 2)
    monkeypatch.setattr(evidence, 'LEAST', 0.0)
    model = copies('4,change,night', mixer='gated_deltanet', cms_step=2.0, share_qk=False).requires_grad_(False)
    for layer in (block.mixer for block in model.blocks):       # so that what MLPs learn is not in its memory as well:
        layer.alpha.bias -= 1.4                                 # it retains for a quarter of the tokens it begins with,
        layer.conv.normal_(std=0.3)[-1] += 1                    # and keys are the token's own
    text = torch.cat([ids(1, 60) % 3, 9 + ids(1, 60) % 4], dim=1)
    return model, text, learn(model, text)[1]


def own_answers(model, state, level, idx):
    """A level of a state at a text: the row of the reader of all levels that is its own."""
    fast = fast_weights(model, state['delta'], False)
    rows = model(idx.expand(4, -1), state=state['recurrent'], fast=fast)[0].log_softmax(-1)
    return rows[level:level + 1]


@torch.no_grad()
def test_a_level_by_itself(day):
    model, text, state = day
    state = between_texts(model, state)
    assert any(x[1].any() for block in state['kept'] for x in block.values()), 'a slow level keeps a recurrent memory'
    for level in range(3):
        known = level_of(model, state, level)
        assert_near(f'level {level}', answers(model, known, text), own_answers(model, state, level, text), 1e-12)
    assert_near('the start', answers(model, level_of(model, state, 3), text), model(text)[0].log_softmax(-1), 1e-12)


@torch.no_grad()
@pytest.mark.parametrize('mixer', ['hope', 'titans', 'ttt', 'mamba2', 'hope,attention', 'attention,hope'])
def test_what_is_kept_can_be_read_on_from_anywhere(mixer):
    """Whatever was left of a memory's chunk: between texts, too, any split of a text gives the same."""
    model = copies('4,change,night', mixer=mixer, memory_chunk=8 if mixer in ('hope', 'titans') else 64)
    model.requires_grad_(False)
    for p in model.parameters():
        p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype)
    state, text = between_texts(model, learn(model, ids(1, 19))[1]), ids(1, 12, seed=2)
    reader = Learner(model, moves=False)
    whole = reader(text, None, state)[0]
    first, _, then = reader(text[:, :5], None, state)
    assert_near('split', torch.cat([first, reader(text[:, 5:], None, then)[0]], dim=1), whole, 1e-9)
    asleep(model, state | {'delta': {name: x + 0.1 for name, x in state['delta'].items()}}, 5, 16, 4, 1)


@torch.no_grad()
def test_dreams_are_the_levels_own(day):
    """As often as the level says: the frequency of the first token against its probability."""
    model, _, state = day
    known, generator = level_of(model, between_texts(model, state), 0), torch.Generator().manual_seed(0)
    texts = dream(model, known, 5, 4000, 2, generator)
    assert texts.shape == (4000, 3) and (texts[:, 0] == 5).all()
    share = F.one_hot(texts[:, 1], 17).double().mean(0)
    want = model(torch.tensor([[5]]), state=begin(model, known[1], 1), fast=known[0])[0][0, 0].softmax(-1)
    assert (share - want).abs().max() < 4 * (0.25 / 4000) ** 0.5
    again = dream(model, known, 5, 4000, 2, torch.Generator().manual_seed(0))
    assert torch.equal(texts, again), 'the same seed, the same dreams'


def test_divergence_is_kl(day):
    model, text, state = day
    a, b = (level_of(model, between_texts(model, state), level) for level in (0, 3))
    log_p, log_q = answers(model, a, text), answers(model, b, text)
    want = F.kl_div(log_q, log_p, log_target=True, reduction='sum') / 120
    assert_near('KL', divergence(model, a, b, text), want, 1e-12)
    assert divergence(model, a, a, text).abs() < 1e-12


def test_one_night(day):
    """All that levels held is one level's, the fast one begins there, and what training learned is not touched."""
    model, text, state = day
    before = {name: x.clone() for name, x in model.state_dict().items()}
    saved = dreamers(between_texts(model, state))
    assert {0, 1} <= {*saved} and saved[0] >= saved[1] == state['book']['saved'][0, 1]
    new, found = asleep(model, state, 5, **A_NIGHT)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert [row['level'] for row in found] == list(saved) and sum(row['share'] for row in found) == pytest.approx(1)
    for row in found:                                   # it answers as they did, on dreams not learned from
        assert max(row['left'], row['mean']) < 0.6 * row['start'], row
    left, mean = (sum(row['share'] * row[name] for row in found) for name in ('left', 'mean'))
    assert left < 0.97 * mean, 'learning from dreams is more than taking the mean'
    for moved in new['delta'].values():
        assert moved[0, 2].any() and torch.equal(moved[0, 0], moved[0, 2]) and not moved[0, 1].any()
    assert new['learned'] == 120 and not new['pending'].numel() and not new['book']['saved'].any()
    for x in (x for block in new['kept'] for x in block.values()):
        assert torch.equal(x[0], x[2]) and not x[1].any() and not x[3].any()
    held_alike(new, between_texts(model, state), [*saved])
    assert new['book']['slept'].item() == pytest.approx(sum(saved.values()))
    assert {*new} == {*state} - {'trace'}, 'a state that a reader can go on from'
    learn(model, text, new)
    again, _ = asleep(model, state, 5, **A_NIGHT)
    assert all(torch.equal(x, again['delta'][name]) for name, x in new['delta'].items()), 'the same seed'


def held_alike(new, day, levels):
    """Of what the recurrent memories of these levels held the night has the mean, whatever each had saved."""
    for block, its in zip(new['kept'], day['kept']):
        for name, x in block.items():
            assert_near(name, x[2], its[name][levels].mean(0), 1e-5)


def test_nothing_to_dream_of():
    model = copies('4,change,night')
    state = empty_state(model.requires_grad_(False), 1)
    assert asleep(model, state, 5) == (state, [])
    state = learn(model, ids(1, 3))[1]                  # no weight has moved, but the recurrent memory has read
    state, found = asleep(model, state, 5, n_dreams=16, length=4, steps=1)
    assert [row['level'] for row in found] == [0]
    assert asleep(model, state, 5) == (state, []), 'one night after another, and no day between'
    day = between_texts(model, learn(model, ids(1, 9), state)[1])
    new, found = asleep(model, day, 5, n_dreams=16, length=4, steps=0)
    assert [row['level'] for row in found] == [0, 2], 'the level of the last night dreams too, to be remembered'
    held_alike(new, day, [0, 2])
    for name, x in new['delta'].items():                # but what MLPs learn by night begins where the day has come
        assert day['delta'][name][:, 0].any()
        assert_near(name, x[:, 2], day['delta'][name][:, 0], 1e-12)


def test_what_sleep_made_stays_by_day(day):
    """The level of the night is read and never moves, whatever is read; it dreams with the others in the next one."""
    model, text, state = day
    new, _ = asleep(model, state, 5, **A_NIGHT)
    later = learn(model, torch.cat([text, ids(1, 80, seed=3)], dim=1), new)[1]
    for name, x in new['delta'].items():
        assert torch.equal(x[:, 2], later['delta'][name][:, 2])
    assert all(torch.equal(x[2], y[name][2]) for a, y in zip(new['kept'], later['kept']) for name, x in a.items())
    assert 2 in dreamers(between_texts(model, later))
    for _ in range(3):                                  # nights with hardly a day between spoil nothing
        later, _ = asleep(model, learn(model, ids(1, 9, seed=3), later)[1], 5, **A_NIGHT)
    start, then, now = (answers(model, level_of(model, between_texts(model, x), level), text).gather(2, text[..., None])
                        .mean() for x, level in ((new, 3), (new, 2), (later, 2)))
    assert now - start > 0.7 * (then - start) > 0


@torch.no_grad()
def test_a_sleeper_reads_the_same_in_any_split(monkeypatch):
    nights = []

    def short(model, state, first, seed):
        nights.append(seed)
        return asleep(model, state, first, 8, 6, 2, seed=seed)
    monkeypatch.setattr('sleep.asleep', short)
    reader, idx = Sleeper(Learner(copies('4,change,night').requires_grad_(False)), 20, first=5, seed=7), ids(1, 50)
    logits, loss, state = reader(idx, idx)
    parts, other = [], None
    for part in idx.split([1, 19, 3, 17, 10], dim=1):
        y, _, other = reader(part, None, other)
        parts.append(y)
    assert_near('logits', torch.cat(parts, dim=1), logits, 1e-9)
    assert nights == [23, 43] * 2, 'after 20 and 40 tokens, four of them unlearned; each with dreams of its own'
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
