r"""
What each memory costs, beside a Transformer of as many parameters, and what the machine could do.

    python bench.py                                     a quarter of an hour on one core
    python bench.py --quick                             under a minute: nothing compiled, one length
    python bench.py --count                             launches and bytes of a step on a GPU; needs none (counts.py)
    python bench.py --parts=train --lengths=4096,16384 --mixers=attention,hope
    python bench.py --preset=gpt2 --parts=ceilings,train --mixers=attention,hope --graph=attention,hope \
                    --lengths=2048,16384 --tokens=32768         for a GPU of 140 GB; --preset=small likewise

Four parts, one process. Ceilings: a large matrix product and a large copy. Training: forward and backward of all models
in turn, medians, as ratios to the first of --mixers; the memory a step takes on top of the process's; --threads=1,2
takes turns with the cores, too: what is compiled gets parts of the batch on them side by side, as in training, and all
else shares its products; --graph adds rows with forward and backward as a CUDA graph each, so that no kernel waits for
Python to launch it. Decoding: milliseconds per token and bytes of state after 1,000 tokens and more. Kernels: the
recurrence as token loop, tiled, compiled. Shares are of the ceilings (of the first --threads). And if asked for, count:
what torch.compile would launch on a GPU for a step of each of --mixers, and what that moves, of the whole model and of
one layer (a mix's mean); minutes each.
--json=FILE keeps it, with machine, versions and commit. Any knob of the model is --key=value.

Does NOT include: the optimizer's step (optim.py's is the same for all), several devices, other machines' numbers.
"""
import contextlib
import ctypes
import gc
import json
import os
import platform
import shlex
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

import kernels
from cli import UsageError, atomic_write, build, check, git_commit, numbers, one_line_errors, read_args, words
from machine import Cores, compiled, describe, pick_device
from model import MIXERS, SIZES, Config, Hope, equal_model, state_bytes


@dataclass
class Bench:
    """The bench"""
    parts: str = 'ceilings,train,decode,kernels'                # which of them; count as well
    mixers: str = 'attention,hope,titans,gated_deltanet,mamba2'    # or hope+attention; ratios are to the first
    compile: str = 'attention,hope,titans'                      # which of them torch.compile gets, in training
    graph: str = ''                     # which of these get a row with CUDA graphs as well, on a GPU
    preset: str = 'cpu'                 # cpu | small | gpt2, the size of the models, as in train.py
    lengths: str = '512,1024,4096'      # tokens per sequence of a training step
    tokens: int = 4096                  # ... and of the whole step, at least one sequence
    repeats: int = 5                    # steps that are timed, of every model in turn
    contexts: str = '1000,10000,100000'     # tokens that were read before those whose decoding is timed
    threads: str = '1'                  # CPU threads; with 1,2 training steps take turns, all else runs on the first
    count: bool = False                 # --parts=count, of attention and hope at one length
    quick: bool = False                 # one length, two models, nothing compiled, short contexts
    dtype: str = 'auto'                 # float32 | bfloat16 (autocast); auto is bfloat16 on a GPU
    device: str = 'auto'                # cpu | cuda | mps; auto is cuda where there is one
    json: str = ''                      # a file for the numbers

    def __post_init__(self):
        check(not os.path.isdir(self.json), f'--json={self.json} is a folder; a file is needed')
        words('parts', self.parts, PARTS)
        words('mixers', self.mixers, MIXERS, joined=True)
        words('compile', self.compile, [*MIXERS, *self.mixers.split(','), ''])
        both = {*self.mixers.split(',')} & {*self.compile.split(',')}
        check({*self.graph.split(',')} <= both | {''},
              f'--graph={self.graph}: its models must be in --mixers and in --compile')
        check(self.preset in SIZES, f"--preset must be one of {', '.join(SIZES)}, not '{self.preset}'")
        numbers('lengths', self.lengths)
        numbers('contexts', self.contexts)
        numbers('threads', self.threads)
        for name in ('tokens', 'repeats'):
            check(getattr(self, name) >= 1, f'--{name} must be at least 1, not {getattr(self, name)}')
        check(self.dtype in ('auto', 'float32', 'bfloat16'), f"--dtype must be float32 or bfloat16, not '{self.dtype}'")


COUNT = dict(parts='count', mixers='attention,hope', lengths='1024')
QUICK = dict(mixers='attention,hope', compile='', lengths='512', tokens=1024, repeats=3, contexts='1000')


