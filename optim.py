"""
Optimizers as memories. Read from top to bottom as one argument: an optimizer is an associative memory whose context is
the stream of gradients, and every optimizer is a choice of what it stores, against which objective, by which rule
(paper: "Optimizers as Learning Modules").

    class                           what it stores
    Momentum, DeltaMomentum         gradients, under no key; along a new one, the second makes room for it
    PreconditionedMomentum, AdamW   the map from gradients to a preconditioner, the second element by element
    DeepMomentum                    an MLP that learns online which update suits a gradient
    Muon, M3                        one momentum, or two with different clocks, read through a non-linearity
    DGD                             in the layer itself, what to answer to its inputs

    python optim.py             two races: the paper's toy surface, and a stream of orthogonal tasks
    python train.py --optimizer=m3      (adamw there is torch's, the numbers of the AdamW here in one fused kernel)

Does NOT include: schedules (train.py), closures, sparse gradients. A new one: a MatrixOptimizer, and a name in MATRIX.

Glossary
    paper       here        shape               meaning
    W_i         W           (n, rows, cols)     n parameters of one shape, each as a matrix; a vector is one row
    G_i         G           (n, rows, cols)     their gradients
    m_i         m           (n, rows, cols)     the momentum, with the sign of the gradient: W <- W - lr m
    V           v           (n, rows, cols)     average of squared gradients
    P_i         P           (n, rows, rows)     preconditioner
    alpha       momentum    number              retention of m
    eta         lr          number              learning rate; the schedule in train.py moves it
"""
import math
from operator import attrgetter

import torch

from kernels import at_least_float32


def matrix(x):
    """A parameter as a matrix: a convolution (rows, ...) flattens to (rows, cols), a vector or a number is one row."""
    return x.flatten(1) if x.dim() > 1 else x.reshape(1, -1)


class MatrixOptimizer(torch.optim.Optimizer):
    """
    What the optimizers share: W <- W - lr weight_decay W - lr U for every parameter that has a gradient. Parameters of
    one shape that have moved equally often are stacked: a rule is a few batched products. A subclass names its knobs,
    what it stores (or overrides `start`), and has the learning rule, update(G, W, s, t, o) -> U, s:

    G, W, U (n, rows, cols), U moves W; s what is stored, each (n, *shape in start); t 1 at the first gradient; o knobs
    """
    stores = ('m',)

    def __init__(self, params, **given):
        knobs = {**self.knobs, 'weight_decay': 0.0, **given}
        assert len(knobs) == len(self.knobs) + 1, f"knobs are {', '.join(self.knobs)} and weight_decay, not {given}"
        for name, x in knobs.items():
            most = 1 if name in ('momentum', 'average', 'beta1', 'beta2', 'beta3') else math.inf
            assert 0 <= x < most, f'{name} must be at least 0 and below {most}, not {x}'
            assert name != 'every' or x == int(x) >= 1, f'{name} must be a whole number of steps from 1, not {x}'
        super().__init__(params, knobs)

    def start(self, G):
        """G (rows, cols), a parameter's -> what is stored before the first gradient, {name: tensor}."""
        return {name: torch.zeros_like(G) for name in self.stores}

    def stored(self, p):
        if not self.state[p]:
            self.state[p].update(self.start(at_least_float32(matrix(p))), step=0)
        return self.state[p]

    def load_state_dict(self, state_dict):
        """As torch's, which casts what was stored to the parameter's type: here it stays as precise as it was."""
        super().load_state_dict(state_dict)
        order = [i for group in state_dict['param_groups'] for i in group['params']]
        for i, p in zip(order, (p for group in self.param_groups for p in group['params'])):
            kept = state_dict['state'].get(i, {})
            self.state[p].update({name: x.to(p.device, copy=True) for name, x in kept.items() if torch.is_tensor(x)})

    @torch.no_grad()
    def step(self, closure=None):
        """Move every parameter that has a gradient. closure, as in torch.optim, computes the loss that is returned."""
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            stacks = {}
            for p in group['params']:
                if p.grad is not None:
                    assert not p.grad.is_sparse, 'sparse gradients are not supported: make the embedding dense'
                    stacks.setdefault((p.shape, p.dtype, p.device, self.stored(p)['step']), []).append(p)
            for (*_, step), params in stacks.items():
                self.move(params, step + 1, group)
        return loss

    def move(self, params, t, group):
        """One update of parameters of one shape."""
        states = [self.state[p] for p in params]
        s = {name: torch.stack([state[name] for state in states]) for name in states[0] if name != 'step'}
        G = at_least_float32(torch.stack([matrix(p.grad) for p in params]))     # n of (rows, cols) -> (n, rows, cols)
        W = at_least_float32(torch.stack([matrix(p) for p in params]))
        U, s = self.update(G, W, s, t, group)
        W = (1 - group['lr'] * group['weight_decay']) * W - group['lr'] * U
        for i, (p, state) in enumerate(zip(params, states)):
            p.copy_(W[i].view_as(p))
            state['step'] = t
            for name, x in s.items():
                state[name].copy_(x[i])


