"""
What the machine needs: devices, compiling, the cores of a CPU; checkpoints, memory files, and readers from them.

    device = pick_device('auto')
    model = load_model(load_checkpoint('out/ckpt.pt'), device).eval()               # reads as it is
    reader = load_learner(load_checkpoint('out/ckpt.pt'), device).eval()            # learns while it reads (cms.py)

Files hold plain types and tensors only, so that loading one never runs code from it, and are written whole or not at
all. A checkpoint is what train.py goes on from, a memory file what sample.py --learn does: a reader's state on disk.

Does NOT include: how a batch is cut over several devices (torchrun, in train.py), files of former formats.
"""
import ctypes
import datetime
import functools
import hashlib
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from cli import UsageError, UserError, atomic_write, build, remove_file
from cms import CHANGE, Learner, weights_of
from model import SWITCHES, Config, Hope
from tokenizer import digest, get_tokenizer


def pick_device(name):
    """'auto' is the GPU where there is one, else the CPU; UserError for a device that this machine does not have."""
    if name == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'cpu'
    if name not in ('cpu', 'cuda', 'mps'):
        raise UserError(f"--device takes auto, cpu, cuda or mps, not '{name}'")
    if name == 'cuda' and not torch.cuda.is_available() or name == 'mps' and not torch.backends.mps.is_available():
        raise UserError(f'--device={name}, but torch finds no such device on this machine; use --device=cpu')
    return name


def describe(device):
    """What a log says a run was made on."""
    if device.startswith('cuda'):
        return torch.cuda.get_device_name()
    return f'{platform.machine()}, {torch.get_num_threads()} threads'


