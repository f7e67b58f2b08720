"""The bench: every part prints what it measured, the JSON holds it, wrong words are refused by name."""
import json
import math

import pytest
import torch
import torch.nn as nn
from conftest import assert_near
from test_scripts import inside, shell

from cli import UsageError
from counts import count_step
from machine import compiled
from model import Config, Hope

TINY = ['--n_layer=1', '--n_embd=32', '--n_head=2', '--quick', '--lengths=64', '--tokens=128', '--contexts=100,700',
        '--device=cpu']


def test_all_parts(tmp_path):
    path = str(tmp_path / 'bench.json')
    printed = shell('bench.py', *TINY, '--mixers=attention,hope,mamba2', f'--json={path}').stdout
    for word in ('ceilings: ', 'training, ', 'decoding, ', 'the recurrence, '):
        assert word in printed
    with open(path) as file:
        result = json.load(file)
    assert [row['mixer'] for row in result['train']] == ['attention', 'hope', 'mamba2']
    assert all(row['flops'] > 0 and row['tokens_per_second'] == 128 / row['seconds'] for row in result['train'])
    assert [row['form'] for row in result['kernels']] == ['token loop', 'tiled']
    assert result['kernels'][1]['seconds'] < result['kernels'][0]['seconds'], 'the tiled form is the fast one'
    assert result['commit'] and result['bench']['quick'] and result['model']['n_embd'] == 32
    states = [row['state_bytes'] for row in result['decode'] if row['mixer'] == 'hope']
    assert len(states) == 2 and states[0] == states[1], 'constant'


def test_count_needs_no_gpu(tmp_path, capsys):
    path = str(tmp_path / 'count.json')
    inside('bench.py', *TINY, '--count', '--mixers=attention', f'--json={path}')
    printed = capsys.readouterr().out
    assert 'a step on a GPU, counted' in printed and 'ceilings' not in printed
    with open(path) as file:
        row, = json.load(file)['count']
    assert row['mixer'] == 'attention' and row['sequences'] == 2 and row['layer_kinds']['products'][0] > 10
    assert row['launches'] == sum(n for n, _ in row['kinds'].values()) > row['layer_kinds']['loops'][0] > 10


def test_the_peak_is_what_a_block_takes():
    Peak = inside('bench.py', *TINY, '--parts=kernels')['Peak']
    with Peak('cpu') as peak:
        x = torch.ones(1 << 25)                                 # 128 MiB
        torch.zeros(1000).sum()
        del x
    assert math.isnan(peak.mib) or 100 < peak.mib < 200


class Chain(nn.Module):
    def forward(self, x):
        return (x.sin() + 1).cos()


def test_a_count_is_what_one_counts_by_hand():
    none, x = [0, 0], torch.empty(128, 64, requires_grad=True)
    linear = 4 * (128 * 64 + 64 * 32 + 128 * 32)        # x W^T, dy^T x and dy W each read two of them, write the third
    want = {'loops': none, 'products': [3, 3 * linear], 'others': none}
    assert count_step(nn.Linear(64, 32, bias=False), [x]) == want
    # one loop reads x and writes y, one reads x and dy and writes dx
    assert count_step(Chain(), [x]) == {'loops': [2, 5 * 4 * 128 * 64], 'products': none, 'others': none}


def test_twice_the_layers_are_twice_the_launches():
    def counted(n):
        layers = [part for _ in range(n) for part in (nn.RMSNorm(32), nn.Linear(32, 32, bias=False), nn.SiLU())]
        return count_step(nn.Sequential(*layers), [torch.empty(128, 32, requires_grad=True)])
    one, two, four = counted(1), counted(2), counted(4)
    for kind in one:
        for a, b, c in zip(one[kind], two[kind], four[kind]):
            assert c - b == 2 * (b - a)
    assert four['products'][0] == 12 and four['loops'][0] > two['loops'][0]


def test_half_precision_is_half_of_a_product():
    layer, x = nn.Linear(64, 32, bias=False), torch.empty(128, 64, requires_grad=True)
    full, half = (count_step(layer, [x], dtype)['products'] for dtype in (torch.float32, torch.bfloat16))
    assert full[0] == half[0] and full[1] == 2 * half[1]


@pytest.mark.parametrize('kind, f, numbers', [
    ('loops', lambda x, w: x[:8].exp() * 2, 2 * 8 * 64),
    ('products', lambda x, w: x[:8] @ w, 8 * 64 + 64 * 32 + 8 * 32),
    ('products', lambda x, w: x[:, :16] @ w[:16], 128 * 16 + 16 * 32 + 128 * 32),
    ('products', lambda x, w: x @ x.mT, 128 * 64 + 128 * 128)])
def test_of_a_slice_the_slice_is_counted(kind, f, numbers):
    class Sliced(nn.Module):
        def forward(self, x, w):
            return f(x, w)
    assert count_step(Sliced(), [torch.empty(128, 64), torch.empty(64, 32)])[kind] == [1, 4 * numbers]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_gpu_computes_the_same_compiled_and_as_graphs():
    Loss = inside('bench.py', *TINY, '--parts=kernels')['Loss']
    torch.manual_seed(0)
    model, x = Hope(Config(n_layer=1, n_embd=32, n_head=2, memory_chunk=16)), torch.randint(257, (2, 64))

    def gradients(f, x, half=False):
        with torch.autocast(x.device.type, torch.bfloat16, half, cache_enabled=False):
            loss = f(x, x)
        loss.backward()
        grads = {name: p.grad.cpu() for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        return grads

    want = gradients(Loss(model), x)
    model, x = model.to('cuda'), x.to('cuda')
    fast = Loss(compiled(model))
    for f in (Loss(model), fast):
        for name, grad in gradients(f, x).items():
            assert_near(name, grad, want[name], 1e-4)
    half, graphs = gradients(fast, x, half=True), Loss(compiled(model))
    with torch.autocast('cuda', torch.bfloat16, cache_enabled=False):
        torch.cuda.make_graphed_callables(graphs, (x, x))
    for _ in range(2):
        for name, grad in gradients(graphs, x, half=True).items():
            assert_near(name, grad, half[name], 1e-4)


@pytest.mark.parametrize('args, words', [
    (['--parts=train,speed'], "with commas between and each once, not 'speed'"),
    (['--mixers=gru'], "not 'gru'"),
    (['--parts=train+decode'], "not 'train+decode'"),
    (['--mixers=hope+gru'], "not 'hope+gru'"),
    (['--lengths=1k'], "not '1k'"),
    (['--count', '--lengths=none'], "not 'none'"),
    (['--count=maybe'], "not 'maybe'"),
    (['--repeats=0'], '--repeats must be at least 1'),
    (['--dtype=int8'], "not 'int8'"),
    (['--preset=huge'], "not 'huge'"),
    (['--graph=mamba2'], '--graph=mamba2: its models must be in --mixers and in --compile'),
    (['--graph=titans', '--mixers=attention,hope'], '--graph=titans: its models must be'),
    (['--quick', '--graph=hope'], '--graph=hope: its models must be'),
    (['--graph=hope', '--device=cpu'], '--graph is for a GPU'),
])
def test_wrong_words(args, words):
    with pytest.raises(UsageError) as error:
        inside('bench.py', *args)
    assert words in str(error.value)
