"""The chain of truth: autograd of the written loss == token loop == tiled == compiled, with every gradient."""
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near

import kernels
from kernels import causal_conv, delta_rule, delta_rule_ref, example, forward_backward

NAMES = ('y', 'state', 'dq', 'dk', 'de', 'da', 'db', 'dc', 'dstate')


@pytest.mark.parametrize('T, C', [(1, 8), (7, 8), (8, 8), (63, 16), (100, 64), (130, 64), (65, 1), (20, 64), (200, 3)])
def test_tiled_equals_token_loop(T, C):
    inputs = example(2, 3, T, 5, torch.float64)
    fast, slow = forward_backward(delta_rule, inputs, tile=C), forward_backward(delta_rule_ref, inputs)
    for name, got, want in zip(NAMES, fast, slow):
        assert_near(name, got, want, 1e-12)


def test_tiled_equals_token_loop_float32():
    """In single precision against the loop in double precision: what is measured is the tiled form's own rounding."""
    single = example(2, 2, 300, 16)
    double = [x.detach().double().requires_grad_() for x in single]
    for name, got, want in zip(NAMES, forward_backward(delta_rule, single), forward_backward(delta_rule_ref, double)):
        assert_near(name, got, want, 1e-5)


@pytest.mark.parametrize('rates', ['abc', 'a.c', '.b.', '...'])
@pytest.mark.parametrize('T, C', [(1, 8), (7, 8), (37, 8), (16, 8)])
def test_momentum_equals_token_loop(rates, T, C):
    """Titans' S_t = mu S + c e k^T, with and without forgetting and erasing; the momentum is part of the state."""
    q, k, e, a, b, c, S = example(2, 3, T, 5, torch.float64)
    a, b, c = (x if name in rates else None for name, x in zip('abc', (a, b, c)))
    g = torch.Generator().manual_seed(1)
    mu = torch.rand(2, 3, T, generator=g, dtype=torch.float64).requires_grad_()
    P = torch.randn(2, 3, 5, 5, generator=g, dtype=torch.float64).requires_grad_()
    inputs = {name: x for name, x in zip('q k e a b c mu S P'.split(), (q, k, e, a, b, c, mu, S, P)) if x is not None}
    def results(f, **kwargs):
        y, (S_end, P_end) = f(q, k, e, a, b, c, (S, P), mu=mu, **kwargs)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        loss = (y * weights).sum() + S_end.cos().sum() + P_end.sin().sum()
        return [y, S_end, P_end, *torch.autograd.grad(loss, inputs.values())]
    names = ['y', 'S_end', 'P_end', *inputs]
    for name, got, want in zip(names, results(delta_rule, tile=C), results(delta_rule_ref)):
        assert_near(name, got, want, 1e-12)


def test_momentum_of_zero_is_the_plain_recurrence():
    q, k, e, a, b, c, S = (x.detach() for x in example(2, 2, 21, 4, torch.float64))
    y, (S_end, _) = delta_rule(q, k, e, a, b, c, (S, torch.zeros_like(S)), 8, torch.zeros_like(a))
    want = delta_rule(q, k, e, a, b, c, S, 8)
    assert_near('y', y, want[0], 1e-11)
    assert_near('state', S_end, want[1], 1e-11)


def test_reading_some_rows():
    q, k, e, a, b, c, S = (x.detach() for x in example(2, 2, 21, 4, torch.float64))
    for mu in (None, torch.full_like(a, 0.5)):
        state = S if mu is None else (S, S)
        every, some = (delta_rule(q, k, e, a, b, c, state, 8, mu, rows)[0] for rows in (None, 3))
        assert_near('y', some, every[..., :3], 1e-12)


@pytest.mark.parametrize('T, C', [(5, 8), (8, 8), (21, 8)])
@pytest.mark.parametrize('forget', [False, True])
def test_answers_that_are_known_are_not_asked_for(T, C, forget):
    """One tile, an odd one, several: the same results, and the same gradients by way of the answers."""
    inputs = example(2, 2, T, 4, torch.float64)
    q, k, e, a, b, c, S = inputs
    leaves = [x for x in inputs if forget or x is not a]

    def results(answers):
        y, end = delta_rule(q, k, e, a if forget else None, b, c, S, C, v_old=answers)
        return [y, end, *torch.autograd.grad((y * torch.linspace(-1, 1, T)[:, None]).sum() + end.cos().sum(), leaves)]
    known = results(k @ S.mT)                                           # (B, H, T, Dk) x (B, H, Dk, Dv)
    for got, want in zip(known, results(None)):
        assert_near('answers', got, want, 1e-12)
    wrong = k @ S.mT + 1
    wrong[:, :, C:] = torch.nan
    y, _ = delta_rule(q, k, e, a, b, c, S, C, v_old=wrong)
    assert y.isfinite().all() and not torch.allclose(y, known[0])       # used in the first tile, and only there


