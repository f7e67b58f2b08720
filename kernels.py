"""
The hot loops: one linear recurrence drives the whole family of memories. Its token loop, and its fast form.

    S_t = S_{t-1} (a_t I - b_t k_t k_t^T) + c_t e_t k_t^T          y_t = S_t q_t            S in R^{Dv x Dk}

A memory S is a matrix that maps keys to values. At every token it keeps a fraction a_t of what it holds, erases a
fraction b_t of what it would have answered to the key k_t, and writes c_t of the new content e_t at that key. memory.py
shows how linear attention, RetNet, Mamba-2, DeltaNet, Gated DeltaNet and TTT-Linear are choices of
(a, b, c, e). With momentum (mu) the writes are gathered first, as Titans does:

    P_t = mu_t P_{t-1} + c_t e_t k_t^T                              S_t = S_{t-1} (a_t I - b_t k_t k_t^T) + P_t

A memory with a hidden layer is two such matrices: what is written in each is its share of one gradient
(mlp_memory_grad).

    python kernels.py              checks the tiled form against the token loop and times both
    python kernels.py --compile    the torch.compile'd form as well (its first call takes a minute on a CPU)

Does NOT include: hand-written Triton or CUDA.

Glossary (paper: "Self-Referential Titans" and "Fast and Parallelizable Training"; column vectors, y = W x)
    paper       here    shape               meaning
    M_t         state   (B, H, Dv, Dk)      the memory
    k_t, q_t    k, q    (B, H, T, Dk)       the key written at, the query read with
    -dL/dy      e       (B, H, T, Dv)       what is written
    alpha_t     a       (B, H, T)           retention in (0, 1]; 1 keeps everything
    -           b       (B, H, T)           erase rate
    eta_t       c       (B, H, T)           write rate
    S_t         P       (B, H, Dv, Dk)      momentum, in Titans' notation; mu (B, H, T) its decay in [0, 1)
    W_2, W_1    W2, U   (.., m, Dk), (.., Dv, Dk + m)   the layers of an MLP memory, m hidden units
    B batch, H heads, T time, Dk key width, Dv value width, C tile, N number of tiles, W width of a convolution
    B, H may be any leading axes; the rates a, b, c, mu may have a 1 where several memories share them
"""
import torch
import torch.nn.functional as F

from scan import Scan

GROUP = 16                  # tiles that wait for each other; from four times as many on, groups of them go side by side

# -----------------------------------------------------------------------------
# the recurrence, token by token


def delta_rule_ref(q, k, e, a, b, c, state=None, mu=None):
    """
    The token loop: the equation at the top of this file, in any dtype. Everything else is tested against it.

    q     (B, H, T, Dk) or None     queries; None skips the reads and returns y = None
    k     (B, H, T, Dk)             keys
    e     (B, H, T, Dv)             what is written
    a     (B, H, T) or None         retention in (0, 1]; None keeps everything (a = 1)
    b     (B, H, T) or None         erase rate;          None erases nothing   (b = 0)
    c     (B, H, T) or None         write rate;          None writes e as is   (c = 1)
    state (B, H, Dv, Dk) or None    the memory before the first token; None is empty (zeros)
    mu    (B, H, T) or None         decay of the momentum; the state is then the pair (memory, momentum)
    returns y (B, H, T, Dv), each token's read after its own write, and the state after the last token
    """
    S, P = start(q, k, e, a, b, c, state, mu)
    y = []
    for t in range(k.shape[-2]):
        write = e[..., t, :] if c is None else c[..., t, None] * e[..., t, :]   # (B, H, Dv)
        write = torch.einsum('...v,...k->...vk', write, k[..., t, :])       # (B, H, Dv) x (B, H, Dk) -> (B, H, Dv, Dk)
        if mu is not None:
            write = P = mu[..., t, None, None] * P + write
        if b is not None:                                                   # less what S answers already
            old = b[..., t, None] * torch.einsum('...vk,...k->...v', S, k[..., t, :])
            write = write - torch.einsum('...v,...k->...vk', old, k[..., t, :])
        S = write + (S if a is None else a[..., t, None, None] * S)
        if q is not None:
            y.append(torch.einsum('...vk,...k->...v', S, q[..., t, :]))     # (B, H, Dv, Dk) x (B, H, Dk) -> (B, H, Dv)
    return (None if q is None else torch.stack(y, dim=-2)), (S if mu is None else (S, P))


