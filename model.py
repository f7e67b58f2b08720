"""
Hope: pre-norm residual blocks of a memory that mixes tokens and of MLPs that transform them, each on a clock of its own
(cms.py). With mixer='attention' and one level it is the Transformer (RoPE, RMSNorm, QK-norm, SwiGLU), the baseline that
everything here is compared with.

    model = Hope(Config())
    logits, loss, state = model(idx, targets)             # idx, targets (B, T); logits (B, T, vocab_size)
    logits, loss, state = model(more, state=state)        # reads on: the state is all it remembers

    for token, state in stream(reader, idx, 100): ...     # goes on from idx, a token (B,) at a time

A reader is what is called like that: the model as it is, or cms.Learner(model), which learns while it reads.

    python model.py        parameters, FLOPs and state of each mixer; the cost of a token after 100 and after 4,000

Does NOT include: dropout (small models on one pass over their data do not need it).

Glossary: B batch, T time, D model width (n_embd), V vocabulary, L layers. A model's state: L flat dicts of tensors, and
of a few plain numbers.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import Attention
from cli import UsageError, UserError, build, check
from cms import CHANGE, CMS, NIGHT, TOPOLOGIES, parse_clock
from kernels import at_least_float32
from light import LIGHT, LightMemory
from lstm import LSTM
from memory import RECURRENT, Recurrent
from titans import DEEP, DeepMemory

MIXERS = dict.fromkeys(RECURRENT, Recurrent) | dict.fromkeys(DEEP, DeepMemory) | {
    'hope_light': LightMemory, 'lstm': LSTM, 'attention': Attention}
SWITCHES = DEEP | LIGHT                     # what makes each of the memories with a hidden layer what it is


@dataclass
class Config:
    """The model"""
    vocab_size: int = 257               # number of token ids; train.py takes it from the tokenizer
    block_size: int = 512               # tokens per training sequence; attention sees no further back than this
    n_layer: int = 2                    # blocks
    n_head: int = 4                     # heads per block, each with a memory of its own
    n_embd: int = 128                   # model width
    n_hidden: int = 0                   # hidden width of the MLP (0 = 8/3 of n_embd, rounded up to a multiple of 32)
    mixer: str = 'hope'                 # hope | hope_light (in presets) | attention | .. (memory.py); or one per block
    tile: int = 32                      # tokens that a recurrent memory computes side by side; a matter of speed
    conv_width: int = 4                 # tokens that the short convolution before a recurrent memory sees
    share_qk: bool = True               # queries and keys of a recurrent memory are made of one projection
    gate_floor: float = 0.0             # a write gate below it is closed, forgetting below a hundredth of it is none
    tie_head: bool = False              # use the embedding as the output head as well
    # hope: what the memories with a hidden layer do
    memory_hidden: int = 0              # hidden units of a memory (0 = half of a head's width)
    memory_chunk: int = 64              # tokens that are generated from the same state of the memory
    projection_chunk: int = 0           # the same for the memories that make keys, values and gates (0 = memory_chunk)
    adaptive: str = 'g'                 # which of k, v, q and the gates (g) come from memories written while reading
    generate_shift: float = -8.0        # added at first to write gates of what generates; to first layers' -3 or more
    gate_gain: float = 1.0              # factor on what a memory adds to a gate
    self_values: bool = True            # a memory makes the values it stores
    objective: str = 'dot'              # dot | l2 (the error at the chunk's start)
    dgd: bool = True                    # Delta Gradient Descent: erase the old answer to a key before writing
    memory_momentum: bool = False       # gather writes with momentum, as Titans does
    forget: bool = True                 # let go of what was written, back towards the learned start
    memory_read: str = 'auto'           # before | after a token's own write | start (of its chunk); auto: hope before
    negative_eigenvalues: bool = False  # steps of up to twice the proximal one: a token can flip what is stored
    # the continuum of MLPs, fastest level first
    cms_periods: str = '1'              # steps of training between two moves of each level, as in 1,2,4,8
    cms_chunks: str = ''                # tokens between two moves while reading: 64,256,1024,0 (0 = never; or change)
    cms_topology: str = 'sequential'    # sequential | independent | nested | stacked | copies (cms.py)
    cms_share: float = 0.001            # copies: of all weight, dealt out anew at every token (0: no mixture)
    cms_step: float = 1.0               # their inner step size; it is learned if the model trains while it reads
    cms_clip: float = 1.0               # largest norm of a level's mean gradient while reading
    cms_truncate: int = 0               # training while reading: gradients end every so many chunks (0 = never)

    def __post_init__(self):
        for name in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd', 'tile', 'memory_chunk',
                     'conv_width'):
            check(getattr(self, name) >= 1, f'--{name} must be at least 1, not {getattr(self, name)}')
        for name in ('n_hidden', 'memory_hidden'):
            check(getattr(self, name) >= 0, f'--{name} must be at least 0, not {getattr(self, name)}')
        check(math.isfinite(self.generate_shift) and math.isfinite(self.gate_gain),
              f'--generate_shift={self.generate_shift} and --gate_gain={self.gate_gain} must be finite')
        check(0 <= self.gate_floor < 0.5, f'--gate_floor must be at least 0 and below 0.5, not {self.gate_floor}')
        self.mixer = self.mixer.replace('+', ',')                   # as it is written in a list of models
        names = self.mixer.split(',')
        for name in names:
            check(name != 'gla', '--mixer=gla is now --mixer=mamba2')
            check(name in MIXERS, f"--mixer must be one of {', '.join(MIXERS)}, or several with commas between, not "
                  f"'{name}'")
        check(self.n_layer % len(names) == 0, f'--mixer={self.mixer} names {len(names)} memories, which cannot be '
              f'repeated over --n_layer={self.n_layer} blocks')
        check(self.n_embd % (2 * self.n_head) == 0,
              f'--n_embd must be a multiple of 2 x n_head = {2 * self.n_head}, not {self.n_embd}')
        self.projection_chunk = self.projection_chunk or self.memory_chunk
        check(self.projection_chunk >= 1 and self.projection_chunk % self.memory_chunk == 0,
              f'--projection_chunk={self.projection_chunk} must be a multiple of --memory_chunk={self.memory_chunk}')
        check(set(self.adaptive) <= set('kvqg'), f"--adaptive takes letters of kvqg, not '{self.adaptive}'")
        for name, choices in (('objective', ('dot', 'l2')), ('memory_read', ('auto', 'before', 'after', 'start')),
                              ('cms_topology', TOPOLOGIES)):
            value = getattr(self, name)
            check(value in choices, f"--{name} must be one of {', '.join(choices)}, not '{value}'")
        deep = set(self.mixers) & {*SWITCHES}
        check(self.memory_read != 'start' or not deep or self.block_size > self.memory_chunk,
              '--memory_read=start reads nothing within a chunk: --block_size must be above --memory_chunk')
        for mixer in deep if 'hope' not in deep else ():
            for name, value in SWITCHES[mixer].items():             # what makes titans titans; of_block sees to it
                check(getattr(self, name) in (value, getattr(Config, name)),    # a field's default is the class's
                      f'--{name}={getattr(self, name)} is for --mixer=hope; {mixer} has {name}={value}')
        check({'hope', 'hope_light'} & {*self.mixers} != {'hope_light'} or set(self.adaptive) <= {'g'}
              and self.memory_read != 'start', f'--adaptive={self.adaptive} and --memory_read={self.memory_read} are '
              'for --mixer=hope; hope_light generates gates alone, and reads before or after each write')
        self.n_hidden = self.n_hidden or math.ceil(self.n_embd * 8 / 3 / 32) * 32
        check(len(self.periods) in (1, self.n_level) and len(self.chunks) in (0, self.n_level),
              f'--cms_periods={self.cms_periods} and --cms_chunks={self.cms_chunks} name different numbers of levels')
        check(not self.chunks or self.chunks[0], f'--cms_chunks={self.cms_chunks}: the fastest level must move')
        copies = self.cms_topology == 'copies'
        by_text = [n for n in self.chunks if n < 0]
        check(copies or not by_text,
              f'--cms_chunks={self.cms_chunks}: change and night are for --cms_topology=copies')
        check(self.cms_share == 0 or 1e-9 <= self.cms_share < 1,
              f'--cms_share must be 0, or at least 1e-9 and below 1, not {self.cms_share}')
        check(self.n_level == 1 or not copies or self.cms_share > 0,
              f'--cms_chunks={self.cms_chunks}: with --cms_share=0 nobody reads what slow levels keep; give one clock')
        check(not copies or set(self.periods) == {1}, '--cms_topology=copies is for --cms_chunks, not --cms_periods')
        check(not by_text or len(by_text) == len(self.chunks) - 1 and NIGHT not in by_text[:-1] and CHANGE in by_text,
              f'--cms_chunks={self.cms_chunks}: either all slow levels are to change, but for a last night, or none')
        check(self.n_hidden >= self.n_level, f'--n_hidden={self.n_hidden} is too small for {self.n_level} levels')
        check(self.cms_topology != 'stacked' or self.n_level <= self.n_layer,
              f'--cms_topology=stacked spreads n_layer={self.n_layer} over the levels, and there are {self.n_level}')
        check(self.cms_topology != 'nested' or set(self.periods) == {1},
              '--cms_topology=nested starts levels again while reading; it is for --cms_chunks, not --cms_periods')
        check(0 <= self.cms_step < math.inf and self.cms_truncate >= 0,
              f'--cms_step={self.cms_step} and --cms_truncate={self.cms_truncate} must be at least 0, and finite')
        check(0 < self.cms_clip <= 1e9, f'--cms_clip must be above 0 and at most 1e9, not {self.cms_clip}')

    @property
    def mixers(self):
        """The memory of each block; the names are repeated as often as there are blocks for."""
        names = self.mixer.split(',')
        return names * (self.n_layer // len(names))

    def of_block(self, index):
        """What one block's memory is built from: its own mixer, and the switches that this one has."""
        mixer, read = self.mixers[index], self.memory_read
        read = read if read != 'auto' else 'before' if 'hope' in mixer else 'after'         # as in the papers
        its = dict(memory_read=read) | SWITCHES.get(mixer, {})
        if mixer == 'hope_light':                           # beside a hope that has switches which are not for it
            its |= dict(adaptive='g' if 'g' in self.adaptive else '', memory_read='before' if read == 'start' else read)
        return replace(self, mixer=mixer, **its)

    @property
    def n_level(self):
        return max(len(parse_clock('cms_periods', self.cms_periods, 1)), len(self.chunks))

    @property
    def periods(self):
        periods = parse_clock('cms_periods', self.cms_periods, 1)
        return periods * self.n_level if len(periods) == 1 else periods

    @property
    def chunks(self):
        return parse_clock('cms_chunks', self.cms_chunks, 0) if self.cms_chunks else ()


