"""
Weights alone: from a run, a folder to hand on and to keep in a repository, a third of its checkpoint's size or less.

    python export.py --to=models/hope                       of the run in out, the best checkpoint
    python export.py --out_dir=out-niah --to=models/needles --last

The folder holds ckpt.pt (weights in half precision, with all that is needed to read with them), log.jsonl (how they
were made: settings, every 50th step, every evaluation, and what was exported) and, for bpe, the tokenizer. Beside the
folder SHA256SUMS gets a line. Whatever takes --out_dir or --init_from takes it. Folders of the machine that trained are
left out of all of it: of a path its last name stays, of a checkpoint's the folder's as well.

Does NOT include: what --resume needs (optimizer, generators), integer formats, a choice of text to measure on: what
half precision costs is measured on the source of this script.
"""
import hashlib
import json
import math
import os
import shlex
import sys
import tempfile
from dataclasses import dataclass

import torch

from cli import (UserError, atomic_write, build, check, git_commit, one_line_errors, print_block, read_args, read_file,
                 remove_file)
from log import read_log
from machine import load_checkpoint, load_model, load_tokenizer, pick_checkpoint, save_checkpoint
from tokenizer import encode, save_tokenizer

FILES = ('log.jsonl', 'tokenizer.bpe', 'best.pt', 'ckpt.pt')        # of a run; ckpt.pt last: with it a model is there
EVERY = 50                                                          # steps between two that stay in the log


@dataclass
class Export:
    """The export"""
    out_dir: str = 'out'                # the folder of the run
    to: str = ''                        # the folder to make, as in models/hope
    last: bool = False                  # the last checkpoint, not the one of the lowest validation loss
    overwrite: bool = False             # also if that folder holds a model

    def __post_init__(self):
        check(self.to, 'give the folder to make, as in --to=models/hope')
        check(os.path.realpath(self.to) != os.path.realpath(self.out_dir),
              f'--to={self.to} is the folder of the run, whose checkpoint it would replace; name another')


# -----------------------------------------------------------------------------
# weights


def halved(weights):
    """{name: weight} in half precision, those that share memory as one. UserError if a weight is too large for it."""
    done, once = {}, {}
    for name, p in weights.items():
        p16 = once.setdefault((p.data_ptr(), p.shape), p.half() if p.is_floating_point() else p)
        if not torch.equal(p16.isfinite(), p.isfinite()):           # the logarithm of a step size may be -inf
            raise UserError(f'{name} holds {p.abs().max().item():.3g}, and half precision ends at 65,504; nothing was '
                            'written')
        done[name] = p16
    return done


def change(before, after):
    """By how much weights differ, as a share of their size, both as root mean squares."""
    pairs = [(p.double(), after[name].double()) for name, p in before.items() if name != 'log_step']
    return math.sqrt(sum((p - q).square().sum().item() for p, q in pairs)
                     / max(1e-300, sum(p.square().sum().item() for p, q in pairs)))


@torch.no_grad()
def bits_per_byte(model, enc):
    """Of the beginning of this script, as far as attention sees: any text says how two models differ."""
    ids = encode(enc, read_file(__file__)).tolist()[:model.config.block_size]
    idx = torch.tensor([[enc.eot_token, *ids]])
    nats = model.eval()(idx[:, :-1], idx[:, 1:])[1].item()
    return nats * len(ids) / math.log(2) / len(enc.decode_bytes(ids))


# -----------------------------------------------------------------------------
# what a reader needs of paths and of a log


def bare(x):
    """A path's last name, of a checkpoint with its folder's; anything else as it is."""
    if not isinstance(x, str):
        return x
    folder, name = os.path.split(x.rstrip('/'))
    return os.path.join(os.path.basename(folder), name) if name in ('ckpt.pt', 'best.pt') else name


def no_folders(settings):
    """A run's settings, or what it says of its data: {key: value}."""
    return {key: '' if key == 'path' else bare(x) for key, x in settings.items()}


def no_folders_in(command):
    """A command line, as the log has it."""
    words = [word.partition('=') for word in shlex.split(command)]
    return shlex.join(f'{key}={bare(x)}' if sep else bare(key) for key, sep, x in words)


