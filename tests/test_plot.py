"""What plot.py reads, what it says where something is missing, and the figures that are there."""
import glob
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import pytest
from conftest import ROOT

import plot
from cli import UserError
from log import names_of, read_run

FIGURES = os.path.join(ROOT, 'results', 'figures')


def write_log(path, steps, mixer='hope', **run):
    """A log.jsonl of steps of 2 x 4 tokens, 100 tokens a second but for the first step, resumed after the second."""
    first = {'run': {'batch_size': 2, **run}, 'config': {'block_size': 4, 'mixer': mixer},
             'data': {'bytes_per_token': 2.0}}
    lines = [first] + [{'step': n, 'loss': n * math.log(2), 'tokens_per_second': 1 if n in (1, 3) else 100}
                       for n in range(1, steps + 1)]
    lines[3:3] = [{'step': 2, 'val_loss': 3 * math.log(2)}, first]
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return str(path)


def shell(*args, code, **env):
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'plot.py'), *args], capture_output=True, text=True,
                          timeout=120, env=os.environ | env)
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stderr.strip()


# -----------------------------------------------------------------------------
# reading


def test_a_log_as_a_curve(tmp_path):
    run = read_run(write_log(tmp_path / 'log.jsonl', 4))
    assert [point['step'] for point in run.curve] == [1, 2, 3, 4] and run.unit == 'bits per byte'
    assert [point['tokens'] for point in run.curve] == [8, 16, 24, 32]
    assert [point['value'] for point in run.curve] == pytest.approx([0.5, 1, 1.5, 2])
    assert [point['seconds'] for point in run.curve] == pytest.approx([0, 0.08, 0.08, 0.16]), 'but for first steps'
    assert [(mark['step'], mark['value']) for mark in run.marks] == [(2, pytest.approx(1.5))]


def test_what_a_run_printed_as_a_curve(tmp_path):
    path = tmp_path / 'printed.txt'
    path.write_text('tokens bytes | vocabulary 257 | train 7 | val 4 | 1.000 bytes per token\n'
                    'model: hope,attention, 945,296 parameters, 8.9 MFLOP per token\n'
                    'run: 1,100 steps of 4 x 1,024 tokens on 1 x cpu, float32, out_dir=out\n'
                    'step   1,000/1,100 | loss  1.3863 | bpb  2.0000 | lr 4e-03 |     4,096 tok/s | left 0:0\n'
                    'eval   1,100/1,100 | val loss 0.6931 | val bpb 1.0000 | best bpb 1.0000 | saved out/ckpt.pt\n')
    run = read_run(str(path))
    assert run.settings == {'mixer': 'hope,attention', 'batch_size': 4, 'block_size': 1024}
    assert run.curve == [{'step': 1000, 'tokens': 4_096_000, 'seconds': 1000.0, 'value': pytest.approx(2, abs=1e-3)}]
    assert run.marks[0]['seconds'] == 1100.0 and run.marks[0]['value'] == pytest.approx(1, abs=1e-3)


def test_runs_are_named_by_what_differs(tmp_path):
    def names(*settings):
        return names_of([read_run(write_log(tmp_path / f'{i}.jsonl', 1, out_dir=str(i), **run))
                         for i, run in enumerate(settings)])
    assert names({'mixer': 'hope'}, {'mixer': 'attention'}) == ['hope', 'attention']
    assert names({'seed': 1, 'lr': 0.1}, {'seed': 2, 'lr': 0.1}) == ['seed=1', 'seed=2']
    assert names({}, {}) == [str(tmp_path / '0.jsonl'), str(tmp_path / '1.jsonl')]


@pytest.mark.parametrize('text', ['', '{}\n', '{"step": 1, "loss": 2.0}\n', 'model: x, 1 parameters\n',
                                  '{"config": {}, "run": 3, "data": {}}\n{"step": 1, "loss": 2.0}\n'])
def test_what_is_no_log_is_said_so(tmp_path, text):
    (tmp_path / 'log').write_text(text)
    with pytest.raises(UserError, match='is no log of a run'):
        read_run(str(tmp_path / 'log'))


