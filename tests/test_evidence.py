"""Levels that keep: the mixture's weights, who keeps what, the reader made of them (evidence.py, cms.py)."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near
from test_cms import assert_causal, ids, in_parts, tiny
from test_scripts import inside

import cms
import evidence
from cli import UsageError, UserError
from cms import Learner, learn, weights_of
from evidence import empty_book, judge, weigh
from machine import load_memory, save_checkpoint
from model import state_bytes


def copies(chunks='4,8', **kwargs):
    return tiny(chunks, **dict(mixer='hope', memory_chunk=2, cms_topology='copies', cms_share=0.01) | kwargs).eval()


# -----------------------------------------------------------------------------
# the weights


def test_weights_are_bayes_with_a_fixed_share():
    """Against the definition, a token at a time, in float64."""
    log_p, log_w, s = torch.randn(2, 3, 20, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64), 0.05
    log_w = log_w.log_softmax(1)
    got, w = weigh(log_w, log_p, s), log_w.exp()
    for t in range(20):
        w = w * log_p[:, :, t].exp()
        w = (1 - s) * w / w.sum(1, keepdim=True) + s / 3
        assert_near(f'weights after {t}', got[:, :, t].exp(), w, 1e-12)
    exact = (log_w + log_p.sum(2)).log_softmax(1)
    assert_near('no share: Bayes', weigh(log_w, log_p, 0.0)[..., -1], exact, 1e-9)


@pytest.mark.parametrize('R, changes, share', [(2, 0, 0.001), (4, 3, 0.001), (5, 9, 0.02)])
def test_the_regret_bound(R, changes, share):
    """On random losses no sequence of levels with so many changes is better than the mixture by more than the bound."""
    T = 400
    log_p = 3 * torch.randn(1, R, T, generator=torch.Generator().manual_seed(R), dtype=torch.float64) - 3
    before = torch.zeros(1, R, dtype=torch.float64).log_softmax(1)
    log_w = torch.cat([before[..., None], weigh(before, log_p, share)[..., :-1]], dim=2)
    mixture = -(log_w + log_p).logsumexp(1).sum().item()
    best = torch.full((changes + 1, R), math.inf, dtype=torch.float64)      # the least loss by changes so far, level
    best[0] = -log_p[0, :, 0]
    for t in range(1, T):
        jump = torch.cat([torch.full((1, 1), math.inf, dtype=torch.float64), best.amin(1, keepdim=True)[:-1]])
        best = torch.minimum(best, jump) - log_p[0, :, t]
    bound = math.log(R) - changes * math.log(share / R) - (T - 1 - changes) * math.log(1 - share + share / R)
    assert mixture <= best[changes].min().item() + bound


# -----------------------------------------------------------------------------
# who keeps what


def told(book, *rows, window=evidence.WINDOW):
    """What judge says after a window of chunks with these losses, one row per stream: fast, slow ones, start."""
    for _ in range(window):
        source, book = judge(book, torch.tensor(rows), 100)
    return None if source is None else source.tolist(), book


def test_nobody_moves_within_a_window():
    book = empty_book(1, 2)
    for _ in range(evidence.WINDOW - 1):
        source, book = judge(book, torch.tensor([[1.0, 3.0, 3.0, 3.0]]), 100)
        assert source is None
    assert judge(book, torch.tensor([[1.0, 3.0, 3.0, 3.0]]), 100)[0].tolist() == [[0, 0, 2, 3]]
    assert told(empty_book(1, 0), [1.0, 3.0])[0] is None, 'without slow levels there is nothing to say'


def test_a_text_is_kept_recognised_and_gone_back_to():
    source, book = told(empty_book(1, 2), [1.0, 3.0, 3.0, 3.0])         # a text that the fast level has learned
    assert source == [[0, 0, 2, 3]], 'is kept in the first level that has saved nothing'
    source, book = told(book, [0.8, 1.0, 3.0, 3.0])
    assert source == [[0, 0, 2, 3]], 'the level that recognises it follows'
    source, book = told(book, [1.0, 2.9, 3.0, 3.0])                     # another text, unknown to the slow one
    assert source == [[0, 1, 0, 3]], 'is kept apart'
    source, book = told(book, [2.0, 1.0, 2.9, 3.0])                     # the first again: the fast level has lost it
    assert source == [[1, 1, 2, 3]], 'the fast level becomes the one that recognises it'
    source, book = told(book, [3.2, 3.3, 3.2, 2.0])                     # what training knows best
    assert source == [[3, 1, 2, 3]], 'nothing is kept, and the fast level begins anew'
    assert told(empty_book(1, 2), [1.8, 2.0, 2.0, 2.0])[0] == [[0, 1, 2, 3]], 'nor what nobody would recognise'
    hurt = told(empty_book(1, 2), [math.nan, 3.0, 3.0, 3.0])[1]
    assert told(hurt, [1.0, 3.0, 3.0, 3.0])[0] == [[0, 0, 2, 3]], 'one window that is no number is forgotten'
    source, book = told(book, [0.1, 3.0, 3.0, 9.0])
    assert source[0][1:3] in ([0, 2], [1, 0]) and book['saved'].min() >= 0


def test_what_saved_least_gives_way():
    _, book = told(empty_book(1, 2), [1.0, 3.0, 3.0, 3.0])              # saves 2 nats a token
    _, book = told(book, [2.0, 3.0, 3.0, 3.0])                          # 1
    source, book = told(book, [1.9, 3.0, 3.0, 3.0])                     # a third text, which saves a little more
    assert source == [[0, 1, 2, 3]], 'saves less than twice what the second did, yet'
    source, book = told(book, [2.0, 3.0, 3.0, 3.0])
    assert source == [[0, 1, 0, 3]], 'and now more'
    before = book['saved'].clone()
    _, book = told(book, [1.0, 1.0, 2.9, 3.0])                          # the first again: what is known saves, too
    assert_near('of 1,600 tokens', book['saved'] - before, torch.tensor([[0.0, 3200.0, 0.0]]), 1e-6)


def test_nobody_moves_where_the_text_changes():
    """A window that begins in a text that is known and ends in another is neither."""
    _, book = told(empty_book(1, 2), [1.0, 3.0, 3.0, 3.0])
    known, strange, before = [1.0, 1.1, 3.0, 3.0], [2.0, 3.0, 3.0, 3.0], book
    for first, then, n in ((known, strange, 13), (known, strange, 9), (strange, known, 12)):
        for chunk in range(evidence.WINDOW):
            source, book = judge(book, torch.tensor([first if chunk < n else then]), 100)
        assert source.tolist() == [[0, 1, 2, 3]] and torch.equal(book['saved'], before['saved']), (first, n)
        book = before


def test_streams_are_judged_apart():
    a, b = [1.0, 3.0, 3.0, 3.0], [3.2, 3.0, 3.0, 2.5]
    source, book = told(empty_book(2, 2), a, b)
    for i, row in enumerate((a, b)):
        alone, own = told(empty_book(1, 2), row)
        assert source[i] == alone[0] and torch.equal(book['saved'][i], own['saved'][0])


# -----------------------------------------------------------------------------
# the reader


@torch.no_grad()
def test_one_level_without_share_is_the_plain_learner_bit_for_bit():
    plain, one = (tiny('4', cms_topology=topology, cms_share=share, mixer='hope', memory_chunk=2).float().eval()
                  for topology, share in (('sequential', 0.001), ('copies', 0.0)))
    idx = ids(2, 31)
    (want, state), (got, other) = learn(plain, idx), learn(one, idx)
    assert torch.equal(got, want)
    assert state['delta'].keys() == other['delta'].keys()
    assert all(torch.equal(state['delta'][name], x) for name, x in other['delta'].items())


@torch.no_grad()
def test_probabilities_sum_to_one():
    for chunks in ('4', '4,8', '4,change'):
        logits, _ = in_parts(copies(chunks), ids(2, 30), 7)
        assert_near(chunks, logits.exp().sum(-1), torch.ones(2, 30, dtype=torch.float64), 1e-10)


@torch.no_grad()
def test_copies_equal_the_loop():
    """The fastest level is the plain learner; one with a clock is what that was; the start is the model; then Bayes."""
    model, idx, s = copies('4,8', cms_share=0.03), ids(1, 31), 0.03
    got, state = learn(model, idx)
    plain = tiny('4', mixer='hope', memory_chunk=2).eval()
    fast, static = learn(plain, idx)[0], model(idx)[0]
    slow, recurrent, weights = [], None, {name: p.detach()[None] for name, (_, p) in weights_of(plain).items()}
    for t in range(0, 31, 8):                           # from tick to tick: the weights and the state of the fast level
        if t:
            at = learn(plain, idx[:, :t + 1])[1]        # it moves as the token after the chunk is read
            weights = {name: p + at['delta'][name] for name, (_, p) in weights_of(plain).items()}
            recurrent = at['anchor']
        y, _, _ = model(idx[:, t:t + 8], state=recurrent, fast=weights)
        slow.append(y)
    rows = torch.stack([fast, torch.cat(slow, dim=1), static], dim=1).log_softmax(-1)           # (1, R, T, V)
    w = torch.full((3,), 1 / 3, dtype=torch.float64)
    for t in range(31):
        if t:                                           # what each said of this token; at a tick one becomes another
            mine = [0, 0, 2] if t % 8 == 0 else [0, 1, 2]
            w = w[mine] * rows[0, mine, t - 1, idx[0, t]].exp()
            w = w / w.sum()
        w = (1 - s) * w + s / 3
        assert_near(f'token {t}', got[0, t].exp(), (w[:, None] * rows[0, :, t].exp()).sum(0), 1e-7)
    assert_near('weights', state['log_w'][0].exp(), w, 1e-8)


@torch.no_grad()
def test_copies_that_keep_equal_the_loop(monkeypatch):
    """The same where evidence says who becomes whom: a slow level what the fast one is, the fast one what it was."""
    said_then = {2: [0, 0, 2], 5: [1, 1, 2]}            # after the second chunk, and after the fifth
    chunks_judged = []

    def judge(book, nats, tokens):
        chunks_judged.append(nats)
        source = said_then.get(len(chunks_judged))
        return source and torch.tensor([source]), book
    monkeypatch.setattr(cms, 'judge', judge)
    model, idx, s = copies('4,change', mixer='gated_deltanet', cms_step=1.0), ids(1, 29), 0.01
    (got, state), weights = learn(model, idx), weights_of(model)
    delta = [{name: torch.zeros_like(p) for name, (_, p) in weights.items()} for _ in range(3)]
    recurrent, said, w = [None] * 3, None, torch.full((3,), 1 / 3, dtype=torch.float64)
    kept = [model.init_state(1)] * 3                    # nothing
    for chunk, part in enumerate(idx.split(4, dim=1), 1):
        own = [{name: (p.detach() + delta[r][name])[None].requires_grad_() for name, (_, p) in weights.items()}
               for r in range(3)]
        with torch.enable_grad():
            logits, _, recurrent = zip(*(model(part, state=recurrent[r], fast=own[r]) for r in range(3)))
        for t in range(part.shape[1]):
            w = w if said is None else w * said[:, part[0, t]].exp()
            w = (1 - s) * w / w.sum() + s / 3
            said = torch.stack([x[0, t].detach().log_softmax(-1) for x in logits])
            want = (w[:, None] * said.exp()).sum(0)
            assert_near(f'chunk {chunk}, token {t}', got[0, 4 * chunk - 4 + t].exp(), want, 1e-9)
        if 4 * chunk < 29:
            source = said_then.get(chunk, [0, 1, 2])
            learner = source[0]                         # it learns from this chunk as who it is from now on
            with torch.enable_grad():
                loss = F.cross_entropy(logits[learner][0], idx[0, 4 * chunk - 3:4 * chunk + 1])
                grads = torch.autograd.grad(loss, [*own[learner].values()])
            scale = 1 / max(1.0, sum(g.square().sum() for g in grads).sqrt().item())
            recurrent = [[*map(cms.detached, state)] for state in recurrent]
            if chunk in said_then:                      # the fastest goes on, the others start from what they keep
                kept = [([recurrent[0]] + kept[1:])[r] for r in source]
                recurrent = [recurrent[source[0]], *kept[1:]]
            delta = [dict(delta[r]) for r in source]
            said, w = said[source], w[source] / w[source].sum()
            for name, g in zip(weights, grads):
                delta[0][name] = delta[0][name] - scale * g[0]
    assert len(chunks_judged) == 7
    rested = cms.between_texts(model, state)['recurrent']               # what is left when the text before is gone
    for r, its in enumerate([recurrent[0], *kept[1:]]):
        for block, (left, want) in enumerate(zip(rested, its)):
            assert_near(f'level {r} keeps of block {block}', left['S'][r], want['S'][0], 1e-9)
    assert all(left['S'][1].any() and not left['S'][2].any() for left in rested)


@pytest.mark.parametrize('chunks', ['4', '4,change,change', '4,8,16'])
def test_any_split_and_any_batch(chunks, monkeypatch):
    monkeypatch.setattr(evidence, 'WINDOW', 2)
    monkeypatch.setattr(evidence, 'LEAST', 0.0)
    model, idx = copies(chunks, cms_step=1.0), torch.cat([ids(3, 24) % 3, 9 + ids(3, 24) % 4], dim=1)
    logits, state = in_parts(model, idx, 48)
    if 'change' in chunks:
        kept = state['delta']['1.0.up'][:, 1:].abs().sum((2, 3))
        assert (kept > 0).any(), 'a slow level has moved'
    for sizes in ([3, 1, 4, 8, 14, 18], 1):
        parts, other = in_parts(model, idx, sizes)
        assert_near('logits', parts, logits, 1e-9)
        for name, moved in state['delta'].items():
            assert_near(name, other['delta'][name], moved, 1e-8)
    for b in range(3):
        alone, _ = in_parts(model, idx[b:b + 1], 48)
        assert_near('one stream alone', alone, logits[b:b + 1], 1e-9)


def test_no_level_sees_what_it_predicts(monkeypatch):
    monkeypatch.setattr(evidence, 'WINDOW', 2)
    assert_causal(copies('4,change'), 22)


@torch.no_grad()
def test_reading_without_learning():
    """moves=False: the levels stay, the evidence goes on; in one piece, or in two."""
    model, idx = copies('4,change'), ids(1, 40)
    state = learn(model, idx[:, :20])[1]
    reader = Learner(model, moves=False)
    logits, loss, after = reader(idx[:, 20:], idx[:, 20:], state)
    assert all(torch.equal(x, after['delta'][name]) for name, x in state['delta'].items())
    assert not torch.equal(state['log_w'], after['log_w'])
    assert_near('loss', loss, F.cross_entropy(logits[0], idx[0, 20:]), 1e-12)
    first = reader(idx[:, 20:27], None, state)
    assert_near('in two', torch.cat([first[0], reader(idx[:, 27:], None, first[2])[0]], dim=1), logits, 1e-10)


@torch.no_grad()
def test_the_state_does_not_grow_and_training_is_refused():
    model = copies('4,change')
    sizes = [state_bytes(in_parts(model, ids(1, n), n)[1]) for n in (20, 200)]
    assert sizes[0] == sizes[1]
    with torch.enable_grad(), pytest.raises(AssertionError, match='copies are for reading'):
        learn(model.train(), ids(1, 20))


def test_kept_text_stays_readable(monkeypatch):
    """Two sources in turn: after the second, the first is read as well as before it, by levels that keep alone."""
    monkeypatch.setattr(evidence, 'WINDOW', 4)
    torch.manual_seed(1)
    a, b = (torch.randint(17, (1, 4)).repeat(1, 200) for _ in range(2))     # four tokens, over and over
    lost = {}
    with torch.no_grad():
        for chunks, share in (('4', 0.0), ('4,change,change', 0.01)):
            model = copies(chunks, cms_share=share, mixer='gated_deltanet', cms_step=1.0)
            state, reader = learn(model, a)[1], Learner(model, moves=False)
            before = reader(a[:, :400], a[:, 1:401], state)[1]
            state = learn(model, b, state)[1]
            lost[chunks] = (reader(a[:, :400], a[:, 1:401], state)[1] - before).item()
    assert lost['4,change,change'] < 0.3 * lost['4'], lost


@pytest.mark.parametrize('args, said', [
    (['--cms_topology=copies', '--cms_chunks=16'], 'is for reading'),
    (['--cms_chunks=16,change'], 'change and night are for'),
    (['--cms_chunks=change,16'], 'whole numbers'), (['--cms_periods=1,change'], 'whole numbers'),
    (['--cms_share=1'], 'cms_share'),
    (['--cms_topology=copies', '--cms_chunks=4,8', '--cms_share=0'], 'give one clock'),
    (['--cms_topology=copies', '--cms_chunks=4,0,change'], 'all slow levels')])
def test_training_in_copies_is_refused(args, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        inside('train.py', f'--out_dir={tmp_path}', *args)


def test_an_old_memory_file_is_refused(tmp_path):
    save_checkpoint(tmp_path / 'me.pt', {'owner': {}, 'cms_chunks': '128', 'next': [], 'state': {}},
                    'nested-learning-memory-2')
    with pytest.raises(UserError, match='not a memory file of this project'):
        load_memory(str(tmp_path / 'me.pt'), {})
