"""Races: a tiny one end to end, its JSON, what is printed of several seeds, lessons, wrong command lines."""
import json
import statistics

import pytest
import torch
from test_scripts import inside, losses

from cli import UserError

TINY = ['--quick', '--max_steps=3', '--n_embd=16', '--memory_chunk=8']


def test_a_race_and_its_numbers(tmp_path, capsys):
    """A curve and a row per memory, of nearly equal size; the table is made of what the file holds."""
    path = str(tmp_path / 'race.json')
    inside('race.py', '--mixers=linear,hope,lstm+hope', '--seeds=2', '--length=8', f'--json={path}', *TINY)
    printed = capsys.readouterr().out
    with open(path) as file:
        result = json.load(file)
    assert [(run['mixer'], run['seed']) for run in result['runs']] == [
        (mixer, seed) for mixer in ('linear', 'hope', 'lstm+hope') for seed in (0, 1)]
    sizes = [run['parameters'] for run in result['runs']]
    assert max(sizes) - min(sizes) <= 3 * 16 * 2
    assert all([line['step'] for line in run['curve']] == [3] for run in result['runs'])
    assert result['commit'] and result['race']['max_steps'] == 3 and result['model']['n_embd'] == 16
    tables = printed.split('right, %: sets  ')[1].split('right, %: whole words')
    for table, what in zip(tables, ('sets', 'whole words')):
        row = next(line for line in table.splitlines() if line.startswith('linear')).split()
        for column, times in enumerate(('1', '2', '4', '8')):
            shares = [100 * run['right'][times][what] for run in result['runs'][:2]]
            mean, error = row[2 + 2 * column:4 + 2 * column]
            assert mean == f'{statistics.mean(shares):.1f}' and error == f'±{abs(shares[0] - shares[1]):.1f}'
    chance = next(line for line in tables[0].splitlines() if line.startswith('chance')).split()[1:]
    assert chance == [f"{100 * result['chance'][times]:.1f}" for times in ('1', '2', '4', '8')]
    assert abs(result['chance']['8'] - 0.5) < 0.03


def test_lessons():
    """A puzzle begins with rows that are shorter by a power of two, recall with fewer pairs as well."""
    script = inside('race.py', *TINY, '--mixers=linear', '--length=8')
    Race, make_task, vocabulary = script['Race'], script['make_task'], script['vocabulary']
    assert Race().first_length == 4 and Race().easier == 8 and Race(length=24).first_length == 6
    assert Race(first_length=32).easier == 1 and Race(task='shift').first_length == 32
    recall = Race(task='recall', n_pairs=8, length=64)
    assert recall.easier == 4 and make_task(recall, 4).n_pairs == 2 and make_task(recall).n_pairs == 8
    assert Race(task='recall').length == 16 and Race(task='fuzzy-recall').length == 54
    for task in script['ALL_PUZZLES']:
        race = Race(task=task)
        assert make_task(race).batch(1, race.first_length, torch.Generator())[0].max() < vocabulary(race)


def test_a_race_is_run_and_won(capsys):
    """An LSTM learns that bits come in twos: rows double as it gets on, and it stops when it is done."""
    inside('race.py', '--task=aa', '--mixers=lstm', '--n_embd=32', '--length=8', '--eval_every=10', '--n_layer=1')
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith('lstm')]
    lengths = [int(line[line.index('length') + 1]) for line in lines if 'length' in line]
    assert lengths[0] == 4 and lengths[-1] == 8 and lengths == sorted(lengths) and len(lengths) < 20
    assert lines[-1][2] == lines[-2][2] == '100.0' and int(lines[-1][1]) == 10 * len(lengths)


@pytest.mark.parametrize('args, named', [
    (['--task=qa'], "--task must be one of recall, in-context-recall, "), (['--mixers=hope,mamba'], 'mamba'),
    (['--learning_rate=nan'], '--learning_rate'), (['--seeds=0'], '--seeds must be at least 1'),
    (['--task=recall', '--length=8'], '--length must be at least 16 for --task=recall and n_pairs = 4'),
    (['--task=hop-3', '--length=20'], '--length must be at least 32 for --task=hop-3, not 20'),
    (['--task=recall', '--n_pairs=8', '--first_pairs=3'], 'double'), (['--first_length=6'], 'double'),
    (['--first_length=64'], 'double'), (['--task=shift', '--first_length=8'], '--first_length must be at least 24'),
    (['--n_pairs=3'], 'are for --task=recall'), (['--json=.'], 'is a folder'), (['parity'], 'not understood')])
def test_wrong_command_lines(args, named):
    with pytest.raises(UserError, match='^[^\n]*$') as caught:
        inside('race.py', *args)
    assert named in str(caught.value) and caught.value.exit_code == 2


def test_a_puzzle_is_trained_on_and_asked(tmp_path, capsys):
    """train.py, with an LSTM in the model and its state carried on; sample.py answers; --learn moves its MLPs."""
    small = ['--data=parity', '--mixer=lstm,hope', '--n_embd=32', '--n_head=1', '--block_size=8', '--batch_size=16',
             '--learning_rate=1e-2', '--warmup_steps=5', '--eval_every=15', '--eval_batches=1', '--compile=false']
    inside('train.py', f'--out_dir={tmp_path}/out', '--max_steps=30', '--carry=2', *small)
    printed = capsys.readouterr().out
    assert printed.count('answers right, %: sets ') == 2 and '  whole words ' in printed and 'bpb' not in printed
    curve = losses(f'{tmp_path}/out')
    assert curve[30] < 1 < curve[1], 'that the answer is one of two sets is learned'
    for more in ([], ['--learn']):
        inside('sample.py', '0110', f'--out_dir={tmp_path}/out', '--max_new_tokens=1', '--temperature=0', *more)
        assert capsys.readouterr().out.strip()[-1] in 'AB'
