"""
Train a language model. Read it from top to bottom: knobs, setup, data, model, log, evaluation, the loop, the summary.

    python train.py                                         one command: a few minutes on two CPU cores
    python train.py --mixer=attention --out_dir=out-tf      any field of the run or of the model is --key=value
    python train.py --resume                                go on where out/ckpt.pt stands, as if never stopped
    python train.py --preset=gpt2                           124M-class model on fineweb, for a GPU
    torchrun --nproc_per_node=4 train.py                    the same batch cut over four devices

A step's batch depends on the seed and the step alone (where a task has lessons, on --max_steps as well). How it is cut,
over devices (torchrun), over the cores of a CPU or in time (--grad_accum), changes nothing but rounding. With
--carry=16 a row is 16 block sizes long and read in 16 steps (carry.py). out_dir holds ckpt.pt (the last; whole at any
moment), best.pt where an earlier one was better, log.jsonl (one line per step) and, for bpe, the tokenizer.

Does NOT include: sharded models, several machines, learning-rate search.
"""
import contextlib
import dataclasses
import math
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import tasks
from carry import Rows, constants, join_rows, take_rows
from cli import (Switch, UsageError, UserError, build, check, clear, git_commit, leave, locked, on_stop,
                 one_line_errors, print_block, read_args, remove_file, show_status)
from cms import Learner, moving
from log import draw_curve, hms, open_log, read_log
from machine import (Cores, best_of, check_progress, choose_compile, compiled, describe, first_to_fail, join_processes,
                     load_checkpoint, load_model, load_progress, load_tokenizer, peak_memory, pick_device,
                     save_progress, to_go_on)
from model import SIZES, Config, Hope, specimen
from optim import NAMES, make_optimizers
from tokenizer import digest, save_tokenizer

one_line_errors(first_to_fail)

# -----------------------------------------------------------------------------
# knobs

# what the models of model.SIZES are trained by. cpu, fast: five minutes on two cores (README). Not measured yet: small,
# for one GPU, twice over 28 million tokens of source, and gpt2, four times over 100 million of web text
PRESETS = {
    'cpu': {},
    'fast': dict(max_steps=3750),
    'small': dict(batch_size=64, max_steps=800, learning_rate=1e-3, eval_every=200, data='packages'),
    'gpt2': dict(batch_size=256, grad_accum=8, max_steps=1500, learning_rate=1e-3, warmup_steps=150, eval_every=250,
                 data='fineweb', tokenizer='gpt2'),
}