def timed(f, device):
    """Seconds that f takes, until the device is done with it."""
    start = time.perf_counter()
    f()
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median(f, device, n):
    """The median of n timings, after a call that warms up or compiles."""
    f()
    return statistics.median(timed(f, device) for _ in range(n))


class Peak:
    """The most memory in MiB that the block took on top of what there was: the GPU's own count, or resident memory."""
    def __init__(self, device):
        self.device, self.mib = device, float('nan')

    def __enter__(self):
        if self.device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif os.path.exists('/proc/self/statm'):
            with contextlib.suppress(AttributeError):       # glibc keeps what was freed; other systems give it back
                ctypes.CDLL(None).malloc_trim(0)
            self.before = self.highest = self.resident()
            self.done = threading.Event()
            self.watcher = threading.Thread(target=self.watch)
            self.watcher.start()
        return self

    def __exit__(self, *error):
        if self.device == 'cuda':
            self.mib = (torch.cuda.max_memory_allocated() - self.before) / 2**20
        elif hasattr(self, 'watcher'):
            self.done.set()
            self.watcher.join()
            self.mib = (self.highest - self.before) / 2**20

    def resident(self):
        with open('/proc/self/statm') as file:
            return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')

    def watch(self):
        while not self.done.wait(0.002):
            self.highest = max(self.highest, self.resident())


# -----------------------------------------------------------------------------
# the parts, each a function that prints a table and returns its rows; ceiling: what ceilings returned, or None


def ceilings(bench, knobs, device, dtype, ceiling):
    """What a large matrix product and a large copy reach."""
    n = 8192 if device == 'cuda' else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    source = torch.ones(1 << (30 if device == 'cuda' else 26), device=device)
    target = torch.empty_like(source)
    flops = 2 * n ** 3 / median(lambda: a @ b, device, 5)
    bandwidth = 2 * source.numel() * 4 / median(lambda: target.copy_(source), device, 5)
    print(f'\nceilings: {flops / 1e9:,.0f} GFLOP/s (a matrix product of {n} x {n}, {str(dtype)[6:]}), '
          f'{bandwidth / 1e9:,.1f} GB/s (a copy)')
    return {'flops': flops, 'bytes_per_second': bandwidth}


