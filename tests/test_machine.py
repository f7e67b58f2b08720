"""What the machine needs: checkpoints of plain data, whole or not at all, readers from them; no circle of imports."""
import ast
import dataclasses
import glob
import os
import pickle

import pytest
import torch
from conftest import ROOT, assert_near
from test_model import ids, tiny
from test_scripts import inside

from cli import UserError, atomic_write
from cms import Learner
from machine import (KEYS, MEMORY_FORMAT, load_checkpoint, load_learner, load_memory, load_model, owner,
                     save_checkpoint, save_memory)


def test_no_two_files_import_each_other():
    """Directly, through others, or inside functions."""
    def imports(path):
        for node in ast.walk(ast.parse(open(path).read())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            yield from names + ([node.module] if isinstance(node, ast.ImportFrom) else [])
    files = {os.path.basename(path)[:-3]: {*imports(path)} for path in glob.glob(f'{ROOT}/*.py')}
    while leaves := [name for name, needs in files.items() if not needs & files.keys()]:
        for name in leaves:
            del files[name]
    assert not files, f'in a circle, or above one: {sorted(files)}'


def saved(model):
    """A checkpoint of it, as train.py would hold."""
    config = dataclasses.asdict(model.config)
    return dict.fromkeys(KEYS) | {'model': model.state_dict(), 'config': config, 'step': 3}


@pytest.mark.parametrize('options, chunks, want, topology', [
    ({}, '', '128,change,change,change', 'copies'), ({}, '16', '16', 'copies'), ({}, '16,64', '16,64', 'copies'),
    ({'cms_periods': '1,4'}, '', '128,512', 'sequential'), ({'cms_chunks': '8,32'}, '', '8,32', 'sequential')])
def test_any_model_can_learn_while_it_reads(options, chunks, want, topology):
    """On the clock that is given, else its own, else a guess; at a step size that is given, else its own."""
    model = tiny('attention', **options)
    for step, size in ((-1.0, 1.0), (0.25, 0.25), (0.0, 0.0)):
        reader = load_learner(saved(model), chunks=chunks, step=step)
        assert isinstance(reader, Learner) and reader.config is reader.model.config
        assert (reader.config.cms_chunks, reader.config.cms_topology) == (want, topology)
        assert torch.equal(reader.model.log_step.exp(), torch.full((reader.config.n_level,), size))
    got, want = reader.eval()(ids(1, 8))[0], model(ids(1, 8))[0]
    assert_near('nothing has moved yet', got.log_softmax(-1), want.log_softmax(-1), 1e-6)


def test_copies_keep_the_step_that_was_learned():
    """Trained to learn on one clock, read with three slow levels: the fast one's step is what training learned."""
    model = tiny('attention', cms_chunks='8')
    with torch.no_grad():
        model.log_step.fill_(1.7)
    reader = load_learner(saved(model), chunks='8,change,change')
    assert reader.model.log_step[0].item() == pytest.approx(1.7)
    model = tiny('attention', cms_chunks='8', cms_topology='independent')
    assert load_learner(saved(model)).config.cms_topology == 'independent'


def test_checkpoint_round_trip(tmp_path):
    model, path = tiny(), tmp_path / 'ckpt.pt'
    save_checkpoint(path, saved(model))
    again = load_model(load_checkpoint(path))
    assert torch.equal(model(ids(1, 9))[0], again(ids(1, 9))[0])
    assert os.listdir(tmp_path) == ['ckpt.pt']


def test_a_model_and_a_tokenizer_of_different_sizes(tmp_path):
    """Said once, when sample.py loads them: ids are not checked at every token."""
    save_checkpoint(tmp_path / 'ckpt.pt', saved(tiny(vocab_size=300)) | {'run': {'tokenizer': 'bytes'}})
    with pytest.raises(UserError, match='trained with other tokens than those of its tokenizer, bytes'):
        inside('sample.py', 'x', f'--out_dir={tmp_path}', '--device=cpu')


@torch.no_grad()
def test_a_memory_file_is_read_on_from_by_its_own_model_alone(tmp_path):
    """Two readings with a file between them are one, and nobody else's file, nor half of one, is taken."""
    checkpoint, path = saved(tiny('hope', memory_chunk=4)), str(tmp_path / 'me.pt')
    reader, whose, text = load_learner(checkpoint, chunks='8').eval(), owner(checkpoint), ids(1, 61)
    want = reader(text)[0]
    state = reader(text[:, :40])[2]
    assert state['trace'], 'it stands at the end of a chunk'
    save_memory(path, whose, reader, [7], state)
    kept = load_memory(path, whose)
    assert kept['next'] == [7] and kept['cms_chunks'] == '8' and 'trace' not in kept['state']
    assert_near('logits', reader(text[:, 40:], state=kept['state'])[0], want[:, 40:], 1e-5)

    with_steps = checkpoint | {'model': reader.model.state_dict()}
    assert 'log_step' in with_steps['model'] and owner(with_steps) == whose, 'a step size is not part of who remembers'
    for other in (whose | {'step': 9}, whose | {'weights': 'x'}):
        with pytest.raises(UserError, match='belongs to another model'):
            load_memory(path, other)
    for options, said in (({'chunks': '16'}, '--cms_chunks=8, not 16'), ({'share': 0.5}, '--cms_share=0.001, not 0.5')):
        with pytest.raises(UserError, match=said):
            load_memory(path, whose, **options)
    save_checkpoint(path, {**kept, 'state': {}}, MEMORY_FORMAT)
    with pytest.raises(UserError, match='damaged'):
        load_memory(path, whose)
    assert checkpoint['config']['cms_chunks'] == '', 'the checkpoint stays what it was'


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ['EVIL'],)


