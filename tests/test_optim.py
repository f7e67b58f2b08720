"""Every optimizer against its closed form, torch's where torch has it, and what it is stated to minimise."""
import copy

import pytest
import torch
from test_scripts import TINY, inside, losses

import optim
from model import Config, Hope
from optim import AdamW, DeepMomentum, DeltaMomentum, DGD, M3, Momentum, Muon, PreconditionedMomentum, newton_schulz

PLAIN = [Momentum, PreconditionedMomentum, AdamW, DeltaMomentum, DeepMomentum, Muon, M3]       # all that need no layers


def gradients(steps, *shape, dtype=torch.float64, seed=0):
    return torch.randn(steps, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def follow(make, grads):
    """The parameter after every step of make([parameter]) along these gradients."""
    p = torch.nn.Parameter(torch.ones_like(grads[0]))
    optimizer, path = make([p]), []
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
        path.append(p.detach().clone())
    return torch.stack(path)


# -----------------------------------------------------------------------------
# torch's


@pytest.mark.parametrize('ours, theirs, dtype, tolerance', [
    (lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
     lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1), torch.float64, 1e-14),
    (lambda p: Momentum(p, lr=1e-2), lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), torch.float64, 1e-14),
    # torch's iterates in bfloat16, whose rounding is 2^-8 of a step
    (lambda p: Muon(p, lr=1e-3, weight_decay=0.1),
     lambda p: torch.optim.Muon(p, lr=1e-3, adjust_lr_fn='match_rms_adamw'), torch.float32, 1e-3)])
@pytest.mark.parametrize('shape', [(24, 40), (40, 24)])
def test_equals_torch(ours, theirs, dtype, tolerance, shape):
    grads = gradients(50, *shape, dtype=dtype)
    a, b = follow(ours, grads), follow(theirs, grads)
    assert (a - b).abs().max() < tolerance and (a[-1] - 1).abs().max() > 10 * tolerance


# -----------------------------------------------------------------------------
# the objectives


def test_adamw_solves_its_regression():
    """With one rate of forgetting, the update is argmin_a sum_i w_i (a g_i - P)^2, P = sqrt(mean g^2)."""
    grads, beta = gradients(20, 6), 0.8
    path = follow(lambda p: AdamW(p, lr=1.0, beta1=beta, beta2=beta, eps=0.0), grads)
    w = beta ** torch.arange(20, dtype=torch.float64).flip(0)
    P = ((w[:, None] * grads.square()).sum(0) / w.sum()).sqrt()
    for i in range(6):                                      # a least squares problem for each element
        a = torch.linalg.lstsq((w.sqrt() * grads[:, i])[:, None], (w.sqrt() * P[i])[:, None]).solution.item()
        assert abs(path[-2, i] - path[-1, i] - a) < 1e-12


def test_preconditioner_of_one_gradient_is_orthogonal():
    U = 1 - follow(lambda p: PreconditionedMomentum(p, lr=1.0, average=0.0, eps=0.0), gradients(1, 5, 9))[0]
    assert torch.allclose(U @ U.T, torch.eye(5, dtype=U.dtype), atol=1e-10)


@pytest.mark.parametrize('shape', [(5, 9), (9, 5)])
def test_preconditioned_momentum(shape):
    grads, beta = gradients(20, *shape), 0.8
    got = follow(lambda p: PreconditionedMomentum(p, lr=0.1, momentum=0.7, average=beta, eps=1e-12), grads)
    W, m, H = torch.ones(shape, dtype=torch.float64), 0, 0
    for t, G in enumerate(grads, 1):
        H = beta * H + (1 - beta) * G @ G.T
        size, axes = torch.linalg.eigh(H / (1 - beta ** t))
        alive = size > 1e-9 * size[-1]                      # what no gradient has touched, P G does not either
        m = 0.7 * m + axes[:, alive] @ torch.diag(size[alive].rsqrt()) @ axes[:, alive].T @ G
        W = W - 0.1 * m
        assert torch.allclose(got[t - 1], W, atol=1e-5)
    one = 1 - follow(lambda p: PreconditionedMomentum(p, lr=1.0), gradients(1, 64, 8, dtype=torch.float32))[0]
    assert torch.linalg.svdvals(one).max() < 1.01           # a tall matrix in float32: its eigenvalues 0 are rounding


