"""Every memory: its own paper's formula, whole == split == token by token, causality, a gradient over 200 tokens."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near

from memory import (RECURRENT, TTT_CHUNK, least_squares, least_squares_ref, no_pairs, qkv_streams, recall, remember,
                    retain, write_rate)
from model import MIXERS, SWITCHES, Config, Hope


def tiny(mixer, **kwargs):
    torch.manual_seed(0)
    kwargs = {'n_layer': 1, 'n_embd': 16, 'n_head': 2, 'block_size': 400, 'tile': 8, 'memory_chunk': 8, **kwargs}
    return Hope(Config(mixer=mixer, **kwargs)).double()


def layer_and_input(mixer, T=45, **kwargs):
    layer = tiny(mixer, **kwargs).blocks[0].mixer
    with torch.no_grad():                       # away from the neutral start, so that the gates depend on the token
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer, torch.randn(2, T, 16, dtype=torch.float64)


def qkv(n, Dk, Dv):
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(n, d, generator=g, dtype=torch.float64) for d in (Dk, Dk, Dv))
    alpha, beta = torch.rand(2, n, generator=g, dtype=torch.float64)
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, alpha, beta


# What each paper prints, for one head; states are (Dv, Dk).
def linear(q, k, v, alpha, beta, t):
    return sum(torch.outer(v[s], k[s]) for s in range(t + 1)) @ q[t]


def retnet(q, k, v, alpha, beta, t):                        # a fixed decay per head
    return sum(alpha[0] ** (t - s) * (q[t] @ k[s]) * v[s] for s in range(t + 1))


def mamba2(q, k, v, alpha, beta, t):                           # Mamba-2: decay exp(-dt), input scaled by dt
    dt = -alpha.log()
    return sum(torch.exp(-dt[s + 1:t + 1].sum()) * dt[s] * (q[t] @ k[s]) * v[s] for s in range(t + 1))


def deltanet(q, k, v, alpha, beta, t):                      # v_new = beta v + (1 - beta) v_old, in v_old's place
    S = torch.zeros(v.shape[1], k.shape[1], dtype=v.dtype)
    for s in range(t + 1):
        v_old = S @ k[s]
        S = S - torch.outer(v_old, k[s]) + torch.outer(beta[s] * v[s] + (1 - beta[s]) * v_old, k[s])
    return S @ q[t]


def gated_deltanet(q, k, v, alpha, beta, t):                # S = S alpha (I - beta k k^T) + beta v k^T
    S, eye = torch.zeros(v.shape[1], k.shape[1], dtype=v.dtype), torch.eye(k.shape[1], dtype=v.dtype)
    for s in range(t + 1):
        S = S @ (alpha[s] * (eye - beta[s] * torch.outer(k[s], k[s]))) + beta[s] * torch.outer(v[s], k[s])
    return S @ q[t]


def ttt(q, k, v, alpha, beta, t):                           # mini-batch descent on |S k - v|^2 / 2, by autograd
    S = torch.zeros(v.shape[1], k.shape[1], dtype=v.dtype)
    for start in range(0, t + 1, TTT_CHUNK):
        anchor = S.clone().requires_grad_()
        for s in range(start, min(start + TTT_CHUNK, t + 1)):
            gradient, = torch.autograd.grad(0.5 * (anchor @ k[s] - v[s]).square().sum(), anchor)
            S = S - beta[s] * 2 / TTT_CHUNK * gradient
    return S @ q[t]


@pytest.mark.parametrize('rule', RECURRENT)
def test_formula_of_its_paper(rule):
    q, k, v, alpha, beta = qkv(37, 6, 5)
    if rule == 'retnet':
        alpha = alpha[:1].expand(37)
    S = torch.zeros(1, 1, 5, 6, dtype=torch.float64)
    state = {'S': S, 'S_xi': S, 'place': 0}
    y, _ = remember(rule, *(x[None, None] for x in (q, k, v, alpha, beta)), state, tile=8)
    formula = globals()[rule]
    assert_near(rule, y[0, 0], torch.stack([formula(q, k, v, alpha, beta, t) for t in range(37)]), 1e-12)


@pytest.mark.parametrize('mixer', MIXERS)
@pytest.mark.parametrize('cuts', [[1] * 45, [5, 20, 1, 19], [16, 16, 13], [3, 42]])
def test_whole_equals_split(mixer, cuts):
    """block_size 20 < 45 tokens: attention's window slides as well."""
    layer, x = layer_and_input(mixer, block_size=20)
    y, last = layer(x)
    parts, state = [], None
    for part in x.split(cuts, dim=1):
        y_part, state = layer(part, state)
        parts.append(y_part)
    assert_near('y', torch.cat(parts, 1), y, 1e-10)
    for key, value in last.items():
        if torch.is_tensor(value):
            assert_near(key, state[key], value, 1e-10)
        else:
            assert state[key] == value