class Loss(nn.Module):
    """A model that returns its loss alone: what a CUDA graph is made of has tensors in and out."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets):
        return self.model(idx, targets)[1]


def step(loss_of, cores, x, autocast):
    """Forward and backward of all rows of x, in parts on the cores."""
    def forward_backward(part):
        with autocast:
            loss = loss_of(part, part)
        loss.backward()
    torch.set_num_threads(cores.threads)            # what was compiled for another count is compiled again
    for _ in cores.map(forward_backward, x.chunk(cores.n)):
        pass
    loss_of.zero_grad(set_to_none=True)


def first_step(how, loss_of, cores, x, autocast):
    """With what has to be done once: compiling, capturing."""
    if how == 'graph':
        with autocast:
            torch.cuda.make_graphed_callables(loss_of, (x, x))      # in place
    step(loss_of, cores, x, autocast)


def train(bench, knobs, device, dtype, ceiling):
    """A training step of every mixer at every length, forward and backward."""
    # a CUDA graph must make its own copies of weights in half precision: none may be kept from before
    rows, hope, autocast = [], equal_model('hope', knobs), in_bf16(device, dtype, cache_enabled=False)
    parameters = hope.num_params()
    threads, to_compile, to_graph = numbers('threads', bench.threads), bench.compile.split(','), bench.graph.split(',')
    print(f"\ntraining, forward and backward, {parameters:,} parameters each; x is the time of the first one's step")
    print('      T  mixer            compiled  threads  first s       ms     tok/s      x  GFLOP/s    share     MiB')
    for T in numbers('lengths', bench.lengths):
        torch._dynamo.reset()                   # or it stops compiling at the eighth shape
        runs, B = {}, max(1, bench.tokens // T)
        x = torch.randint(hope.config.vocab_size, (B, T), device=device)
        for mixer in bench.mixers.split(','):
            torch.manual_seed(0)
            model = equal_model(mixer, knobs | {'block_size': T}, parameters).to(device)
            model = compiled(model) if mixer in to_compile else model
            for n in threads:
                torch.set_num_threads(n)
                cores = Cores(B if mixer in to_compile and device == 'cpu' else 1)
                runs[mixer, 'yes' if mixer in to_compile else 'no', n] = Loss(model), cores, x, autocast
                if mixer in to_graph and n == threads[0]:
                    runs[mixer, 'graph', n] = Loss(model), cores, x, autocast
        first = {run: timed(lambda: first_step(run[1], *what), device) for run, what in runs.items()}
        for what in runs.values():              # again: what was compiled before hope is compiled anew after it
            step(*what)
        times = {run: [] for run in runs}
        for _ in range(bench.repeats):
            for run, what in runs.items():
                times[run].append(timed(lambda: step(*what), device))
        base = statistics.median(times[next(iter(runs))])
        for run, what in runs.items():
            mixer, how, n = run
            with Peak(device) as peak:
                timed(lambda: step(*what), device)
            peak_mib = None if how == 'graph' else peak.mib          # a graph's memory is its own all the time
            seconds = statistics.median(times[run])
            flops = B * T / seconds * what[0].model.flops_per_token(T)
            rows.append({'T': T, 'mixer': mixer, 'compiled': how, 'threads': n, 'first': first[run], 'seconds': seconds,
                         'tokens_per_second': B * T / seconds, 'ratio': seconds / base, 'flops': flops,
                         'peak_mib': peak_mib})
            print(f'{T:>7,}  {mixer:<16}{how:>9}{n:>9}{first[run]:>9.1f}{1e3 * seconds:>9.0f}'
                  f"{B * T / seconds:>10,.0f}{seconds / base:>7.2f}{flops / 1e9:>9.1f}"
                  f"{share(flops, ceiling, 'flops'):>9}{'-' if peak_mib is None else f'{peak_mib:.0f}':>8}", flush=True)
        runs = model = what = None
        gc.collect()                            # a captured model refers to itself
    torch.set_num_threads(threads[0])
    return rows


def decoding(model, token, state, device, n):
    """The median seconds of n tokens, each read from the state that the one before it left; one more warms up."""
    def read_on():
        nonlocal state
        state = model(token, state=state)[2]
    return median(read_on, device, n)


@torch.no_grad()
def decode(bench, knobs, device, dtype, ceiling):
    """Milliseconds per token and bytes of state, after a context was read. Attention keeps all of it."""
    rows, contexts, autocast = [], numbers('contexts', bench.contexts), in_bf16(device, dtype)
    print(f"\ndecoding, one sequence: ms per token, KiB of state, after a context of so many tokens\n{'mixer':<16}"
          + ''.join(f'{n:>20,}' for n in contexts))
    for mixer in bench.mixers.split(','):
        line = ''
        for n in contexts:
            if 'attention' in mixer and n > 10_000 and device == 'cpu':     # reading it would take many minutes
                line += f"{'-':>20}"
                continue
            torch.manual_seed(0)
            sees = n + 100 if 'attention' in mixer else 512
            model = Hope(build([Config], knobs | {'mixer': mixer, 'block_size': sees})[0]).to(device).eval()
            idx, state = torch.randint(model.config.vocab_size, (1, n), device=device), None
            with autocast:
                for part in idx.split(512, dim=1):
                    state = model(part, state=state)[2]
                size, seconds = state_bytes(state), decoding(model, idx[:, :1], state, device, 32)
            rows.append({'mixer': mixer, 'context': n, 'seconds': seconds, 'state_bytes': size})
            line += f"{1e3 * seconds:>9.2f}{size / 1024:>11,.0f}"
        print(f'{mixer:<16}{line}', flush=True)
    return rows


def recurrence(bench, knobs, device, dtype, ceiling):
    """The recurrence: token loop, in float32, tiled form, compiled form, whose products are of the ceilings' type."""
    B, H, T, D = (8, 16, 2048, 64) if device == 'cuda' else (1, 2, 256, 32) if bench.quick else (2, 4, 1024, 32)
    inputs = [x.detach().to(device).requires_grad_() for x in kernels.example(B, H, T, D)]
    forms = {'token loop': (kernels.delta_rule_ref,) * 2, 'tiled': (kernels.delta_rule,) * 2}
    if bench.compile:
        forms['compiled'] = torch.compile(kernels.delta_rule), kernels.delta_rule
    moved = 2 * 4 * sum(x.numel() for x in inputs)                          # inputs, and their gradients
    print(f'\nthe recurrence, forward and backward, B={B} H={H} T={T} Dk=Dv={D}, tile 64: matrix products, and '
          f'what has to be moved at least ({moved / 1e6:.1f} MB)')
    rows = []
    for name, (f, eager) in forms.items():
        its = {} if name == 'token loop' else {'products': dtype}
        with FlopCounterMode(display=False) as counter:
            kernels.forward_backward(eager, inputs, **its)
        seconds = median(lambda: kernels.forward_backward(f, inputs, **its), device, bench.repeats)
        flops, bandwidth = counter.get_total_flops() / seconds, moved / seconds
        rows.append({'form': name, 'seconds': seconds, 'flops': flops, 'bytes_per_second': bandwidth})
        shares = share(flops, ceiling, 'flops'), share(bandwidth, ceiling, 'bytes_per_second')
        print(f'{name:<16}{1e3 * seconds:>9.1f} ms{flops / 1e9:>9.1f} GFLOP/s{shares[0]:>9}{bandwidth / 1e9:>9.2f} GB/s'
              f'{shares[1]:>9}')
    return rows