def peak_memory(device):
    """MiB: the GPU's, or this process's where the system tells."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:                                         # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)


def first_to_fail():
    """
    Whether no other process of this run has failed yet; one at a time may ask, and only one hears yes. What one of
    several meets (torchrun) most often all meet, and those that wait for it lose their connection: said once, it can be
    read. They ask the store that they found each other by, which outlives them.
    """
    env = os.environ
    if 'TORCHELASTIC_RUN_ID' not in env:
        return True
    try:
        store = dist.TCPStore(env['MASTER_ADDR'], int(env['MASTER_PORT']), is_master=False, wait_for_workers=False,
                              timeout=datetime.timedelta(seconds=5))
        return store.add(f"failed, try {env.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except RuntimeError:                                        # nobody keeps one, or it is gone with who kept it
        return env['RANK'] == '0'


def join_processes(device):
    """Meet the other processes of this run (torchrun) -> the device of this one."""
    # long: the others wait while the first one downloads, or evaluates
    dist.init_process_group('nccl' if device == 'cuda' else 'gloo', timeout=datetime.timedelta(hours=2))
    if device == 'cuda':
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    return device


@functools.cache
def cannot_compile(device):
    """
    What keeps torch.compile from working here, or ''. On a CPU it has a C++ compiler build libraries against Python's
    headers, and loads them: a line of C++ meets in a moment what torch would after a minute, with a traceback.
    """
    linux, mac, windows = (sys.platform == name for name in ('linux', 'darwin', 'win32'))
    cxx = os.environ.get('CXX', 'clang++' if mac else 'cl' if windows else 'g++')
    if device.startswith('cuda') or windows and shutil.which(cxx):
        return ''
    flags = ['-fopenmp'] * linux + ['-undefined', 'dynamic_lookup'] * mac + ['-I', sysconfig.get_path('include')]
    try:
        place = os.environ.get('TORCHINDUCTOR_CACHE_DIR') or tempfile.gettempdir()          # where torch builds
        os.makedirs(place, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place) as folder:
            source, library = os.path.join(folder, 'a.cpp'), os.path.join(folder, 'a.so')
            with open(source, 'w') as file:
                file.write('#include <Python.h>\n' + '#include <omp.h>\n' * linux)
            subprocess.run([cxx, '-std=c++20', '-shared', '-fPIC', *flags, source, '-o', library],
                           check=True, capture_output=True, text=True)
            ctypes.CDLL(library)
    except FileNotFoundError:
        return f'there is no C++ compiler {cxx} (CXX=NAME names another)'
    except subprocess.CalledProcessError as error:
        said = re.search('error: (.*)', error.stderr)
        return f"the C++ compiler {cxx} does not work: {said[1] if said else f'it ends with {error.returncode}'}"
    except OSError as error:
        return f'what it builds cannot be kept and loaded: {error} (TMPDIR=FOLDER names another folder)'
    return ''


def choose_compile(run, config, device):
    """
    Whether to compile, as --compile says; auto: where it pays and is possible, unless NL_COMPILE=0 forbids it. And why
    it is not possible where it would pay, or ''.
    """
    if run.compile != 'auto':
        return run.compile == 'true', ''
    few = 200 if {*SWITCHES} & {*config.mixers} else 1000       # steps that make up for the minute of compiling
    pays = device.startswith('cuda') or (       # ttt's chunks of 16 compile for minutes
        device == 'cpu' and run.max_steps >= few and 'ttt' not in config.mixers)
    if not pays or config.chunks or run.optimizer == 'dgd' or os.environ.get('NL_COMPILE') == '0':
        return False, ''
    return not cannot_compile(device), cannot_compile(device)


def compiled(model):
    """
    torch.compile'd. On a CPU the code that calls the kernels is C++ as well: a chunk is many small calls, and made from
    Python they are a tenth of the time of a long sequence. What C++ cannot call needs no warning, Python still can.
    Every shape is compiled for itself: code for any length compiles for minutes and is slower. torch checks shapes
    before it calls compiled code; that code would check them again.
    raises  UserError if the machine cannot
    """
    device = next(model.parameters()).device.type
    on_cpu = device == 'cpu'
    if why := cannot_compile(device):
        raise UserError(f'--compile=true is not possible: {why}; leave --compile out')
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


# -----------------------------------------------------------------------------
# checkpoints

FORMAT = 'nested-learning-4'
KEYS = ('model', 'config', 'run', 'step',
        'data', 'tokenizer')            # what tells the text, and the tokens that it is cut into, from others
PROGRESS = ('optimizer', 'batch_rng', 'best_loss', 'gathered', 'carried')       # what a run goes on from besides


def check_progress(step, lr, **values):
    """UserError if one of these is not, before a checkpoint takes the place of one from when all were."""
    if not all(map(math.isfinite, values.values())):
        said = ' and '.join(f"the {name.replace('_', ' ')} is {x}" for name, x in values.items())
        raise UserError(f'step {step}: {said}. Nothing was saved after the last evaluation. Try a lower '
                        f'--learning_rate (now {lr:.1e}), more --warmup_steps, or --dtype=float32.')


def save_checkpoint(path, checkpoint, form=FORMAT):
    """Write a dict of plain types and tensors to path, whole or not at all."""
    with atomic_write(path) as file:
        try:
            torch.save({**checkpoint, 'format': form}, file)
        except RuntimeError as error:       # torch wraps what the disk says
            raise OSError(f'{error}'.splitlines()[0]) from None


def pick_checkpoint(out_dir, best):
    """The path of a folder's last checkpoint or of its best one, which may be the same."""
    path = os.path.join(out_dir, 'ckpt.pt')
    return best_of(path) if best and os.path.exists(best_of(path)) else path


def best_of(path):
    """Where the checkpoint of the lowest validation loss is kept while another one is at path, the last."""
    return os.path.join(os.path.dirname(path), 'best.pt')


def save_progress(path, checkpoint, there):
    """
    save_checkpoint, with the best one kept: what lies at path has the validation loss `there` (None: not known), and if
    that is the lowest so far, and this one's is not, it gets a second name before it is replaced. Nothing is copied.
    """
    best, name = best_of(path), f'{os.path.realpath(path)}.{os.getpid()}.tmp'       # should we be killed: cli.locked
    try:
        if there == checkpoint['best_loss'] != checkpoint['val_loss']:
            try:
                os.link(os.path.realpath(path), name)
            except OSError:                 # another disk, or one that knows no links
                shutil.copyfile(path, name)
            os.replace(name, best)
    except OSError as error:
        raise UserError(f'could not write {best}: {error.strerror}') from None
    save_checkpoint(path, checkpoint)
    if checkpoint['val_loss'] == checkpoint['best_loss']:
        remove_file(best)


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
    for name, p in model.named_parameters():                    # a step size of 0 has the logarithm -inf
        if not (p.exp() if name == 'log_step' else p).isfinite().all():
            raise UserError(f'the checkpoint holds weights that are not finite ({name}): its training had failed; '
                            'use an earlier one, or train again with a lower --learning_rate')
    return model.to(device)


