"""Levels with their own clocks: against loops that move them by hand, on both clocks; causality, splits, files."""
import collections
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_near
from test_scripts import TINY, inside, losses, shell, train_until

import cms
from cli import UsageError
from cms import TOPOLOGIES, Learner, learn, levels_of, moving, transitions, weights_of
from machine import load_checkpoint, load_model
from model import Config, Hope, state_bytes


SHORT = [arg for arg in TINY if not arg.startswith(('--n_layer', '--max_steps'))] + ['--n_layer=2']


def tiny(chunks='4,8', seed=0, **kwargs):
    torch.manual_seed(seed)
    options = dict(vocab_size=17, block_size=64, n_layer=2, n_head=2, n_embd=8, n_hidden=12, mixer='gated_deltanet',
                   cms_chunks=chunks, cms_step=0.5)
    return Hope(Config(**options | kwargs)).double()


def ids(B, T, seed=1):
    return torch.randint(17, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def in_parts(model, idx, sizes):
    """Logits and state of a stream that is given to `learn` in parts."""
    state, out = None, []
    for part in idx.split(sizes, dim=1):
        logits, state = learn(model, part, state)
        out.append(logits)
    return torch.cat(out, dim=1), state


# -----------------------------------------------------------------------------
# the chain


@pytest.mark.parametrize('topology', TOPOLOGIES)
def test_the_chain_is_what_its_docstring_says(topology):
    model = tiny(chunks='', cms_periods={'stacked': '1,1', 'copies': '1'}.get(topology, '1,1,1'), cms_topology=topology,
                 n_hidden=32)
    chain, x = model.blocks[0].cms, torch.randn(2, 5, 8, dtype=torch.float64)

    def mlp(level, x):
        h = F.rms_norm(x, (8,), level.norm.weight, 1e-6) @ level.up.weight.mT
        return (F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1]) @ level.out.weight.mT
    if topology == 'independent':
        want = x + sum(mlp(level, x) * mix for level, mix in zip(chain.levels, chain.mix))
    else:
        want = x
        for level in chain.levels:
            want = want + mlp(level, want)
    assert_near('y', chain(x), want, 1e-12)
    assert len(chain.levels) == (1 if topology in ('stacked', 'copies') else 3)
    assert sum(level.out.weight.shape[1] for level in chain.levels) == 32, 'the width of one MLP, split'


@pytest.mark.parametrize('options, named', [
    (dict(cms_periods='1,x'), 'cms_periods'), (dict(cms_periods='2,3'), 'multiple'), (dict(cms_periods='0'), 'periods'),
    (dict(cms_chunks='8,4'), 'multiple'), (dict(cms_chunks='0,8'), 'fastest'), (dict(cms_chunks='8,,9'), 'cms_chunks'),
    (dict(cms_chunks='4,8', cms_periods='1,2,4'), 'levels'), (dict(cms_topology='tree'), 'cms_topology'),
    (dict(cms_topology='nested', cms_periods='1,2'), 'nested'),
    (dict(cms_topology='stacked', cms_chunks='4,8,16'), 'n_layer'), (dict(cms_step=-1.0), 'cms_step'),
    (dict(cms_clip=float('inf')), 'cms_clip')])
def test_refuses(options, named):
    with pytest.raises(ValueError, match=named):
        Config(**dict(n_layer=2, n_head=2, n_embd=8) | options)


# -----------------------------------------------------------------------------
# the optimizer clock


