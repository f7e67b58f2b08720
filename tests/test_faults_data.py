"""What goes wrong with data, tokenizers, folders and several processes: said in one line, with nothing lost."""
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_scripts import inside

import carry
import cli
import corpora
import data
import tokenizer
from cli import UsageError, UserError

TINY = ['--n_layer=1', '--n_embd=16', '--n_head=1', '--block_size=16', '--batch_size=2', '--max_steps=2',
        '--eval_every=2', '--eval_batches=1', '--sample_tokens=4', '--device=cpu', '--mixer=linear']


# ---- several processes


@pytest.mark.parametrize('name, more, said', [
    ('', '--block_size=90000', 'one window takes 90001'), ('/no/such', '--batch_size=2', '/no/such')])
def test_what_several_processes_meet_is_said_once(name, more, said, text):
    """Both find that the text is too short; one fails at the data, while the other waits for it."""
    args = [arg for arg in TINY if arg.split('=')[0] != more.split('=')[0]]
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                           os.path.join(ROOT, 'train.py'), f'--data={name or text}', more, *args], capture_output=True,
                          text=True, timeout=120, cwd=os.path.dirname(text))
    errors = [line for line in done.stderr.splitlines() if line.startswith('error:')]
    assert done.returncode == 1 and len(errors) == 1 and said in errors[0], done.stderr
    ours = done.stderr[:done.stderr.index('torch/distributed/elastic')]
    assert 'Traceback' not in ours and 'Connection' not in done.stderr, 'those who wait end without a word'


# ---- a run, its folder and its tokenizer


def contents(folder):
    """{name: bytes} of the files that make a run."""
    return {name: open(os.path.join(folder, name), 'rb').read() for name in os.listdir(folder)}


@pytest.fixture
def run_of_bpe(text, tmp_path):
    out_dir = str(tmp_path / 'out')
    inside('train.py', f'--data={text}', '--tokenizer=bpe:300', f'--out_dir={out_dir}', *TINY)
    other = tmp_path / 'other.txt'
    other.write_text(''.join(f'quite other words, of which {i * 7919 % 1000} is one;\n' for i in range(900)))
    return out_dir, str(other)


def test_a_run_that_is_refused_replaces_nothing(run_of_bpe, monkeypatch):
    """Not enough text, a loss that is not finite, and memory that does not suffice in the first step."""
    out_dir, other = run_of_bpe
    before = contents(out_dir)
    new = [f'--data={other}', '--tokenizer=bpe:300', f'--out_dir={out_dir}', '--overwrite']
    for change, error in (('--block_size=90000', UserError), ('--learning_rate=1e30', UserError),
                          ('--batch_size=2', MemoryError)):
        args = [arg for arg in TINY if arg.split('=')[0] != change.split('=')[0]]
        with monkeypatch.context() as patch, pytest.raises(error):
            if error is MemoryError:
                patch.setattr(carry.Rows, 'at', lambda *_: (_ for _ in ()).throw(MemoryError))
            else:
                patch.setattr(torch.nn.utils, 'clip_grad_norm_', lambda *_: torch.tensor(float('nan')))
            inside('train.py', *new, change, *args)
        assert contents(out_dir) == before, change
    inside('sample.py', 'line', f'--out_dir={out_dir}', '--max_new_tokens=2', '--device=cpu')
    inside('train.py', *new, *TINY)
    assert contents(out_dir)['tokenizer.bpe'] != before['tokenizer.bpe'], 'a run that goes well replaces all'
    inside('sample.py', 'line', f'--out_dir={out_dir}', '--max_new_tokens=2', '--device=cpu')


def test_a_checkpoint_knows_its_tokenizer(run_of_bpe, tmp_path):
    """Another one of the same size is refused by all that read the checkpoint; one that is gone is not learned anew."""
    out_dir, other = run_of_bpe
    inside('train.py', f'--data={other}', '--tokenizer=bpe:300', f'--out_dir={tmp_path}/b', *TINY)
    inside('train.py', f'--data={other}', f'--init_from={out_dir}/ckpt.pt', f'--out_dir={tmp_path}/c', *TINY)
    assert contents(tmp_path / 'c')['tokenizer.bpe'] == contents(out_dir)['tokenizer.bpe']
    with pytest.raises(UserError, match='--tokenizer=bytes, but .* was trained with bpe:300'):
        inside('train.py', f'--init_from={out_dir}/ckpt.pt', f'--out_dir={tmp_path}/d', '--tokenizer=bytes', *TINY)
    for folder in (out_dir, f'{tmp_path}/c'):
        shutil.copy(f'{tmp_path}/b/tokenizer.bpe', folder)
        readers = [('sample.py', 'hi', f'--out_dir={folder}'), ('eval_niah.py', f'--out_dir={folder}'),
                   ('train.py', '--resume', '--max_steps=4', f'--out_dir={folder}'),
                   ('train.py', f'--init_from={folder}/ckpt.pt', f'--data={other}', f'--out_dir={tmp_path}/d')]
        before = contents(folder)
        for reader in readers:
            with pytest.raises(UserError, match='trained with other tokens than those of its tokenizer, bpe:300'):
                inside(*reader)
        assert contents(folder) == before
        os.remove(f'{folder}/tokenizer.bpe')
        for reader in readers:
            with pytest.raises(UserError, match='tokenizer.bpe is missing'):
                inside(*reader)
        assert 'tokenizer.bpe' not in os.listdir(folder)