def to_go_on(path, given):
    """
    The checkpoint at path, and the knobs of its run: what --resume goes on with, and what it says goes before them.
    UsageError if what is given, {key: value}, would make it another run.
    """
    checkpoint = load_checkpoint(path)
    if missing := [key for key in PROGRESS if key not in checkpoint]:
        raise UserError(f"{path} holds weights alone, as export.py writes them, without {', '.join(missing)}: --resume "
                        f'has nothing to go on with; --init_from={path} starts a new run from these weights')
    saved = checkpoint['run'] | checkpoint['config']
    given = {key: x.replace('+', ',') if key == 'mixer' else x for key, x in given.items()}     # as Config keeps it
    text = checkpoint['data'].get('path')                       # a file or folder, which may move: its sha256 counts
    if text and os.path.exists(text):
        saved['data'] = text                                    # whatever folder we are in
    fixed = {*checkpoint['config'], 'tokenizer', 'batch_size', 'optimizer', 'seed'}
    fixed |= set() if text and os.path.exists(given.get('data', '')) else {'data'}
    for key in given:
        if key in fixed and given[key] not in (saved[key], 'auto'):
            raise UsageError(f'--{key}={given[key]}, but {path} was trained with {saved[key]}; a resumed run cannot '
                             'change it (train into another --out_dir)')
    return checkpoint, saved


def load_progress(optimizers, model, checkpoint, path):
    """
    Give optimizers the state they had in the checkpoint at path, while their settings stay what this command line says,
    and the model what its slow levels have gathered since they last moved.
    """
    for optimizer, kept in zip(optimizers, checkpoint['optimizer']):
        for group, new in zip(kept['param_groups'], optimizer.param_groups):
            group.update({key: x for key, x in new.items() if key != 'params'})
        try:
            optimizer.load_state_dict(kept)
        except (KeyError, ValueError) as error:
            raise UserError(f'the optimizer in {path} does not fit this code: {error}') from None
    for name, p in model.named_parameters():
        p.grad = checkpoint['gathered'][name].to(p.device) if name in checkpoint['gathered'] else None


def load_tokenizer(checkpoint, path):
    """The tokenizer of a checkpoint, from the folder of its path. UserError if it is gone, or has other tokens."""
    enc = get_tokenizer(checkpoint['run']['tokenizer'], os.path.dirname(path))
    if digest(enc) != checkpoint['tokenizer']:
        raise UserError(f'{path} was trained with other tokens than those of its tokenizer, {enc.name}: they are '
                        'not from the same run')
    return enc


def load_learner(checkpoint, device='cpu', chunks='', step=-1.0, share=-1.0):
    """
    load_model as a reader that learns while it reads (cms.py), on the token clock that is given, else the one it was
    trained with. A model of one level learns in copies, else 128 tokens for the fastest and three slow ones that keep;
    of several levels, 128 tokens and four times as many for each one after it. step: the inner step size of all levels;
    below 0 they keep what they learned. share: as cms_share; below 0 what it was.
    """
    config = dict(checkpoint['config'])
    levels = build([Config], config)[0].n_level
    usual = '128,change,change,change' if levels == 1 else ','.join(str(128 * 4 ** level) for level in range(levels))
    config['cms_chunks'] = chunks or config['cms_chunks'] or usual
    if levels == 1 and config['cms_topology'] != 'independent':         # whose levels have weights in a sum
        config['cms_topology'] = 'copies'
    if share >= 0:
        config['cms_share'] = share
    build([Config], config)                                     # what is wrong with these is said as such
    model = load_model(checkpoint | {'config': config}, device).requires_grad_(False)       # they move by themselves
    if config['cms_topology'] == 'copies' and 'log_step' in checkpoint['model']:
        model.log_step.fill_(checkpoint['model']['log_step'][0])                            # the fast level's
    if step >= 0:
        model.log_step.data.fill_(math.log(step) if step else -math.inf)
    return Learner(model)


# -----------------------------------------------------------------------------
# memory files: the state of a reader that learns, and whose it is

MEMORY_FORMAT = 'nested-learning-memory-5'
STATE = {'recurrent', 'anchor', 'pending', 'delta', 'gathered', 'learned'}      # of cms.learn's, all but its trace
READ_OUT = {'log_w', 'said', 'book', 'kept'}                                    # ... of copies as well


