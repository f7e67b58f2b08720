"""Faults that users of such tools report, each with what should happen: one line or the right thing, nothing lost."""
import contextlib
import os

import pytest
import torch
from test_scripts import TINY, inside

from cli import UserError
from machine import load_checkpoint, save_checkpoint
from model import sample

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
    with pytest.raises(UserError, match='^what the model answers is no longer finite[^\n]*--cms_step'):
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
    next(iter(saved['state']['gathered'].values())).fill_(float('inf'))
    torch.save(saved, memory)
    with pytest.raises(UserError, match='not finite; remove it'):
        inside('sample.py', 'y', *args)