@pytest.mark.parametrize('mixer', MIXERS)
@pytest.mark.parametrize('tile', [1, 8, 64])
def test_causality(mixer, tile):
    """Changing token 23 leaves every output before it untouched, and changes its own."""
    layer, x = layer_and_input(mixer, tile=tile, memory_chunk=tile)
    y = layer(x)[0]
    x2 = x.clone()
    x2[:, 23] += 1
    y2 = layer(x2)[0]
    assert torch.equal(y[:, :23], y2[:, :23])
    assert (y[:, 23] != y2[:, 23]).any()


def test_gates():
    """Without a floor sigmoids. With one, shut at and below it, whole where the sigmoid is, a straight line between."""
    x = torch.linspace(-9, 9, 37, dtype=torch.float64)
    assert_near('beta', write_rate(x, 0, 0.5), torch.sigmoid(x + 0.5), 1e-12)
    assert_near('alpha', retain(x, 0), torch.sigmoid(x), 1e-12)
    for rate in (0.0, -3.0):
        at_floor = 1 / (1 + math.exp(-math.log(0.2 / 0.8) - rate))      # sigmoid(x + rate) where that of x is 0.2
        want = (torch.sigmoid(x + rate) - at_floor) / (1 - at_floor)
        want[torch.sigmoid(x) <= 0.2] = 0
        assert_near('beta', write_rate(x, 0.2, torch.tensor(rate)), want, 1e-12)
    kept = torch.sigmoid(x) / 0.998
    assert_near('alpha', retain(x, 0.2), torch.where(torch.sigmoid(x) >= 0.998, 1.0, kept), 1e-12)


@pytest.mark.parametrize('mixer', ['gated_deltanet', 'ttt_mlp', 'hope'])
@pytest.mark.parametrize('floor', [0, 0.1])
def test_closed_gates_hold_what_was_written(mixer, floor):
    """To the last bit, over 200 tokens whose gates are below the floor; without one it fades."""
    layer, x = layer_and_input(mixer, T=220, gate_floor=floor)
    _, written = layer(x[:, :20])
    with torch.no_grad():
        for gate, bias in ((layer.alpha, 10), (layer.beta, -5)):
            if gate is not None:
                gate.weight.zero_()
                gate.bias.fill_(bias)
    _, held = layer(x[:, 20:], written)
    same = [torch.equal(held[name], W) for name, W in written.items() if name in ('S', 'W2', 'U', 'W1')]
    assert same == len(same) * [floor > 0]


@pytest.mark.parametrize('mixer', [*RECURRENT, *SWITCHES])
def test_gradient_over_200_tokens(mixer):
    """From the loss at token 230 to the input at token 30, at the default start and through a whole model."""
    model = tiny(mixer, n_layer=2, tile=32)
    x = torch.randn(1, 231, 16, dtype=torch.float64, requires_grad=True)
    h = x
    for block in model.blocks:
        h, _ = block(h)
    loss = F.cross_entropy(model.head(model.norm(h))[:, 230], torch.tensor([5]))
    gradient, = torch.autograd.grad(loss, x)
    assert gradient[0, 30].norm() > 1e-9, gradient[0, 30].norm()


