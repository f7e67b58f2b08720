"""
Hope: pre-norm residual blocks of a memory that mixes tokens and of MLPs that transform them, each on a clock of its own
(cms.py). With mixer='attention' and one level it is the Transformer (RoPE, RMSNorm, QK-norm, SwiGLU), the baseline that
everything here is compared with.

    model = Hope(Config())
    logits, loss, state = model(idx, targets)             # idx, targets (B, T); logits (B, T, vocab_size)
    logits, loss, state = model(more, state=state)        # reads on: the state is all it remembers

    python model.py        parameters, FLOPs and state of each mixer; the cost of a token after 100 and after 4,000

Does NOT include: dropout (small models on one pass over their data do not need it).

Glossary: B batch, T time, D model width (n_embd), V vocabulary, L layers. A state is a list of L flat dicts of tensors.
"""
import dataclasses
import logging
import math
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from cli import UsageError, UserError, atomic_write, build, check, clock
from cms import CMS, TOPOLOGIES, learn
from kernels import at_least_float32
from memory import DEEP, MIXERS


@dataclass
class Config:
    """The model"""
    vocab_size: int = 257               # number of token ids; train.py takes it from the tokenizer
    block_size: int = 512               # tokens per training sequence; attention sees no further back than this
    n_layer: int = 4                    # blocks
    n_head: int = 4                     # heads per block, each with a memory of its own
    n_embd: int = 128                   # model width
    n_hidden: int = 0                   # hidden width of the MLP (0 = 8/3 of n_embd, rounded up to a multiple of 32)
    mixer: str = 'hope'                 # hope | titans | ttt_mlp | ttt | gated_deltanet | deltanet | gla | ... (README)
    chunk_size: int = 32                # tokens that a recurrent memory computes side by side; a matter of speed
    conv_width: int = 4                 # tokens that the short convolution before a recurrent memory sees
    gate_floor: float = 0.0             # a write gate below it is closed, forgetting below a hundredth of it is none
    tie_head: bool = False              # use the embedding as the output head as well
    # hope: what the memories with a hidden layer do
    memory_hidden: int = 0              # hidden units of a memory (0 = half of a head's width)
    memory_chunk: int = 64              # tokens that are generated from the same state of the memory
    projection_chunk: int = 0           # the same for the memories that make keys, values and gates (0 = memory_chunk)
    adaptive: str = 'kvg'               # which of k, v, q and the gates (g) come from memories written while reading
    self_values: bool = True            # a memory makes the values it stores
    objective: str = 'dot'              # dot | l2 (the error at the chunk's start) | l2_now (at the current state)
    dgd: bool = True                    # Delta Gradient Descent: erase the old answer to a key before writing
    memory_momentum: bool = False       # gather writes with momentum, as Titans does
    forget: bool = True                 # let go of what was written, back towards the learned start
    memory_read: str = 'after'          # after | before a token's own write | start: as the chunk began
    negative_eigenvalues: bool = False  # steps of up to twice the proximal one: a token can flip what is stored
    # the continuum of MLPs, fastest level first
    cms_periods: str = '1'              # steps of training between two moves of each level, as in 1,2,4,8
    cms_chunks: str = ''                # tokens between two moves while reading, as in 64,256,1024,0 (0 = never)
    cms_topology: str = 'sequential'    # sequential | independent | nested | stacked (a level is a share of the depth)
    cms_inner: str = 'gd'               # what moves them while reading: gd | dgd (erases as it writes)
    cms_step: float = 1.0               # their inner step size; it is learned if the model trains while it reads
    cms_clip: float = 1.0               # largest norm of a level's mean gradient while reading
    cms_meta: str = 'first'             # training while reading: gradients of first | second order
    cms_truncate: int = 0               # ... and of the recurrent state are cut every so many chunks (0 = never)

    def __post_init__(self):
        for name in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd', 'chunk_size', 'memory_chunk',
                     'conv_width'):
            check(getattr(self, name) >= 1, f'--{name} must be at least 1, not {getattr(self, name)}')
        for name in ('n_hidden', 'memory_hidden'):
            check(getattr(self, name) >= 0, f'--{name} must be at least 0, not {getattr(self, name)}')
        check(0 <= self.gate_floor < 0.5, f'--gate_floor must be at least 0 and below 0.5, not {self.gate_floor}')
        check(self.mixer in MIXERS, f"--mixer must be one of {', '.join(MIXERS)}, not '{self.mixer}'")
        check(self.n_embd % (2 * self.n_head) == 0,
              f'--n_embd must be a multiple of 2 x n_head = {2 * self.n_head}, not {self.n_embd}')
        self.projection_chunk = self.projection_chunk or self.memory_chunk
        check(self.projection_chunk >= 1 and self.projection_chunk % self.memory_chunk == 0,
              f'--projection_chunk={self.projection_chunk} must be a multiple of --memory_chunk={self.memory_chunk}')
        check(set(self.adaptive) <= set('kvqg'), f"--adaptive takes letters of kvqg, not '{self.adaptive}'")
        for name, choices in (('objective', ('dot', 'l2', 'l2_now')), ('memory_read', ('after', 'before', 'start')),
                              ('cms_topology', TOPOLOGIES), ('cms_inner', ('gd', 'dgd')),
                              ('cms_meta', ('first', 'second'))):
            value = getattr(self, name)
            check(value in choices, f"--{name} must be one of {', '.join(choices)}, not '{value}'")
        check(self.memory_read != 'start' or self.mixer not in DEEP or self.block_size > self.memory_chunk,
              '--memory_read=start reads nothing within a chunk: --block_size must be above --memory_chunk')
        for name, value in DEEP.get(self.mixer, {}).items():        # what makes titans titans
            check(getattr(self, name) in (value, getattr(Config, name)),        # a field's default is the class's
                  f'--{name}={getattr(self, name)} is for --mixer=hope; {self.mixer} has {name}={value}')
            setattr(self, name, value)
        self.n_hidden = self.n_hidden or math.ceil(self.n_embd * 8 / 3 / 32) * 32
        check(len(self.periods) in (1, self.n_level) and len(self.chunks) in (0, self.n_level),
              f'--cms_periods={self.cms_periods} and --cms_chunks={self.cms_chunks} name different numbers of levels')
        check(not self.chunks or self.chunks[0], f'--cms_chunks={self.cms_chunks}: the fastest level must move')
        check(self.n_hidden >= self.n_level, f'--n_hidden={self.n_hidden} is too small for {self.n_level} levels')
        check(self.cms_topology != 'stacked' or self.n_level <= self.n_layer,
              f'--cms_topology=stacked spreads n_layer={self.n_layer} over the levels, and there are {self.n_level}')
        check(self.cms_topology != 'nested' or set(self.periods) == {1},
              '--cms_topology=nested starts levels again while reading; it is for --cms_chunks, not --cms_periods')
        check(0 <= self.cms_step < math.inf and self.cms_truncate >= 0,
              f'--cms_step={self.cms_step} and --cms_truncate={self.cms_truncate} must be at least 0, and finite')
        check(0 < self.cms_clip <= 1e9, f'--cms_clip must be above 0 and at most 1e9, not {self.cms_clip}')

    @property
    def n_level(self):
        return max(len(clock('cms_periods', self.cms_periods, 1)), len(self.chunks))

    @property
    def periods(self):
        periods = clock('cms_periods', self.cms_periods, 1)
        return periods * self.n_level if len(periods) == 1 else periods

    @property
    def chunks(self):
        return clock('cms_chunks', self.cms_chunks, 0) if self.cms_chunks else ()


