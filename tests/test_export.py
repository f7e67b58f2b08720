"""Weights alone, from a run: what they hold and what they leave out, who reads them, and the models that are kept."""
import contextlib
import glob
import hashlib
import json
import os
import re
import shutil

import pytest
import torch
from conftest import ROOT
from test_scripts import TINY, inside

from cli import UserError
from log import read_run
from machine import PROGRESS, load_checkpoint, load_model, save_checkpoint

KEPT = sorted(glob.glob(os.path.join(ROOT, 'models', '*', 'ckpt.pt')))


@pytest.fixture(scope='module')
def run(text, tmp_path_factory):
    """The folder of a run of a few steps, resumed once, whose paths are all absolute."""
    out_dir = str(tmp_path_factory.mktemp('secret') / 'out')
    with contextlib.redirect_stdout(None):
        inside('train.py', f'--data={text}', f'--out_dir={out_dir}', '--tokenizer=bpe:260',
               *[arg for arg in TINY if 'max_steps' not in arg], '--max_steps=3')
        inside('train.py', '--resume', f'--out_dir={out_dir}', '--max_steps=6')
    return out_dir


@pytest.fixture(scope='module')
def exported(run):
    """That run's weights alone."""
    folder = os.path.join(os.path.dirname(run), 'models', 'tiny')
    with contextlib.redirect_stdout(None):
        inside('export.py', f'--out_dir={run}', f'--to={folder}')
    return folder


def test_weights_to_half_precision_and_what_reads_them(run, exported):
    whole, light = load_checkpoint(f'{run}/ckpt.pt'), load_checkpoint(f'{exported}/ckpt.pt')
    assert {*light} == {*whole} - {*PROGRESS} and light['config'] == whole['config'] and light['step'] == 6
    assert light['val_loss'] == whole['val_loss'] and light['data']['sha256'] == whole['data']['sha256']
    assert {*light['model']} == {*whole['model']}
    for name, p in whole['model'].items():
        assert light['model'][name].dtype == torch.half and torch.equal(light['model'][name], p.half()), name
    model = load_model(light)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert os.path.getsize(f'{exported}/ckpt.pt') < os.path.getsize(f'{run}/ckpt.pt') / 2
    assert sorted(os.listdir(exported)) == ['ckpt.pt', 'log.jsonl', 'tokenizer.bpe']
    assert sorted(os.listdir(os.path.dirname(exported))) == ['SHA256SUMS', 'tiny'], 'no temporary files stay behind'
    assert read_sums(os.path.dirname(exported)) == {'tiny/ckpt.pt': sha256_of(f'{exported}/ckpt.pt')}


def test_the_log_says_how_and_not_where(run, exported):
    with open(f'{exported}/log.jsonl') as file:
        lines = [json.loads(line) for line in file]
    assert [line['step'] for line in lines if 'loss' in line] == [1, 4, 6], 'the first of each start, and the last'
    assert [line['step'] for line in lines if 'val_loss' in line] == [3, 6]
    first, second = (line for line in lines if 'config' in line)
    assert re.fullmatch('train.py --data=text.txt --out_dir=out .*', first['command'])
    assert second['command'] == 'train.py --resume --out_dir=out --max_steps=6' and second['start_step'] == 3
    assert {'commit', 'torch', 'machine', 'run', 'config', 'data'} <= {*first}
    about = lines[-1]['exported']
    assert about['sha256'] == sha256_of(f'{exported}/ckpt.pt') and about['from'] == 'ckpt.pt'
    before, after = about['bits_per_byte']
    assert 0 < abs(before - after) < 0.01 and 1e-5 < about['change_of_weights'] < 1e-3
    for path in glob.glob(f'{exported}/*'):
        with open(path, 'rb') as file:
            assert os.path.dirname(run).encode() not in (data := file.read()) and b'secret' not in data, path
    assert [mark['step'] for mark in read_run(f'{exported}/log.jsonl').marks] == [3, 6], 'plot.py can draw it'


@pytest.mark.parametrize('path, want', [
    ('/a/b/out', 'out'), ('../b/out/', 'out'), ('/a/out-x/ckpt.pt', 'out-x/ckpt.pt'), ('out/best.pt', 'out/best.pt'),
    ('ckpt.pt', 'ckpt.pt'), ('niah:full', 'niah:full'), ('', ''), (3, 3), ('/a/my book.txt', 'my book.txt')])
def test_of_a_path_the_last_name_stays(path, want):
    import export
    assert export.bare(path) == want