@dataclass
class Run:
    """The run"""
    # data and files
    data: str = 'python'                # python | packages | FILE | FOLDER | ... (corpora.py) | a task (tasks.py)
    suffix: str = ''                    # with a folder or a package: only files that end so, as in .txt or .py,.md
    tokenizer: str = 'auto'             # bytes | bpe:N (learned on the data) | gpt2; auto: bpe:1024 for 1 MB or more
    out_dir: str = 'out'                # where the checkpoint and the log go
    resume: bool = False                # go on from out_dir's checkpoint
    overwrite: bool = False             # start anew although out_dir holds a run
    init_from: str = ''                 # a checkpoint to start from: model, tokenizer; lengths and clocks may differ
    preset: str = 'auto'                # cpu | fast | small | gpt2; auto picks small on a GPU and cpu elsewhere
    # batches and length
    max_steps: int = 3500               # optimizer steps
    batch_size: int = 4                 # sequences per optimizer step, all devices together
    grad_accum: int = 1                 # parts that a device cuts its share into, to save memory
    carry: int = 0                      # rows are as long as so many steps; the state goes on, its gradient does not
    # optimizer
    optimizer: str = 'muon'             # adamw | muon | m3 | momentum | delta_momentum | deep_momentum | dgd
    learning_rate: float = 8e-3         # at the peak
    matrix_lr: float = 0.0              # of the matrices, if not adamw moves them (0 = 1.5 times the above for muon)
    start_lr: float = 1.0               # of what memories hold before the first token, as a fraction of the peak
    final_lr: float = 0.05              # where the schedule ends, as a fraction of the peak
    warmup_steps: int = 100             # steps of linear rise to the peak
    schedule: str = 'cosine'            # cosine | trapezoid (constant, then linear down)
    cooldown: float = 0.4               # trapezoid: the fraction of the run that the way down takes
    weight_decay: float = 0.1           # on matrices; not on embeddings, convolutions, norms and biases
    beta1: float = 0.9                  # AdamW
    beta2: float = 0.95                 # AdamW
    grad_clip: float = 1.0              # largest norm of the gradient (0 = no limit)
    # evaluation
    eval_every: int = 500               # steps between evaluations, each followed by a checkpoint
    eval_batches: int = 40              # batches per evaluation, the same ones every time
    sample_tokens: int = 200            # tokens to sample at each evaluation (0 = none)
    # machine
    device: str = 'auto'                # cpu | cuda | mps; auto is cuda where there is one
    dtype: str = 'auto'                 # float32 | bfloat16 (autocast); auto is bfloat16 on a GPU
    compile: Switch = 'auto'            # true | false; auto: on a GPU, and in long runs on a CPU; not if NL_COMPILE=0
    seed: int = 1337                    # of the weights, the batches and the samples

    def __post_init__(self):
        for name in ('max_steps', 'batch_size', 'grad_accum', 'eval_every', 'eval_batches'):
            check(getattr(self, name) >= 1, f'--{name} must be at least 1, not {getattr(self, name)}')
        for name in ('warmup_steps', 'sample_tokens', 'weight_decay', 'grad_clip', 'final_lr', 'start_lr', 'matrix_lr',
                     'seed', 'carry'):
            check(getattr(self, name) >= 0, f'--{name} must be at least 0, not {getattr(self, name)}')
        check(self.seed < 2**63, f'--seed must be below 2^63, not {self.seed}')
        check(1e-300 < self.learning_rate < math.inf, f'--learning_rate must be above 0, not {self.learning_rate}')
        check(0 < self.cooldown <= 1, f'--cooldown must be above 0 and at most 1, not {self.cooldown}')
        for name in ('beta1', 'beta2'):
            check(0 <= getattr(self, name) < 1, f'--{name} must be at least 0 and below 1, not {getattr(self, name)}')
        check(not 0 < self.matrix_lr < 1e-99 and self.matrix_lr < math.inf, f'--matrix_lr cannot be {self.matrix_lr}')
        check(not (self.resume and self.overwrite), 'give one of --resume and --overwrite')
        for name, choices in (('preset', ('auto', *PRESETS)), ('optimizer', NAMES),
                              ('schedule', ('cosine', 'trapezoid')), ('dtype', ('auto', 'float32', 'bfloat16')),
                              ('compile', ('auto', 'true', 'false'))):
            value = getattr(self, name)
            check(value in choices, f"--{name} must be one of {', '.join(choices)}, not '{value}'")


# the command line wins over the checkpoint that --resume goes on from, that over the preset, and that over the defaults
given = read_args([Run, Config], sys.argv[1:], hidden=('vocab_size',))
run, = build([Run], given)
ckpt_path, log_path = os.path.join(run.out_dir, 'ckpt.pt'), os.path.join(run.out_dir, 'log.jsonl')
ddp = 'TORCHELASTIC_RUN_ID' in os.environ               # started by torchrun
rank, world = (int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])) if ddp else (0, 1)
is_main = rank == 0                                     # the process that prints, evaluates and writes
hold = contextlib.ExitStack()                           # out_dir is ours until this process ends
checkpoint = source = None                              # to go on from, to start from
if run.resume:
    if is_main and os.path.exists(ckpt_path):
        hold.enter_context(locked(ckpt_path))
    checkpoint, saved = to_go_on(ckpt_path, given)
    run, config = build([Run, Config], saved | {'out_dir': run.out_dir, 'overwrite': False} | given)
