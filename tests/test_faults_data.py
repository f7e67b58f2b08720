"""What goes wrong with data, tokenizers, folders and several processes: said in one line, with nothing lost."""
import os
import subprocess
import sys

import pytest
from conftest import ROOT

TINY = ['--n_layer=1', '--n_embd=16', '--n_head=1', '--block_size=16', '--batch_size=2', '--max_steps=2',
        '--eval_every=2', '--eval_batches=1', '--sample_tokens=4', '--device=cpu', '--mixer=linear']


# ---- several processes


@pytest.mark.parametrize('data, more, said', [
    ('', '--block_size=90000', 'one window takes 90001'), ('/no/such', '--batch_size=2', '/no/such')])
def test_what_several_processes_meet_is_said_once(data, more, said, text):
    """Both find that the text is too short; one fails at the data, while the other waits for it."""
    args = [arg for arg in TINY if arg.split('=')[0] != more.split('=')[0]]
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                           os.path.join(ROOT, 'train.py'), f'--data={data or text}', more, *args], capture_output=True,
                          text=True, timeout=120, cwd=os.path.dirname(text))
    errors = [line for line in done.stderr.splitlines() if line.startswith('error:')]
    assert done.returncode == 1 and len(errors) == 1 and said in errors[0], done.stderr
    ours = done.stderr[:done.stderr.index('torch/distributed/elastic')]
    assert 'Traceback' not in ours and 'Connection' not in done.stderr, 'those who wait end without a word'
