"""Faults that users of such tools report, each with what should happen: one line or the right thing, nothing lost."""
import contextlib
import ctypes
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import unicodedata
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import ROOT
from test_scripts import TINY, inside

import machine
from cli import (Switch, UsageError, UserError, atomic_write, convert, locked, on_stop, one_line_errors,
                 plain)
from log import read_log
from machine import load_checkpoint, save_checkpoint
from model import Config, sample

SHORT = [*[arg for arg in TINY if 'steps' not in arg], '--max_steps=4', '--warmup_steps=1']


@pytest.fixture(scope='module')
def out_dir(text, tmp_path_factory):
    """The folder of a run of a few steps."""
    path = str(tmp_path_factory.mktemp('faults') / 'out')
    with contextlib.redirect_stdout(None):
        inside('train.py', f'--data={text}', f'--out_dir={path}', *SHORT)
    return path


# ---- what is not finite


def test_the_most_likely_token_stays_however_small_top_p_is():
    torch.set_flush_denormal(True)                              # as in the scripts
    for top_p in (1e-38, 1e-45, 1e-300):
        assert sample(torch.tensor([[0.0, 3.0, 1.0]]), top_p=top_p).tolist() == [1]


@pytest.mark.parametrize('step', ['1e15', '1e30', '1e300'])
@pytest.mark.parametrize('more', [['x' * 70], ['x' * 70, '--temperature=0'], ['--score=TEXT']])
def test_learning_that_blows_up_is_said_and_leaves_the_memory(step, more, out_dir, text, tmp_path):
    memory = str(tmp_path / 'me.pt')
    args = [f'--out_dir={out_dir}', '--learn', f'--memory={memory}', '--device=cpu', '--max_new_tokens=30']
    inside('sample.py', 'x' * 70, *args, '--cms_chunks=16')['hold'].close()
    before = open(memory, 'rb').read()
    with pytest.raises(UserError, match='^what the model answers is not finite[^\n]*--cms_step'):
        inside('sample.py', *[arg.replace('TEXT', text) for arg in more], *args, f'--cms_step={step}')
    assert open(memory, 'rb').read() == before


def test_weights_that_are_not_finite_are_not_read(out_dir, tmp_path):
    checkpoint = load_checkpoint(f'{out_dir}/ckpt.pt')
    checkpoint['model']['head.weight'][3, 4] = float('nan')
    save_checkpoint(tmp_path / 'ckpt.pt', checkpoint)
    for script, *args in (('sample.py', 'x'), ('sample.py', '--learn'), ('eval_niah.py',), ('train.py', '--resume')):
        with pytest.raises(UserError, match=r'weights that are not finite \(head.weight\)'):
            inside(script, *args, f'--out_dir={tmp_path}', '--device=cpu')


def test_a_memory_that_is_not_finite_is_not_read(out_dir, tmp_path):
    memory = str(tmp_path / 'me.pt')
    args = [f'--out_dir={out_dir}', '--learn', f'--memory={memory}', '--device=cpu', '--max_new_tokens=3']
    inside('sample.py', 'x' * 70, *args)['hold'].close()
    saved = torch.load(memory)
    next(iter(saved['state']['delta'].values())).fill_(float('inf'))
    torch.save(saved, memory)
    with pytest.raises(UserError, match='not finite; remove it'):
        inside('sample.py', 'y', *args)


# ---- compilers that are there and do not work


@pytest.mark.parametrize('broken, said', [('no headers', 'Python.h'), ('no program', 'nowhere'),
                                          ('fails', 'ends with 3'), ('no place', 'failed to map.*TMPDIR')])
def test_a_compiler_that_cannot_build_is_no_obstacle(broken, said, text, tmp_path, monkeypatch, capsys):
    """The default goes on uncompiled and says why; who asked for it is told."""
    if not shutil.which('g++'):
        pytest.skip('needs a C++ compiler that works')
    (tmp_path / 'fails').write_text('#!/bin/sh\nexit 3\n')
    (tmp_path / 'fails').chmod(0o755)
    if broken == 'no headers':
        monkeypatch.setattr(sysconfig, 'get_path', lambda name: '/nowhere')
    elif broken == 'no place':
        def refuse(path): raise OSError(f'{path}: failed to map segment from shared object')
        monkeypatch.setattr(ctypes, 'CDLL', refuse)
    else:
        monkeypatch.setenv('CXX', 'nowhere++' if broken == 'no program' else str(tmp_path / 'fails'))
    machine.cannot_compile.cache_clear()
    try:
        asked = SimpleNamespace(compile='auto', max_steps=200, optimizer='adamw')
        use_compile, why = machine.choose_compile(asked, Config(), 'cpu')
        assert not use_compile and re.search(said, why)
        with pytest.raises(UserError, match=f'^--compile=true is not possible: .*{said}'):
            machine.compiled(torch.nn.Linear(1, 1))
        if broken == 'no headers':
            model = ['--n_layer=1', '--n_head=2', '--n_embd=8', '--block_size=8', '--batch_size=1', '--eval_batches=1']
            args = [f'--data={text}', f'--out_dir={tmp_path}/out', *model, '--max_steps=200', '--sample_tokens=0']
            assert inside('train.py', *args)['step'] == 200
            assert f'training goes on uncompiled, and slower: {why}' in capsys.readouterr().out
    finally:
        machine.cannot_compile.cache_clear()