# -----------------------------------------------------------------------------
# memories of gradients: linear, deep, and read through a non-linearity


class Momentum(MatrixOptimizer):
    """
    stores      the gradients' values, under no key (paper: "Momentum", value-less or key-less memory)
    objective   min_m  -<m, G> + (1 - momentum) / 2 |m|^2
    rule        one step of gradient descent on it: m <- momentum m + G
    """
    knobs = dict(lr=0.1, momentum=0.9)

    def update(self, G, W, s, t, o):
        m = o['momentum'] * s['m'] + G
        return m, {'m': m}


class PreconditionedMomentum(MatrixOptimizer):
    """
    stores      a map from gradients to P, here P = (average of G G^T)^-1/2 (paper: appendix on AdaGrad, outer products)
    objective   min_m  -<m G^T, P> + (1 - momentum) / 2 |m|^2
    rule        one step of gradient descent: m <- momentum m + P G

    With average = 0 only the last gradient counts and P G is orthogonal: what Muon's Newton-Schulz approximates.
    """
    knobs = dict(lr=4e-3, momentum=0.9, average=0.95, eps=1e-6)

    def start(self, G):
        return {'m': torch.zeros_like(G), 'H': G.new_zeros(len(G), len(G))}

    def update(self, G, W, s, t, o):
        H = s['H'].lerp(G @ G.mT, 1 - o['average'])                             # (n, rows, cols) x (n, cols, rows)
        size, axes = torch.linalg.eigh(H / (1 - o['average'] ** t))
        # relative to the largest, so that the loss may be scaled; what is far below it is rounding, of either sign
        floor = max(o['eps'], G.shape[1] * torch.finfo(size.dtype).eps) * size[:, -1:]
        size = size.clamp(min=0) + floor.clamp(min=torch.finfo(size.dtype).tiny)
        PG = axes @ (axes.mT @ G / size.sqrt().unsqueeze(-1))                   # (n, rows, rows) x (n, rows, cols)
        m = o['momentum'] * s['m'] + PG
        return m, {'m': m, 'H': H}


class AdamW(MatrixOptimizer):
    """
    stores      element by element, a map from gradients to the size they usually have
    objective   min_a  sum_i (a g_i - P)^2 + eps a^2  for each element, with P = sqrt(sum of g_i^2)
    rule        its exact solution a = sum(g) P / (sum(g^2) + eps), about sum(g) / sqrt(sum(g^2))

    paper: sums over all gradients    here: decaying averages, corrected for their start    because that is Adam
    """
    knobs, stores = dict(lr=4e-3, beta1=0.9, beta2=0.95, eps=1e-8), ('m', 'v')

    def update(self, G, W, s, t, o):
        m, v = s['m'].lerp(G, 1 - o['beta1']), s['v'].lerp(G.square(), 1 - o['beta2'])
        U = m / (1 - o['beta1'] ** t) / ((v / (1 - o['beta2'] ** t)).sqrt() + o['eps'])
        return U, {'m': m, 'v': v}