def test_delta_momentum_without_erasing_is_momentum():
    for shape in ((5, 9), (7,)):
        grads = gradients(30, *shape)
        assert torch.equal(follow(lambda p: DeltaMomentum(p, erase=0.0), grads), follow(Momentum, grads))


@pytest.mark.parametrize('shape', [(5, 9), (9, 5), (7,)])
def test_delta_momentum_descends_its_objective(shape):
    grads, path = gradients(30, *shape), torch.ones(shape, dtype=torch.float64)
    got = follow(lambda p: DeltaMomentum(p, lr=0.1, momentum=0.8, erase=0.7), grads)
    m = torch.zeros(shape, dtype=torch.float64)
    for t, G in enumerate(grads):
        m = m.detach().requires_grad_()
        E, M = (x if x.dim() == 2 else x[None] for x in (G / G.norm(), m))
        objective = 0.7 / 2 * (M @ E.T).square().sum() - (m * G).sum() + (1 - 0.8) / 2 * m.square().sum()
        m = (m - torch.autograd.grad(objective, m)[0]).detach()
        path = path - 0.1 * m
        assert torch.allclose(got[t], path, atol=1e-12)


def test_deep_momentum_starts_as_momentum_and_learns_what_comes_next():
    # a gradient that swings: the next one is the opposite of this one, which a momentum cannot say
    noise = 0.1 * gradients(300, 6, 8, seed=1)
    grads = torch.stack([(-1) ** t * (gradients(1, 6, 8)[0] + x) for t, x in enumerate(noise)])

    def worth(inner_lr):
        path = follow(lambda p: DeepMomentum(p, lr=1.0, inner_lr=inner_lr), grads)
        updates = path[:-1] - path[1:]                      # made at gradients 1 .. 299
        return torch.cosine_similarity(updates[-50:-1].flatten(1), grads[-49:].flatten(1)).mean()
    assert worth(0.0) < -0.2 < 0.8 < worth(0.1)

    m, v = torch.zeros(6, 8), 0.0                           # without learning it is momentum, in units of usual size
    path = follow(lambda p: DeepMomentum(p, lr=0.1, inner_lr=0.0), grads)
    W = torch.ones(6, 8, dtype=torch.float64)
    for t, G in enumerate(grads[:20], 1):
        m, v = 0.9 * m + 0.1 * G, 0.95 * v + 0.05 * G.square().mean()
        W = W - 0.1 * m / (1 - 0.9 ** t) / (v / (1 - 0.95 ** t)).sqrt()
        assert torch.allclose(path[t - 1], W)


def test_deep_momentum_descends_its_objective():
    grads = gradients(8, 6, 10)
    p = torch.nn.Parameter(torch.ones(6, 10, dtype=torch.float64))
    optimizer = DeepMomentum([p], inner_lr=0.5, decay=0.1)
    for t, grad in enumerate(grads):
        p.grad = grad.clone()
        before = {name: x.clone() for name, x in optimizer.stored(p).items() if name != 'step'}
        optimizer.step()
        after = optimizer.state[p]
        W1, W2 = before['W1'].requires_grad_(), before['W2'].requires_grad_()
        said = W2 @ (W1 @ before['x']).tanh()
        objective = -(said * after['x'][0]).mean() + 0.1 / 2 / 0.5 * W2.square().sum()
        for W, got, slope in zip((W1, W2), (after['W1'], after['W2']), torch.autograd.grad(objective, (W1, W2))):
            assert torch.allclose(got, W - 0.5 * slope, atol=1e-12)
    assert after['W2'].abs().max() > 0.01


# -----------------------------------------------------------------------------
# Delta Gradient Descent


def argmin(W, x, delta, lr):
    """argmin_W 1/2 |W x + delta|^2 + 1/(2 lr) |W - W_t|^2 from its normal equations, for one token."""
    A = torch.outer(x, x) + torch.eye(len(x), dtype=x.dtype) / lr
    return torch.linalg.solve(A, (W / lr - torch.outer(delta, x)).T).T