# Sizes by name; what they are trained with is train.py's. On a GPU a memory has longer chunks, which are fewer
# launches; a small hope reads text as well with them (results/speed.md). titans, which takes smaller steps in longer
# chunks, was not tried
SIZES = {
    # cpu: the defaults, with the memory that learns more a second, in heads of 64; 0.7 M parameters
    'cpu': dict(mixer='hope_light', n_head=2),
    # fast: the same with attention in every second block, what the paper calls Hope-Attention
    'fast': dict(mixer='hope_light,attention', n_head=2),
    # small: 29 M parameters
    'small': dict(mixer='hope_light', n_layer=8, n_head=8, n_embd=512, block_size=1024, tile=64, memory_chunk=256),
    # gpt2: the size of GPT-2 124M
    'gpt2': dict(mixer='hope_light', n_layer=12, n_head=12, n_embd=768, block_size=1024, tile=64, memory_chunk=256,
                 vocab_size=50257, tie_head=True),
}


# -----------------------------------------------------------------------------
# parts


class Block(nn.Module):
    """x + memory(norm(x)), then the MLPs, each of which adds to x what it makes of norm(x)."""
    def __init__(self, config, index):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.mixer = MIXERS[config.mixers[index]](config.of_block(index))
        self.cms = CMS(config, index)

    def forward(self, x, state=None, fast=None):
        y, state = self.mixer(self.mixer_norm(x), state)
        return self.cms(x + y, fast), state