class DeltaMomentum(MatrixOptimizer):
    """
    stores      a map from gradients to what was written at them; what is held along a new gradient makes room for it
    objective   min_m  erase / 2 |m E^T|^2 - <m, G> + (1 - momentum) / 2 |m|^2,  with E = G / |G|
    rule        one step of gradient descent: m <- m (momentum I - erase E^T E) + G

    For a vector this is the delta rule. momentum may be near 1: old gradients then fade only where new ones speak.
    paper: m (alpha I - G^T G) - eta P G    here: E, and a rate of its own    because erasing more than all diverges
    """
    knobs = dict(lr=0.1, momentum=0.9, erase=0.5)

    def update(self, G, W, s, t, o):
        E = G / G.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
        wide = G.shape[-1] >= G.shape[-2]                                       # the smaller of E E^T and E^T E
        held = s['m'] @ E.mT @ E if wide else s['m'] @ (E.mT @ E)               # (n, rows, cols) along this gradient
        m = o['momentum'] * s['m'] - o['erase'] * held + G
        return m, {'m': m}


class DeepMomentum(MatrixOptimizer):
    """
    stores      an MLP, shared by the parameters of a shape, from an element's gradient and momentum to its update
    objective   min_MLP  -mean of MLP(x_t) G_{t+1} + decay / (2 inner_lr) |W2|^2: would more have lowered the loss?
    rule        one step of gradient descent per gradient; W moves by m + MLP(x), and MLP starts at 0: as momentum

    Gradients are measured in their running root mean square over the whole parameter, so updates are about 1; the mean
    is over a sample of the elements. Parameters that always move together share one MLP.
    paper: <MLP(G), 1>    here: the next gradient in the place of 1    because 1 lowers the output, not the loss
    """
    knobs = dict(lr=4e-3, momentum=0.9, average=0.95, inner_lr=0.1, decay=0.01)
    UNITS, SAMPLE = 4, 1024                     # hidden units; elements of a parameter that it learns from

    def start(self, G):
        angles = torch.arange(self.UNITS, dtype=G.dtype, device=G.device) * math.pi / self.UNITS
        x = self.sample(G.new_zeros(2, G.numel())).clone()                                      # (2, up to SAMPLE)
        return {'m': torch.zeros_like(G), 'v': G.new_zeros(1, 1), 'x': x,
                'W1': torch.stack([angles.cos(), angles.sin()], dim=1), 'W2': G.new_zeros(self.UNITS)}

    def sample(self, x):
        """x (.., n) -> elements at equal distances, SAMPLE of them at most."""
        return x[..., ::math.ceil(x.shape[-1] / self.SAMPLE)]

    def update(self, G, W, s, t, o):
        m = s['m'].lerp(G, 1 - o['momentum'])
        v = s['v'].lerp(G.square().mean(dim=(-2, -1), keepdim=True), 1 - o['average'])
        scale = (v / (1 - o['average'] ** t)).sqrt().clamp(min=torch.finfo(G.dtype).tiny)
        x = torch.stack([G / scale, m / (1 - o['momentum'] ** t) / scale], dim=1).flatten(2)    # (n, 2, rows cols)

        # what the MLP said at the last gradient, judged by this one
        seen = self.sample(x)                                       # (n, 2, up to SAMPLE)
        h = (s['W1'] @ s['x']).tanh()                               # (n, units, 2) x (n, 2, SAMPLE)
        dh = (1 - h.square()) * s['W2'].unsqueeze(-1) * seen[:, :1]
        dW1, dW2 = dh @ s['x'].mT / h.shape[-1], (h * seen[:, :1]).mean(-1)
        W1 = s['W1'] + o['inner_lr'] * dW1.mean(0)
        W2 = (1 - o['decay']) * s['W2'] + o['inner_lr'] * dW2.mean(0)

        # an odd function, as an update should be: (n, 1, units) x (n, units, rows cols)
        U = x[:, 1:] + W2.unsqueeze(1) @ (W1 @ x).tanh()
        return U.view_as(G), {'m': m, 'v': v, 'x': seen, 'W1': W1, 'W2': W2}


def newton_schulz(M, steps=5, dtype=None):
    """
    M (.., rows, cols) with singular values brought near 1 and its singular vectors: the nearest orthogonal matrix, up
    to 0.3 per singular value; 0 stays 0. Five steps suffice, each an odd polynomial, steep at 0 (Keller Jordan's Muon
    has the coefficients). dtype None: on CUDA bfloat16, which is enough; else float32, on a CPU up to 12 times as fast.
    """
    assert min(M.shape[-2:]) > 1, 'Newton-Schulz is for matrices: give vectors to AdamW (param_groups does)'
    tall = M.shape[-2] > M.shape[-1]
    X = M.mT if tall else M                                         # the smaller Gram matrix is (m, m)
    X = (X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype or (torch.float32, torch.bfloat16)[M.is_cuda])
    for _ in range(steps):
        A = X @ X.mT                                                # (.., m, n) x (.., n, m) -> (.., m, m)
        X = 3.4445 * X + (2.0315 * A @ A - 4.775 * A) @ X           # a X + b A X + c A^2 X
    return (X.mT if tall else X).to(M.dtype)