# Sizes by name, with what train.py trains them by: its knobs and those above. On a GPU a memory has longer chunks, which
# are fewer launches; a small hope reads text as well with them (results/speed.md). titans, which takes smaller steps in
# longer chunks, was not tried
PRESETS = {
    # cpu: the defaults; 1.0 M parameters, minutes on two cores (README)
    'cpu': {},
    # small: 28 M parameters, bytes, for one GPU; not measured yet
    'small': dict(n_layer=8, n_head=8, n_embd=512, block_size=1024, chunk_size=64, memory_chunk=256, batch_size=64,
                  max_steps=5000, learning_rate=1e-3, warmup_steps=200, eval_every=500),
    # gpt2: the size of GPT-2 124M, four times over 100 million tokens of web text; not measured yet
    'gpt2': dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, chunk_size=64, memory_chunk=256, batch_size=256,
                 grad_accum=8, max_steps=1500, learning_rate=1e-3, warmup_steps=150, eval_every=250, data='fineweb',
                 tokenizer='gpt2', vocab_size=50257, tie_head=True),
}


# -----------------------------------------------------------------------------
# parts


class Block(nn.Module):
    """x + memory(norm(x)), then the MLPs, each of which adds to x what it makes of norm(x)."""
    def __init__(self, config, index):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.mixer = MIXERS[config.mixer](config)
        self.cms = CMS(config, index)

    def forward(self, x, state=None, fast=None):
        y, state = self.mixer(self.mixer_norm(x), state)
        return self.cms(x + y, fast), state