# -----------------------------------------------------------------------------
# the model


class Hope(nn.Module):
    groups = {'embed.weight': 'vector', 'head.weight': 'head'}          # optim.param_groups

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
        log_step                log cms_step
        norms                   1
        mixers, MLPs            say it themselves; what comes out of them, normal, std 1 / sqrt(fan_in branches): the
                                residual branches together add variance 1
        """
        said_here = {name: p for name, p in self.named_parameters() if 'norm' not in name}
        for p in said_here.values():
            p.fill_(math.nan)
        D, branches = self.config.n_embd, sum(1 + len(block.cms.levels) for block in self.blocks)
        if self.log_step is not None:
            self.log_step.fill_(math.log(self.config.cms_step) if self.config.cms_step else -math.inf)
        self.embed.weight.normal_(std=D ** -0.5 if self.config.tie_head else 1.0)
        for block in self.blocks:
            block.mixer.init_weights(branches)
            block.cms.init_weights(branches)
        if not self.config.tie_head:
            self.head.weight.normal_(std=1 / D)
        for name, p in said_here.items():
            assert not p.isnan().any(), f'nobody says how {name} starts'

    def init_state(self, batch_size, device=None):
        """The empty state: what forward starts from when it is given none."""
        device = device or self.embed.weight.device
        return [block.mixer.init_state(batch_size, device) for block in self.blocks]

    def forward(self, idx, targets=None, state=None, weights=None, fast=None):
        """
        idx (B, T) token ids; targets (B, T) the ids that should follow, -1 where there is nothing to predict
        state: as returned, or None to start empty
        weights (B, T) of the tokens in the loss, of mean 1; None: all alike
        fast: MLP weights of each stream's own, from cms.learn
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
        return logits, self.loss(logits, targets, weights)

    def loss(self, logits, targets, weights):
        """The mean loss in nats per token of logits (B, T, V), as forward says; None without targets."""
        if targets is None:
            return None
        pair = logits.flatten(0, 1), targets.flatten()
        if weights is None:
            return F.cross_entropy(*pair, ignore_index=-1)
        return (F.cross_entropy(*pair, ignore_index=-1, reduction='none') * weights.flatten()).mean()

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_token=None, generator=None,
                 state=None):
        """idx (B, T) -> idx with up to max_new_tokens more, (B, T + n); options as in stream."""
        check_ids(idx, self.config.vocab_size)
        tokens = stream(self, idx, max_new_tokens, temperature, top_k, top_p, stop_token, generator, state)
        return torch.cat([idx] + [token[:, None] for token, _ in tokens], dim=1)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """Training FLOPs per token at sequences of T: 2 per weight and the mixers' own forward, twice that backward."""
        weights = sum(p.numel() for name, p in self.named_parameters() if p.dim() == 2 and name != 'embed.weight')
        weights += self.embed.weight.numel() if self.config.tie_head else 0
        return 3 * (2 * weights + sum(block.mixer.flops(T) for block in self.blocks))