def large_as_adam(M):
    """The same with elements of root mean square 0.2, about that of AdamW's updates."""
    return 0.2 * math.sqrt(max(M.shape[-2:])) * newton_schulz(M)


class Muon(MatrixOptimizer):
    """
    stores      a momentum: the decaying average of gradients
    objective   its read O = argmin |O^T O - I|^2 near m: the closest matrix whose directions all count alike
    rule        five Newton-Schulz steps. As torch.optim.Muon with adjust_lr_fn='match_rms_adamw'
    """
    knobs = dict(lr=6e-3, momentum=0.95)

    def update(self, G, W, s, t, o):
        m = s['m'].lerp(G, 1 - o['momentum'])
        return large_as_adam(G.lerp(m, o['momentum'])), {'m': m}                # Nesterov: a look ahead


class M3(MatrixOptimizer):
    """
    stores      two momenta, one that follows and one that keeps, and v (paper: "Multi-scale Momentum Muon")
    objective   Muon's, for both; the slow one is read once per `every` steps, and that read is used until the next
    rule        U = (NS(m1) + slow NS(m2)) / sqrt(v)

    paper: sums                   here: decaying averages           because NS(m2) of sums is a stale NS(m1)
    paper: U as it comes          here: root mean square 0.2        because U grows as 1 / |G|, and is largest at once
    paper: a small eps            here: a tenth of v's mean         because what hardly has a gradient would move most
    literal=True is Algorithm 1 as printed: beta1, beta3, beta2 weigh the sums m1, m2, v; it takes a small eps
    """
    knobs = dict(lr=4e-3, beta1=0.95, beta2=0.95, beta3=0.99, slow=0.5, every=8, eps=0.1, literal=False)
    stores = ('m1', 'm2', 'v', 'o2')

    def update(self, G, W, s, t, o):
        # the slow read is of the gradients before this one, and stays for `every` steps
        read = newton_schulz if o['literal'] else large_as_adam
        o2 = read(s['m2']) if t % o['every'] == 1 % o['every'] else s['o2']
        if o['literal']:
            m1, m2 = s['m1'] + o['beta1'] * G, s['m2'] + o['beta3'] * G
            v = s['v'] + o['beta2'] * G.square()
            U = (read(m1) + o['slow'] * o2) / (v + o['eps']).sqrt()
        else:
            m1, m2 = s['m1'].lerp(G, 1 - o['beta1']), s['m2'].lerp(G, 1 - o['beta3'])
            v = s['v'].lerp(G.square(), 1 - o['beta2'])
            usual = v.mean(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
            U = (read(m1) + o['slow'] * o2) / (v / usual + o['eps']).sqrt()
            U = 0.2 * U / U.square().mean(dim=(-2, -1), keepdim=True).sqrt().clamp(min=1e-3)
        return U, {'m1': m1, 'm2': m2, 'v': v, 'o2': o2}


# -----------------------------------------------------------------------------
# the layer itself as an L2 memory


class DGD(MatrixOptimizer):
    """
    stores      in the layer W: what it should answer to its input x, u = -dL/dy (paper: "Delta Gradient Descent")
    objective   min_W  1/2 |W x - u|^2 + 1/(2 lr) |W - W_t|^2;  plain gradient descent is -<W x, u> in the place of it
    rule        its exact solution W_t (I - lr' x x^T) - lr' dL/dy x^T,  lr' = lr / (1 + lr |x|^2), averaged over tokens

    layers are the nn.Linear whose inputs are watched by hooks; parameters of other kinds get plain gradient descent.
    The hooks also weigh each token's part of the gradient by lr' / lr = 1 / (1 + lr |x|^2), so .grad is what the rule
    needs. Clipping it, as train.py does, shortens what is written and not what is erased.
    paper: lr' = lr / (1 + lr)    here: |x|^2 counts    because the former solves it for inputs of norm 1 alone
    """
    knobs = dict(lr=0.1)

    def __init__(self, params, layers, **given):
        super().__init__(params, **given)
        for layer in layers:
            assert self.lr_of(layer.weight) is not None, 'DGD watches a layer whose weight it does not move'
            layer.register_forward_hook(self.watch)

    def start(self, G):
        return {'xx': G.new_zeros(G.shape[1], G.shape[1]), 'tokens': G.new_zeros(1, 1)}

    def lr_of(self, p):
        return next((group['lr'] for group in self.param_groups if any(p is q for q in group['params'])), None)

    def watch(self, layer, inputs, y):
        """After layer(x): the same y, with a backward pass that tells what the rule needs to know."""
        return Watched.apply(inputs[0], layer.weight, layer.bias, y.detach(), self.lr_of(layer.weight),
                             self.stored(layer.weight))

    def update(self, G, W, s, t, o):
        U = W @ s['xx'] / s['tokens'].clamp(min=1) + G                  # (n, rows, cols) x (n, cols, cols)
        return U, {name: torch.zeros_like(x) for name, x in s.items()}


class Watched(torch.autograd.Function):
    """y = x W^T + bias, computed already. Backward weighs W's gradient, and gathers x x^T, so weighed, for the rule."""
    @staticmethod
    def forward(ctx, x, W, bias, y, lr, stored):
        ctx.save_for_backward(x, W)
        ctx.lr, ctx.stored = lr, stored
        return y.view_as(y)

    @staticmethod
    def backward(ctx, g):                                               # g (.., rows), x (.., cols)
        x, W = ctx.saved_tensors
        flat, inputs = at_least_float32(g).flatten(0, -2), at_least_float32(x).flatten(0, -2)   # (N, rows), (N, cols)
        weighed = inputs / (1 + ctx.lr * inputs.square().sum(-1, keepdim=True))
        ctx.stored['xx'] += weighed.mT @ inputs                         # (cols, N) x (N, cols)
        ctx.stored['tokens'] += len(inputs)
        dW = (flat.mT @ weighed).to(W.dtype)                            # (rows, N) x (N, cols)
        return g @ W.to(g.dtype), dW, flat.sum(0) if ctx.needs_input_grad[2] else None, None, None, None


# -----------------------------------------------------------------------------
# who moves which parameter

MATRIX = {'muon': Muon, 'm3': M3, 'momentum': Momentum, 'delta_momentum': DeltaMomentum,
          'deep_momentum': DeepMomentum, 'dgd': DGD}
NAMES = ('adamw', *MATRIX)


def param_groups(model, weight_decay, start_lr):
    """
    Every parameter in one of four groups: 'matrix', the hidden matrices; 'head'; 'vector', embeddings, convolutions,
    norms, biases and everything else that is no matrix of a layer; 'start', what memories hold before the first token,
    whose learning rate is start_lr times the others'. Language gains from 1. Recall is found sooner at 0.1: a start
    that is learned as fast as the projections answers every key alike before there is anything to recall. The first two
    decay. A module says in `groups`, {name of its parameter: group}, what the shape of a parameter does not tell.
    """
    groups = {name: {'params': [], 'weight_decay': decay, 'lr_scale': scale} for name, decay, scale in (
        ('matrix', weight_decay, 1.0), ('head', weight_decay, 1.0), ('vector', 0.0, 1.0), ('start', 0.0, start_lr))}
    said = {f'{prefix}.{name}'.lstrip('.'): group for prefix, module in model.named_modules()
            for name, group in getattr(module, 'groups', {}).items() if attrgetter(name)(module) is not None}
    for name, p in model.named_parameters():
        by_shape = 'matrix' if p.dim() == 2 and min(p.shape) > 1 else 'vector'
        groups[said.get(name, by_shape)]['params'].append(p)
    return [group for group in groups.values() if group['params']]


def make_optimizers(model, name, lr, matrix_lr, weight_decay, start_lr, betas):
    """
    The optimizer of that name for the hidden matrices, and AdamW for the rest: a list, to step one after the other.
    lr is AdamW's; matrix_lr the other's, 0: its default, in proportion to lr. Each shrinks weights by lr weight_decay.
    """
    assert name in NAMES, f"optimizer must be one of {', '.join(NAMES)}, not {name!r}"
    optimizers, groups = [], param_groups(model, weight_decay, start_lr)
    if name != 'adamw':
        matrices, *groups = groups
        layers = [layer for layer in model.modules() if getattr(layer, 'weight', None) in set(matrices['params'])]
        optimizers = [DGD([matrices], layers) if name == 'dgd' else MATRIX[name]([matrices])]
        matrix_lr = matrix_lr or optimizers[0].defaults['lr'] * lr / 4e-3       # the defaults were found beside 4e-3
        decay = weight_decay * lr / matrix_lr
        optimizers[0].param_groups[0].update(lr=matrix_lr, lr_scale=matrix_lr / lr, weight_decay=decay)
    return [*optimizers, torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)]


