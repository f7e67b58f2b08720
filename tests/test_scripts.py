"""The shell commands end to end: train, sample, score, resume bit for bit, two processes as one, every wrong input."""
import collections
import contextlib
import gc
import itertools
import json
import math
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from carry import take_rows
from cli import UserError
from log import read_log

TINY = ['--n_layer=1', '--n_embd=32', '--n_head=2', '--block_size=64', '--batch_size=4', '--learning_rate=1e-2',
        '--warmup_steps=5', '--max_steps=40', '--eval_every=20', '--eval_batches=2', '--sample_tokens=8',
        '--device=cpu']


@pytest.fixture(scope='module')
def trained(text, tmp_path_factory):
    """One finished run that several tests look at: its folder and what it printed."""
    out_dir = str(tmp_path_factory.mktemp('run') / 'out')
    return out_dir, shell('train.py', f'--data={text}', f'--out_dir={out_dir}', *TINY).stdout


def shell(script, *args, code=0, **kwargs):
    """Run a script as a user would; a wrong exit code shows what it printed."""
    command = [sys.executable, os.path.join(ROOT, script), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)
    assert done.returncode == code, f'exit code {done.returncode}\n{done.stdout}\n{done.stderr}'
    return done


def train_until(step, out_dir, *args):
    """Train, and press Ctrl-C once that step is logged -> the exit code, and what was printed."""
    command = [sys.executable, os.path.join(ROOT, 'train.py'), f'--out_dir={out_dir}', *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (os.path.exists(f'{out_dir}/log.jsonl') and step in losses(out_dir)):
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        printed = process.stdout.read()
    return process.returncode, printed


def inside(script, *args):
    """Run a script in this process, which saves starting Python; its UserError comes out as it is."""
    handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    gc.collect()                    # a run that failed before this one holds its folder until its frames are gone
    argv, hook = sys.argv, sys.excepthook
    sys.argv = [script, *args]
    try:
        return runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
    finally:
        sys.argv, sys.excepthook = argv, hook
        for s, handler in handlers:
            signal.signal(s, handler)


def losses(out_dir):
    """{step: loss} from the log; a step that stands there twice fails."""
    steps = [(line['step'], line['loss']) for line in read_log(f'{out_dir}/log.jsonl', math.inf) if 'loss' in line]
    assert len(steps) == len(dict(steps)), 'a step is logged twice'
    return dict(steps)


def test_train_prints_what_it_should(trained, text):
    out_dir, stdout = trained
    curve = losses(out_dir)
    assert list(curve) == list(range(1, 41))
    assert curve[40] < curve[1] - 2, f'{curve[1]} -> {curve[40]}'
    assert [line[:15] for line in stdout.splitlines() if '/40 |' in line] == ['eval      20/40', 'eval      40/40']
    block = dict(line.split(':', 1) for line in stdout[stdout.index('mixer:'):].splitlines())
    assert block['tokens'].strip() == str(40 * 4 * 64)
    with open(text, 'rb') as file:
        counts = collections.Counter(file.read())
    entropy = -sum(n / counts.total() * math.log2(n / counts.total()) for n in counts.values())
    assert float(block['val_bpb']) < entropy - 1, 'it should know more than how frequent each byte is'
    with open(os.path.join(out_dir, 'log.jsonl')) as file:
        header = json.loads(file.readline())
    assert header['config']['n_embd'] == 32 and header['run']['max_steps'] == 40 and 'commit' in header
    assert sorted(os.listdir(out_dir)) == ['ckpt.pt', 'ckpt.pt.lock', 'log.jsonl'], 'no temporary files stay behind'


def test_a_line_that_is_written_over_on_a_terminal_and_every_50th_that_stays(text, tmp_path, monkeypatch, capsys):
    args = [f'--data={text}', '--n_layer=1', '--n_embd=8', '--n_head=1', '--block_size=8', '--batch_size=1',
            '--mixer=linear', '--max_steps=101', '--eval_batches=1', '--sample_tokens=0']
    inside('train.py', f'--out_dir={tmp_path}/a', *args)
    piped = capsys.readouterr().out
    stay = [('step', '50'), ('step', '100'), ('eval', '101')]
    assert re.findall(r'^(step|eval) +(\d+)/101 \|', piped, flags=re.M) == stay
    assert re.search(r'^step +50/101 \| loss +\d.*bpb.*lr.*norm.*tok/s \| left 0:\d\d:\d\d$', piped, flags=re.M)
    assert '\r' not in piped and '\033' not in piped

    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    monkeypatch.setattr(time, 'perf_counter', itertools.count(0, 1e-3).__next__)    # as fast on any machine
    inside('train.py', f'--out_dir={tmp_path}/b', *args)
    shown = capsys.readouterr().out
    lines = [line.rpartition('\r\033[K')[2] for line in shown.split('\n')]        # what is to be seen in the end
    assert re.findall(r'(step|eval) +(\d+)/101 \|', '\n'.join(lines)) == stay
    over = re.findall(r'\033\[K(step +\d+/101 \| loss +\d.*?tok/s \| left 0:00:00)\r', shown)
    assert len(over) == 99 and max(map(len, over)) < 80


def test_sample_and_score(trained, text):
    out_dir, _ = trained
    args = (f'--out_dir={out_dir}', '--device=cpu')
    one = shell('sample.py', 'line 12: ', '--max_new_tokens=30', *args)
    assert one.stdout.startswith('line 12: ') and 'tok/s, state' in one.stderr
    from_stdin = shell('sample.py', '-', '--max_new_tokens=30', *args, input='line 12: ')
    assert from_stdin.stdout == one.stdout, 'the same prompt and seed'
    talk = shell('sample.py', '--interactive', '--max_new_tokens=5', *args, input='line 1\nline 2\n')
    assert talk.stderr.count('tok/s, state') == 2
    score = dict(line.split(':', 1) for line in shell('sample.py', f'--score={text}', *args).stdout.splitlines())
    assert int(score['bytes']) == os.path.getsize(text) and float(score['bits_per_byte']) < 4


def test_score_is_the_mean_over_one_pass(trained, tmp_path, capsys):
    """Against the whole file given to the model at once, with no state carried."""
    out_dir, _ = trained
    file = tmp_path / 'some.txt'
    file.write_bytes(b'line 3: the answer to 3 is 18.\n' * 9 + b'\xff\xfe')
    script = inside('sample.py', f'--score={file}', f'--out_dir={out_dir}', '--device=cpu')
    ids = torch.tensor([[256] + list(file.read_bytes())])
    want = script['model'](ids[:, :-1], ids[:, 1:])[1].item()
    printed = dict(line.split(':', 1) for line in capsys.readouterr().out.splitlines())
    assert abs(float(printed['nats_per_token']) - want) < 1e-3


def test_stopped_and_resumed_equals_never_stopped(trained, text, tmp_path):
    """Ctrl-C between two evaluations: losses and weights are the same bit for bit, and nothing is logged twice."""
    out_dir = str(tmp_path / 'out')
    returncode, rest = train_until(13, out_dir, f'--data={text}', *TINY)
    assert returncode == 0 and '--resume' in rest
    assert 13 <= torch.load(os.path.join(out_dir, 'ckpt.pt'))['step'] < 40
    shell('train.py', '--resume', f'--out_dir={out_dir}')
    assert losses(out_dir) == losses(trained[0])
    a, b = (torch.load(os.path.join(d, 'ckpt.pt')) for d in (out_dir, trained[0]))
    assert all(torch.equal(a['model'][name], b['model'][name]) for name in b['model'])


def test_the_environment_can_forbid_compiling(text, tmp_path, monkeypatch):
    monkeypatch.setenv('NL_COMPILE', '0')
    tiny = ['--n_layer=1', '--n_embd=32', '--n_head=2', '--block_size=8', '--batch_size=1', '--max_steps=200']
    script = inside('train.py', f'--data={text}', f'--out_dir={tmp_path}/out', '--sample_tokens=0', *tiny)
    assert not script['use_compile']
    monkeypatch.delenv('NL_COMPILE')
    assert script['choose_compile'](script['run'], script['config'], 'cuda') == (True, '')


def test_evaluation_does_not_touch_training(trained, text, tmp_path):
    out_dir = str(tmp_path / 'out')
    args = [arg for arg in TINY if 'eval_every' not in arg]
    inside('train.py', f'--data={text}', f'--out_dir={out_dir}', *args, '--eval_every=7')
    assert losses(out_dir) == losses(trained[0])


def test_a_carried_state_is_read_on_from(text, tmp_path):
    """Rows read in two steps, the second from the state of the first, have the loss of rows that are read whole."""
    runs = {}
    for carry, block_size, steps in ((0, 64, 2), (2, 32, 4)):
        out_dir = str(tmp_path / str(carry))
        args = [arg for arg in TINY if not any(name in arg for name in ('steps', 'rate', 'block'))]
        script = inside('train.py', f'--data={text}', f'--out_dir={out_dir}', f'--carry={carry}', '--mixer=hope',
                        f'--block_size={block_size}', f'--max_steps={steps}', '--learning_rate=1e-9', *args)
        runs[carry] = losses(out_dir)
    for step in (1, 2):
        assert abs(runs[0][step] - (runs[2][2 * step - 1] + runs[2][2 * step]) / 2) < 1e-5
    state = take_rows(script['carried'], slice(0, 2), 'cpu')[0]
    assert all(x.requires_grad and x.grad_fn is None and len(x) == 2 for name, x in state.items() if name != 'place')
    assert state['U'] is state['U_xi'], 'one tensor stays one, or the chunk is compiled twice'
    inside('train.py', '--resume', f'--out_dir={out_dir}', '--max_steps=5')     # resumed within a row, in other parts
    shutil.copytree(out_dir, tmp_path / 'parts')
    inside('train.py', '--resume', f'--out_dir={out_dir}', '--max_steps=6')
    inside('train.py', '--resume', f'--out_dir={tmp_path}/parts', '--grad_accum=2', '--max_steps=6')
    assert abs(losses(out_dir)[6] - losses(str(tmp_path / 'parts'))[6]) < 1e-5
    with pytest.raises(UserError, match='a smaller --carry'):
        inside('train.py', f'--data={text}', f'--out_dir={tmp_path}/long', '--carry=100000', *TINY)


def test_two_processes_equal_one(trained, text, tmp_path):
    """The same batch cut over two processes and in two parts each; equal to rounding."""
    out_dir = str(tmp_path / 'out')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               os.path.join(ROOT, 'train.py'), f'--data={text}', f'--out_dir={out_dir}', '--grad_accum=2', *TINY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one, two = losses(trained[0]), losses(out_dir)
    assert max(abs(one[step] - two[step]) for step in one) < 1e-3
    assert done.stdout.count('eval      40/40') == 1, 'only one process prints'


def test_parts_side_by_side_equal_the_whole_batch(text, tmp_path, monkeypatch):
    """A compiled run puts a part of its batch on every core: equal to rounding, and to itself bit for bit."""
    monkeypatch.setattr(torch, 'compile', lambda model, **options: model)
    curves, options = {}, ['--cms_periods=1,4', '--carry=3', *TINY]
    for run, threads in (('one', 4), ('again', 4), ('three', 3)):
        torch.set_num_threads(threads)
        try:
            script = inside('train.py', f'--data={text}', f'--out_dir={tmp_path}/{run}', '--compile=true',
                            *options)
        finally:
            torch.set_num_threads(1)
        curves[run] = losses(f'{tmp_path}/{run}')
        assert script['cores'].n == len(script['parts']) == {4: 4, 3: 2}[threads], 'parts are equal'
    inside('train.py', f'--data={text}', f'--out_dir={tmp_path}/whole', *options)
    whole = losses(f'{tmp_path}/whole')
    assert curves['one'] == curves['again']
    assert all(max(abs(curve[step] - whole[step]) for step in whole) < 1e-3 for curve in curves.values())
    assert whole[40] < whole[1] - 2


@pytest.mark.parametrize('mixer', ['attention', 'ttt', 'hope'])
def test_other_mixers_and_bpe(mixer, text, tmp_path):
    out_dir = str(tmp_path / 'out')
    inside('train.py', f'--data={text}', f'--out_dir={out_dir}', *TINY, f'--mixer={mixer}', '--tokenizer=bpe:300',
           '--grad_accum=2', '--dtype=bfloat16', '--schedule=trapezoid')
    assert losses(out_dir)[40] < losses(out_dir)[1] - 1.5
    assert 'tokenizer.bpe' in os.listdir(out_dir)
    assert shell('sample.py', 'line', f'--out_dir={out_dir}', '--max_new_tokens=5').stdout.startswith('line')

    longer = str(tmp_path / 'longer')                   # the same model and tokenizer, another length
    inside('train.py', f'--data={text}', f'--out_dir={longer}', f'--init_from={out_dir}/ckpt.pt', '--block_size=96',
           '--max_steps=1', '--sample_tokens=0', '--eval_batches=1', '--compile=false')
    assert losses(longer)[1] < losses(out_dir)[1] - 1, 'it starts where the other ended'


def test_recall_is_trained_on_stopped_and_resumed(tmp_path):
    """A task without text: no bits per byte, its report, and a prompt of letters; also in rows of several steps."""
    small = ['--data=recall:2', '--mixer=gated_deltanet', '--n_layer=1', '--n_embd=32', '--n_head=1', '--block_size=16',
             '--batch_size=32', '--learning_rate=1e-2', '--warmup_steps=5', '--eval_every=20', '--eval_batches=2']
    out_dir = str(tmp_path / 'whole')
    stdout = shell('train.py', f'--out_dir={out_dir}', '--max_steps=40', *small).stdout
    curve = losses(out_dir)
    assert curve[40] < 3.4 < curve[1], 'that the answer is one of 26 letters is learned: ln 26 is 3.3'
    assert stdout.count('answers right, %: 2 pairs ') == 2 and 'bpb' not in stdout and '    | ' not in stdout
    with open(os.path.join(out_dir, 'log.jsonl')) as file:
        lines = [json.loads(line) for line in file]
    assert [list(line['report']) for line in lines if 'report' in line] == [['2 pairs']] * 2
    assert not [line for line in lines if 'val_bpb' in line]
    train_until(13, f'{tmp_path}/cut', '--max_steps=40', *small)
    with pytest.raises(UserError, match='--data=recall:3, but .* was trained with recall:2'):
        inside('train.py', '--resume', f'--out_dir={tmp_path}/cut', '--data=recall:3')
    inside('train.py', '--resume', f'--out_dir={tmp_path}/cut')
    assert losses(f'{tmp_path}/cut') == curve
    with pytest.raises(UserError, match='--block_size=4 is too short for --data=recall:2: a row takes at least 8'):
        inside('train.py', f'--out_dir={tmp_path}/short', *small[:5], '--block_size=4')
    said = shell('sample.py', 'aQbTaQb', f'--out_dir={out_dir}', '--max_new_tokens=1', '--temperature=0').stdout
    assert len(said.strip()) == 8 and said.strip()[-1].isupper()
    inside('train.py', f'--out_dir={tmp_path}/long', '--max_steps=12', '--carry=4', *small)
    assert losses(f'{tmp_path}/long')[12] < math.inf


def test_a_model_that_learns_while_it_reads_trains_on_what_is_weighted(tmp_path):
    script = inside('train.py', f'--out_dir={tmp_path}/out', '--data=recall:2', '--cms_chunks=8,16', '--mixer=mamba2',
                    '--n_layer=1', '--n_embd=16', '--n_head=1', '--block_size=32', '--max_steps=3', '--eval_batches=1')
    assert script['val_loss'] > 0 and len(losses(f'{tmp_path}/out')) == 3
    assert all(p.grad is None or p.grad.isfinite().all() for p in script['raw_model'].parameters())


# ---- wrong input


@pytest.mark.parametrize('script, args, named', [
    ('train.py', ['--learning_rat=1'], 'unknown option --learning_rat, did you mean --learning_rate'),
    ('train.py', ['--max_steps=many'], "--max_steps takes a whole number, not 'many'"),
    ('train.py', ['--max_steps'], '--max_steps needs a value'),
    ('train.py', ['--max_steps=1', '--max_steps=2'], 'given twice'),
    ('train.py', ['--mixer=hope', '--adaptive=kx'], 'kvqg'),
    ('train.py', ['--mixer=hope', '--memory_chunk=0'], '--memory_chunk'),
    ('train.py', ['--mixer=hope', '--memory_hidden=-1'], '--memory_hidden'),
    ('train.py', ['--mixer=hope', '--projection_chunk=40'], '--projection_chunk'),
    ('train.py', ['--gate_floor=1'], '--gate_floor must be at least 0 and below 0.5'),
    ('train.py', ['--mixer=hope', '--memory_read=now'], 'before, after, start'),
    ('train.py', ['--mixer=titans', '--adaptive=k'], '--adaptive'),
    ('train.py', ['--resume=maybe'], "--resume takes true or false"),
    ('train.py', ['-lr=1'], 'not understood'),
    ('train.py', ['hello'], 'not understood'),
    ('train.py', ['--vocab_size=3'], 'unknown option --vocab_size'),
    ('train.py', ['--batch_size=0'], '--batch_size must be at least 1'),
    ('train.py', ['--learning_rate=-1'], '--learning_rate must be above 0'),
    ('train.py', ['--learning_rate=nan'], '--learning_rate must be above 0'),
    ('train.py', ['--beta2=1'], '--beta2'),
    ('train.py', ['--mixer=mamba'], '--mixer must be one of'),
    ('train.py', ['--n_embd=100', '--n_head=3'], '--n_embd must be a multiple'),
    ('train.py', ['--batch_size=4', '--grad_accum=3'], '--batch_size=4 must be a multiple'),
    ('train.py', ['--preset=huge'], '--preset must be one of'),
    ('train.py', ['--device=tpu'], "--device takes auto, cpu, cuda or mps, not 'tpu'"),
    ('train.py', ['--data=/no/such/thing'], '/no/such/thing'),
    ('train.py', ['--data=EMPTY'], 'EMPTY holds 0 bytes'),
    ('train.py', ['--data=SHORT'], 'block_size'),
    ('train.py', ['--data=NARROW', '--block_size=64'], 'the data has 64 tokens and one window takes 65'),
    ('train.py', ['--device=cpu:x'], '--device takes'),
    ('train.py', ['--seed=99999999999999999999'], '--seed must be below'),
    ('train.py', ['--resume', '--overwrite'], 'give one of'),
    ('train.py', ['--tokenizer=words'], 'words'),
    ('train.py', ['--tokenizer=bpe:100'], 'bpe'),
    ('train.py', ['--resume'], 'there is no checkpoint'),
    ('sample.py', ['--out_dir=/no/such'], 'there is no checkpoint'),
    ('sample.py', ['--temperature=-1'], '--temperature'),
    ('sample.py', ['--top_p=0'], '--top_p'),
    ('sample.py', ['one', 'two'], 'quote a prompt'),
    ('sample.py', ['hi', '--score=x'], 'give one of'),
])
def test_wrong_command_lines(script, args, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'EMPTY').write_bytes(b'')
    (tmp_path / 'SHORT').write_bytes(b'too short for a block')
    (tmp_path / 'NARROW').write_bytes(b'x' * 624)            # long enough to train on, too short to hold a block out
    with pytest.raises(UserError, match='^[^\n]*$') as caught, contextlib.redirect_stdout(None):
        inside(script, *args)
    assert named in str(caught.value), str(caught.value)
    assert caught.value.exit_code in (1, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')
def test_errors_are_one_line_on_stderr(tmp_path):
    done = shell('train.py', '--device=cuda', code=1, cwd=tmp_path)
    assert done.stderr.startswith('error: --device=cuda, but') and done.stderr.count('\n') == 1 and not done.stdout
    assert shell('sample.py', '--seed=x', code=2, cwd=tmp_path).stderr.count('\n') == 1


def test_prompts_that_cannot_be(trained, text, tmp_path):
    out_dir = str(tmp_path / 'attention')
    inside('train.py', f'--data={text}', f'--out_dir={out_dir}', *TINY, '--mixer=attention', '--seed=1')
    with pytest.raises(UserError, match='has 65 tokens, but this attention model sees 64'):
        inside('sample.py', 'x' * 65, f'--out_dir={out_dir}')
    inside('sample.py', 'x' * 65, f'--out_dir={trained[0]}', '--max_new_tokens=1')      # a recurrent memory can
    with pytest.raises(UserError, match='the prompt is empty'):
        inside('sample.py', '', f'--out_dir={out_dir}')
    with pytest.raises(UserError, match='cannot read'):
        inside('sample.py', '--score=/no/such/file', f'--out_dir={out_dir}')


def test_a_run_is_not_overwritten_or_mixed(trained, text, tmp_path):
    out_dir = str(tmp_path / 'out')
    shutil.copytree(trained[0], out_dir)
    before = open(os.path.join(out_dir, 'ckpt.pt'), 'rb').read()
    with pytest.raises(UserError, match='holds a run already'):
        inside('train.py', f'--data={text}', f'--out_dir={out_dir}', *TINY)
    for change in ('--n_embd=64', '--mixer=linear', '--data=python', '--seed=2', '--tokenizer=gpt2'):
        with pytest.raises(UserError, match='cannot change it'):
            inside('train.py', '--resume', f'--out_dir={out_dir}', change)
    with pytest.raises(UserError, match='one window takes'):
        args = [arg for arg in TINY if 'block_size' not in arg]
        inside('train.py', f'--data={text}', f'--out_dir={out_dir}', *args, '--overwrite', '--block_size=9000')
    assert open(os.path.join(out_dir, 'ckpt.pt'), 'rb').read() == before
    inside('train.py', f'--data={text}', f'--out_dir={out_dir}', *TINY, '--overwrite', '--cooldown=0.5')
    assert losses(out_dir) == losses(trained[0])
    script = inside('train.py', '--resume', f'--out_dir={out_dir}')
    assert script['checkpoint']['run']['overwrite'] and not script['run'].overwrite, 'or it would remove what it reads'


def test_a_resumed_run_may_move_and_change_its_optimizer(trained, tmp_path):
    out_dir = str(tmp_path / 'moved')
    shutil.copytree(trained[0], out_dir)
    with open(os.path.join(out_dir, 'log.jsonl'), 'a') as file:
        file.write('5\n{"step": null}\n{"step": 4')            # what a crash may leave
    change = ('--max_steps=42', '--weight_decay=0.3', '--beta2=0.5')
    script = inside('train.py', '--resume', *change, f'--out_dir={out_dir}')
    assert script['ckpt_path'].startswith(out_dir) and list(losses(out_dir)) == list(range(1, 43))
    (matrices,), groups = (optimizer.param_groups for optimizer in script['optimizers'])
    assert [group['weight_decay'] for group in groups] == [0.3, 0.0, 0.0] and groups[0]['betas'] == (0.9, 0.5)
    assert abs(matrices['weight_decay'] * matrices['lr_scale'] - 0.3) < 1e-9


def test_changed_text_is_noticed(trained, text, tmp_path):
    out_dir, copy = str(tmp_path / 'out'), str(tmp_path / 'text.txt')
    shutil.copy(text, copy)
    inside('train.py', f'--data={copy}', f'--out_dir={out_dir}', *TINY)
    with open(copy, 'a') as file:
        file.write('more')
    with pytest.raises(UserError, match='not the one that'):
        inside('train.py', '--resume', '--max_steps=50', f'--out_dir={out_dir}')


def test_loss_that_is_not_finite_stops_the_run(text, tmp_path):
    with pytest.raises(UserError, match='(?s)the loss is .*Try a lower --learning_rate'):
        inside('train.py', f'--data={text}', f'--out_dir={tmp_path}/out', *[a for a in TINY if 'rate' not in a],
               '--learning_rate=1e20', '--grad_clip=0')


def test_a_full_disk_keeps_the_old_checkpoint(trained, tmp_path):
    out_dir = str(tmp_path / 'out')
    shutil.copytree(trained[0], out_dir)
    before = open(os.path.join(out_dir, 'ckpt.pt'), 'rb').read()
    done = shell('train.py', '--resume', '--max_steps=45', f'--out_dir={out_dir}', code=1,
                 preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)))
    assert 'could not write' in done.stderr and done.stderr.count('\n') == 1, done.stderr
    assert open(os.path.join(out_dir, 'ckpt.pt'), 'rb').read() == before
    assert sorted(os.listdir(out_dir)) == ['ckpt.pt', 'ckpt.pt.lock', 'log.jsonl']