@pytest.mark.parametrize('more', ['--overwrite', '--resume', '--max_steps=3'])
def test_one_run_at_a_time_in_a_folder(more, run_of_bpe):
    out_dir, other = run_of_bpe
    before = contents(out_dir)
    with cli.locked(f'{out_dir}/ckpt.pt'), pytest.raises(UserError, match='in use by another process'):
        inside('train.py', f'--data={other}', f'--out_dir={out_dir}', more)
    assert contents(out_dir) == before


# ---- documents


def test_a_tokenizer_is_learned_from_bytes_and_not_from_documents(tmp_path, monkeypatch):
    """A large document among small ones is not passed over, nor one that fills the sample alone."""
    big = b''.join(b'%d bottles of %d; ' % (i, i * i) for i in range(20_000))
    for sizes in ([1, 1, len(big)], [len(big), 1, 1], [9] * 5000 + [len(big)] + [9] * 5000, [2000] * 100):
        documents = [(f'{i}', big[:size]) for i, size in enumerate(sizes)]
        pieces = data.sample(documents, 50_000)
        assert 45_000 < sum(map(len, pieces)) < 55_000, sizes
        share = sum(len(text) for text in pieces if len(text) > 20) / sum(map(len, pieces))
        want = sum(size for size in sizes if size > 20) / sum(sizes)
        assert abs(share - want) < 0.1, 'what is large gives much, what is small little'
    assert data.sample(documents, sum(sizes)) == [text for _, text in documents]
    (tmp_path / 'README').write_bytes(b'about this text')
    (tmp_path / 'corpus.txt').write_bytes(big)
    monkeypatch.setattr(data, 'BPE_BYTES', 100_000)
    assert data.prepare(str(tmp_path), 'bpe:300', quiet=True)[2].n_vocab == 300