# -----------------------------------------------------------------------------
# python optim.py

# name: (kind, its learning rate in the stream of tasks)
RIVALS = {'Momentum': (Momentum, 0.1), 'Momentum, 0.6': (lambda p, lr: Momentum(p, lr=lr, momentum=0.6), 0.1),
          'DeltaMomentum': (DeltaMomentum, 0.1), 'DeepMomentum': (DeepMomentum, 0.03)}


def descend(optimizer, loss, steps):
    """So many steps down loss(), with a learning rate that falls to 0."""
    lr = optimizer.defaults['lr']
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def race_to_origin(steps=300, rates=(0.01, 0.02, 0.04)):
    """The paper's toy surface psi(r, theta), lowest at the origin. It names no constants: 5, 0.5 and 2 here."""
    def surface(p):
        r, theta = p.norm(), torch.atan2(p[1], p[0])
        return r ** 2 + 5 * (r - theta + torch.sin(2 * r) / 2) ** 2

    print(f'the toy surface from (-3.5, 2): distance to the lowest point after {steps} steps, lr falling to 0')
    print(f"{'':<24}" + ''.join(f'   lr {lr:.2f}' for lr in rates))
    unlearned = {'DeepMomentum, no MLP': (lambda p, lr: DeepMomentum(p, lr=lr, inner_lr=0.0), None)}
    for name, (kind, _) in {**RIVALS, **unlearned}.items():
        starts = [torch.nn.Parameter(torch.tensor([-3.5, 2.0])) for _ in rates]
        for p, lr in zip(starts, rates):
            descend(kind([p], lr=lr), lambda: surface(p), steps)
        print(f'{name:<24}' + ''.join(f'{p.norm().item():10.3f}' for p in starts))