# -----------------------------------------------------------------------------
# reading and writing


def check_ids(idx, vocab_size):
    """UserError if there are no token ids, or ones that the model does not know. It waits for the device: ask once."""
    if idx.numel() == 0:
        raise UserError('the prompt is empty; give at least one token')
    low, high = idx.min().item(), idx.max().item()
    if low < 0 or high >= vocab_size:
        raise UserError(f'token id {high if high >= vocab_size else low} is outside the vocabulary of {vocab_size}')


def check_finite(x):
    """UserError if a model's logits or its loss are not numbers: what is written or scored by them would be noise."""
    if not x.isfinite().all():
        raise UserError('what the model answers is not finite: its weights, or how far they moved while reading, '
                        'are too large; try a smaller --cms_step if it learns, or another checkpoint')


@torch.no_grad()
def read(reader, idx, state=None):
    """
    Read a prompt (B, T) of any length, block_size tokens at a time -> logits of its last token (B, V), the reader's
    state.
    """
    for part in idx.split(reader.config.block_size, dim=1):
        logits, _, state = reader(part, state=state)
    return logits[:, -1], state


@torch.no_grad()
def stream(reader, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_token=None, generator=None,
           state=None):
    """
    Go on from idx (B, T): yield (next tokens (B,), the state before them) one by one. With a recurrent mixer a token
    costs the same however long the text is.

    temperature 0 takes the most likely token; top_k > 0 samples among the k most likely; top_p < 1 among the fewest
    that together have this probability. Ends early once every row of the batch has produced stop_token.
    """
    stopped = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        logits, state = read(reader, idx, state)                                # the prompt, then a token at a time
        check_finite(logits)
        token = sample(logits, temperature, top_k, top_p, generator)            # (B, V) -> (B,)
        if stop_token is not None:
            token = token.masked_fill(stopped, stop_token)
            stopped |= token == stop_token
        yield token, state
        if stop_token is not None and stopped.all():
            return
        idx = token[:, None]                                                    # (B, 1)


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
        outside[:, 0] = False                                   # nothing is before the first, however small top_p is
        probs = probs.scatter(-1, order, ordered.masked_fill(outside, 0.0))
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def specimen(model, enc, n, seed):
    """Up to n tokens of the model's own, begun from nothing, as eight lines to look at."""
    device = model.embed.weight.device
    rng, start = torch.Generator(device=device).manual_seed(seed), torch.tensor([[enc.eot_token]], device=device)
    out = model.generate(start, n, temperature=0.8, generator=rng, stop_token=enc.eot_token)[0].tolist()
    lines = enc.decode([i for i in out if i != enc.eot_token], errors='replace').split('\n')[:8]
    return '\n'.join('    | ' + ''.join(c if c.isprintable() else ' ' for c in line) for line in lines)


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


def state_bytes(state):
    """Bytes of the tensors that a reader's state holds in its lists and dicts."""
    if torch.is_tensor(state):
        return state.numel() * state.element_size()
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return sum(map(state_bytes, parts))


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
            _, state = read(model, idx[:, :context])
            row += f'{state_bytes(state) / 1024:>9.0f} KiB'
            tokens, n = stream(model, idx[:, :1], 6, state=state), 5
            next(tokens)                                        # warms up
            start = time.perf_counter()
            for _ in tokens:
                pass
            times.append((time.perf_counter() - start) / n * 1e3)
        print(f'{mixer:<16}{model.num_params():>12,}{model.flops_per_token(512) / 1e6:>13.1f}  {row}'
              + ''.join(f'{t:8.1f}' for t in times))


if __name__ == '__main__':
    main()