@pytest.mark.parametrize('momentum', [False, True])
@pytest.mark.parametrize('f', [lambda *args: delta_rule_ref(*args[:7], mu=args[7]),
                               lambda *args: delta_rule(*args[:7], tile=8, mu=args[7])], ids=['loop', 'tiles'])
def test_memories_that_share_their_rates(f, momentum):
    """(B, H, M, T, D) with rates (B, H, 1, T): M memories for each head, which could as well be heads themselves."""
    q, k, e, _, _, _, S = example(2, 3 * 2, 21, 4, torch.float64)
    a, b, c = example(2, 3, 21, 4, torch.float64)[3:6]

    def results(heads, rate):
        start, mu = ((heads(S), heads(S)), rate(torch.sigmoid(a))) if momentum else (heads(S), None)
        y, end = f(*(heads(x) for x in (q, k, e)), *(rate(x) for x in (a, b, c)), start, mu)
        found = [x.reshape(2, 6, *x.shape[-2:]) for x in (y, *(end if momentum else (end,)))]
        return found + list(torch.autograd.grad(sum(x.cos().sum() for x in found), (q, k, e, a, b, c, S)))
    apart = results(lambda x: x, lambda x: x.repeat_interleave(2, dim=1))
    for got, want in zip(results(lambda x: x.unflatten(1, (3, 2)), lambda x: x[:, :, None]), apart):
        assert_near('memories of a head', got, want, 1e-12)


@pytest.mark.parametrize('rates', ['...', 'a..', '.b.', '..c', 'ab.', 'a.c', '.bc', 'abc'])
@pytest.mark.parametrize('with_state', [False, True])
def test_left_out_rates_are_one_zero_one(rates, with_state):
    """None stands for a = 1, b = 0, c = 1, and no state for zeros, in both forms; value and key widths differ."""
    q, k, _, a, b, c, _ = example(2, 2, 37, 6, torch.float64)
    e, state = torch.randn(2, 2, 37, 4, dtype=torch.float64), torch.randn(2, 2, 4, 6, dtype=torch.float64)
    short = [x if name in rates else None for name, x in zip('abc', (a, b, c))]
    defaults = (1, 0, 1)
    full = [x if name in rates else torch.full_like(x, d) for name, x, d in zip('abc', (a, b, c), defaults)]
    want = delta_rule_ref(q, k, e, *full, state if with_state else torch.zeros_like(state))
    for f in (delta_rule_ref, lambda *args: delta_rule(*args, tile=16)):
        for name, got, right in zip(('y', 'state'), f(q, k, e, *short, state if with_state else None), want):
            assert_near(name, got, right, 1e-12)


def test_token_loop_is_the_written_equation():
    """One token at a time, S_t = S (a I - b k k^T) + c e k^T with the matrices written out."""
    q, k, e, a, b, c, S = (x.detach() for x in example(1, 1, 9, 4, torch.float64))
    y, last = delta_rule_ref(q, k, e, a, b, c, S)
    S, eye = S[0, 0], torch.eye(4, dtype=torch.float64)
    for t in range(9):
        k_t, e_t = k[0, 0, t, :, None], e[0, 0, t, :, None]
        S = S @ (a[0, 0, t] * eye - b[0, 0, t] * k_t @ k_t.T) + c[0, 0, t] * e_t @ k_t.T
        assert_near('y', y[0, 0, t], S @ q[0, 0, t], 1e-12)
    assert_near('state', last[0, 0], S, 1e-12)


def test_write_is_a_gradient_step():
    """With b = c = beta and a = 1 a token is a step of gradient descent on |S k - v|^2 / 2, taken here by autograd."""
    _, k, v, _, beta, _, S = (x.detach() for x in example(1, 1, 12, 4, torch.float64))
    _, last = delta_rule(None, k, v, None, beta, beta, S, tile=5)
    S = S[0, 0].clone().requires_grad_()
    for t in range(12):
        loss = 0.5 * (S @ k[0, 0, t] - v[0, 0, t]).square().sum()
        S = (S - beta[0, 0, t] * torch.autograd.grad(loss, S)[0]).detach().requires_grad_()
    assert_near('state', last[0, 0], S.detach(), 1e-12)


@pytest.mark.parametrize('rates', ['abc', 'a.c', '.b.', '...'])
def test_groups_of_tiles(rates, monkeypatch):
    """Ten tiles in groups of two, the last one padded: as in one chain, in all results and gradients."""
    q, k, e, a, b, c, S = example(2, 2, 37, 5, torch.float64)
    a, b, c = (x if name in rates else None for name, x in zip('abc', (a, b, c)))

    def results():
        y, end = delta_rule(q, k, e, a, b, c, S, tile=4)
        return [y, end, *torch.autograd.grad((y.sin().sum() + end.cos().sum()),
                                             [x for x in (q, k, e, a, b, c, S) if x is not None])]
    chain = results()
    monkeypatch.setattr(kernels, 'GROUP', 2)
    for got, want in zip(results(), chain):
        assert_near('groups', got, want, 1e-12)
    with pytest.raises(AssertionError, match='second derivatives'):
        torch.autograd.grad(delta_rule(q, k, e, a, b, c, S, tile=4)[0].sum(), k, create_graph=True)