else:
    preset = run.preset if run.preset != 'auto' else 'small' if pick_device(run.device) == 'cuda' else 'cpu'
    base = SIZES[preset] | PRESETS[preset]
    if run.init_from:
        source = load_checkpoint(run.init_from)
        if given.get('tokenizer', 'auto') not in ('auto', source['run']['tokenizer']):
            raise UsageError(f"--tokenizer={given['tokenizer']}, but {run.init_from} was trained with "
                             f"{source['run']['tokenizer']}, which it keeps; leave --tokenizer out")
        if 'cms_step' in given:                         # else the step sizes that it learned, if it did
            source['model'].pop('log_step', None)
        base, given = base | source['config'], given | {'tokenizer': source['run']['tokenizer']}
    run, config = build([Run, Config], base | given)
device = pick_device(run.device)

# -----------------------------------------------------------------------------
# setup: devices, number formats, random generators

if ddp:
    device = join_processes(device)
    one_line_errors(first_to_fail)                      # torch has put a hook of its own in the place of ours
on_gpu = device.startswith('cuda')
torch.set_flush_denormal(True)                          # what a memory forgets fades through them, slowly
torch.set_float32_matmul_precision('high' if on_gpu else 'highest')     # tf32 for what stays in float32
use_bf16 = run.dtype == 'bfloat16' or run.dtype == 'auto' and on_gpu
autocast = torch.autocast(device.split(':')[0], dtype=torch.bfloat16, enabled=use_bf16)
use_compile, why_not = choose_compile(run, config, device)
for refused, why in (
        (run.batch_size % (world * run.grad_accum), f'--batch_size={run.batch_size} must be a multiple of devices x '
         f'grad_accum = {world} x {run.grad_accum}'),
        # the backward passes of a model that learns while it reads can neither be kept nor differentiated by a compiler
        (use_compile and config.chunks, '--compile=true is not for models that learn while they read (--cms_chunks)'),
        (run.optimizer == 'dgd' and (use_compile or ddp or config.chunks), '--optimizer=dgd watches what goes through '
         'the layers: not with --compile=true, torchrun or --cms_chunks'),
        (config.cms_topology == 'copies', '--cms_topology=copies is for reading: sample.py --learn has it by itself'),
        (given.get('matrix_lr') and run.optimizer == 'adamw', '--matrix_lr is for other optimizers than adamw'),
        (run.carry and (ddp or config.chunks), '--carry is not for torchrun or --cms_chunks'),
        (config.chunks and config.block_size <= config.chunks[0], f'--block_size={config.block_size} must be above the '
         f'first of --cms_chunks={config.cms_chunks}, or no level would move while training reads')):
    if refused:
        raise UsageError(why)
torch.manual_seed(run.seed)                             # the weights; batches and samples have generators of their own
batch_rng = torch.Generator().manual_seed(run.seed)


def say(line):
    if is_main:
        print(f'{clear(sys.stdout)}{line}', flush=True)


# -----------------------------------------------------------------------------
# data

if is_main and not run.resume:
    hold.enter_context(locked(ckpt_path))
    if any(map(os.path.exists, (ckpt_path, best_of(ckpt_path)))) and not run.overwrite:
        raise UserError(f'{run.out_dir} holds a run already; --resume goes on with it, --overwrite starts anew, '
                        '--out_dir=NAME keeps both')
if ddp and not is_main:
    dist.barrier()                                      # the main process downloads first
enc = load_tokenizer(checkpoint, ckpt_path) if checkpoint else source and load_tokenizer(source, run.init_from)
task, val_task, enc, info = tasks.load(run.data, run.tokenizer, run.out_dir, run.suffix, not is_main, enc,
                                       checkpoint['data'].get('left_out', ()) if checkpoint else ())
if ddp and is_main:
    dist.barrier()
tasks.check_enough(task, val_task, config.block_size, max(1, run.carry), run.data)      # now, and not after steps
rows = Rows(task, run.batch_size, config.block_size, max(1, run.carry), batch_rng)
if checkpoint and checkpoint['data']['sha256'] != info['sha256']:
    raise UserError(f'the text of --data={run.data} is not the one that {ckpt_path} was trained on; '
                    'a resumed run needs the same')

# -----------------------------------------------------------------------------
# model and optimizer