def owner(checkpoint):
    """Which model a memory file belongs to, {what: value}."""
    weights = hashlib.sha256()
    for name, p in checkpoint['model'].items():
        if name != 'log_step':                                  # a step size is not part of who remembers
            weights.update(p.contiguous().numpy().tobytes())
    return {'mixer': checkpoint['config']['mixer'], 'step': checkpoint['step'], 'weights': weights.hexdigest()[:16]}


def finite(x):
    """Whether all tensors in a reader's state are."""
    if torch.is_tensor(x):
        return bool(x.isfinite().all())
    return all(map(finite, x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()))


def save_memory(path, whose, reader, tokens, state):
    """
    Write a Learner's state and the tokens that it has yet to read, whole or not at all. whose: what owner said.
    UserError if what was learned is not finite.
    """
    state = {key: x for key, x in state.items() if key != 'trace'}
    if not finite(state):
        raise UserError(f'what was learned is not finite, and {path} stays as it was; try a smaller --cms_step')

    def copy(x):
        """A view would be written with all that it is a view of."""
        if isinstance(x, (list, dict)):
            return [copy(y) for y in x] if isinstance(x, list) else {key: copy(y) for key, y in x.items()}
        return x.detach().clone() if torch.is_tensor(x) else x
    about = {key: getattr(reader.config, key) for key in ('cms_chunks', 'cms_share')}
    save_checkpoint(path, {'owner': whose, **about, 'next': tokens, 'state': copy(state)}, MEMORY_FORMAT)


def load_memory(path, whose, chunks='', share=-1.0, device='cpu'):
    """
    What save_memory wrote, {'cms_chunks', 'cms_share', 'next', 'state', ..}. UserError if it is not that owner's, or
    was kept on another clock than chunks or with another share, where they are given.
    """
    keys = ('owner', 'cms_chunks', 'cms_share', 'next', 'state')
    saved = load_checkpoint(path, 'memory file', MEMORY_FORMAT, keys, device)
    for what, value in whose.items():
        if saved['owner'].get(what) != value:
            raise UserError(f"{path} belongs to another model: its {what} is {saved['owner'].get(what)}, that of this "
                            f'one is {value}')
    if {*saved['state']} not in (STATE, STATE | READ_OUT):
        raise UserError(f'{path} is damaged: it holds no state that a reader could go on from')
    if not finite(saved['state']):
        raise UserError(f'{path} holds numbers that are not finite; remove it and begin anew')
    if chunks not in ('', saved['cms_chunks']):
        raise UserError(f"{path} was kept with --cms_chunks={saved['cms_chunks']}, not {chunks}")
    if share >= 0 and share != saved['cms_share']:
        raise UserError(f"{path} was kept with --cms_share={saved['cms_share']}, not {share}")
    return saved


def describe_levels(model, state):
    """
    {'level_0': '..', ..}: how often each level of the first stream has moved and how far it is from the start, also as
    a share of it, or what it has saved; and, where levels are read out, how much each is believed now.
    """
    rows, copies = {}, 'log_w' in state
    believed = [f', believed to {100 * w:.1f} %' for w in state['log_w'][0].exp().tolist()] if copies else []
    for level, chunk in enumerate(model.config.chunks):
        squares, start = 0.0, 0.0
        for name, (its, p) in weights_of(model).items():
            if copies or its == level and chunk:
                delta = state['delta'][name][0, level] if copies else state['delta'][name][0]
                squares = squares + delta.double().square().sum()                       # of what is large, too
                start = start + p.detach().square().sum()
        if chunk:
            moved = squares.sqrt().item()
            when = f"every {chunk:,} tokens, {state['learned'] // chunk:,} moves" if chunk > 0 else \
                f"keeps, saved {state['book']['saved'][0, level].item():,.0f} nats" if chunk == CHANGE else \
                f"made in sleep, of what had saved {state['book']['slept'][0].item():,.0f} nats"
            rows[f'level_{level}'] = f'{when}, change {moved:.4f} ({100 * moved / start.sqrt().item():.2f} %)' \
                                     + (believed[level] if copies else '')
    return rows | ({'start': f'as trained{believed[-1]}'} if copies else {})