@pytest.mark.parametrize('mixer', MIXERS)
def test_streams_of_a_batch_do_not_mix(mixer):
    layer, x = layer_and_input(mixer)
    y = layer(x)[0]
    assert_near('row alone', layer(x[1:])[0], y[1:], 1e-10)


@pytest.mark.parametrize('mixer', MIXERS)
def test_every_parameter_learns(mixer):
    model = tiny(mixer, n_layer=2)
    idx = torch.randint(257, (2, 40))
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_gates_and_reads_are_float32_under_autocast(monkeypatch):
    """A retention of 0.999 is 1 in bfloat16: the memory would never forget."""
    seen = {}
    def spy(rule, q, k, v, alpha, beta, state, tile):
        seen.update(alpha=alpha.dtype, beta=beta.dtype)
        y, state = remember(rule, q, k, v, alpha, beta, state, tile)
        seen['S'] = state['S'].dtype
        return y, state
    monkeypatch.setattr('memory.remember', spy)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        tiny('gated_deltanet').float()(torch.randint(257, (1, 20)))
    assert set(seen.values()) == {torch.float32}


def test_recall_table():
    """What `python memory.py` claims: the delta rule holds what a sum cannot, attention holds everything."""
    assert recall('attention', 128) == 1.0 and recall('attention', 128, alike=0.5) == 1.0
    assert recall('deltanet', 32, alike=0.5) > 1.5 * recall('linear', 32, alike=0.5)
    assert recall('deltanet', 16, again=16) > 0.9 > 0.7 > recall('linear', 16, again=16)


def test_least_squares_is_the_closed_form_in_any_order():
    """Pair by pair == in parts == ridge regression on all pairs, in three orders, float64."""
    rng = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 23, n, dtype=torch.float64, generator=rng) for n in (6, 4))
    wanted = torch.linalg.solve(k.mT @ k + 0.3 * torch.eye(6, dtype=torch.float64), k.mT @ v).mT
    for order in (torch.arange(23), torch.arange(23).flip(0), torch.randperm(23, generator=rng)):
        state = no_pairs(2, 6, 4, ridge=0.3, dtype=torch.float64)
        one = least_squares_ref(k[:, order], v[:, order], state)
        for size in (1, 5, 23):
            other = state
            for part in order.split(size):
                other = least_squares(k[:, part], v[:, part], other)
            assert (other['P'] - one['P']).abs().max() < 1e-12 and (other['S'] - one['S']).abs().max() < 1e-12
        assert (one['S'] - wanted).abs().max() < 1e-12


@pytest.mark.parametrize('mixer', ['gated_deltanet', 'hope_light', 'hope'])
def test_a_key_begins_as_the_query_of_the_token_before(mixer):
    """At first; but for the tap that a query has for the oldest token, which a key has for its own."""
    for share in (True, False):
        layer, x = tiny(mixer, share_qk=share).blocks[0].mixer, torch.randn(2, 9, 16, dtype=torch.float64)
        with torch.no_grad():
            layer.conv[0, :16] = layer.conv[-1, 16:32] = 0
            q, k, _, _ = qkv_streams(layer.qkv(x), layer.conv, None, 2)
        assert layer.qkv.out_features == (32 if share else 48)
        assert_near('keys', k[:, :, 1:], q[:, :, :-1], 1e-12)


def test_a_shared_projection_is_two_equal_ones():
    """What q and k share is as if both had it, streams and tail; with a convolution over one token keys are queries."""
    layer, x = tiny('gated_deltanet').blocks[0].mixer, torch.randn(2, 9, 16, dtype=torch.float64)
    qk, v = layer.qkv(x).chunk(2, dim=-1)
    for got, want in zip(qkv_streams(torch.cat([qk, v], dim=-1), layer.conv, None, 2),
                         qkv_streams(torch.cat([qk, qk, v], dim=-1), layer.conv, None, 2)):
        assert torch.equal(got, want)
    layer = tiny('gated_deltanet', conv_width=1).blocks[0].mixer
    q, k, _, _ = qkv_streams(layer.qkv(x), layer.conv, None, 2)
    assert_near('keys', k, q, 1e-12)