def test_damaged_foreign_and_evil_checkpoints(tmp_path, monkeypatch):
    model, path = tiny(), tmp_path / 'ckpt.pt'
    good = saved(model)
    save_checkpoint(path, good)
    whole = path.read_bytes()
    for damaged in (whole[:len(whole) // 2], b'', b'hello', pickle.dumps({'a': 1}, protocol=2)):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match='damaged or not a checkpoint|not a checkpoint of this project'):
            load_checkpoint(path)
    torch.save({'model': {}}, path)
    with pytest.raises(UserError, match='not a checkpoint of this project'):
        load_checkpoint(path)
    save_checkpoint(path, {'model': {}})
    with pytest.raises(UserError, match='without config, run'):
        load_checkpoint(path)
    monkeypatch.setenv('EVIL', str(tmp_path / 'ran'))
    torch.save({'format': 'nested-learning-1', 'model': Evil()}, path)
    with pytest.raises(UserError, match='damaged or not a checkpoint'):
        load_checkpoint(path)
    assert not (tmp_path / 'ran').exists(), 'loading ran code from the checkpoint'
    with pytest.raises(UserError, match='there is no checkpoint'):
        load_checkpoint(tmp_path / 'none.pt')
    for wrong in ({'n_embd': 32}, {'n_wings': 2}):
        with pytest.raises(UserError, match='does not fit'):
            load_model({**good, 'config': {**good['config'], **wrong}})


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'old')
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(path) as file:
            file.write(b'half of the n')
            raise KeyboardInterrupt
    with pytest.raises(UserError, match='could not write'):
        with atomic_write(path) as file:
            raise OSError(28, 'No space left on device')
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['file']


def test_the_best_checkpoint_stays(text, tmp_path):
    """Beside the last one, which is the one to go on from; also over a stop, and until there is a better one."""
    args = [f'--data={text}', '--n_layer=1', '--n_embd=8', '--n_head=1', '--block_size=8', '--batch_size=1',
            '--mixer=linear', '--eval_batches=1', '--sample_tokens=0', '--eval_every=2', '--warmup_steps=0']
    out, path, worse = f'--out_dir={tmp_path}/out', tmp_path / 'out' / 'ckpt.pt', ['--learning_rate=9', '--grad_clip=0']
    best = path.with_name('best.pt')
    inside('train.py', out, *args, '--max_steps=2')
    first = load_checkpoint(path)
    assert not best.exists() and first['val_loss'] == first['best_loss']
    inside('train.py', out, *args[1:], '--resume', '--max_steps=4', *worse)
    assert load_checkpoint(best)['step'] == 2 and load_checkpoint(path)['val_loss'] > first['best_loss']
    inside('train.py', out, *args[1:], '--resume', '--max_steps=6', *worse)
    kept = load_checkpoint(best)
    assert kept['step'] == 2 and torch.equal(kept['model']['head.weight'], first['model']['head.weight'])
    assert inside('sample.py', 'x', out, '--best', '--max_new_tokens=1', '--device=cpu')['checkpoint']['step'] == 2
    assert inside('sample.py', 'x', out, '--max_new_tokens=1', '--device=cpu')['checkpoint']['step'] == 6
    path.unlink()
    with pytest.raises(UserError, match='holds a run already'):
        inside('train.py', out, *args, '--max_steps=2')
    inside('train.py', out, *args, '--overwrite', '--max_steps=2')
    assert not best.exists()
    inside('train.py', out, '--resume', '--max_steps=60', '--learning_rate=1e-2', '--eval_every=50')
    last = load_checkpoint(path)
    assert last['step'] == 60 and last['best_loss'] == last['val_loss'] and not best.exists()