@pytest.mark.parametrize('topology', ['sequential', 'stacked'])
def test_levels_move_at_their_multiples_with_the_mean_gradient(topology):
    """Against copies of the gradients kept by hand and an optimizer per level."""
    periods = (1, 3) if topology == 'stacked' else (1, 2, 4)
    options = dict(chunks='', cms_periods=','.join(map(str, periods)), cms_topology=topology)
    model, twin = tiny(**options), tiny(**options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    level = {p: level for _, level, mlp in levels_of(twin) for p in mlp.parameters()}
    groups = [[p for p in twin.parameters() if level.get(p, 0) == i] for i in range(len(periods))]
    by_hand = [torch.optim.AdamW(group, lr=0.1) for group in groups]
    kept = {p: 0 for p in twin.parameters()}
    for step in range(9):
        x, y = ids(2, 12, seed=step), ids(2, 12, seed=step + 100)
        model(x, y)[1].backward()
        before = [p.detach().clone() for p in model.parameters()]
        with moving(model, step) as moved:
            optimizer.step()
            optimizer.zero_grad()
        grads = torch.autograd.grad(twin(x, y)[1], list(twin.parameters()))
        for p, grad in zip(twin.parameters(), grads):
            kept[p] = kept[p] + grad
        for i, period in enumerate(periods):
            if (step + 1) % period == 0:
                for p in groups[i]:
                    p.grad, kept[p] = kept[p] / period, 0
                by_hand[i].step()
        for (name, p), q, old in zip(model.named_parameters(), twin.parameters(), before):
            assert_near(f'{name} after step {step}', p, q, 1e-10)
            assert torch.equal(p, old) == ((step + 1) % periods[level.get(q, 0)] != 0), f'{name} at step {step}'
        assert sorted(moved) == [i for i, period in enumerate(periods) if (step + 1) % period == 0]
        fastest = set(model.blocks[0].cms.levels[0].parameters())
        size = sum((p - old).square().sum() for p, old in zip(model.parameters(), before) if p in fastest).sqrt().item()
        assert abs(moved[0] - size) < 1e-9, 'the size of the move'


# -----------------------------------------------------------------------------
# the token clock


def learn_by_hand(model, idx):
    """One stream, one token at a time, weights set in place: what each level holds at the end, and all logits."""
    o, named = model.config, {name: p.detach().clone() for name, p in model.named_parameters()}
    names = {p: name for name, p in model.named_parameters()}
    weights = [(level, names[p]) for level, p in weights_of(model).values()]
    start, gathered, state, out, C = dict(named), {name: 0 for _, name in weights}, None, [], o.chunks[0]
    for first in range(0, idx.shape[1], C):
        own = {name: named[name].clone().requires_grad_() for _, name in weights}
        logits = []
        for t in range(first, min(first + C, idx.shape[1])):
            y, _, state = torch.func.functional_call(model, named | own, (idx[:, t:t + 1],), {'state': state})
            logits.append(y)
        logits = torch.cat(logits, dim=1)
        out.append(logits.detach())
        if first + C >= idx.shape[1]:
            break
        loss = F.cross_entropy(logits[0], idx[0, first + 1:first + C + 1])
        for (_, name), grad in zip(weights, torch.autograd.grad(loss, [own[name] for _, name in weights])):
            gathered[name] = gathered[name] + grad
        state = [{n: x.detach() if torch.is_tensor(x) else x for n, x in layer.items()} for layer in state]
        for level, chunk in enumerate(o.chunks):
            if chunk and (first + C) % chunk == 0:
                mine = [name for owner, name in weights if owner == level]
                mean = {name: gathered[name] / (chunk // C) for name in mine}
                norm = torch.cat([g.flatten() for g in mean.values()]).norm()
                for name in mine:
                    named[name] = named[name] - o.cms_step * min(1, o.cms_clip / norm) * mean[name]
                    gathered[name] = 0
                if o.cms_topology == 'nested':
                    for owner, name in weights:
                        named[name] = start[name] if owner < level else named[name]
    return torch.cat(out, dim=1), {name: named[name] - start[name] for _, name in weights}


@pytest.mark.parametrize('topology, mixer', [*((topology, 'gated_deltanet') for topology in TOPOLOGIES[:-1]),
                                             ('sequential', 'hope'), ('stacked', 'attention'), ('nested', 'ttt')])
def test_learn_equals_the_loop(topology, mixer):
    model = tiny(cms_topology=topology, mixer=mixer, memory_chunk=2, cms_clip=0.3).eval()
    idx = ids(2, 27)
    with torch.no_grad():
        logits, state = learn(model, idx)
    for b in range(2):
        want, moved = learn_by_hand(model, idx[b:b + 1])
        assert_near('logits', logits[b:b + 1], want, 1e-8)
        for name, (_, p) in weights_of(model).items():
            full = next(n for n, q in model.named_parameters() if q is p)
            assert_near(full, state['delta'][name][b], moved[full], 1e-7)


@pytest.mark.parametrize('topology', TOPOLOGIES)
def test_any_split_and_any_batch(topology):
    model, idx = tiny(cms_topology=topology, mixer='hope', memory_chunk=2).eval(), ids(3, 30)
    logits, state = in_parts(model, idx, 30)
    for sizes in ([3, 1, 4, 8, 14], [4, 4, 8, 8, 6], 1):
        parts, other = in_parts(model, idx, sizes)
        assert_near('logits', parts, logits, 1e-9)
        for name, moved in state['delta'].items():
            assert_near(name, other['delta'][name], moved, 1e-8)
    whole = learn(model, idx[:, :12])[1]
    assert torch.equal(*(learn(model, idx[:, 12:], whole)[0] for _ in range(2))), 'a state is read on from twice'
    alone, _ = in_parts(model, idx[1:2], 30)
    assert_near('one stream alone', alone, logits[1:2], 1e-9)


def assert_causal(model, T):
    """What is said before a token is the same whatever that token is; what is said after it is not."""
    idx = ids(1, T)
    before, _ = in_parts(model, idx, T)
    for t in range(1, T):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 17
        after, _ = in_parts(model, changed, T)
        assert torch.equal(after[:, :t], before[:, :t]), f'token {t} is seen before it is read'
        assert not torch.equal(after[:, t:], before[:, t:])


def test_no_token_is_predicted_by_weights_that_saw_it():
    assert_causal(tiny(mixer='hope', memory_chunk=2).eval(), 24)


def test_levels_move_at_exactly_their_multiples():
    model, idx, state = tiny(chunks='2,6,0').eval(), ids(1, 26), None
    last = {level: 0.0 for level in range(3)}
    with torch.no_grad():
        for read in range(1, 26):           # a chunk's last target is the token after it: it moves as that one is read
            _, state = learn(model, idx[:, read - 1:read], state)
            sizes = {level: sum(state['delta'][name].abs().sum().item() for name, (i, _) in weights_of(model).items()
                                if i == level and name in state['delta']) for level in range(3)}
            moved = [level for level in range(3) if sizes[level] != last[level]]
            want = [level for level, n in ((0, 2), (1, 6)) if read > 1 and (read - 1) % n == 0]
            assert moved == want, f'{moved} moved as token {read} was read, not {want}'
            last = sizes
    assert state['learned'] == 24


def test_step_zero_is_the_static_model():
    for mixer in ('hope', 'attention'):
        model, idx = tiny(cms_step=0.0, mixer=mixer, memory_chunk=2).float().eval(), ids(1, 30)
        static, state = [], None
        with torch.no_grad():
            for part in idx.split(4, dim=1):
                logits, _, state = model(part, state=state)
                static.append(logits)
            assert torch.equal(learn(model, idx)[0], torch.cat(static, dim=1)), 'bit for bit'


def test_a_learner_is_called_as_the_model_is():
    """Its loss is the model's own, weights and targets of -1 included."""
    model, idx, targets = tiny(cms_step=0.0).eval(), ids(2, 12), ids(2, 12, seed=2)
    reader, weights, targets[:, 5] = Learner(model), torch.rand(2, 12, dtype=torch.float64), -1
    with torch.no_grad():
        for options in ({}, {'targets': targets}, {'targets': targets, 'weights': weights}):
            (logits, loss, _), (want, mean, _) = reader(idx, **options), model(idx, **options)
            assert_near('logits', logits, want, 1e-12)
            assert loss is None if mean is None else abs(loss - mean) < 1e-12
        state = reader(idx[:, :7])[2]
        assert_near('read on', reader(idx[:, 7:], state=state)[0], logits[:, 7:], 1e-12)


def test_learning_without_gradients_is_refused():
    with torch.inference_mode(), pytest.raises(AssertionError, match='no_grad'):
        learn(tiny(), ids(1, 4))
    with pytest.raises(AssertionError, match='no token clock'):
        learn(tiny(chunks=''), ids(1, 4))


def test_the_state_does_not_grow():
    model = tiny(mixer='hope', memory_chunk=2).eval()
    sizes = [state_bytes(in_parts(model, ids(1, n), n)[1]) for n in (20, 200)]
    assert sizes[0] == sizes[1]
    _, state = in_parts(model, ids(1, 200), 8)
    layers = (x for layer in state['recurrent'] for x in layer.values())
    kept = [*state['delta'].values(), *state['gathered'].values(), *layers]
    assert not any(x.grad_fn for x in kept if torch.is_tensor(x)), 'nor does a graph'


def test_first_order_is_exact_for_the_step_size_and_learns_the_start():
    """One move: its size enters nowhere else. Every parameter gets a gradient, those of each level included."""
    model, idx = tiny(chunks='4,8'), ids(2, 9)
    def loss(): return F.cross_entropy(learn(model, idx[:, :-1])[0].flatten(0, 1), idx[:, 1:].flatten())
    loss().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    slope, values = model.log_step.grad[0].item(), []
    for sign in (1, -1):
        model.log_step.data[0] += sign * 1e-5
        values.append(loss().item())
        model.log_step.data[0] -= sign * 1e-5
    assert slope and abs(slope - (values[0] - values[1]) / 2e-5) < 1e-6
    model.config.cms_truncate, model.log_step.grad = 1, None
    loss().backward()
    assert model.log_step.grad is None or model.log_step.grad[0] == 0, 'cut after every chunk'


# -----------------------------------------------------------------------------
# what `python cms.py` shows


def test_transitions():
    """Nine tokens in ten follow from the one before them, by a function that takes every value."""
    torch.manual_seed(0)
    x = transitions(4000, 16).tolist()
    assert len(x) == 4000 and set(x) == set(range(16))
    pairs = collections.Counter(zip(x, x[1:]))
    then = {a: max(range(16), key=lambda b: pairs[a, b]) for a in range(16)}
    assert sorted(then.values()) == list(range(16))
    assert 0.87 < sum(then[a] == b for a, b in zip(x, x[1:])) / 3999 < 0.95


def test_levels_follow_what_is_read(capsys):
    cms.main()
    rows = {line[:28].strip(): [*map(float, line[28:].split())] for line in capsys.readouterr().out.splitlines()[-3:]}
    still, fast, every = (sum(row) / 8 for row in rows.values())
    assert len(rows) == 3 and every < still - 2 and fast < still - 2


# -----------------------------------------------------------------------------
# the shell commands


@pytest.fixture
def short(text, tmp_path):
    path = tmp_path / 'short.txt'
    with open(text) as file:
        path.write_text(file.read(3000))
    return str(path)


@pytest.fixture(scope='module')
def transformer(text, tmp_path_factory):
    out_dir = str(tmp_path_factory.mktemp('transformer') / 'out')
    inside('train.py', f'--data={text}', f'--out_dir={out_dir}', *SHORT, '--mixer=attention',
           '--max_steps=40')
    return out_dir


def test_resume_in_the_middle_of_a_period(text, tmp_path):
    levels = ['--cms_periods=1,4,8', '--mixer=deltanet']
    dirs = [str(tmp_path / name) for name in ('never', 'stopped')]
    inside('train.py', f'--data={text}', f'--out_dir={dirs[0]}', *TINY, *levels)
    train_until(13, dirs[1], f'--data={text}', *TINY, *levels)
    stopped = torch.load(os.path.join(dirs[1], 'ckpt.pt'))
    assert 13 <= stopped['step'] < 40
    assert bool(stopped['gathered']) == (stopped['step'] % 8 != 0), 'what was gathered is in the checkpoint'
    shell('train.py', '--resume', f'--out_dir={dirs[1]}')
    assert losses(dirs[0]) == losses(dirs[1])
    a, b = (torch.load(os.path.join(d, 'ckpt.pt'))['model'] for d in dirs)
    assert all(torch.equal(a[name], b[name]) for name in a)
    with open(os.path.join(dirs[0], 'log.jsonl')) as file:
        lines = [json.loads(line) for line in file]
    assert [line['ticks'] for line in lines if line.get('step') == 39 and 'loss' in line] == [[39, 9, 4]]


def test_two_processes_equal_one_on_both_clocks(text, tmp_path):
    options = [f'--data={text}', *SHORT, '--max_steps=12', '--cms_periods=1,4', '--cms_chunks=16,32',
               '--mixer=deltanet']
    inside('train.py', f'--out_dir={tmp_path}/one', *options)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               os.path.join(ROOT, 'train.py'), f'--out_dir={tmp_path}/two', '--grad_accum=2', *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one, two = losses(f'{tmp_path}/one'), losses(f'{tmp_path}/two')
    assert list(one) == list(two) and max(abs(one[step] - two[step]) for step in one) < 1e-3


def test_stacking_a_transformer_changes_nothing_until_it_learns(transformer, text, tmp_path):
    checkpoint, idx = load_checkpoint(f'{transformer}/ckpt.pt'), ids(1, 90)
    stacked = dict(cms_topology='stacked', cms_chunks='16,32', cms_step=0.0)
    plain, model = (load_model(checkpoint | {'config': checkpoint['config'] | options}) for options in ({}, stacked))
    state, static = None, []
    with torch.no_grad():
        for part in idx.split(16, dim=1):
            logits, _, state = plain(part, state=state)
            static.append(logits)
        assert torch.equal(learn(model.eval(), idx)[0], torch.cat(static, dim=1)), 'bit for bit'
        model.log_step.fill_(-1.0)
        assert not torch.equal(learn(model, idx)[0], torch.cat(static, dim=1))
    assert {name[0]: level for name, (level, _) in weights_of(model).items()} == {'0': 0, '1': 1}, 'the depth is spread'

    options = (f'--data={text}', f'--out_dir={tmp_path}/out', f'--init_from={transformer}/ckpt.pt', '--max_steps=6',
               '--cms_topology=stacked', '--cms_chunks=16,32', *SHORT)
    script = inside('train.py', *options)
    assert script['config'].mixer == 'attention' and 'log_step' in script['raw_model'].state_dict()
    assert losses(f'{tmp_path}/out')[1] < losses(transformer)[1] - 2, 'it starts where the Transformer ended'


def test_reading_with_learning_is_better_here(transformer, text):
    def bits(*args):
        out = shell('sample.py', f'--score={text}', f'--out_dir={transformer}', *args).stdout
        return float(dict(line.split(':', 1) for line in out.splitlines())['bits_per_byte'])
    assert bits('--learn', '--cms_chunks=64', '--cms_step=0.3') < bits() - 0.25


def test_bfloat16(text, tmp_path):
    inside('train.py', f'--data={text}', f'--out_dir={tmp_path}/out', *SHORT, '--max_steps=3', '--dtype=bfloat16',
           '--cms_chunks=16,32', '--mixer=deltanet')
    with pytest.raises(UsageError, match='block_size'):
        inside('train.py', f'--data={text}', f'--out_dir={tmp_path}/other', *SHORT, '--cms_chunks=64')


def test_what_is_not_finite_is_not_kept(transformer, short, tmp_path):
    args = (f'--out_dir={transformer}', '--learn', '--cms_chunks=16')
    failed = shell('sample.py', f'--score={short}', f'--memory={tmp_path}/me.pt', '--cms_step=1e30', *args, code=1)
    assert 'not finite' in failed.stderr and not os.path.exists(tmp_path / 'me.pt')
    assert 'cms_step' in shell('sample.py', 'x', '--cms_step=nan', *args, code=2).stderr
    assert 'cms_chunks' in shell('sample.py', 'x', args[0], '--learn', '--cms_chunks=abc', code=2).stderr


def test_memory_file(transformer, short, tmp_path):
    """Two calls are one: what is learned, read and said is kept between them. Foreign and damaged files are refused."""
    learning = (f'--out_dir={transformer}', '--learn', '--cms_chunks=16', '--cms_step=0.5')
    mine = f'--memory={tmp_path}/me.pt'
    assert 'no memory' in shell('sample.py', mine, '--memory_info', *learning, code=1).stderr
    shell('sample.py', 'line 3: the answer to 3 is', mine, '--max_new_tokens=30', '--stop=false', *learning)
    info = shell('sample.py', mine, '--memory_info', f'--out_dir={transformer}').stdout
    kept = torch.load(tmp_path / 'me.pt', weights_only=True)
    assert f"tokens_read:        {26 + 29}" in info and '3 moves' in info and len(kept['next']) == 1
    shell('sample.py', f'--score={short}', mine, *learning)
    again = torch.load(tmp_path / 'me.pt', weights_only=True)['state']
    assert again['learned'] + again['pending'].shape[1] == 26 + 29 + os.path.getsize(short)
    assert os.path.getsize(tmp_path / 'me.pt') < state_bytes(again) + 30_000, 'not all that they are views of'
    for args, named in ((('--cms_chunks=32',), 'cms_chunks'), (('--num_samples=2',), 'num_samples')):
        other = [a for a in learning if not a.startswith(args[0].split('=')[0])]
        assert named in shell('sample.py', mine, *other, *args, code=1 + (named == 'num_samples')).stderr
    (tmp_path / 'bad.pt').write_bytes(b'not a memory')
    assert 'damaged' in shell('sample.py', f'--memory={tmp_path}/bad.pt', *learning, code=1).stderr
    assert 'not a memory' in shell('sample.py', f'--memory={transformer}/ckpt.pt', *learning, code=1).stderr
    assert 'learn' in shell('sample.py', mine, f'--out_dir={transformer}', code=2).stderr
    assert torch.load(tmp_path / 'me.pt')['state']['learned'] == again['learned'], 'what is refused changes nothing'


def test_two_processes_do_not_share_a_memory(transformer, tmp_path):
    fcntl = pytest.importorskip('fcntl')
    with open(tmp_path / 'me.pt.lock', 'ab') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        failed = shell('sample.py', 'x', f'--memory={tmp_path}/me.pt', '--learn', f'--out_dir={transformer}', code=1)
        assert 'in use' in failed.stderr and not os.path.exists(tmp_path / 'me.pt')