def test_what_can_be_done_with_them(exported, text, tmp_path, monkeypatch, capsys):
    """Write, score, learn and remember, sleep, answer, choose, and begin a run; each from the folder alone."""
    monkeypatch.chdir(tmp_path)
    out, memory = (f'--out_dir={exported}', '--device=cpu'), f'--memory={tmp_path}/me.pt'
    inside('sample.py', 'line', '--max_new_tokens=3', '--best', *out)
    assert capsys.readouterr().out.startswith('line')
    (tmp_path / 'some.txt').write_text('line 3: the answer to 3 is 18.\n' * 12)
    inside('sample.py', '--score=some.txt', *out)
    inside('sample.py', '--score=some.txt', '--learn', '--cms_chunks=32,change,change', memory, *out)['hold'].close()
    inside('sample.py', 'line', '--learn', memory, '--max_new_tokens=3', *out)['hold'].close()
    inside('sleep.py', memory, '--dreams=1', '--length=4', '--steps=1', *out)
    with pytest.raises(SystemExit):
        inside('sample.py', memory, '--memory_info', *out)
    assert 'made in sleep' in capsys.readouterr().out
    inside('eval_niah.py', '--lengths=420', '--tasks=s1', '--n=2', '--depths=2', f'--haystack={text}', '--json=n.json',
           *out)
    (tmp_path / 'items.jsonl').write_text('{"context": "a", "choices": ["b", "c"], "answer": 0}\n')
    inside('eval_choices.py', '--data=items.jsonl', *out)
    script = inside('train.py', f'--init_from={exported}/ckpt.pt', f'--data={text}', '--max_steps=1',
                    '--sample_tokens=0', '--eval_batches=1', '--compile=false', '--batch_size=4')
    assert script['losses'][0] < 5.3 and script['enc'].n_vocab == 260, 'it begins below ln 260 = 5.6'
    assert sorted(os.listdir(exported)) == ['ckpt.pt', 'log.jsonl', 'tokenizer.bpe']


def test_a_memory_file_is_not_for_the_weights_before_halving(run, exported, tmp_path):
    args = ('--learn', f'--memory={tmp_path}/me.pt', '--max_new_tokens=1', '--device=cpu')
    inside('sample.py', 'line', f'--out_dir={exported}', *args)['hold'].close()
    with pytest.raises(UserError, match='belongs to another model: its weights'):
        inside('sample.py', 'line', f'--out_dir={run}', *args)


def test_what_is_refused_in_one_line(run, exported, tmp_path):
    with pytest.raises(UserError, match='^[^\n]* holds weights alone[^\n]*--init_from=[^\n]*$') as caught:
        inside('train.py', '--resume', f'--out_dir={exported}')
    assert caught.value.exit_code == 1
    os.remove(f'{exported}/ckpt.pt.lock')
    for args, said in (([f'--to={exported}'], 'holds a model or a run already'), ([], '--to=models/hope'),
                       ([f'--to={run}', '--overwrite'], 'is the folder of the run'),
                       ([f'--to={tmp_path}/x', '--out_dir=/no/such'], 'there is no checkpoint')):
        with pytest.raises(UserError, match=f'^[^\n]*{said}[^\n]*$'):
            inside('export.py', *args, *[f'--out_dir={run}'] * ('/no/such' not in ''.join(args)))


def test_overwrite_replaces_all_of_it_and_keeps_the_other_sums(run, exported, tmp_path, capsys):
    """Also from weights alone, which are the same again, and by the last checkpoint where the best is another."""
    shutil.copytree(run, tmp_path / 'out')
    shutil.copy(f'{run}/ckpt.pt', tmp_path / 'out' / 'best.pt')
    save_checkpoint(tmp_path / 'out' / 'ckpt.pt', load_checkpoint(f'{run}/ckpt.pt') | {'step': 4, 'val_loss': None})
    sums, again = tmp_path / 'SHA256SUMS', f'--to={tmp_path}/again'
    sums.write_text('ab  other/ckpt.pt\n')
    inside('export.py', f'--out_dir={exported}', again)
    assert read_sums(tmp_path) == {'again/ckpt.pt': sha256_of(f'{exported}/ckpt.pt'), 'other/ckpt.pt': 'ab'}
    (tmp_path / 'again' / 'best.pt').write_bytes(b'of a run')
    inside('export.py', f'--out_dir={tmp_path}/out', again, '--overwrite')
    assert sorted(os.listdir(tmp_path / 'again')) == ['ckpt.pt', 'log.jsonl', 'tokenizer.bpe']
    assert load_checkpoint(tmp_path / 'again' / 'ckpt.pt')['step'] == 6, 'the best'
    inside('export.py', f'--out_dir={tmp_path}/out', again, '--overwrite', '--last')
    assert load_checkpoint(tmp_path / 'again' / 'ckpt.pt')['step'] == 4 and 'not known' in capsys.readouterr().out
    assert read_sums(tmp_path)['again/ckpt.pt'] == sha256_of(f'{tmp_path}/again/ckpt.pt')