def test_backward_of_backward():
    """Gradients of gradients exist and are right: a memory's start can be learned through its writes."""
    inputs = [x.detach()[:, :, :5].requires_grad_() for x in example(1, 1, 6, 2, torch.float64)[:6]]
    assert torch.autograd.gradgradcheck(lambda *x: delta_rule(*x, tile=3), inputs)


def test_no_overflow_when_forgetting_fast():
    """Retention of 1e-6 for a whole tile: exp(-884) must not meet exp(+884)."""
    inputs = example(1, 2, 130, 8)
    with torch.no_grad():
        inputs[3][:, :, 20:100] = 1e-6
    double = [x.detach().double().requires_grad_() for x in inputs]
    for name, got, want in zip(NAMES, forward_backward(delta_rule, inputs), forward_backward(delta_rule_ref, double)):
        if name == 'da':                        # as a gate's logit sees it: da is a small difference divided by a
            got, want = got * inputs[3], want * double[3]
        assert_near(name, got, want, 1e-4)


def test_no_queries():
    q, k, e, a, b, c, S = example(1, 2, 19, 4)
    y, state = delta_rule(None, k, e, a, b, c, S, tile=8)
    assert y is None
    assert_near('state', state, delta_rule(q, k, e, a, b, c, S, tile=8)[1], 1e-6)


def test_autocast_keeps_the_state_in_float32():
    q, k, e, a, b, c, S = (x.detach() for x in example(1, 2, 50, 8))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y, state = delta_rule(q.bfloat16(), k.bfloat16(), e.bfloat16(), a, b, c, S)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_near('y', y, delta_rule_ref(q, k, e, a, b, c, S)[0], 2e-2)


@pytest.mark.parametrize('T, tile, rates', [(7, 64, 'abc'), (700, 64, 'abc'), (600, 8, 'abc'), (600, 512, 'abc'),
                                            (90, 32, 'a.c'), (90, 32, '.b.'), (90, 32, '...')])
def test_products_in_bfloat16(T, tile, rates):
    """Sums over tiles, gates and the state stay in float32, so that errors do not grow with length; each gradient."""
    inputs = [x if name in 'qkeS' or name in rates else None for name, x in zip('qkeabcS', example(1, 2, T, 16))]
    double = [x if x is None else x.detach().double().requires_grad_() for x in inputs]

    def numbers(f, inputs, **kwargs):
        y, state = f(*inputs, **kwargs)
        loss = (y * torch.linspace(-1, 1, T, dtype=y.dtype)[:, None]).sum() + state.square().sum()
        return [y, state, *torch.autograd.grad(loss, [x for x in inputs if x is not None])]
    got = numbers(delta_rule, inputs, products=torch.bfloat16, tile=tile)
    for i, (x, want) in enumerate(zip(got, numbers(delta_rule_ref, double))):
        error = ((x - want).norm() / want.norm()).item()
        assert x.dtype == torch.float32 and 1e-5 < error < 0.02, (i, error)


def test_wrong_shapes_are_named():
    q, k, e, a, b, c, S = example(1, 2, 5, 4)
    with pytest.raises(AssertionError, match='b must be'):
        delta_rule(q, k, e, a, b[:, :, :3], c, S)
    with pytest.raises(AssertionError, match='state must be'):
        delta_rule(q, k, e, a, b, c, S[:, :1])


def test_convolution():
    x, weight = torch.randn(2, 11, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    y, tail = causal_conv(x, weight)
    assert_near('y', y, F.conv1d(F.pad(x.mT, (3, 0)), weight.mT[:, None], groups=6).mT, 1e-12)
    first, state = causal_conv(x[:, :2], weight)            # fewer tokens than the tail is long
    second, state = causal_conv(x[:, 2:], weight, state)
    assert_near('split', torch.cat([first, second], 1), y, 1e-12)
    assert_near('tail', state, tail, 1e-12)


@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile on a CPU needs a C++ compiler')
def test_compiled_equals_eager():
    inputs = example(1, 2, 40, 8)
    compiled = torch.compile(delta_rule, fullgraph=True)
    fast, eager = (forward_backward(f, inputs, tile=16) for f in (compiled, delta_rule))
    for name, got, want in zip(NAMES, fast, eager):
        assert_near(name, got, want, 1e-5)