def test_what_a_run_writes_is_no_part_of_its_text(tmp_path, monkeypatch):
    """Trained on the folder that it runs in, with its output going there, and gone on with, with output elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.txt').write_text('what there is to be read here\n' * 100)
    (tmp_path / 'tee.log').write_bytes(b'')                     # as `tee` leaves it while we start
    new = ['--data=.', '--tokenizer=bpe:260', *TINY]
    with open('train.log', 'w') as log:
        log.write('printed before\n')
        log.flush()
        subprocess.run([sys.executable, os.path.join(ROOT, 'train.py'), *new], stdout=log, check=True, timeout=60)
    (tmp_path / 'tee.log').write_text('what it printed')
    script = inside('train.py', '--resume', '--max_steps=4')
    assert script['info']['bytes'] == 3000 and script['info']['files'] == 1
    os.remove('train.log')
    os.remove('tee.log')
    for out_dir in ('.', 'deep/er'):
        inside('train.py', f'--out_dir={out_dir}', *new)
        script = inside('train.py', '--resume', '--max_steps=5', f'--out_dir={out_dir}')
        assert script['info']['bytes'] == 3000
    inside('train.py', '--resume', '--max_steps=5')
    (tmp_path / 'b.txt').write_text('more')
    with pytest.raises(UserError, match='is not the one that'):
        inside('train.py', '--resume', '--max_steps=6', f'--out_dir={out_dir}')


def test_text_may_move_if_it_stays_the_same(tmp_path, monkeypatch):
    """Another spelling, another working directory, another place; not another text, and not a task of that name."""
    home, away, out = tmp_path / 'home', tmp_path / 'away', f'--out_dir={tmp_path}/out'
    home.mkdir(), away.mkdir()
    monkeypatch.chdir(home)
    (home / 'a.txt').write_text('what there is to be read here\n' * 100)
    inside('train.py', '--data=a.txt', out, *TINY)
    inside('train.py', '--resume', '--data=./a.txt', '--max_steps=3', out)
    monkeypatch.chdir(away)
    inside('train.py', '--resume', '--max_steps=4', out)
    shutil.move(home / 'a.txt', away / 'a.txt')
    inside('train.py', '--resume', '--max_steps=5', f'--data={away}/a.txt', '--suffix=.txt', out)
    os.rename(away / 'a.txt', away / 'b.txt')
    inside('train.py', '--resume', '--max_steps=6', f'--data={away}/b.txt', out)
    (home / 'a.txt').write_text('what else there is to be read\n' * 100)
    with pytest.raises(UserError, match='is not the one that'):
        inside('train.py', '--resume', '--max_steps=7', f'--data={home}/a.txt', out)
    for name in ('python', 'recall', 'c.txt'):
        with pytest.raises(UserError, match='cannot change it'):
            inside('train.py', '--resume', f'--data={name}', out)


def test_a_split_by_name_is_never_useless(tmp_path, capsys):
    """Whatever sizes the names fall upon, each side can be trained or measured on, and it is said if it is cut."""
    train, val = (next(name for name in map('{}.txt'.format, range(999)) if corpora.side(name) == which)
                  for which in ('train', 'val'))
    for small, large in ((train, val), (val, train)):
        (tmp_path / small).write_bytes(b'small')
        (tmp_path / large).write_bytes(b'a large one' * 1000)
        tokens = data.prepare(str(tmp_path))[:2]
        assert 0.09 < len(tokens[1]) / sum(map(len, tokens)) < 0.11
        assert 'validation is the last 10 % of the bytes' in capsys.readouterr().out
    (tmp_path / small).write_bytes(b'a fair share' * 50)
    documents, splits = corpora.load_documents(str(tmp_path))
    assert splits == [corpora.side(name) for name, _ in documents] and len(documents) == 2
    data.prepare(str(tmp_path))
    assert len(capsys.readouterr().out.splitlines()) == 2, 'nothing to say'


# ---- what is not finite


@pytest.mark.parametrize('value, stop', [(float('nan'), False), (3e38, True)])
def test_weights_that_blow_up_are_not_saved(value, stop, text, tmp_path, monkeypatch):
    """In the step of an evaluation, or in the last one before a stop; the checkpoint before it can still write."""
    args = [f'--data={text}', f'--out_dir={tmp_path}/out', *[arg for arg in TINY if 'max_steps' not in arg]]
    inside('train.py', *args, '--max_steps=2')
    before = contents(tmp_path / 'out')['ckpt.pt']
    step_of, calls = torch.optim.AdamW.step, []

    def blow_up(self, *rest):
        step_of(self, *rest)
        calls.append(1)
        if stop and len(calls) == 1:                    # the stop after the next step saves without an evaluation
            signal.raise_signal(signal.SIGTERM)
        if len(calls) == 2:
            for group in self.param_groups:
                for p in group['params']:
                    p.data.fill_(value)
    monkeypatch.setattr(torch.optim.AdamW, 'step', blow_up)
    with pytest.raises(UserError, match='step 4: the (validation loss is nan|sum of all weights is inf). Nothing was'):
        inside('train.py', '--resume', f'--out_dir={tmp_path}/out', '--max_steps=9')
    assert contents(tmp_path / 'out')['ckpt.pt'] == before
    inside('sample.py', 'line', f'--out_dir={tmp_path}/out', '--max_new_tokens=2', '--device=cpu')


def test_what_a_folder_holds_and_is_not_read_is_said(tmp_path, capsys):
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'utf16.txt').write_bytes('some words, '.encode('utf-16') * 100)
    (tmp_path / '.hidden').write_bytes(b'\0')
    (tmp_path / 'link').symlink_to('sub')
    with pytest.raises(UserError, match=r'too little to train on; not read: .*UTF-16 \(1: utf16.txt\).*\(1: link\)$'):
        data.prepare(str(tmp_path))
    for name in ('a.txt', 'sub/b.txt'):
        (tmp_path / name).write_text('plain words, ' * 1000)
    data.prepare(str(tmp_path))
    assert re.search(r'not read: .*UTF-16 \(1: utf16.txt\); links to folders \(1: link\)\n', capsys.readouterr().out)
    data.prepare(str(tmp_path), suffix='.txt')
    assert 'not read' not in capsys.readouterr().out


@pytest.mark.parametrize('wrong', ['--mixer=gla', '--batch_size=3 --grad_accum=2', '--n_head=3'])
def test_a_command_line_that_is_refused_leaves_no_folder(wrong, tmp_path):
    with pytest.raises(UsageError):
        inside('train.py', f'--out_dir={tmp_path}/out', *wrong.split())
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', ['python', __file__])
def test_a_suffix_is_for_folders_and_packages(name):
    with pytest.raises(UsageError, match='picks files of a folder'):
        data.prepare(name, suffix='.md, txt')


def test_one_long_word_is_learned_from_in_parts(monkeypatch, capsys):
    """A sequence without blanks: every merge would go through all of it. What takes long says how far it is."""
    word = ''.join(random.Random(0).choices('ACGT', k=40_000)).encode()
    clock = itertools.count(step=3.0)
    monkeypatch.setattr(tokenizer.time, 'monotonic', lambda: next(clock))
    seen = []
    merge = tokenizer.merge
    monkeypatch.setattr(tokenizer, 'merge', lambda *args: seen.append(len(args[0])) or merge(*args))
    tokens = tokenizer.train_bpe([word], 100)
    assert max(seen) <= 128
    assert len(tokens) == 356 and max(map(len, tokens)) > 3
    said = [int(n) for n in re.findall(r'learning the tokenizer: (\d+) of 100 merges\n', capsys.readouterr().err)]
    assert len(said) > 5 and said == sorted(said) and said[-1] < 100
