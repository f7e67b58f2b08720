"""
What each memory costs, beside a Transformer of as many parameters, and what the machine could do.

    python bench.py                                     a quarter of an hour on one core
    python bench.py --quick                             under a minute: nothing compiled, one length
    python bench.py --parts=train --lengths=4096,16384 --mixers=attention,hope
    python bench.py --n_layer=12 --n_head=12 --n_embd=768 --lengths=2048,16384       GPT-2's size, for a GPU

Four parts, one process. Ceilings: a large matrix product and a large copy. Training: forward and backward of all models in
turn, medians, as ratios to attention; the memory a step takes on top of the process's. Decoding: milliseconds per token
and bytes of state after 1,000 tokens and more. Kernels: token loop, chunked form, compiled form, against the ceilings.
With --json=FILE everything goes there as well, with machine, versions and commit. Any knob of the model is --key=value.

Does NOT include: the optimizer's step (optim.py's is the same for all), several devices, other machines' numbers.
"""
import contextlib
import ctypes
import json
import os
import platform
import shlex
import sys
import threading
import time
from dataclasses import asdict, dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from cli import atomic_write, build, check, git_commit, one_line_errors, read_args
from memory import MIXERS
from model import Config, Hope, equal_model, pick_device, state_bytes


@dataclass
class Bench:
    """The bench"""
    parts: str = 'ceilings,train,decode,kernels'                # which of them
    mixers: str = 'attention,hope,titans,gated_deltanet,gla'    # whose models; ratios are to the first
    compile: str = 'attention,hope,titans'                      # which of them torch.compile gets, in training
    lengths: str = '512,1024,4096'      # tokens per sequence of a training step
    tokens: int = 4096                  # ... and of the whole step, at least one sequence
    repeats: int = 5                    # steps that are timed, of every model in turn
    contexts: str = '1000,10000,100000'     # tokens that were read before those whose decoding is timed
    threads: int = 1                    # CPU threads
    quick: bool = False                 # one length, two models, nothing compiled, short contexts
    dtype: str = 'auto'                 # float32 | bfloat16 (autocast); auto is bfloat16 on a GPU
    device: str = 'auto'                # cpu | cuda | mps; auto is the GPU where there is one
    json: str = ''                      # a file for the numbers

    def __post_init__(self):
        for name, known in (('parts', PARTS), ('mixers', MIXERS), ('compile', MIXERS)):
            for word in filter(None, getattr(self, name).split(',')):
                check(word in known, f"--{name} takes {', '.join(known)}, with commas between, not '{word}'")
        for name in ('lengths', 'contexts'):
            check(all(n.isdecimal() and int(n) for n in getattr(self, name).split(',')),
                  f"--{name} takes whole numbers with commas between, not '{getattr(self, name)}'")
        for name in ('tokens', 'repeats', 'threads'):
            check(getattr(self, name) >= 1, f'--{name} must be at least 1, not {getattr(self, name)}')
        check(self.dtype in ('auto', 'float32', 'bfloat16'), f"--dtype must be float32 or bfloat16, not '{self.dtype}'")
        check(self.mixers, '--mixers names no model')


QUICK = dict(mixers='attention,hope', compile='', lengths='512', tokens=1024, repeats=3, contexts='1000')