def test_numbers_of_the_pages_are_what_is_read():
    """A few that results/*.md names, so that a log that changes its form is seen here."""
    needles = plot.read_needles('far', 'hope.txt')
    assert needles[True, 's1', 32768] == [100.0, 90.0, 100.0], 'of 33 examples, not of 11'
    assert needles[True, 'mk', 32768][0] == 45.5 and needles[False, 's3', 8192][0] == 54.5
    assert plot.read_needles('attention.txt')[False, 's1', 8192][0] == 27.3
    training, decoding = plot.read_costs()
    assert decoding['attention'] == {1000: 0.91, 10000: 3.06} and decoding['mamba2'][100000] == 1.83
    assert 0.64 <= training['hope'][4096] / training['attention'][4096] <= 0.66 and 16384 in training['hope']
    learners = plot.read_learners('domains-former', 'domains')
    assert round(learners['finetune']['lost'][0], 3) == 0.861 and round(learners['hope-1']['gained'][0], 3) == 0.965
    best = {run.settings['mixer']: round(run.marks[-1]['value'], 3) for run in plot.best_runs('records-cpu/*-1.txt')}
    assert best == {'hope': 1.490, 'attention': 1.473, 'gated_deltanet': 1.456, 'hope,attention': 1.426}
    assert plot.read_clocks()[2] == (256, [256, 512, 768, 1024])


def test_smoothing_keeps_a_constant_and_the_length():
    assert plot.smooth([2.0] * 50) == [2.0] * 50 and plot.smooth([5.0]) == [5.0]
    assert plot.smooth([0.0, 0.0, 0.0, 3.0])[3] == 1.5


# -----------------------------------------------------------------------------
# what is said, and what is there


def test_without_matplotlib_it_says_what_to_install(tmp_path):
    (tmp_path / 'matplotlib.py').write_text("raise ImportError(\"No module named 'matplotlib'\")")
    error = shell('--all', code=1, PYTHONPATH=str(tmp_path))
    assert 'pip install matplotlib' in error and error.count('\n') == 0


def test_nothing_else_imports_it():
    for path in glob.glob(os.path.join(ROOT, '*.py')):
        with open(path) as file:
            assert ('import matplotlib' in file.read()) == path.endswith('plot.py'), path
    with open(os.path.join(ROOT, 'requirements.txt')) as file:
        assert 'matplotlib' not in file.read()


def test_text_and_other_tasks_share_no_axis():
    with pytest.raises(UserError, match='no unit in common'):
        plot.draw_runs([SimpleNamespace(unit='bits per byte'), SimpleNamespace(unit='nats per token')], 'step')


@pytest.mark.parametrize('args, code, said', [
    ([], 2, '--all'), (['x', '--all'], 2, '--all'), (['x', '--x=foo'], 2, '--x'), (['x', '--out=x.doc'], 2, '--out'),
    (['no-such-file'], 1, 'could not read no-such-file')])
def test_wrong_input_is_one_line(args, code, said):
    error = shell(*args, code=code)
    assert error.startswith('error: ') and said in error and error.count('\n') == 0


def test_every_figure_is_on_a_page_and_is_a_small_svg():
    shown = set()
    for page in (os.path.join(ROOT, 'README.md'), *glob.glob(os.path.join(ROOT, 'results', '*.md'))):
        with open(page, encoding='utf-8') as file:
            shown |= {os.path.normpath(os.path.join(os.path.dirname(page), target))
                      for target in re.findall(r'!\[[^\]]+\]\(([^)]+)\)', file.read())}
    drawn = {os.path.join(FIGURES, f'{name}.svg') for name in plot.DRAW}
    assert shown == drawn == {*glob.glob(os.path.join(FIGURES, '*'))}
    for path in drawn:
        assert os.path.getsize(path) < 60_000, path
        assert ET.parse(path).getroot().tag.endswith('svg'), path
        with open(path) as file:
            text = file.read()
        assert '<text' in text and '<image' not in text and '<dc:date>' not in text, path


def test_figures_are_drawn_again_byte_by_byte(tmp_path):
    """As they are there, if that was by the same matplotlib; of a log, twice the same."""
    matplotlib = pytest.importorskip('matplotlib')
    for name, draw in plot.DRAW.items():
        plot.save(draw(), str(tmp_path / f'{name}.svg'))
        with open(os.path.join(FIGURES, f'{name}.svg')) as file:
            there = file.read()
        if f'Matplotlib v{matplotlib.__version__},' in there:
            assert (tmp_path / f'{name}.svg').read_text() == there, f'{name}.svg is not what plot.py --all draws'
    log = write_log(tmp_path / 'log.jsonl', 300)
    for name in ('one.svg', 'two.svg'):
        shell(log, '--x=seconds', f'--out={tmp_path / name}', code=0)
    assert (tmp_path / 'one.svg').read_bytes() == (tmp_path / 'two.svg').read_bytes()