# ---- files that are no plain files


def test_a_link_is_followed(tmp_path):
    """The file that it leads to is replaced, whole or not at all; one that leads nowhere yet makes that file."""
    (tmp_path / 'disk').mkdir()
    target, link, chain = tmp_path / 'disk' / 'ckpt.pt', tmp_path / 'ckpt.pt', tmp_path / 'chain.pt'
    link.symlink_to('disk/ckpt.pt')
    chain.symlink_to(link)
    for path, text in ((link, b'new'), (chain, b'newer')):
        with atomic_write(path) as file:
            file.write(text)
        assert target.read_bytes() == text and link.is_symlink() and chain.is_symlink()
    target.chmod(0o600)
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(link) as file:
            file.write(b'half')
            raise KeyboardInterrupt
    assert target.read_bytes() == b'newer' and os.listdir(tmp_path / 'disk') == ['ckpt.pt']
    with atomic_write(link) as file:
        file.write(b'newest')
    assert target.read_bytes() == b'newest' and target.stat().st_mode & 0o777 == 0o600, 'who may read it is kept'
    (tmp_path / 'loop').symlink_to('loop')
    with pytest.raises(UserError, match='^could not write [^\n]*loop: Too many'):
        with atomic_write(tmp_path / 'loop') as file:
            pass


def test_a_pipe_or_a_device_is_written_to(tmp_path):
    pipe, link = str(tmp_path / 'pipe'), str(tmp_path / 'link')
    os.mkfifo(pipe)
    os.symlink(pipe, link)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    save_checkpoint(link, {'x': torch.ones(3)}, form='some')
    (tmp_path / 'copy').write_bytes(os.read(reader, 1 << 16))
    os.close(reader)
    assert torch.load(tmp_path / 'copy')['x'].tolist() == [1, 1, 1]
    os.symlink('/dev/full', tmp_path / 'full')
    for path in ('/dev/null', f'{tmp_path}/full'):
        before = os.stat(path)
        with contextlib.suppress(UserError) if path == '/dev/null' else pytest.raises(UserError, match='No space left'):
            with atomic_write(path) as file:
                file.write(b'x')
        assert os.stat(path).st_rdev == before.st_rdev != 0
    assert sorted(os.listdir(tmp_path)) == ['copy', 'full', 'link', 'pipe']


def test_standard_output_keeps_what_was_printed_before(tmp_path):
    """--json=/dev/stdout > FILE: the numbers stand behind the table, and neither takes the other's place."""
    code = ("from cli import atomic_write\nprint('the table')\n"
            "with atomic_write('/dev/stdout') as file:\n    file.write(b'{}')\nprint('the end')")
    with open(tmp_path / 'all.txt', 'w') as file:
        subprocess.run([sys.executable, '-c', code], cwd=ROOT, stdout=file, check=True)
    assert (tmp_path / 'all.txt').read_text().split('\n') == ['the table', '{}the end', '']


@pytest.mark.parametrize('script', ['eval_niah.py', 'bench.py'])
def test_a_folder_for_numbers_is_refused_before_the_work(script, tmp_path):
    with pytest.raises(UsageError, match='is a folder'):
        inside(script, f'--json={tmp_path}')


def test_a_folder_in_the_place_of_a_file_is_one_line(tmp_path):
    (tmp_path / 'folder').mkdir()
    for path in (tmp_path / 'folder', f'{tmp_path}/folder/', f'{tmp_path}/none/'):
        with pytest.raises(UserError, match='^could not write [^\n]*: it names a folder'):
            with atomic_write(path) as file:
                file.write(b'x')
    assert os.listdir(tmp_path) == ['folder'] and not os.listdir(tmp_path / 'folder')