run.tokenizer, config.vocab_size = enc.name, enc.n_vocab
origin = checkpoint or source and {'config': dataclasses.asdict(config), 'model': source['model']}
raw_model = load_model(origin, device) if origin else Hope(config).to(device)
optimizers = make_optimizers(raw_model, run.optimizer, run.learning_rate, run.matrix_lr, run.weight_decay, run.start_lr,
                             (run.beta1, run.beta2))
step, best_loss, carried, log = 0, math.inf, None, None         # carried: the state to read on from; log: see begin
kept_loss = None                                        # the validation loss of the weights in ckpt.pt, if it is known
if checkpoint:
    load_progress(optimizers, raw_model, checkpoint, ckpt_path)
    batch_rng.set_state(checkpoint['batch_rng'])
    step, best_loss, carried = checkpoint['step'], checkpoint['best_loss'], checkpoint['carried']
    kept_loss = checkpoint.get('val_loss')
reader = Learner(raw_model) if config.chunks else raw_model         # on the token clock, or as it is; evaluates
model = compiled(reader) if use_compile else reader                 # the same, for training; raw_model writes, is saved
if ddp:
    model = DistributedDataParallel(model, device_ids=[device] if on_gpu else None,
                                    find_unused_parameters=bool(config.chunks))     # a step size that was cut off