def stream_of_tasks(rows=16, cols=64, tasks=4, steps=60):
    """One matrix learns task after task, each with inputs orthogonal to the others' (paper: eq. 45)."""
    rng = torch.Generator().manual_seed(0)
    bases = torch.linalg.qr(torch.randn(cols, cols, generator=rng))[0].chunk(tasks, dim=1)
    truth = torch.randn(rows, cols, generator=rng) / 4
    layer = torch.nn.Linear(cols, rows, bias=False)

    def loss_of(basis, n=64):                               # basis (cols, cols / tasks)
        x = torch.randn(n, basis.shape[1], generator=rng) @ basis.mT                # (n, cols)
        return (layer(x) - x @ truth.mT).square().sum(1).mean() / 2

    print('\northogonal tasks one after the other: loss of each after the last (before any, about 8)')
    print(f"{'':<24}" + ''.join(f'    task {i + 1}' for i in range(tasks)))
    others = {'AdamW': (AdamW, 0.03), 'Muon': (Muon, 0.03), 'M3': (M3, 0.03),
              'DGD': (lambda p, lr: DGD(p, [layer], lr=lr), 1.0)}
    for name, (kind, lr) in {**RIVALS, **others}.items():
        torch.nn.init.zeros_(layer.weight)
        optimizer = kind([layer.weight], lr=lr)
        for basis in bases:
            descend(optimizer, lambda: loss_of(basis), steps)
        print(f'{name:<24}' + ''.join(f'{loss_of(basis, 1000).item():10.4f}' for basis in bases))


if __name__ == '__main__':
    torch.set_num_threads(1)
    race_to_origin()
    stream_of_tasks()