def test_a_link_and_its_target_are_locked_as_one(tmp_path):
    (tmp_path / 'link').symlink_to('me.pt')
    with locked(str(tmp_path / 'me.pt')), pytest.raises(UserError, match='in use by another process'):
        with locked(str(tmp_path / 'link')):
            pass


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    rest, *others = (tmp_path / name for name in ('[a].pt.123.tmp', 'b.pt.123.tmp', '[a].pt.notes.tmp'))
    for path in (rest, *others):
        path.touch()
    with locked(tmp_path / '[a].pt'):
        assert not rest.exists() and all(path.exists() for path in others)


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_disk_without_locks_is_no_obstacle(number, tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr('fcntl.flock', flock)
    with locked(str(tmp_path / 'me.pt')):
        assert 'cannot be locked on this disk' in capsys.readouterr().err


# ---- plain causes


SMALL = '''"""What it does."""
import sys
from dataclasses import dataclass
from cli import one_line_errors, read_args
one_line_errors()

@dataclass
class Small:
    """The small one"""
    number: int = 3         # how many

read_args([Small], sys.argv[1:])
print('out', sys.stdout.isatty(), repr(sys.stdin.read()))
print('err', sys.stderr.isatty(), file=sys.stderr)
'''


def small(path, *args, **streams):
    """A script without torch, which is slow to start, in a process of its own."""
    (path / 'small.py').write_text(SMALL)
    return subprocess.run([sys.executable, *args[:-1], 'small.py', *args[-1:]], cwd=path, text=True, timeout=60,
                          env=os.environ | {'PYTHONPATH': ROOT}, **{'stderr': subprocess.PIPE, **streams})


def test_streams_that_are_full_or_closed(tmp_path):
    """A full one is an error, at the last flush too; a closed one holds nothing and takes nothing."""
    with open('/dev/full', 'w') as full:
        for arg in ('--help', '--number=2'):
            done = small(tmp_path, arg, stdout=full, input='')
            assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith('error: standard '), done.stderr
            assert 'No space left on device' in done.stderr and 'Traceback' not in done.stderr
        assert small(tmp_path, '--nought', stderr=full).returncode == 2, 'the exit code of a wrong command line'
    for closed in ((0,), (1,), (2,), (0, 1, 2)):
        done = small(tmp_path, '--number=2', stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
                     preexec_fn=lambda: [*map(os.close, closed)])
        assert (done.returncode, done.stdout, done.stderr) == (
            0, '' if 1 in closed else "out False ''\n", '' if 2 in closed else 'err False\n')


def test_help_without_docstrings(tmp_path):
    done = small(tmp_path, '-OO', '--help', stdout=subprocess.PIPE)
    assert done.stdout.split('\n\n') == ['What it does.', f"The small one\n  --{'number=3':<28} how many\n"]


@pytest.mark.parametrize('line', ['{"step": 2, "loss": "x"}', '{"step": 2, "loss": null}', '{"step": 2, "moves": 3}',
                                  '{"step": 2, "loss": NaN}', '{"step": 2.5}', '[' * 9999, '{"step": 2, "loss": [1]}',
                                  '{"step": 2, "moves": [null]}', '{"loss": Infinity}', '"step"', '\udcff'])
def test_a_log_line_of_another_kind_is_no_part_of_the_log(line, tmp_path):
    good = '{"step": 1, "loss": 2.5, "moves": [0.5]}'
    (tmp_path / 'log').write_bytes(f'{good}\n{line}\n{good}\n'.encode(errors='surrogateescape'))
    assert read_log(tmp_path / 'log', 9) == [json.loads(good)] * 2


def test_numbers_beyond_what_can_be_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    big = str(10 ** 30)
    for script, *args in (('train.py', f'--max_steps={big}'), ('train.py', f'--eval_every=-{big}'),
                          ('train.py', f'--cms_chunks=8,{big}'), ('train.py', f'--n_embd={big}'),
                          ('sample.py', f'--top_k={big}'), ('eval_niah.py', f'--lengths={big}'),
                          ('train.py', '--optimizer=muon', '--learning_rate=1e-320')):
        with pytest.raises(UsageError, match='^--[a-z_]+ [^\n]*$'):
            inside(script, *args)


@pytest.mark.parametrize('fill', ['numpy.zeros((10**9, 10**6))', 'numpy.zeros((2**62, 2**62))', 'numpy.empty(2**62)',
                                  'torch.zeros(10**9, 10**6)', 'torch.zeros(2**62, 2**62)', '[0] * 2**58'])
def test_no_memory_is_one_line(fill, monkeypatch, capsys):
    def leave(code, error):
        raise SystemExit(f'{code} {error}')
    monkeypatch.setattr('cli.leave', leave)
    monkeypatch.setattr('sys.excepthook', sys.excepthook)
    one_line_errors()
    try:
        eval(fill, {'numpy': numpy, 'torch': torch})
    except Exception as error:
        with pytest.raises(SystemExit, match='^1 out of memory; try a larger --grad_accum'):
            sys.excepthook(type(error), error, None)
    else:
        pytest.fail('it fits')


# ---- smaller


@pytest.mark.parametrize('words', [['- item'], ['-x'], ['--- a/file.c'], ['-- x'], ['-1 is']])
def test_a_prompt_that_begins_with_a_dash(words):
    with pytest.raises(UsageError, match=r"a prompt that begins with a dash is written --prompt='...', or after --$"):
        inside('sample.py', *words)
    for args in (['--', *words], [f'--prompt={words[0]}']):
        with pytest.raises(UserError, match='there is no checkpoint'):
            inside('sample.py', '--out_dir=/no/such', *args)


def test_a_switch_is_given_as_a_flag_is():
    for text, want in (('False', 'false'), ('0', 'false'), ('NO', 'false'), ('True', 'true'), ('yes', 'true'),
                       (None, 'true'), ('AUTO', 'auto')):
        assert convert('compile', Switch, text) == want
    with pytest.raises(UsageError, match="--compile takes true, false or auto, not 'maybe'"):
        inside('train.py', '--compile=maybe')


def test_control_characters_do_not_reach_a_terminal(out_dir, capsys, monkeypatch):
    prompt = 'a\x1b]0;title\x07b\r\x9bc\x7f\n\td\xe9'
    args = ('sample.py', prompt, f'--out_dir={out_dir}', '--device=cpu', '--max_new_tokens=60', '--temperature=9')
    inside(*args)
    piped = capsys.readouterr().out
    assert piped.startswith(prompt)
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    inside(*args)
    shown = capsys.readouterr().out
    assert shown.startswith('a\ufffd]0;title\ufffdb\ufffd\ufffdc\ufffd\n\td\xe9')
    assert shown == plain(piped) and all(c in '\n\t' or unicodedata.category(c) != 'Cc' for c in shown)


def test_score_reads_stdin(out_dir, text, monkeypatch, capsys):
    args = (f'--out_dir={out_dir}', '--device=cpu')
    inside('sample.py', f'--score={text}', *args)
    want = capsys.readouterr().out.splitlines()[1:5]
    with open(text) as file:
        monkeypatch.setattr(sys, 'stdin', file)
        inside('sample.py', '--score=-', *args)
    assert capsys.readouterr().out.splitlines()[1:5] == want


@pytest.fixture
def hangup():
    """SIGHUP ends a process, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures('hangup')
@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_the_hint_is_a_command(signum, text, tmp_path, monkeypatch, capsys):
    """Also the signal of a terminal that is closed, to which no line can be written any more."""
    folder = f"{tmp_path}/my run's; $HOME"
    seen = []
    monkeypatch.setattr('log.json.dumps', lambda entry, f=json.dumps, **_: (
        seen.append(entry), len(seen) == 2 and os.kill(os.getpid(), signum), f(entry))[-1])
    inside('train.py', f'--data={text}', f'--out_dir={folder}', *SHORT[:-2], '--max_steps=9')
    assert 0 < load_checkpoint(f'{folder}/ckpt.pt')['step'] < 9
    line, = [line for line in capsys.readouterr().out.splitlines() if 'go on with: python ' in line]
    script, *args = shlex.split(line.split('go on with: python ')[1])
    assert args == ['--resume', f'--out_dir={folder}'] and script.endswith('train.py')


@pytest.mark.usefixtures('hangup')
def test_a_closed_terminal_takes_no_lines(monkeypatch):
    before = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    calls, ours, theirs = [], *os.openpty()
    try:
        with contextlib.suppress(OSError), open(theirs, 'w') as terminal:       # closing it fails, too
            monkeypatch.setattr(sys, 'stdout', terminal)
            on_stop(lambda signum, frame: calls.append(signum))
            os.close(ours)
            print('nobody reads this', flush=True)          # before the signal comes, and after it
            os.kill(os.getpid(), signal.SIGHUP)
            print('nor this', flush=True)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            on_stop(print)
            calls.append(signal.getsignal(signal.SIGHUP))
        assert calls == [signal.SIGHUP, signal.SIG_IGN], 'called once, and nohup stays nohup'
    finally:
        monkeypatch.undo()
        for s, handler in before:
            signal.signal(s, handler)
