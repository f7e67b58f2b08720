"""
Hope's memory, made light: it writes itself where that costs little. Two linear recurrences in the place of a chain of
chunks, so that training takes three quarters of hope's time on a CPU, and a third of its launches on a GPU.

    paper: all layers of a memory are written, and memories generate keys, values and gates
    here:  the output layer is written, and a memory generates the gates
    because the rest gains nothing at our size (results/records.md), and what is left needs no chunk to end before the
    next begins, but for the two numbers a token that the gates are moved by

    y, state = LightMemory(config)(x, state)        x, y (B, T, D)
    python light.py         the fast form beside the equations, token by token

Does NOT include: memories that generate keys, queries or values, written hidden layers, momentum (titans.py has them).

Glossary (paper: "Self-Referential Titans"; column vectors, y = W x)
    paper       here        shape               meaning
    M_memory    W, U        (m, d), (d, d + m)  the memory that is read, M(s) = U [s; hidden(W s)]; W is learned
    -           S           (B, H, d, d + m)    what was written: U less its learned start, [0, out_0]
    M_alpha,eta G           (2, d)              the rows that move the gates: linear memories of one number each
    -           R           (B, H, 2, d)        what was written of them: G less its learned start, gates_0
    alpha, eta  alpha, beta (B, H, T)           retention; write gate
    xi          *_xi        of R                as it stood at the chunk's start
    B batch, H heads, T time, C chunk, D model width, d = D / H, m hidden units
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import at_least_float32, delta_rule, hidden, matmul_nt, product_type
from memory import MemoryLayer, chunk_sizes, qkv_streams, recall_before, retain, unit, write_rate

LIGHT = {'hope_light': dict(self_values=False, objective='dot', dgd=True, memory_momentum=False, forget=True)}
UNROLLED = 16               # chunks of gates that are compiled as one piece of code: more compile for minutes


# -----------------------------------------------------------------------------
# the cell on a blackboard


def light_ref(layer, x):
    """One sequence, x (T, D) -> y (T, D): a token at a time, the weights themselves, inner gradients by autograd."""
    q, k, v, _ = qkv_streams(layer.qkv(x)[None], layer.conv, None, layer.n_head)    # three of (1, H, T, d)
    alpha, beta = layer.alpha(x).mT, layer.beta(x).mT                               # (H, T), before the sigmoid
    y = [head_ref(layer, i, q[0, i], k[0, i], unit(v)[0, i], alpha[i], beta[i]) for i in range(layer.n_head)]
    return layer.emit(torch.stack(y)[None], x[None])[0]                             # H of (T, d) -> (T, D)


def head_ref(layer, i, q, k, v, ax, bx):
    """light_ref for head i: q, k, v (T, d), ax, bx (T,) what x says of its gates -> y (T, d)."""
    o, W, y = layer.config, layer.W[i], []
    U_0, G_0 = layer.start()[i], None if layer.gates_0 is None else layer.gates_0[i]
    U, G, shift = U_0, G_0, layer.beta_shift[i]

    def features(s):
        return torch.cat([s, hidden(W @ s)])

    def descend(weights, start, alpha, rate, at, loss):
        """A step down the gradient of loss at `at`, from the weights as far as they are kept; None: at these."""
        kept = start + alpha * (weights - start)
        at = kept if at is None else at
        return kept - rate * torch.autograd.grad(loss(at), at, create_graph=True)[0]

    for t in range(len(q)):
        if t % o.projection_chunk == 0:
            G_xi = G

        # 1   alpha = sigmoid(a.x + G_xi[0].k)     beta = sigmoid(b.x + G_xi[1].k), G_xi times gate_gain (1)
        g = (0, 0) if G is None else o.gate_gain * (G_xi @ k[t])
        alpha, beta = retain(ax[t] + g[0], o.gate_floor), bx[t] + g[1] + shift[0]

        # 2   y = M(q), before the token is written
        before = U @ features(q[t])

        # 3   U <- U' - beta d/dU |U' x - v|^2 / 2 / |x|^2,     U' = U_0 + alpha (U - U_0),   x = [k; hidden(W k)]
        x = features(k[t])
        rate = (2 if o.negative_eigenvalues else 1) * write_rate(beta, o.gate_floor) / x.square().sum().clamp(min=1)
        U = descend(U, U_0, alpha, rate, None, lambda U: (U @ x - v[t]).square().sum() / 2)

        # 4   G <- G' - 2 / C beta_G d/dG |G_xi k - tanh(G_xi v)|^2 / 2,  the value, tanh, one that it makes itself
        if G is not None:
            rate = 2 / o.projection_chunk * write_rate(beta, o.gate_floor, shift[1])
            value = torch.tanh(G_xi @ v[t])
            at = G_xi.view_as(G_xi)                     # only this use of it counts: the value is a target
            G = descend(G, G_0, alpha, rate, at, lambda at: (at @ k[t] - value).square().sum() / 2)
        y.append(before if o.memory_read == 'before' else U @ features(q[t]))
    return torch.stack(y)


# -----------------------------------------------------------------------------
# the layer


class LightMemory(MemoryLayer):
    """
    In each head one memory that is written at every token, by Delta Gradient Descent, and two rows that move its gates.

    state   S (B, H, d, d + m), R (B, H, 2, d): differences from the learned starts; R_xi, R at the chunk's start;
            place, tokens since then; conv
    """
    groups = {'conv': 'vector', 'beta_shift': 'vector', 'W': 'start', 'gates_0': 'start', 'out_0': 'start'}

    def __init__(self, config):
        super().__init__(config)
        D, H = config.n_embd, config.n_head
        self.config, d, m = config, D // H, config.memory_hidden or D // H // 2
        self.alpha, self.beta = nn.Linear(D, H), nn.Linear(D, H)
        self.W = nn.Parameter(torch.empty(H, m, d))
        self.out_0 = nn.Parameter(torch.empty(H, d, m))
        self.gates_0 = nn.Parameter(torch.empty(H, 2, d)) if 'g' in config.adaptive else None
        self.beta_shift = nn.Parameter(torch.empty(H, 2))

    def init_memory(self):
        """As hope's (titans.py): keys of norm 1 give pre-activations of size 1, and nothing is answered at first."""
        self.W.normal_()
        self.out_0.zero_()
        self.beta_shift[:, 0], self.beta_shift[:, 1] = 0, max(-3, self.config.generate_shift)
        if self.gates_0 is not None:
            self.gates_0.zero_()

    def start(self):
        """U before the first token (H, d, d + m): the linear part starts empty."""
        return F.pad(self.out_0, (self.W.shape[2], 0))

    def init_state(self, batch_size, device=None):
        """Nothing written yet. In training it requires a gradient, as later states do: one compiled graph for both."""
        (H, m, d), options = self.W.shape, dict(
            device=device, dtype=self.W.dtype, requires_grad=torch.is_grad_enabled())
        state = {'S': torch.zeros(batch_size, H, d, d + m, **options), 'place': 0,
                 'conv': torch.zeros(batch_size, len(self.conv) - 1, self.conv.shape[1], **options)}
        R = torch.zeros(batch_size, H, 2, d, **options)
        return state | ({} if self.gates_0 is None else {'R': R, 'R_xi': R})

    @torch.compiler.disable
    def opened(self, state, x):
        """
        The state, where there is one; and whether x is few whole chunks. torch.compile stops here: so it makes code for
        one block, which all use, and not for all of them at once, with every chunk of each, which would compile for
        minutes and be a tenth faster.
        """
        state, C = state or self.init_state(len(x), x.device), self.config.projection_chunk
        return state, state['place'] == x.shape[1] % C == 0 and x.shape[1] <= UNROLLED * C

    def forward(self, x, state=None):
        state, few = self.opened(state, x)
        q, k, v, tail = qkv_streams(self.qkv(x), self.conv, state['conv'], self.n_head)     # three of (B, H, T, d)
        alpha, beta = (at_least_float32(gate(x)).mT for gate in (self.alpha, self.beta))    # (B, T, H) -> (B, H, T)
        products = product_type(x)
        with torch.autocast(x.device.type, enabled=False):
            v, beta = unit(v), beta + self.beta_shift[:, :1]
            if self.gates_0 is None:
                alpha, gates = retain(alpha, self.gate_floor), {'place': 0}
            else:
                generate = self.generate_gates if few else self.generate_many_gates
                alpha, beta, gates = generate(k, v, alpha, beta, state, products)
            y, S = self.write_and_read(q, k, v, alpha, beta, state['S'], products)
        return self.emit(y, x), gates | {'S': S, 'conv': tail.to(state['conv'].dtype)}

    def generate_gates(self, k, v, alpha, beta, state, products):
        """
        1, 4   The gates, chunk by chunk; no token waits for another, and there are two numbers for each.
        k, v (B, H, T, d), alpha, beta (B, H, T) before the sigmoid -> retention, the write gate before it, new state.
        products: the type of what is multiplied (kernels.product_type)
        """
        o, C = self.config, self.config.projection_chunk
        R, R_xi, place, gates = state['R'], state['R_xi'], state['place'], []
        sizes = chunk_sizes(k.shape[2], C, place)
        for part in zip(*(x.split(sizes, dim=2) for x in (k.to(products), v.to(products), alpha, beta))):
            *gate, R = gates_of_chunk(o, *part, R, self.gates_0 + R_xi, self.beta_shift[:, 1:])
            gates.append(gate)
            place = (place + part[0].shape[2]) % C
            R_xi = R if place == 0 else R_xi
        alpha, beta = (torch.cat(x, dim=2) for x in zip(*gates))
        return alpha, beta, {'R': R, 'R_xi': R_xi, 'place': place}

    generate_many_gates = torch.compiler.disable(generate_gates, recursive=False)       # each chunk compiled for itself

    def write_and_read(self, q, k, v, alpha, beta, S, products):
        """2, 3   y (B, H, T, d) and the new S; q, k, v (B, H, T, d), alpha (B, H, T), beta before its sigmoid."""
        o, W, out_0 = self.config, self.W.to(products), self.out_0.to(products)
        def from_start(s):                      # features [s; hidden(W s)], and what the start answers to them
            h = hidden(matmul_nt(s.to(products), W))                                        # (.., T, d) x (.., d, m)
            return torch.cat([s, h], dim=-1), matmul_nt(h, out_0)                           # (.., T, m) x (.., m, d)
        (q, y_0), (k, erased) = from_start(q), from_start(k)
        most = 2 if o.negative_eigenvalues else 1
        c = most * write_rate(beta, o.gate_floor) / k.square().sum(-1).clamp(min=1)
        rule = recall_before if o.memory_read == 'before' else delta_rule
        y, S = rule(q, k, v - erased, alpha, alpha * c, c, S, o.tile, products=products)
        return y + y_0, S

    def flops(self, T):
        """Forward FLOPs per token beyond the weights, half a tile's keys seen on average."""
        H, m, d = self.W.shape
        C = min(T, self.tile)
        features = 8 * m * d + (0 if self.gates_0 is None else 12 * d)      # of q and k, read from the start; gates
        state = 3 * 2 * d * (d + m)                                         # write, erase, read
        return H * (features + state + 2 * C * (3 * d + m))                 # k k^T, q k^T, the inverse, scores v