@pytest.mark.parametrize('when', [1, 2, 3])
def test_a_full_disk_leaves_nothing_half_written(when, run, tmp_path, monkeypatch):
    """Whichever of the files does not fit: no new folder, and an old one stays as it was."""
    (tmp_path / 'old').mkdir()
    (tmp_path / 'old' / 'ckpt.pt').write_bytes(b'old')
    for to in ('new', 'old'):
        calls = []

        def full(descriptor, calls=calls):
            calls.append(descriptor)
            if len(calls) == when:
                raise OSError(28, 'No space left on device')
        monkeypatch.setattr('os.fsync', full)
        with pytest.raises(UserError, match='^could not write [^\n]*No space left on device'):
            inside('export.py', f'--out_dir={run}', f'--to={tmp_path}/{to}', '--overwrite')
    assert os.listdir(tmp_path) == ['old'] and os.listdir(tmp_path / 'old') == ['ckpt.pt']
    assert (tmp_path / 'old' / 'ckpt.pt').read_bytes() == b'old'


def test_a_weight_that_half_precision_cannot_hold(run, tmp_path):
    shutil.copytree(run, tmp_path / 'out')
    checkpoint = load_checkpoint(f'{run}/ckpt.pt')
    checkpoint['model']['head.weight'][3, 4] = -7e4
    save_checkpoint(tmp_path / 'out' / 'ckpt.pt', checkpoint)
    with pytest.raises(UserError, match='^head.weight holds 7e[+]04, and half precision ends at 65,504'):
        inside('export.py', f'--out_dir={tmp_path}/out', f'--to={tmp_path}/new')
    assert os.listdir(tmp_path) == ['out']


def test_a_head_tied_to_the_embedding_is_written_once():
    import export
    weight = torch.randn(4, 3)
    light = export.halved({'embed.weight': weight, 'head.weight': weight, 'log_step': torch.tensor([-torch.inf])})
    assert light['head.weight'] is light['embed.weight'] and light['log_step'].item() == -torch.inf


# ---- the models that are kept


def read_sums(folder):
    """{file: sha256}, of what sha256sum -c reads."""
    with open(os.path.join(folder, 'SHA256SUMS')) as file:
        return dict(line.rstrip('\n').split('  ')[::-1] for line in file)


def sha256_of(path):
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()


@pytest.mark.parametrize('path', KEPT or [pytest.param('', marks=pytest.mark.skip('models/ holds none'))])
def test_a_kept_model_is_whole_and_small_and_has_its_log(path):
    folder = os.path.dirname(path)
    name = os.path.relpath(path, os.path.join(ROOT, 'models')).replace(os.sep, '/')
    assert read_sums(os.path.join(ROOT, 'models')).get(name) == sha256_of(path), f'{name} is not what was exported'
    assert os.path.getsize(path) <= 3_000_000
    torch.load(path, weights_only=True)
    checkpoint = load_checkpoint(path)
    load_model(checkpoint)
    assert {p.dtype for p in checkpoint['model'].values()} == {torch.half} and not {*checkpoint} & {*PROGRESS}
    with open(os.path.join(folder, 'log.jsonl')) as file:
        lines = [json.loads(line) for line in file]
    assert lines[0]['config'] and lines[-1]['exported']['sha256'] == sha256_of(path)
    assert not checkpoint['data'].get('path') and not any(map(os.path.isabs, map(str, checkpoint['run'].values())))
    assert not re.search(r'=/|"/', ' '.join(line['command'] for line in lines if 'command' in line))


def test_every_line_of_the_sums_is_of_a_model_that_is_kept():
    names = {os.path.relpath(path, os.path.join(ROOT, 'models')).replace(os.sep, '/') for path in KEPT}
    if KEPT or os.path.exists(f'{ROOT}/models/SHA256SUMS'):
        assert names == {*read_sums(os.path.join(ROOT, 'models'))}