def median(numbers):
    return sorted(numbers)[len(numbers) // 2]


def timed(f, device):
    """Seconds that f takes, until the device is done with it."""
    start = time.perf_counter()
    f()
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


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
# the four parts, each a function of the knobs that prints a table and returns its rows


def ceilings(bench, knobs, device, autocast):
    """What a large matrix product and a large copy reach."""
    n = 8192 if device == 'cuda' else 2048
    dtype = torch.bfloat16 if autocast.fast_dtype == torch.bfloat16 and autocast._enabled else torch.float32
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    c, d = torch.empty(2, 1 << (30 if device == 'cuda' else 26), device=device)
    flops = 2 * n ** 3 / median([timed(lambda: a @ b, device) for _ in range(5)])
    bandwidth = 2 * c.numel() * 4 / median([timed(lambda: d.copy_(c), device) for _ in range(5)])
    print(f'\nceilings: {flops / 1e9:,.0f} GFLOP/s (a matrix product of {n} x {n}, {str(dtype)[6:]}), '
          f'{bandwidth / 1e9:,.1f} GB/s (a copy)')
    return {'flops': flops, 'bytes_per_second': bandwidth}


def train(bench, knobs, device, autocast):
    """A training step of every mixer at every length, forward and backward."""
    rows, parameters = [], equal_model('hope', knobs).num_params()
    print(f"\ntraining, forward and backward, {parameters:,} parameters each; x is the time of the first one's step\n"
          f"{'T':>7}  {'mixer':<16}{'compiled':>9}{'first s':>9}{'ms':>9}{'tok/s':>10}{'x':>7}{'GFLOP/s':>9}{'MiB':>8}")
    for T in map(int, bench.lengths.split(',')):
        runs = {}
        for mixer in bench.mixers.split(','):
            torch.manual_seed(0)
            model = equal_model(mixer, knobs | {'block_size': T}, parameters).to(device)
            runs[mixer] = torch.compile(model) if mixer in bench.compile.split(',') else model
        x = torch.randint(knobs.get('vocab_size', Config.vocab_size), (max(1, bench.tokens // T), T), device=device)

        def step(model):
            with autocast:
                loss = model(x, x)[1]
            loss.backward()
            model.zero_grad(set_to_none=True)
        first = {mixer: timed(lambda: step(model), device) for mixer, model in runs.items()}
        times = {mixer: [] for mixer in runs}
        for _ in range(bench.repeats):
            for mixer, model in runs.items():
                times[mixer].append(timed(lambda: step(model), device))
        base = median(times[next(iter(runs))])
        for mixer, model in runs.items():
            with Peak(device) as peak:
                timed(lambda: step(model), device)
            seconds = median(times[mixer])
            speed = x.numel() / seconds
            rows.append({'T': T, 'mixer': mixer, 'compiled': mixer in bench.compile.split(','), 'first': first[mixer],
                         'seconds': seconds, 'tokens_per_second': speed, 'ratio': seconds / base,
                         'flops': speed * model.flops_per_token(T), 'peak_mib': peak.mib})
            r = rows[-1]
            print(f"{T:>7,}  {mixer:<16}{'yes' if r['compiled'] else 'no':>9}{r['first']:>9.1f}{1e3 * seconds:>9.0f}"
                  f"{speed:>10,.0f}{r['ratio']:>7.2f}{r['flops'] / 1e9:>9.1f}{peak.mib:>8.0f}", flush=True)
        del runs
    return rows


@torch.no_grad()
def decode(bench, knobs, device, autocast):
    """Milliseconds per token and bytes of state, after a context was read. Attention keeps all of it."""
    rows, contexts = [], [*map(int, bench.contexts.split(','))]
    print(f"\ndecoding, one sequence: ms per token, KiB of state, after a context of so many tokens\n{'mixer':<16}"
          + ''.join(f'{n:>20,}' for n in contexts))
    for mixer in bench.mixers.split(','):
        line = ''
        for n in contexts:
            if mixer == 'attention' and n > 10_000 and device == 'cpu':     # reading it would take many minutes
                line += f"{'-':>20}"
                continue
            torch.manual_seed(0)
            sees = max(contexts) + 100 if mixer == 'attention' else 512
            model = Hope(build([Config], knobs | {'mixer': mixer, 'block_size': sees})[0]).to(device).eval()
            idx, state, times = torch.randint(257, (1, n), device=device), None, []
            with autocast:
                for part in idx.split(512, dim=1):
                    state = model(part, state=state)[2]
                for _ in range(32):
                    times.append(timed(lambda: model(idx[:, :1], state=state), device))
            rows.append({'mixer': mixer, 'context': n, 'seconds': median(times), 'state_bytes': state_bytes(state)})
            line += f"{1e3 * median(times):>9.2f}{state_bytes(state) / 1024:>11,.0f}"
        print(f'{mixer:<16}{line}', flush=True)
    return rows


def recurrence(bench, knobs, device, autocast):
    """The recurrence: token loop, chunked form, compiled form."""
    B, H, T, D = (8, 16, 2048, 64) if device == 'cuda' else (1, 2, 256, 32) if bench.quick else (2, 4, 1024, 32)
    inputs = [x.detach().to(device).requires_grad_() for x in kernels.example(B, H, T, D)]
    forms = {'token loop': kernels.delta_rule_ref, 'chunked': kernels.delta_rule}
    if bench.compile:
        forms['compiled'] = torch.compile(kernels.delta_rule)
    with FlopCounterMode(display=False) as counter:
        kernels.forward_backward(kernels.delta_rule, inputs)
    flops, moved = counter.get_total_flops(), 2 * 4 * sum(x.numel() for x in inputs)     # inputs, and their gradients
    print(f'\nthe recurrence, forward and backward, B={B} H={H} T={T} Dk=Dv={D}, chunk 64: '
          f'{flops / 1e9:.2f} GFLOP in matrix products, {moved / 1e6:.1f} MB of inputs and gradients')
    rows = []
    for name, f in forms.items():
        kernels.forward_backward(f, inputs)                                 # warms up or compiles
        seconds = median([timed(lambda: kernels.forward_backward(f, inputs), device) for _ in range(bench.repeats)])
        rows.append({'form': name, 'seconds': seconds, 'flops': flops / seconds, 'bytes_per_second': moved / seconds})
        print(f'{name:<16}{1e3 * seconds:>9.1f} ms{flops / seconds / 1e9:>9.1f} GFLOP/s{moved / seconds / 1e9:>8.2f} GB/s')
    return rows


PARTS = {'ceilings': ceilings, 'train': train, 'decode': decode, 'kernels': recurrence}


def main():
    given = read_args([Bench, Config], sys.argv[1:], hidden=('vocab_size', 'block_size', 'mixer', 'n_hidden'))
    bench, = build([Bench], (QUICK if given.get('quick') else {}) | given)
    knobs = {name: x for name, x in given.items() if name in Config.__dataclass_fields__}
    device = pick_device(bench.device)
    torch.set_num_threads(bench.threads)
    torch.set_flush_denormal(True)
    if device == 'cuda':
        torch.set_float32_matmul_precision('high')
    bf16 = bench.dtype == 'bfloat16' or bench.dtype == 'auto' and device == 'cuda'
    autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=bf16)
    machine = torch.cuda.get_device_name() if device == 'cuda' else f'{platform.machine()}, {bench.threads} threads'
    print(f"{machine} | torch {torch.__version__} | {'bfloat16' if bf16 else 'float32'} | commit {git_commit()[:12]}")
    parts = bench.parts.split(',')
    result = {part: PARTS[part](bench, knobs, device, autocast) for part in PARTS if part in parts}
    if bench.json:
        about = {'command': shlex.join(sys.argv), 'commit': git_commit(), 'torch': torch.__version__,
                 'python': platform.python_version(), 'machine': machine, 'bench': asdict(bench), 'model': knobs}
        with atomic_write(bench.json) as file:
            file.write(json.dumps(about | result, indent=1).encode())
        print(f'\nwritten to {bench.json}')


if __name__ == '__main__':
    one_line_errors()
    main()