@pytest.mark.parametrize('N, parts', [(1, 1), (12, 1), (12, 3)])
def test_dgd_solves_its_regression(N, parts):
    layer = torch.nn.Linear(7, 5, dtype=torch.float64)
    bias = copy.deepcopy(layer.bias)
    optimizer = DGD(layer.parameters(), [layer], lr=0.3)
    x, target = 3 * gradients(N, 7), gradients(N, 5)        # inputs of many norms, none of them 1
    x *= torch.linspace(0.1, 2, N, dtype=x.dtype)[:, None]
    for step in range(3):
        W = layer.weight.detach().clone()
        y = x @ W.T + layer.bias.detach()
        want = torch.stack([argmin(W, x[i], y[i] - target[i], 0.3) for i in range(N)]).mean(0)
        bias = bias - 0.3 * (y - target).mean(0)            # what has no inputs falls back to gradient descent
        for a, b in zip(x.chunk(parts), target.chunk(parts)):
            ((layer(a) - b).square().sum(1).mean() / 2 / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.allclose(layer.weight, want, atol=1e-12) and torch.allclose(layer.bias, bias, atol=1e-12)


def test_dgd_does_not_change_what_the_model_says_or_hands_down():
    x, weight = gradients(6, 7).requires_grad_(), gradients(5, 7)
    layer = torch.nn.Linear(7, 5, dtype=torch.float64)
    before = layer(x)
    optimizer = DGD(layer.parameters(), [layer], lr=0.3)
    after = layer(x)
    assert torch.equal(before, after)
    dx = [torch.autograd.grad(y.cos().sum(), x)[0] for y in (before, after)]
    assert torch.allclose(*dx, atol=1e-15)
    assert optimizer.state[layer.weight]['tokens'] == 6
    with torch.no_grad():
        layer(weight)
    layer(weight)                                           # what is not followed by a backward pass leaves no trace
    assert optimizer.state[layer.weight]['tokens'] == 6


# -----------------------------------------------------------------------------
# Newton-Schulz, M3


@pytest.mark.parametrize('shape', [(32, 32), (16, 64), (3, 48, 12)])
def test_newton_schulz_singular_values(shape):
    A = gradients(1, *shape, dtype=torch.float32)[0]
    U, _, V = torch.linalg.svd(A, full_matrices=False)
    size = torch.logspace(-1.5, 0, U.shape[-1])             # condition 30
    out = newton_schulz(U * size @ V, dtype=torch.float32)
    values = torch.linalg.svdvals(out)
    assert 0.68 <= values.min() and values.max() <= 1.14
    assert (U.mT @ out @ V.mT - torch.diag_embed((U.mT @ out @ V.mT).diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-4
    assert newton_schulz(torch.zeros(shape)).abs().max() == 0


def test_m3_literal_is_algorithm_1():
    lr, b1, b2, b3, slow, f, eps = 1e-3, 0.9, 0.95, 0.8, 0.6, 8, 1e-8
    grads = gradients(40, 6, 10, dtype=torch.float32)

    W, M1, M2, V = torch.ones(6, 10), 0, torch.zeros(6, 10), 0
    path = []
    for k in range(5):
        if k > 0:
            M2 = M2 + b3 * grads[(k - 1) * f:k * f].sum(0)
        O2 = newton_schulz(M2)
        for t in range(k * f, (k + 1) * f):
            M1, V = M1 + b1 * grads[t], V + b2 * grads[t] ** 2
            W = W - lr * (newton_schulz(M1) + slow * O2) / torch.sqrt(V + eps)
            path.append(W)

    def make(p, slow=slow):
        return M3(p, lr=lr, beta1=b1, beta2=b2, beta3=b3, slow=slow, every=f, eps=eps, literal=True)
    got = follow(make, grads)
    assert (got - torch.stack(path)).abs().max() < 1e-4 and (got[-1] - 1).abs().max() > 5e-3
    without = follow(lambda p: make(p, slow=0.0), grads)
    assert torch.equal(got[:f], without[:f]) and not torch.allclose(got[f], without[f], atol=1e-4)


def test_m3_default():
    lr, b1, b2, b3, slow, f, eps = 0.1, 0.9, 0.8, 0.95, 0.6, 4, 0.05
    grads = gradients(20, 6, 10, dtype=torch.float32)
    got = follow(lambda p: M3(p, lr=lr, beta1=b1, beta2=b2, beta3=b3, slow=slow, every=f, eps=eps), grads)
    W, m1, m2, v, o2 = torch.ones(6, 10), torch.zeros(6, 10), torch.zeros(6, 10), 0, None
    for t, G in enumerate(grads):
        o2 = newton_schulz(m2) if t % f == 0 else o2
        m1, m2, v = b1 * m1 + (1 - b1) * G, b3 * m2 + (1 - b3) * G, b2 * v + (1 - b2) * G ** 2
        U = (newton_schulz(m1) + slow * o2) / (v / v.mean() + eps).sqrt()
        W = W - lr * 0.2 * U / U.square().mean().sqrt()
        assert (got[t] - W).abs().max() < 1e-4, t
    assert (got[-1] - 1).abs().max() > 0.1


def test_m3_slow_term_is_refreshed_at_the_start_of_chunks():
    p = torch.nn.Parameter(torch.ones(6, 10))
    optimizer, seen = M3([p], every=4), []
    for grad in gradients(12, 6, 10, dtype=torch.float32):
        p.grad = grad
        optimizer.step()
        seen.append(optimizer.state[p]['o2'].clone())
    assert seen[0].abs().max() == 0
    assert [torch.equal(a, b) for a, b in zip(seen, seen[1:])] == [t % 4 != 3 for t in range(11)]


def test_scale_of_the_loss():
    grads = gradients(40, 6, 10, dtype=torch.float32)
    for kind in (M3, Muon, DeepMomentum, PreconditionedMomentum):
        assert torch.allclose(follow(kind, grads), follow(kind, 1000 * grads), atol=1e-6), kind
    literal = [follow(lambda p: M3(p, literal=True, eps=1e-8), scale * grads)[-1] - 1 for scale in (1, 1000)]
    assert literal[0].norm() > 100 * literal[1].norm()      # as printed, its steps shrink as the loss grows


# -----------------------------------------------------------------------------
# every kind of parameter


def unwatched(params, **knobs):
    """DGD of parameters that are not a watched layer's: plain gradient descent."""
    return DGD(params, [], **knobs)


@pytest.mark.parametrize('kind', [*PLAIN, unwatched])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_kinds_of_parameters(kind, dtype):
    shapes = [(6, 4), (4, 6), (1, 3), (2, 3, 2, 2), (5,), ()]
    if kind in (Muon, M3):
        for shape in shapes[2], shapes[4], shapes[5]:
            with pytest.raises(AssertionError, match='give vectors to AdamW'):
                follow(kind, gradients(1, *shape))
        shapes = [shapes[i] for i in (0, 1, 3)]
    params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes for _ in range(2)]
    too_much = {AdamW: {'beta1': 1.0}, M3: {'beta1': 1.0}, unwatched: {'lr': -1.0}}.get(kind, {'momentum': 1.0})
    with pytest.raises(AssertionError, match='must be at least 0'):
        kind(params, **too_much)
    with pytest.raises(AssertionError, match='knobs are lr.* and weight_decay'):
        kind(params, beta9=0.5)
    optimizer = kind(params, lr=0.1)
    assert optimizer.step(lambda: 7.0) == 7.0 and all((p == 1).all() for p in params)      # gradients are missing
    for p in params[::2]:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all((p == 1).all() for p in params)                                              # gradients are zero
    for p in params[::2]:
        p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    assert all(p.isfinite().all() and (p != 1).all() and p.dtype == dtype for p in params[::2])
    assert all((p == 1).all() for p in params[1::2])
    params[0].grad = torch.ones(shapes[0], dtype=dtype).to_sparse()
    with pytest.raises(AssertionError, match='sparse'):
        optimizer.step()


@pytest.mark.parametrize('kind', PLAIN)
def test_gradients_that_fade(kind):
    """Squares of them underflow, and what is stored decays to nothing: nothing may come of that but rest in the end."""
    grads = torch.cat([gradients(3, 6, 4, dtype=torch.float32), 1e-25 * gradients(3, 6, 4, dtype=torch.float32),
                       torch.zeros(1200, 6, 4)])
    path = follow(kind, grads)
    assert path.isfinite().all() and (path[5] - 1).abs().max() < 10
    if kind is not M3:                                      # its slow momentum is read at full size for long
        assert (path[-1] - path[-100]).abs().max() < 1e-3


@pytest.mark.parametrize('kind', [kind for kind in PLAIN if kind is not DeepMomentum])
def test_stacked_equals_alone(kind):
    grads = gradients(20, 3, 6, 10, dtype=torch.float32)
    params = [torch.nn.Parameter(torch.ones(6, 10)) for _ in range(3)]
    optimizer = kind(params)
    for t, grad in enumerate(grads):
        for i, p in enumerate(params):
            p.grad = grad[i] if (t + 1) % (i + 1) == 0 else None       # as with levels of clocks of their own
        optimizer.step()
    for i, p in enumerate(params):
        assert torch.allclose(p, follow(kind, grads[i::i + 1, i])[-1], atol=1e-6)


@pytest.mark.parametrize('kind', PLAIN)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_state_dict(kind, dtype, tmp_path):
    grads = gradients(20, 6, 10, dtype=dtype)
    whole = follow(kind, grads)
    p = torch.nn.Parameter(torch.ones(6, 10, dtype=dtype))
    optimizer = kind([p])
    for t, grad in enumerate(grads):
        if t == 11:
            torch.save(optimizer.state_dict(), tmp_path / 'state.pt')
            optimizer = kind([p])
            optimizer.load_state_dict(torch.load(tmp_path / 'state.pt', weights_only=True))
        p.grad = grad.clone()
        optimizer.step()
    assert torch.equal(p, whole[-1])


def test_a_group_for_a_parameter_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(Hope, 'groups', {'embed.wait': 'vector'})
    with pytest.raises(AttributeError, match='wait'):
        optim.param_groups(Hope(Config(n_layer=1, n_embd=16, n_head=2)), 0.1, 1.0)


@pytest.mark.parametrize('knobs', [{}, {'tie_head': True}, {'mixer': 'attention', 'cms_periods': '1,2'}])
def test_every_parameter_has_one_optimizer(knobs):
    model = Hope(Config(**{'vocab_size': 11, 'n_layer': 2, 'n_embd': 16, 'n_head': 2, **knobs}))
    for name in optim.NAMES:
        optimizers = optim.make_optimizers(model, name, 1e-2, 0.0, 0.1, 0.1, (0.9, 0.95))
        owned = [p for one in optimizers for group in one.param_groups for p in group['params']]
        assert len(owned) == len(set(owned)) and set(owned) == set(model.parameters())
        names = {p: n for n, p in model.named_parameters()}
        groups = {names[p]: group for one in optimizers for group in one.param_groups for p in group['params']}
        for p, group in groups.items():                     # all shrink alike; what memories start with learns slower
            decays = p.endswith('weight') and 'norm' not in p and p != 'embed.weight'
            assert group['lr'] * group['weight_decay'] == pytest.approx(1e-2 * 0.1 if decays else 0.0)
            assert 1e-2 * group['lr_scale'] == pytest.approx(1e-3 if p.endswith('_0') else group['lr'])
        if name != 'adamw':
            moved = {names[p] for p in optimizers[0].param_groups[0]['params']}
            assert moved == {p for p in groups if groups[p]['weight_decay'] and p != 'head.weight'}
            assert 'blocks.0.cms.levels.0.up.weight' in moved and 'blocks.1.mixer.qkv.weight' in moved
        if name == 'dgd':                                   # its hooks see all that it moves
            idx = torch.randint(11, (2, 9))
            model(idx[:, :-1], idx[:, 1:])[1].backward()
            assert all(optimizers[0].state[p]['tokens'] == 16 for p in optimizers[0].param_groups[0]['params'])
    with pytest.raises(AssertionError, match='must be one of'):
        optim.make_optimizers(model, 'sgd', 1e-2, 0.0, 0.1, 0.1, (0.9, 0.95))


# -----------------------------------------------------------------------------
# train.py


@pytest.mark.parametrize('name', [name for name in optim.NAMES if name != 'adamw'])
def test_training_stopped_and_resumed_equals_never_stopped(name, text, tmp_path):
    own = ('--max_steps', '--eval_every', '--sample_tokens', '--warmup_steps')
    args = [arg for arg in TINY if not arg.startswith(own)]
    args += [f'--data={text}', '--mixer=gated_deltanet', f'--optimizer={name}', '--cms_periods=1,4',
             '--sample_tokens=0', '--eval_every=100', '--warmup_steps=40']      # the rate changes at every step
    inside('train.py', *args, f'--out_dir={tmp_path}/whole', '--max_steps=24')
    inside('train.py', *args, f'--out_dir={tmp_path}/cut', '--max_steps=14')    # between two moves of a slow level
    inside('train.py', '--resume', f'--out_dir={tmp_path}/cut', '--max_steps=24')
    whole = losses(f'{tmp_path}/whole')
    assert losses(f'{tmp_path}/cut') == whole and whole[24] < whole[1]