params = list(raw_model.parameters())
share = run.batch_size // world                         # rows of a step on this device, and how they are cut
cores = Cores(share // run.grad_accum if use_compile and device == 'cpu' and not ddp else 1)
size = share // (run.grad_accum * cores.n)
parts = [slice(start, start + size) for start in range(0, share, size)]

flops = raw_model.flops_per_token(config.block_size)
say(f'model: {config.mixer}, {raw_model.num_params():,} parameters, {flops / 1e6:.1f} MFLOP per token')
say(f'run: {run.max_steps:,} steps of {run.batch_size} x {config.block_size} tokens on {world} x {device}, '
    f"{'bfloat16' if use_bf16 else 'float32'}, out_dir={run.out_dir}{f', from step {step:,} on' * (step > 0)}")
still = [str(level) for level, chunk in enumerate(config.chunks) if chunk >= config.block_size]
if still:
    say(f"levels that do not move within {config.block_size} tokens, and learn no step size: {', '.join(still)}")
if cores.n > 1:
    say(f'{cores.n} parts of a batch at a time, side by side on the cores')
if why_not:
    say(f'training goes on uncompiled, and slower: {why_not}')
if use_compile:
    say('the first step waits for torch.compile, a minute or more')

# -----------------------------------------------------------------------------
# the log: what is needed to run it again, then one line per step

lines = read_log(log_path, step) if checkpoint and os.path.exists(log_path) else []
losses = [line['loss'] for line in lines if 'loss' in line]
lines.append({'command': shlex.join(sys.argv), 'commit': git_commit(), 'torch': torch.__version__,
              'python': platform.python_version(), 'machine': describe(device), 'devices': world,
              'start_step': step, 'parameters': raw_model.num_params(), 'data': info,
              'run': dataclasses.asdict(run), 'config': dataclasses.asdict(config)})


def begin():
    """Write what a run begins with -> the log. In the place of an old run's, so not before this one has made a step."""
    if not checkpoint:                                  # first: weights never lie beside a tokenizer not their own
        remove_file(ckpt_path)
        remove_file(best_of(ckpt_path))
        save_tokenizer(enc, run.out_dir)
    return open_log(log_path, lines)


# -----------------------------------------------------------------------------
# schedule, evaluation, checkpoint


def lr_at(step):
    if step < run.warmup_steps:
        return run.learning_rate * (step + 1) / run.warmup_steps
    done = (step - run.warmup_steps) / max(1, run.max_steps - run.warmup_steps)
    cosine, trapezoid = 0.5 * (1 + math.cos(math.pi * min(1, done))), min(1.0, (1 - done) / run.cooldown)
    high = cosine if run.schedule == 'cosine' else trapezoid
    return run.learning_rate * (run.final_lr + (1 - run.final_lr) * max(0.0, high))


def bits_per_byte(**losses):
    """Nats per token as bits per byte, by name; nothing where what is read is no text."""
    return {name: x / math.log(2) / info['bytes_per_token'] for name, x in losses.items() if 'bytes_per_token' in info}


@torch.no_grad()
def evaluate():
    """Mean validation loss in nats per token, over the same batches every time."""
    rng, total = torch.Generator().manual_seed(run.seed), 0.0
    for _ in range(run.eval_batches):
        pair = val_task.held_out(run.batch_size, config.block_size, rng)
        for idx, targets in zip(*(x.chunk(run.grad_accum) for x in pair)):
            with autocast:
                total += reader(idx.to(device), targets.to(device))[1].item() * len(idx) / run.batch_size
    return total / run.eval_batches


def forward_backward(part):
    """Forward and backward of a part of the batch -> its share of the loss, its state, gradients to add up."""
    inputs = {name: x[part] for name, x in batch.items()}
    if carried:
        inputs['state'] = take_rows(carried, part, device)
    if ddp:
        model.require_backward_grad_sync = part == parts[-1]        # devices average once per step
    with autocast:
        _, loss, state = model(**inputs)
        loss = loss / len(parts)
    state = state if run.carry else None
    if cores.n > 1:                                     # side by side with others
        return loss.detach(), state, torch.autograd.grad(loss, params, allow_unused=True)
    loss.backward()
    return loss.detach(), state, []


def save(val_loss=None):
    """Write ckpt.pt, whose weights have that validation loss, if it is known."""
    global kept_loss
    # a step size may be 0, and its logarithm not finite
    total = sum(p.detach().abs().sum() for name, p in raw_model.named_parameters() if name != 'log_step')
    check_progress(step, lr_at(step - 1), sum_of_all_weights=total.item())
    save_progress(ckpt_path, {
        'model': raw_model.state_dict(), 'optimizer': [optimizer.state_dict() for optimizer in optimizers],
        'config': dataclasses.asdict(config), 'run': dataclasses.asdict(run), 'step': step,
        'batch_rng': rows.generator_state(step), 'carried': carried, 'best_loss': best_loss, 'data': info,
        'tokenizer': digest(enc), 'val_loss': val_loss,
        'gathered': {name: p.grad for name, p in raw_model.named_parameters() if p.grad is not None}},
        kept_loss)
    kept_loss = val_loss


asked_to_stop = stopping = False                        # the first in this process, the second agreed by all of them


def on_signal(signum, frame):
    global asked_to_stop
    if asked_to_stop:
        raise KeyboardInterrupt                         # the second Ctrl-C does not wait
    asked_to_stop = True
    say('\nstopping after this step (once more to leave at once)')


on_stop(on_signal)

# -----------------------------------------------------------------------------
# the loop

if step >= run.max_steps and checkpoint:
    say(f'{ckpt_path} is at step {step} already; give a larger --max_steps to go on')
first_step, train_seconds, recent = step, 0.0, []
moves = ([line['moves'] for line in lines if 'moves' in line] or [[0.0] * config.n_level])[-1]     # each level's last
while True:
    # evaluate, sample, save
    early = stopping and step < run.max_steps
    done = early or step >= run.max_steps
    if done or (step % run.eval_every == 0 and step > first_step):
        if is_main and step > first_step and early:     # whoever stops us may not wait for an evaluation
            save()
            again = shlex.join([sys.argv[0], '--resume', f'--out_dir={run.out_dir}'])
            say(f'stopped at step {step:,}; go on with: python {again}')
        elif is_main and step > first_step:
            val_loss = evaluate()
            check_progress(step, lr_at(step - 1), validation_loss=val_loss)
            best_loss = min(best_loss, val_loss)
            save(val_loss)
            log(step=step, val_loss=val_loss, **bits_per_byte(val_bpb=val_loss))
            bpb = ''.join(f'| {name.replace("_", " ")} {x:.4f} '
                          for name, x in bits_per_byte(val_bpb=val_loss, best_bpb=best_loss).items())
            say(f'eval {step:>7,}/{run.max_steps:,} | val loss {val_loss:.4f} {bpb}| saved {ckpt_path}')
            if shares := val_task.report(reader, config.block_size, run.batch_size // run.grad_accum):
                log(step=step, report=shares)
                say('answers right, %: ' + '  '.join(f'{what} {100 * share:.0f}' for what, share in shares.items()))
            if run.sample_tokens and bpb:
                with autocast:
                    say(specimen(raw_model, enc, run.sample_tokens, run.seed))
        if ddp:
            dist.barrier()
    if done:
        break

    # forward and backward, over the parts of this device's share of the batch
    start_time = time.perf_counter()
    lr = lr_at(step)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = lr * group['lr_scale']
    place = step % rows.steps                           # of this step in its rows, with --carry
    progress = 1.0 if run.init_from else (step - place) / run.max_steps     # tasks may begin with lessons for beginners
    batch = {name: x[rank::world].to(device) for name, x in rows.at(step, progress).items()}
    loss, states, carried = torch.zeros((), device=device), [], carried if place else None
    kind = carried and constants(carried)               # code is compiled for these: parts of a new kind go alone
    for part_loss, state, grads in cores.map(forward_backward, parts, kind):
        loss += part_loss
        states.append(state)
        for p, g in zip(params, grads):                 # in the order of the parts: the sum is always the same
            if g is not None:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad += g
    carried = join_rows(states) if run.carry else None
    stopping = asked_to_stop
    if ddp:                                             # the mean loss, and whether anybody was told to stop
        message = torch.stack([loss, torch.tensor(float(asked_to_stop), device=device)])
        dist.all_reduce(message)
        loss, stopping = message[0] / world, message[1].item() > 0

    # step, with the levels whose time it is
    loss = loss.item()
    with moving(raw_model, step) as moved:              # with one level an ordinary step
        grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), run.grad_clip or math.inf).item()
        check_progress(step + 1, lr, loss=loss, gradient_norm=grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    step += 1
    moves = [moved.get(level, size) for level, size in enumerate(moves)]

    # log; the first step is not counted in the speed, it compiles and fills caches
    seconds = time.perf_counter() - start_time
    recent = (recent + [seconds])[-50:] if step > first_step + 1 else []
    train_seconds += seconds if recent else 0.0
    mean = sum(recent) / len(recent) if recent else seconds
    speed = run.batch_size * config.block_size / mean
    losses.append(loss)
    if step == first_step + 1:                          # memory sufficed and the loss is finite
        log = begin() if is_main else lambda **entry: None
    levels = {'ticks': [step // n for n in config.periods], 'moves': moves}
    log(step=step, loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_second=round(speed),
        **levels if config.n_level > 1 else {})
    bpb = f'| bpb {bits_per_byte(bpb=loss)["bpb"]:7.4f} ' if task.is_text else ''
    line = f'step {step:>7,}/{run.max_steps:,} | loss {loss:7.4f} {bpb}'
    pace = f'| {speed:>9,.0f} tok/s | left {hms(mean * (run.max_steps - step))}'
    if step % 50 == 0:
        say(f'{line}| lr {lr:.2e} | norm {grad_norm:7.3f} {pace}')
    elif is_main:
        show_status(line + pace)

# -----------------------------------------------------------------------------
# summary

if is_main and step > first_step and not early:
    print('\ntraining loss, nats per token' + ', as the task weighs them' * (not task.is_text))
    print(draw_curve(losses))
    counted = max(1, step - first_step - 1) * run.batch_size * config.block_size
    speed = counted / train_seconds if train_seconds else speed
    print_block(mixer=config.mixer, parameters=raw_model.num_params(), steps=step,
                tokens=step * run.batch_size * config.block_size, train_seconds=f'{train_seconds:.1f}',
                tokens_per_second=f'{speed:.0f}', gflops=f'{speed * flops / 1e9:.1f}',
                peak_memory_mib=f'{peak_memory(device):.0f}', val_loss=f'{val_loss:.4f}',
                **{name: f'{x:.4f}' for name, x in bits_per_byte(val_bpb=val_loss, best_val_bpb=best_loss).items()},
                checkpoint=ckpt_path, **{'best': best_of(ckpt_path)} if os.path.exists(best_of(ckpt_path)) else {})
hold.close()
if ddp:
    dist.destroy_process_group()
    leave(0)                                            # at once: threads that torch leaves may abort as Python ends