# -----------------------------------------------------------------------------
# the model


class Hope(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_head:
            self.head.weight = self.embed.weight
        self.log_step = nn.Parameter(torch.empty(config.n_level)) if config.chunks else None    # cms.py: log of eta
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        embed                   normal, std 1, so that the first norm changes little (tied to the head: 1 / sqrt(D))
        head                    normal, std 1 / D: logits start near 0 and the loss near log V
        mixer.qkv, .gate, cms up        normal, std 1 / sqrt(D)
        mixer.out, cms out      normal, std 1 / sqrt(fan_in branches): the residual branches together add variance 1
        cms.mix                 1 / levels: a mean
        log_step                log cms_step
        mixer.conv              the last tap 1 (the token itself), normal, std 0.3 on all: what came just before is
                                seen from the start, which a value needs to find its key
        mixer.alpha             weight 0; bias log(n - 1) with n from 8 to 256 over the heads: they retain for n tokens
        mixer.beta              weight 0, bias 0: write rate 1/2
        mixer.mu                weight 0, bias -2: momentum 0.12
        mixer.W2_0              normal, std 1: a key of norm 1 gives pre-activations of size 1
        mixer.W1_0              0: what is read was written while reading, what is made starts as what it is made from.
                                An answer from the start, the same for all keys, hides what is recalled (mqar.py)
        mixer.gates_0           0: the gates move only with what is read
        mixer.rate              write rates relative to beta, before the sigmoid: -3 for first layers, 0 for the memory
                                that is read, -8 for those that generate: a key that moves from the start is no key
        mixer.blend             0.1: a value starts as v, not as what a still empty memory answers to it
        norms                   1
        """
        D, branches = self.config.n_embd, sum(1 + len(block.cms.levels) for block in self.blocks)
        for name, p in self.named_parameters():
            if name == 'head.weight':
                p.normal_(std=1 / D)
            elif name == 'embed.weight':
                p.normal_(std=D ** -0.5 if self.config.tie_head else 1.0)
            elif name.endswith(('mixer.qkv.weight', 'mixer.gate.weight', 'up.weight')):
                p.normal_(std=D ** -0.5)
            elif name.endswith('out.weight'):
                p.normal_(std=(p.shape[1] * branches) ** -0.5)
            elif name.endswith('mix'):
                p.fill_(1 / len(p))
            elif name == 'log_step':
                p.fill_(math.log(self.config.cms_step) if self.config.cms_step else -math.inf)
            elif name.endswith('conv'):
                p.normal_(std=0.3)
                p[-1] += 1
            elif name.endswith('alpha.bias'):
                p.copy_((torch.logspace(3, 8, len(p), base=2) - 1).log())
            elif name.endswith(('alpha.weight', 'beta.weight', 'beta.bias', 'mu.weight')):
                p.zero_()
            elif name.endswith('mu.bias'):
                p.fill_(-2)
            elif name.endswith('W2_0'):
                p.normal_()
            elif name.endswith(('gates_0', 'W1_0')):
                p.zero_()
            elif name.endswith('rate'):
                p[:, 0], p[:, 1], p[:, 2:] = -3, 0, -8
            elif name.endswith('blend'):
                p.fill_(0.1)
            elif 'norm' in name:
                p.fill_(1)
            else:
                raise AssertionError(f'init_weights does not say how {name} starts')

    def init_state(self, batch_size, device=None):
        """The empty state: what forward starts from when it is given none."""
        device = device or self.embed.weight.device
        return [block.mixer.init_state(batch_size, device) for block in self.blocks]

    def forward(self, idx, targets=None, state=None, fast=None, weights=None):
        """
        idx (B, T) token ids; targets (B, T) the ids that should follow, -1 where there is nothing to predict
        state: as returned, or None to start empty; fast: weights of the streams' own, from cms.learn
        weights (B, T) of the tokens in the loss, of mean 1; None: all alike
        returns logits (B, T, V), the mean loss in nats per token (None without targets), and the new state
        """
        assert idx.dim() == 2 and idx.shape[1] >= 1, f'idx must be (B, T) with T >= 1, got {tuple(idx.shape)}'
        x = self.embed(idx)                                     # (B, T) -> (B, T, D)
        new_state = []
        for block, block_state in zip(self.blocks, state or [None] * len(self.blocks)):
            x, block_state = block(x, block_state, fast)
            new_state.append(block_state)
        return *self.predict(x, targets, weights), new_state

    def predict(self, x, targets, weights):
        """x (B, T, D) -> logits, loss. Apart, as torch.compile gives up forward where chunks interrupt its loop."""
        logits = at_least_float32(self.head(self.norm(x)))      # (B, T, D) -> (B, T, V)
        loss = None
        if targets is not None:
            pair = logits.flatten(0, 1), targets.flatten()
            if weights is None:
                loss = F.cross_entropy(*pair, ignore_index=-1)
            else:
                loss = (F.cross_entropy(*pair, ignore_index=-1, reduction='none') * weights.flatten()).mean()
        return logits, loss

    @torch.no_grad()
    def read(self, idx, state=None, learning=False):
        """
        Read a prompt of any length, block_size tokens at a time -> logits of its last token (B, V), state. Learning
        from it (cms.py), the state is that of cms.learn.
        """
        V = self.config.vocab_size
        if idx.numel() == 0:
            raise UserError('the prompt is empty; give at least one token')
        if idx.min() < 0 or idx.max() >= V:
            wrong = int(idx.max() if idx.max() >= V else idx.min())
            raise UserError(f'token id {wrong} is outside the vocabulary of {V}')
        for part in idx.split(self.config.block_size, dim=1):
            if learning:
                logits, state = learn(self, part, state)
            else:
                logits, _, state = self(part, state=state)
        return logits[:, -1], state

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_token=None, generator=None,
               state=None, learning=False):
        """
        Yield (next tokens (B,), the state before them) one by one. With a recurrent mixer a token costs the same
        however long the text is.

        temperature 0 takes the most likely token; top_k > 0 samples among the k most likely; top_p < 1 among the fewest
        that together have this probability. Ends early once every row of the batch has produced stop_token.
        """
        stopped = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            logits, state = self.read(idx, state, learning)                         # the prompt, then a token at a time
            token = sample(logits, temperature, top_k, top_p, generator)            # (B, V) -> (B,)
            if stop_token is not None:
                token = token.masked_fill(stopped, stop_token)
                stopped |= token == stop_token
            yield token, state
            if stop_token is not None and stopped.all():
                return
            idx = token[:, None]                                                    # (B, 1)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_token=None, generator=None,
                 state=None):
        """idx (B, T) -> idx with up to max_new_tokens more, (B, T + n); options as in stream."""
        tokens = self.stream(idx, max_new_tokens, temperature, top_k, top_p, stop_token, generator, state)
        return torch.cat([idx] + [token[:, None] for token, _ in tokens], dim=1)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """Training FLOPs per token at sequences of T: 2 per weight and the mixers' own forward, twice that backward."""
        weights = sum(p.numel() for name, p in self.named_parameters() if p.dim() == 2 and name != 'embed.weight')
        weights += self.embed.weight.numel() if self.config.tie_head else 0
        return 3 * (2 * weights + sum(block.mixer.flops(T) for block in self.blocks))


def equal_model(mixer, knobs, parameters=None):
    """
    The model with that memory and the knobs (a dict of Config's fields), and with about that many parameters: its MLPs
    are as wide as brings it nearest.
    """
    config, = build([Config], {**knobs, 'mixer': mixer})
    model = Hope(config)
    if parameters:
        per_unit = 3 * config.n_embd * config.n_layer
        n_hidden = config.n_hidden + round((parameters - model.num_params()) / per_unit)
        if n_hidden < 1:
            raise UsageError(f'--n_hidden={config.n_hidden} is too small to give {mixer} {parameters:,} parameters')
        model = Hope(build([Config], {**knobs, 'mixer': mixer, 'n_hidden': n_hidden})[0])
    return model


def compiled(model):
    """
    torch.compile'd. On a CPU the code that calls the kernels is C++ as well: a chunk is many small calls, and made from
    Python they are a tenth of the time of a long sequence. What C++ cannot call needs no warning, Python still can.
    Every shape is compiled for itself: code for any length compiles for minutes and is slower. torch checks shapes
    before it calls compiled code; that code would check them again.
    """
    on_cpu = next(model.parameters()).device.type == 'cpu'
    logging.getLogger('torch._inductor.ir').setLevel(logging.ERROR)
    return torch.compile(model, dynamic=False, options={'cpp_wrapper': True, 'size_asserts': False} if on_cpu else None)


class Cores:
    """
    Parts of a batch side by side on a CPU, n at a time: the most that its threads allow and that divide the rows.

    A memory makes many small products. Two threads that share each of them wait for each other most of the time; with
    half of the rows each, and Python's lock let go by compiled code, they hardly meet.
    """
    def __init__(self, rows):
        self.threads = torch.get_num_threads()
        self.n = max(n for n in range(1, min(rows, self.threads) + 1) if rows % n == 0)
        self.pool = ThreadPoolExecutor(self.n, initializer=self.set_up, initargs=(self.threads // self.n,))
        self.seen = set()

    def map(self, f, parts, kind=None):
        """f(part) for each of parts, in their order; the first of each kind one after the other, as f may compile."""
        if self.n == 1:
            return map(f, parts)
        if kind in self.seen:
            return self.pool.map(f, parts)
        self.seen.add(kind)
        return (self.alone(f, part) for part in parts)

    def alone(self, f, part):
        """
        f(part) in the thread that calls, as the others do it later. torch 2.13 keeps tracebacks of the last compilation
        in the thread that compiled, and may stand still for good when two such threads end at once.
        """
        torch.set_num_threads(self.threads // self.n)
        try:
            return f(part)
        finally:
            torch.set_num_threads(self.threads)

    @staticmethod
    def set_up(threads):
        """What a thread has of its own."""
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """logits (B, V) -> one token id per row (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    # a tiny temperature must neither overflow nor be taken for 0, as denormals are
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-30)
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(dim=-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p         # the tokens before it reach top_p already
        probs = probs.scatter(-1, order, ordered.masked_fill(outside, 0.0))
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def pick_device(name):
    """'auto' is the GPU where there is one, else the CPU; UserError for a device that this machine does not have."""
    if name == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'cpu'
    if name not in ('cpu', 'cuda', 'mps'):
        raise UserError(f"--device takes auto, cpu, cuda or mps, not '{name}'")
    if name == 'cuda' and not torch.cuda.is_available() or name == 'mps' and not torch.backends.mps.is_available():
        raise UserError(f'--device={name}, but torch finds no such device on this machine; use --device=cpu')
    return name


def machine(device):
    """What a log says a run was made on."""
    if device.startswith('cuda'):
        return torch.cuda.get_device_name()
    return f'{platform.machine()}, {torch.get_num_threads()} threads'


def state_bytes(state):
    """Bytes that a state holds, or what a memory of cms.learn keeps in lists and dicts."""
    if torch.is_tensor(state):
        return state.numel() * state.element_size()
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return sum(map(state_bytes, parts))


# -----------------------------------------------------------------------------
# checkpoints: plain types only, so that loading one never runs code from it

FORMAT = 'nested-learning-2'
KEYS = ('model', 'config', 'run', 'optimizer', 'step', 'batch_rng', 'best_loss', 'sha256', 'gathered')


def save_checkpoint(path, checkpoint):
    """Write a dict of plain types and tensors to path, whole or not at all."""
    with atomic_write(path) as file:
        try:
            torch.save({'format': FORMAT, **checkpoint}, file)
        except RuntimeError as error:       # torch wraps what the disk says
            raise OSError(f'{error}'.splitlines()[0]) from None


def load_checkpoint(path, kind='checkpoint', form=FORMAT, keys=KEYS, device='cpu'):
    """Read back what save_checkpoint wrote; UserError in one line if it is missing, damaged, or of another format."""
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f'there is no {kind} {path}; train one first (python train.py), or name its folder '
                        'with --out_dir') from None
    except PermissionError:
        raise UserError(f'{path} may not be read by this user') from None
    except Exception:                       # damaged bytes make torch raise nearly anything; it runs none of them
        raise UserError(f'{path} is damaged or not a {kind}; nothing was changed') from None
    if not isinstance(checkpoint, dict) or checkpoint.get('format') != form:
        raise UserError(f'{path} is not a {kind} of this project (format {form})')
    missing = [key for key in keys if key not in checkpoint]
    if missing:
        raise UserError(f"{path} is a {kind} without {', '.join(missing)}")
    return checkpoint


def load_model(checkpoint, device='cpu'):
    """The model in a checkpoint, on device. UserError if its configuration and its weights do not fit together."""
    try:
        model = Hope(Config(**checkpoint['config']))
        weights, own = dict(checkpoint['model']), model.log_step    # another number of clocks starts with cms_step
        if own is None or 'log_step' not in weights or weights['log_step'].shape != own.shape:
            weights = {name: p for name, p in weights.items() if name != 'log_step'}
            weights |= {} if own is None else {'log_step': own}
        model.load_state_dict(weights)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"the checkpoint does not fit: {' '.join(str(error).split())[:300]}") from None
    return model.to(device)


def load_learner(checkpoint, device='cpu', chunks='', inner='', step=-1.0):
    """
    load_model, with a token clock to learn by while reading: the one given, else the one it was trained with, else 128
    tokens for the fastest level and four times as many for each one after it. step: the inner step size of all levels;
    below 0 they keep what they learned.
    """
    config = checkpoint['config']
    levels = build([Config], config)[0].n_level
    config['cms_chunks'] = chunks or config['cms_chunks'] or ','.join(str(128 * 4 ** level) for level in range(levels))
    config['cms_inner'] = inner or config['cms_inner']
    if levels == 1 and ',' in config['cms_chunks']:             # one MLP per block: their clocks differ with the depth
        config['cms_topology'] = 'stacked'
    build([Config], config)                                     # what is wrong with these is said as such
    model = load_model(checkpoint, device)
    if step >= 0:
        model.log_step.data.fill_(math.log(step) if step else -math.inf)
    return model


# -----------------------------------------------------------------------------
# python model.py


def main():
    import time
    print('the default model, one sequence, one thread; ms per token with 100 and with 4,000 tokens before it')
    print(f"{'mixer':<16}{'parameters':>12}{'MFLOP/token':>13}{'state at 100':>14}{'at 4,000':>12}{'ms':>8}{'ms':>8}")
    torch.set_num_threads(1)
    for mixer in MIXERS:
        model, row = Hope(Config(mixer=mixer)).eval(), ''
        idx = torch.randint(256, (1, 4_000), generator=torch.Generator().manual_seed(0))
        times = []
        for context in (100, 4_000):
            _, state = model.read(idx[:, :context])
            start, n = time.perf_counter(), 5
            for _ in model.stream(idx[:, :1], n, state=state):
                pass
            times.append((time.perf_counter() - start) / n * 1e3)
            row += f'{state_bytes(state) / 1024:>9.0f} KiB'
        print(f'{mixer:<16}{model.num_params():>12,}{model.flops_per_token(512) / 1e6:>13.1f}  {row}'
              + ''.join(f'{t:8.1f}' for t in times))


if __name__ == '__main__':
    main()