def compact(path, step):
    """The lines of a run's log up to that step; of its steps every 50th, the first after each start, and the last."""
    lines, kept = read_log(path, step), []
    last = max((line['step'] for line in lines if 'loss' in line), default=0)
    for line in lines:
        if 'config' in line:
            if kept and line.get('start_step', 0) >= step:       # resumed after what is exported
                break
            line = line | {'command': no_folders_in(line['command']), 'run': no_folders(line['run']),
                           'data': no_folders(line['data'])}
        if 'loss' not in line or line['step'] % EVERY == 0 or line['step'] == last or not kept or 'config' in kept[-1]:
            kept.append(line)
    return kept


# -----------------------------------------------------------------------------
# go


def main():
    one_line_errors()
    args, = build([Export], read_args([Export], sys.argv[1:]))
    if not args.overwrite and any(os.path.exists(os.path.join(args.to, name)) for name in FILES):
        raise UserError(f'{args.to} holds a model or a run already; --overwrite replaces it, --to=NAME keeps both')
    path = pick_checkpoint(args.out_dir, best=not args.last)
    checkpoint = load_checkpoint(path)
    model, enc = load_model(checkpoint), load_tokenizer(checkpoint, path)
    weights = halved(checkpoint['model'])
    light = {key: checkpoint[key] for key in ('config', 'step', 'tokenizer')} | {
        'model': weights, 'run': no_folders(checkpoint['run']), 'data': no_folders(checkpoint['data']),
        'val_loss': checkpoint.get('val_loss')}                     # of the weights as they were trained
    lines = compact(os.path.join(args.out_dir, 'log.jsonl'), checkpoint['step'])

    to = os.path.abspath(args.to)
    about = {'from': os.path.basename(path), 'step': checkpoint['step'], 'commit': git_commit(),
             'torch': torch.__version__, 'change_of_weights': change(checkpoint['model'], weights)}
    try:
        os.makedirs(os.path.dirname(to), exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.export-', dir=os.path.dirname(to)) as new:
            save_checkpoint(os.path.join(new, 'ckpt.pt'), light)
            data = read_file(os.path.join(new, 'ckpt.pt'))
            again = load_model(load_checkpoint(os.path.join(new, 'ckpt.pt')))       # it can be read
            about |= {'bits_per_byte': [bits_per_byte(model, enc), bits_per_byte(again, enc)],
                      'bytes': len(data), 'sha256': hashlib.sha256(data).hexdigest()}
            save_tokenizer(enc, new)
            with atomic_write(os.path.join(new, 'log.jsonl')) as file:
                file.writelines(json.dumps(line).encode() + b'\n' for line in [*lines, {'exported': about}])
            put(new, to)
    except OSError as error:
        raise UserError(f'could not write {args.to}: {error.strerror}') from None
    sign(to, about['sha256'])
    before, after = about['bits_per_byte']
    print_block(folder=args.to, mixer=model.config.mixer, parameters=model.num_params(), step=checkpoint['step'],
                val_loss='not known' if light['val_loss'] is None else f"{light['val_loss']:.4f} before",
                half_precision=f"weights changed by {about['change_of_weights']:.1e} of their size, bits per byte of "
                               f'this script {before:.4f}, then {after:.4f}',
                bytes=about['bytes'], sha256=about['sha256'])
    for use in ('sample.py "def " --out_dir=', 'train.py --init_from='):
        print(f"    python {use}{shlex.quote(os.path.join(args.to, 'ckpt.pt') if 'init' in use else args.to)}")


def put(new, to):
    """The files of the folder new, which are whole, into the folder to, in the place of a model that was there."""
    os.makedirs(to, exist_ok=True)
    for name in FILES:
        if os.path.exists(os.path.join(new, name)):
            os.replace(os.path.join(new, name), os.path.join(to, name))
        else:
            remove_file(os.path.join(to, name))


def sign(to, sha256):
    """Its line in the SHA256SUMS beside a model's folder, as sha256sum writes and checks it, sorted by name."""
    path, name = os.path.join(os.path.dirname(to), 'SHA256SUMS'), f'{os.path.basename(to)}/ckpt.pt'
    lines = read_file(path).decode().splitlines() if os.path.exists(path) else []
    sums = dict(line.split('  ', 1)[::-1] for line in lines if '  ' in line) | {name: sha256}
    with atomic_write(path) as file:
        file.writelines(f'{sums[name]}  {name}\n'.encode() for name in sorted(sums))


if __name__ == '__main__':
    main()