def gates_of_chunk(o, k, v, alpha, beta, R, G_xi, shift):
    """
    What the rows G_xi (B, H, 2, d) make of the gates of a chunk, or of a part of one, and what is written; o: Config.
    k, v (B, H, c, d), alpha, beta (B, H, c), R (B, H, 2, d) -> alpha, beta (B, H, c), R
    """
    G_xi = G_xi.to(k.dtype)
    at_k, at_v = (matmul_nt(x, G_xi).to(alpha.dtype) for x in (k, v))                   # (.., c, d) x (.., d, 2)
    alpha = retain(alpha + o.gate_gain * at_k[..., 0], o.gate_floor)
    beta = beta + o.gate_gain * at_k[..., 1]
    g = alpha.clamp(min=1e-12).log().cumsum(-1)                                         # (B, H, c)
    rate = 2 / o.projection_chunk * write_rate(beta, o.gate_floor, shift) * (g[..., -1:] - g).exp()
    wrote = (rate[..., None] * (torch.tanh(at_v) - at_k)).to(k.dtype).mT @ k            # (.., 2, c) x (.., c, d)
    return alpha, beta, g[..., -1:, None].exp() * R + wrote


# -----------------------------------------------------------------------------
# python light.py


def main():
    from types import SimpleNamespace
    torch.manual_seed(0)
    config = dict(n_head=2, n_embd=16, conv_width=4, share_qk=True, tile=8, projection_chunk=16, memory_hidden=0,
                  adaptive='g', memory_read='before', negative_eigenvalues=False, gate_floor=0.0, generate_shift=-8.0,
                  gate_gain=1.0)                                                              # Config's defaults
    print('100 tokens in float64, the largest difference between the equations, token by token, and the fast form')
    for switches in ({}, {'memory_read': 'after'}, {'adaptive': ''}, {'negative_eigenvalues': True}):
        layer, x = LightMemory(SimpleNamespace(**config | switches)).double(), torch.randn(100, 16).double()
        with torch.no_grad():
            layer.init_weights(branches=2)
            for p in layer.parameters():                # away from the start, so that everything has an effect
                p += 0.3 * torch.randn_like(p)
            fast = layer(x[None])[0][0]
        print(f"{' '.join(f'--{name}={value}' for name, value in switches.items()) or 'the default':<32}"
              f'{(fast - light_ref(layer, x)).abs().max().item():.0e}')


if __name__ == '__main__':
    main()