def start(q, k, e, a, b, c, state, mu):
    """The memory and its momentum before the first token; zeros for what is not given. Checks every shape."""
    S, P = state if mu is not None and state is not None else (state, None)
    check_shapes(q, k, e, a, b, c, mu, S, P)
    S = k.new_zeros(*k.shape[:-2], e.shape[-1], k.shape[-1]) if S is None else S
    return S, torch.zeros_like(S) if P is None and mu is not None else P


# -----------------------------------------------------------------------------
# the same numbers, a tile of tokens at a time


def delta_rule(q, k, e, a, b, c, state=None, tile=64, mu=None, rows=None, v_old=None, products=None):
    """
    delta_rule_ref's arguments and results, computed `tile` tokens at a time. rows: how many of the first rows of S
    are read, y (B, H, T, rows); None reads all of them. v_old (B, H, T, Dv): what the given state answers to every
    key, k S^T, from one who has it and erases (b); the first tile then need not ask. products: the type of what is
    multiplied (product_type); None: float32 or better, as gates and states are anyway. Neither goes with momentum.

    With g_t = log a_1 + ... + log a_t counted from the tile's start, and S_0 the memory there, the recurrence is
        S_t = exp(g_t) S_0 + sum_{s<=t} exp(g_t - g_s) n_s k_s^T,       n_t = c_t e_t - b_t S_{t-1} k_t
    where n_t is what token t really writes. It depends on S_0 and on the tokens before it in the tile, linearly:
        (I + A) N = diag(c) E - diag(b/a exp(g)) K S_0^T,               A_ts = b_t/a_t exp(g_t - g_s) k_t.k_s  for s < t
    (/a because token t erases before it decays: exp(g_{t-1}) = exp(g_t) / a_t.) The inverse of I + A does not need S_0,
    so all tiles compute it at once; what is left for a loop over tiles is three small products (scan.py; many tiles in
    groups). All exponents are <= 0, so nothing overflows however fast the memory forgets. Autocast has no say here:
    products has.

    With momentum a write of token s has grown, by the time t, to R_ts times itself,
        R_ts = sum_{s<=r<=t} exp(g_t - g_r) exp(h_r - h_s),             h_t = log mu_1 + ... + log mu_t
    which is one more product of two C x C matrices. What is erased, -b_t S_{t-1} k_t, takes no part in the momentum and
    still solves the triangular system.
    """
    S, P = start(q, k, e, a, b, c, state, mu)
    T, axis = k.shape[-2], k.dim() - 2
    assert T >= 1 and tile >= 1, f'needs a token and a tile of one, got T={T}, tile={tile}'
    assert mu is None or v_old is None and products is None, 'v_old and products are for memories without momentum'
    assert v_old is None or v_old.shape == e.shape and b is not None, 'v_old is as e, and of use where b erases'
    C = min(tile, T)
    N = -(-T // C)                                                          # tiles, and how many groups of them
    groups = -(-N // GROUP) if N >= 4 * GROUP and mu is None and v_old is None else 1
    if mu is not None and T % C:            # padding does not leave a momentum alone: the odd tail is its own tile
        whole, tail = ([None if x is None else x.narrow(axis, *part) for x in (q, k, e, a, b, c, mu)]
                       for part in ((0, T - T % C), (T - T % C, T % C)))
        y1, state = delta_rule(*whole[:6], state, C, whole[6], rows)
        y2, state = delta_rule(*tail[:6], state, C, tail[6], rows)
        return (None if q is None else torch.cat([y1, y2], dim=-2)), state
    with torch.autocast(k.device.type, enabled=False):
        # a token of padding keeps everything, erases nothing and writes nothing: the final state does not see it
        pads = (q, 0), (k, 0), (e, 0), (a, 1), (b, 0), (c, 0), (mu, 0), (v_old, 0)
        *parts, mu, v_old = (tiled(x, axis, C, -(-N // groups) * groups, pad) for x, pad in pads)
        S = S.to(parts[1].dtype)
        if mu is None:
            y, S = delta_rule_tiles(*parts, S, rows, v_old, products or S.dtype, groups)
        else:
            y, S, P = momentum_tiles(*parts, mu, S, P.to(S.dtype), rows)
    return (None if y is None else y.flatten(-3, -2)[..., :T, :].to(e.dtype)), (S if mu is None else (S, P))


def delta_rule_tiles(q, k, e, a, b, c, S, rows, v_old, products, groups):
    """
    delta_rule on whole tiles: q, k (B, H, N, C, Dk), e, v_old (B, H, N, C, Dv), a, b, c (B, H, N, C),
    S (B, H, Dv, Dk). groups: see Scan.
    """
    C = k.shape[-2]
    def near(x): return None if x is None else x.to(products)               # as it is multiplied
    past = log_past(C, k)
    decay, k_end, q_start, keep_all = past.exp(), k, q, None                # with nothing forgotten
    if a is not None:
        a = a.clamp(min=1e-12)                                              # its logarithm must be finite
        g = a.log().cumsum(-1)                                              # (B, H, N, C)
        decay = (g[..., :, None] - g[..., None, :] + past).exp()            # (B, H, N, C, C)
        k_end = (g[..., -1:] - g).exp()[..., None] * k                      # what the tile's end holds of each write
        q_start = None if q is None else g.exp()[..., None] * q             # what each read still finds of S_0
        keep_all = g[..., -1, None, None].exp().expand(*k.shape[:-2], 1, 1)     # (B, H, N, 1, 1)

    write = e if c is None else c[..., None] * e                            # (B, H, N, C, Dv)
    A, inverse, k_erase = None, None, None
    if b is not None:
        erase = b if a is None else b / a                                   # (B, H, N, C)
        A = matmul_nt(near(erase[..., None] * k), near(k)) * decay          # (.., C, Dk) x (.., Dk, C) -> (.., C, C)
        inverse = unit_lower_inverse(A)
        erase = (erase if a is None else g.exp() * erase)[..., None]        # what of S_0's answers is erased
        k_erase = erase * k                                                 # (B, H, N, C, Dk)
        if v_old is not None:             # by a mask: the first tile cut off and put back would be one copy more
            first = (torch.arange(k.shape[-3], device=k.device) == 0)[:, None, None]
            write, k_erase = write - torch.where(first, erase * v_old, 0), k_erase[..., 1:, :, :]

    starts, writes, S = Scan.apply(S, near(write), A, near(inverse), near(k_erase), near(k_end), keep_all, groups)
    if q is None:
        return None, S

    # the reads of all tiles: what each tile's start still holds, and what the tile's own tokens wrote
    y = matmul_nt(near(q_start), starts[..., :rows, :])                     # (.., C, Dk) x (.., Dk, Dv) -> (.., C, Dv)
    scores = near(matmul_nt(near(q), near(k)) * decay)                      # (.., C, Dk) x (.., Dk, C) -> (.., C, C)
    return y.to(S.dtype) + scores @ writes[..., :rows], S                   # (.., C, C) x (.., C, Dv) -> (.., C, Dv)


def momentum_tiles(q, k, e, a, b, c, mu, S, P, rows):
    """delta_rule_tiles with momentum: mu (B, H, N, C), P (B, H, Dv, Dk) as S; returns y, S, P."""
    C = k.shape[-2]
    past = log_past(C, k)
    log_a, log_mu = (torch.zeros_like(mu) if x is None else x.clamp(min=1e-12).log() for x in (a, mu))
    g, h = log_a.cumsum(-1), log_mu.cumsum(-1)                                  # (B, H, N, C)
    decay, gather = ((x[..., :, None] - x[..., None, :] + past).exp() for x in (g, h))
    grown = decay @ gather                                                      # (.., C, C) x (.., C, C): R above
    from_P = decay @ h.exp()[..., None]                                        # (.., C, 1): what P_0 has added to S_t
    before = F.pad(grown, (0, 0, 1, -1)), F.pad(from_P, (0, 0, 1, -1))           # the same, a token earlier

    write = e if c is None else c[..., None] * e                                # (.., C, Dv)
    keep_S, keep_P = (x[..., -1, None, None].exp().unbind(-3) for x in (g, h))
    k_decay, k_grown, k_gather = (x[..., -1, :, None] * k for x in (decay, grown, gather))  # what each write leaves
    add_S, add_P = ((write.mT @ x).unbind(-3) for x in (k_grown, k_gather))     # (.., Dv, C) x (.., C, Dk)
    if b is not None:
        k_b = b[..., None] * k                                                  # (.., C, Dk)
        overlap = matmul_nt(k_b, k)                                             # (.., C, Dk) x (.., Dk, C)
        inverse = unit_lower_inverse(overlap * decay * (-log_a).exp()[..., None])
        known = (overlap * before[0]) @ write                                   # what earlier writes would answer
        k_S, k_P = (g - log_a).exp()[..., None] * k_b, before[1] * k_b
        inverse, known, k_S, k_P, k_decay = (x.unbind(-3) for x in (inverse, known, k_S, k_P, k_decay))

    S_starts, P_starts, erased = [], [], []
    for n in range(k.shape[-3]):
        S_starts.append(S)
        P_starts.append(P)
        S = keep_S[n] * S + from_P[..., n, -1:, :] * P + add_S[n]
        if b is not None:
            old = k_S[n] @ S_starts[n].mT + k_P[n] @ P.mT + known[n]            # (.., C, Dk) x (.., Dk, Dv)
            erased.append(inverse[n] @ old)                                     # (.., C, C) x (.., C, Dv)
            S = S - erased[n].mT @ k_decay[n]                                   # (.., Dv, C) x (.., C, Dk)
        P = keep_P[n] * P + add_P[n]
    if q is None:
        return None, S, P

    # the reads of all tiles: what each start still holds, what its momentum has added, and the tile's own tokens
    S_starts, P_starts = (torch.stack(x, dim=-3)[..., :rows, :] for x in (S_starts, P_starts))
    scores = matmul_nt(q, k)                                                    # (.., C, Dk) x (.., Dk, C)
    y = g.exp()[..., None] * matmul_nt(q, S_starts) + from_P * matmul_nt(q, P_starts)    # (.., C, Dk) x (.., Dk, Dv)
    y = y + (scores * grown) @ write[..., :rows]                                # (.., C, C) x (.., C, Dv)
    if b is not None:
        y = y - (scores * decay) @ torch.stack(erased, dim=-3)[..., :rows]
    return y, S, P


def log_past(C, x):
    """
    The logarithm of what token t sees of token s, (C, C) like x: 0 where s <= t, -inf where s is to come. Added to
    exponents it needs no mask in the backward; compiled, it is made once, where loops would each compare.
    """
    place = torch.arange(C, device=x.device, dtype=x.dtype)
    return (place[:, None] >= place).to(x.dtype).log()


def unit_lower_inverse(A):
    """(..., C, C) -> (I + A)^-1 for the strictly lower part of A; what stands on and above its diagonal is not read."""
    # laid out by columns, like the copy that the solver makes and solves in: else that takes as long as all the rest
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).mT.expand_as(A)
    # X (I + A) = I takes half to three quarters of the time of (I + A) X = I
    return torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True, left=False)


class MatmulNT(torch.autograd.Function):
    """x y^T (NT: not transposed, transposed) whose backward gives y's gradient row by row."""
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x @ y.mT                                                     # (.., n, d) x (.., d, m) -> (.., n, m)

    @staticmethod
    def backward(ctx, d):
        x, y = ctx.saved_tensors
        return d @ y, d.mT @ x                                              # (.., m, n) x (.., n, d) -> (.., m, d)


def matmul_nt(x, y):
    """
    x (.., n, d), y (.., m, d), leading axes broadcast -> x y^T (.., n, m). Compiled, it has a backward of its own:
    autograd makes the gradient of y^T, and each loop that then reads it as y's would gather its columns.
    """
    return MatmulNT.apply(x, y) if torch.compiler.is_compiling() else x @ y.mT


def product_type(x):
    """
    The type in which memory.py and light.py multiply: autocast's, where it is on and has a say (not of float64), else
    x's own, float32 at least. titans.py stays in float32.
    """
    full, device = at_least_float32(x).dtype, x.device.type
    autocast = torch.is_autocast_enabled(device) and full == torch.float32
    return torch.get_autocast_dtype(device) if autocast else full


def tiled(x, axis, C, N, pad):
    """(B, H, T, ...) -> (B, H, N, C, ...) in float32 or better, the last tiles filled up with pad; None stays None."""
    if x is None:
        return None
    missing = N * C - x.shape[axis]
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - axis - 1) + (0, missing), value=pad)
    return at_least_float32(x).unflatten(axis, (-1, C))


def at_least_float32(x):
    """Half precision becomes float32; float32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_shapes(q, k, e, a, b, c, mu, S, P):
    """One assert per argument of delta_rule, so that a wrong call fails by name."""
    assert k.dim() >= 3, f'k must be (B, H, T, Dk), got {tuple(k.shape)}'
    *lead, T, Dk = k.shape
    assert q is None or q.shape == k.shape, f'q must have the shape of k {tuple(k.shape)}, got {tuple(q.shape)}'
    assert e.shape[:-1] == k.shape[:-1], f'e must be (B, H, T, Dv) = {(*lead, T)} and Dv, got {tuple(e.shape)}'
    for name, x in (('a', a), ('b', b), ('c', c), ('mu', mu)):
        if x is not None:
            fits = x.dim() == k.dim() - 1 and x.shape[-1] == T and all(n in (1, m) for n, m in zip(x.shape, lead))
            assert fits, f'{name} must be (B, H, T) = {(*lead, T)}, got {tuple(x.shape)}'
    want = (*lead, e.shape[-1], Dk)
    for name, x in (('state', S), ('momentum', P)):
        assert x is None or x.shape == want, f'{name} must be (B, H, Dv, Dk) = {want}, got {tuple(x.shape)}'


# -----------------------------------------------------------------------------
# a memory with a hidden layer


def mlp_memory(W2, U, z):
    """
    M(z) = U [z; hidden(W2 z)]:  W2 (.., m, Dk), U (.., Dv, Dk + m), z (.., T, Dk)
    returns M(z) (.., T, Dv), the output layer's input x = [z; hidden(W2 z)] (.., T, Dk + m), and u = W2 z (.., T, m)
    paper: M(z) = z + W_1 silu(W_2 z)   here: the skip connection is a matrix that is written like the others, because
    the memory then contains the linear ones (U = [S, 0]); U = [I, W_1] is the paper's.
    """
    u = z @ W2.mT                                                           # (.., T, Dk) x (.., Dk, m) -> (.., T, m)
    x = torch.cat([z.expand(*u.shape[:-1], -1), hidden(u)], dim=-1)
    return x @ U.mT, x, u                                                   # (.., T, Dk + m) x (.., Dk + m, Dv)


def hidden(u):
    """
    What the hidden layer makes of u (.., m): silu(u) / sqrt(m). The root keeps it as short as a key: without
    it the output layer tells keys apart by m random features rather than by the keys, and recall is learned late.
    """
    return F.silu(u) * u.shape[-1] ** -0.5


def mlp_memory_grad_ref(W2, U, k, v, objective='l2'):
    """
    One token's inner gradient by autograd: k (Dk,), v (Dv,), W2 (m, Dk), U (Dv, Dk + m) -> -dL/dW2, -dL/dU of
    L = |M(k) - v|^2 / 2 ('l2') or -<M(k), v> ('dot'), v held constant (paper: "Self-Referential Titans").
    Differentiable itself, so that the outer loss can learn through it.
    """
    if not W2.requires_grad:
        W2, U = W2.detach().requires_grad_(), U.detach().requires_grad_()
    W2, U = W2.view_as(W2), U.view_as(U)        # v may have come from the memory itself: only this use of it counts
    y = mlp_memory(W2, U, k[None])[0][0]
    loss = 0.5 * (y - v).square().sum() if objective == 'l2' else -(y * v).sum()
    return tuple(-g for g in torch.autograd.grad(loss, (W2, U), create_graph=True))


def mlp_memory_grad(W1, u, error):
    """
    The same for all tokens at once, and without the outer products: token t's share of -dL/dW2 is e_t k_t^T and that of
    -dL/dU is error_t x_t^T. u = W2 k (.., T, m), error (.., T, Dv) is -dL/dM(k): v - M(k) for 'l2', v for 'dot', and W1
    (.., Dv, m) the columns of U that read the hidden layer. Returns e = hidden'(u) * (W1^T error) (.., T, m).
    """
    s = torch.sigmoid(u)
    slope = s * (1 + u * (1 - s)) * u.shape[-1] ** -0.5
    return slope * (error @ W1)                                             # (.., T, Dv) x (.., Dv, m) -> (.., T, m)


# -----------------------------------------------------------------------------
# the local convolution


def causal_conv(x, weight, state=None):
    """
    Causal depth-wise convolution, every channel over its own last W tokens: y_t = sum_i weight[i] x_{t - W + 1 + i}.
    x (B, T, D), weight (W, D), state (B, W - 1, D) = the tail of the tokens before x, or None (zeros)
    -> y (B, T, D) and the new tail. paper: "local convolutions with window size 4", nothing more.
    """
    (B, T, D), W = x.shape, len(weight)
    assert weight.shape[1] == D, f'weight must be (W, {D}), got {tuple(weight.shape)}'
    assert state is None or state.shape == (B, W - 1, D), f'state must be ({B}, {W - 1}, {D}), got {tuple(state.shape)}'
    tail = x.new_zeros(B, W - 1, D) if state is None else state.to(x.dtype)
    x = torch.cat([tail, x], dim=1)                                             # (B, W - 1 + T, D)
    # W shifted products read as the formula does, and on a CPU they are faster than conv1d with one group per channel
    y = sum(w.to(x.dtype) * x[:, i:i + T] for i, w in enumerate(weight))        # (D,) x (B, T, D)
    # a copy, as a view would keep all of x alive; in two parts, as torch.compile drops a clone
    return y, torch.cat([x[:, T:T + 1], x[:, T + 1:]], dim=1)


# -----------------------------------------------------------------------------
# python kernels.py


def example(B, H, T, D, dtype=torch.float32, seed=0):
    """Random inputs of a Gated DeltaNet: unit keys, retention near 1, all differentiable. -> q, k, e, a, b, c, state"""
    rng = torch.Generator().manual_seed(seed)
    def randn(*shape): return torch.randn(*shape, generator=rng, dtype=dtype)
    q, k, e = F.normalize(randn(B, H, T, D), dim=-1), F.normalize(randn(B, H, T, D), dim=-1), randn(B, H, T, D)
    a, b, c = torch.sigmoid(randn(B, H, T) + 4), torch.sigmoid(randn(B, H, T)), torch.sigmoid(randn(B, H, T))
    return [x.requires_grad_() for x in (q, k, e, a, b, c, randn(B, H, D, D))]


def forward_backward(f, inputs, **kwargs):
    """Outputs, final state and the gradient of every input for one fixed loss."""
    y, state = f(*inputs, **kwargs)
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)).sum() + state.cos().sum()
    return [y, state, *torch.autograd.grad(loss, inputs)]


def main(compiled):
    import time
    torch.set_num_threads(1)
    small = example(2, 2, 130, 16, torch.float64)
    both = zip(*(forward_backward(f, small) for f in (delta_rule_ref, delta_rule)))
    print('tiled against the token loop, float64, T=130, tile 64, largest difference\n  ' + '  '.join(
        f'{name} {(x - y).abs().max():.0e}' for name, (x, y) in zip('y state dq dk de da db dc dstate'.split(), both)))

    inputs, base = example(4, 4, 512, 64), None
    forms = [('token loop', delta_rule_ref, {})] + [(f'tile {C}', delta_rule, {'tile': C}) for C in (16, 32, 64)]
    forms += [('tile 64, compiled', torch.compile(delta_rule), {'tile': 64})] * compiled
    print('forward + backward, B=4 H=4 T=512 Dk=Dv=64, float32, one thread')
    for name, f, kwargs in forms:
        times = [time.perf_counter()]
        for _ in range(2 if f is delta_rule_ref else 3):
            forward_backward(f, inputs, **kwargs)
            times.append(time.perf_counter())
        seconds = min(b - a for a, b in zip(times, times[1:]))      # the first call warms up or compiles
        base = base or seconds
        print(f'  {name:<20} {1e3 * seconds:8.1f} ms   {base / seconds:5.1f} x the token loop')


if __name__ == '__main__':
    import sys
    main(compiled='--compile' in sys.argv[1:])