def count(bench, knobs, device, dtype, ceiling):
    """Launches and bytes of a training step of every mixer at every length, as torch.compile makes it for a GPU."""
    from counts import count_model                                          # torch's compiler: seconds to import
    rows, dtype = [], torch.float32 if bench.dtype == 'float32' else torch.bfloat16
    parameters = equal_model('hope', knobs).num_params()
    print(f'\na step on a GPU, counted: {str(dtype)[6:]}, {parameters:,} parameters each\n'
          '      T  mixer              loops  products    others  launches        GB   a layer        GB   a token'
          '        KB')
    for T in numbers('lengths', bench.lengths):
        B = max(1, bench.tokens // T)
        for mixer in bench.mixers.split(','):
            config = equal_model(mixer, knobs | {'block_size': T}, parameters).config
            model, layer = count_model(config, B, T, dtype)
            (launches, moved), of_layer = ([sum(x) for x in zip(*kinds.values())] for kinds in (model, layer))
            rows.append({'T': T, 'mixer': mixer, 'sequences': B, 'kinds': model, 'layer_kinds': layer,
                         'launches': launches, 'bytes': moved})
            print(f'{T:>7,}  {mixer:<14}' + ''.join(f'{n:>10,}' for n, _ in model.values())
                  + f'{launches:>10,}{moved / 1e9:>10.2f}{of_layer[0]:>10,.1f}{of_layer[1] / 1e9:>10.2f}'
                  f'{launches / (B * T):>10.3f}{moved / (B * T) / 1e3:>10,.1f}', flush=True)
    return rows


def in_bf16(device, dtype, cache_enabled=True):
    return torch.autocast(device, torch.bfloat16, dtype == torch.bfloat16, cache_enabled)


def share(number, ceiling, of):
    return f'{100 * number / ceiling[of]:.1f} %' if ceiling else '-'


PARTS = {'ceilings': ceilings, 'train': train, 'decode': decode, 'kernels': recurrence, 'count': count}


def main():
    own = 'block_size', 'mixer', 'n_hidden'                                 # what the bench itself gives its models
    given = read_args([Bench, Config], sys.argv[1:], hidden=own)
    bench, = build([Bench], (QUICK if given.get('quick') else {}) | (COUNT if given.get('count') else {}) | given)
    knobs = {name: x for name, x in (SIZES[bench.preset] | given).items()
             if name in Config.__dataclass_fields__ and name not in own}
    device = pick_device(bench.device)
    if bench.graph and device != 'cuda':
        raise UsageError('--graph is for a GPU')
    torch.set_num_threads(numbers('threads', bench.threads)[0])
    torch.set_flush_denormal(True)
    if device == 'cuda':
        torch.set_float32_matmul_precision('high')
    bf16 = bench.dtype == 'bfloat16' or bench.dtype == 'auto' and device == 'cuda'
    dtype = torch.bfloat16 if bf16 else torch.float32
    print(f"{describe(device)} | torch {torch.__version__} | {str(dtype)[6:]} | commit {git_commit()}")
    parts = bench.parts.split(',')
    result = {}
    for part in filter(parts.__contains__, PARTS):                          # in their order: the ceilings come first
        result[part] = PARTS[part](bench, knobs, device, dtype, result.get('ceilings'))
    if bench.json:
        about = {'command': shlex.join(sys.argv), 'commit': git_commit(), 'torch': torch.__version__,
                 'python': platform.python_version(), 'machine': describe(device),
                 'bench': asdict(bench), 'model': knobs}
        with atomic_write(bench.json) as file:
            file.write(json.dumps(about | result, indent=1).encode())
        print(f'\nwritten to {bench.json}')


if __name__ == '__main__':
    one_line_errors()
    main()
