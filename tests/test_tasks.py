"""
Tasks: the interface, which all of them follow (tasks.py), then what is each one's own; needles have test_niah.py, and
puzzles other than recall test_puzzles.py.

    python -m pytest tests/test_tasks.py
"""
import textwrap

import numpy as np
import pytest
import torch
from test_data import fails
from test_niah import make
from test_scripts import inside

import tasks
from cli import UserError
from data import Text
from languages import Languages
from niah import Needles
from puzzles import Recall
from tokenizer import get_tokenizer

LETTERS = torch.arange(26)


example = '    class Echo:' + tasks.__doc__.partition('    class Echo:')[2].partition('\n\n')[0]
exec(textwrap.dedent(example))                              # the one at the top of tasks.py, word by word


@pytest.fixture(params=['text', 'needles', 'recall', 'languages', 'echo'])
def task(request):
    tokens = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint16)
    return {'text': lambda: Text(tokens), 'needles': make, 'recall': lambda: Recall(8, LETTERS, LETTERS + 26, 52),
            'languages': lambda: Languages(get_tokenizer('bytes')), 'echo': globals()['Echo']}[request.param]()


def has_answers(task):
    return isinstance(task, (Needles, Recall, Languages))


class Program(torch.nn.Module):
    """A reader that is a program: said(idx (B, T)) are the tokens (B, T) that it finds most likely."""
    def __init__(self, said):
        super().__init__()
        self.said, self.nothing = said, torch.nn.Parameter(torch.zeros(1))

    def forward(self, idx, targets=None, state=None, weights=None):
        return torch.nn.functional.one_hot(self.said(idx), 257).float(), None, state


def following(idx):
    """The token that follows each, which is what needles and recall ask for, and a full stop after the last."""
    return torch.cat([idx[:, 1:], torch.full((len(idx), 1), ord('.'))], dim=1)


def remembering(idx):
    """What followed the same token when it was first read: what associative recall is, by a program."""
    said = torch.zeros_like(idx)
    for b, row in enumerate(idx.tolist()):
        followed = {}
        for t, token in enumerate(row):
            said[b, t] = followed.get(token, 0)
            if t:
                followed.setdefault(row[t - 1], token)
    return said


# -----------------------------------------------------------------------------
# the interface


def test_rows_to_train_on(task):
    for progress in (0.0, 0.15, 1.0):
        for T in (task.shortest, 400):
            idx, targets, weights = task.batch(5, T, torch.Generator().manual_seed(3), progress)
            assert idx.shape == targets.shape == (5, T) and idx.dtype == targets.dtype == torch.int64
            assert idx.min() >= 0 and targets.min() >= -1 and (targets >= 0).any() and idx.device.type == 'cpu'
            assert idx.is_contiguous() and targets.is_contiguous()
            if weights is not None:
                assert weights.shape == (5, T) and weights.dtype == torch.float32 and weights.min() >= 0
                assert weights.mean().item() == pytest.approx(1, abs=1e-5) and (weights[targets < 0] == 0).all()


def test_rows_are_a_matter_of_their_generator(task):
    def rows(generator): return [*task.batch(4, 350, generator)[:2], *task.held_out(4, 350, generator)]
    one = rows(torch.Generator().manual_seed(7))
    torch.manual_seed(123)
    np.random.seed(5)
    before, generator = torch.get_rng_state(), torch.Generator().manual_seed(7)
    assert all(map(torch.equal, one, rows(generator))), 'the same seed, the same rows'
    assert torch.equal(torch.get_rng_state(), before), 'no other randomness is touched'
    assert not torch.equal(one[0], rows(generator)[0]), 'the generator goes on'


def test_a_corpus_may_be_limited_by_suffix(tmp_path):
    for name, text in (('a.py', 'x = 1\n'), ('b.txt', 'some words. ')):
        (tmp_path / name).write_text(100 * text)
    assert tasks.load(str(tmp_path), suffix='.txt', quiet=True)[3]['bytes'] == 1200


def test_rows_that_are_held_out(task):
    idx, targets = task.held_out(3, 320, torch.Generator().manual_seed(0))
    assert idx.shape == targets.shape == (3, 320) and (targets >= 0).any()
    if has_answers(task):
        trained_on = torch.Generator().manual_seed(0)
        for _ in range(3):
            assert not torch.equal(idx, task.batch(3, 320, trained_on)[0]), 'not what is trained on'
        held = torch.Generator().manual_seed(0)
        task.held_out(3, 320, held)
        assert not torch.equal(task.held_out(3, 320, held)[0], idx), 'other rows every time'
        assert not torch.equal(task.batch(3, 320, held)[0], task.held_out(3, 320, held)[0])


def test_a_report(task):
    """All answers of a reader that knows them are right, none of one that says nothing, and some of half a reader."""
    right, wrong = (task.report(Program(said), 400, 7) for said in (following, torch.zeros_like))
    assert set(right.values()) <= {1.0} and set(wrong.values()) <= {0.0} and right.keys() == wrong.keys()
    assert right == task.report(Program(following), 400, 100), 'however many rows are read at once'
    assert bool(right) == has_answers(task)
    half = task.report(Program(lambda idx: following(idx) * (idx % 2)), 400, 7)
    assert all(0 <= share < 1 for share in half.values())


# -----------------------------------------------------------------------------
# text


def test_text_is_windows_of_the_data_and_their_successors(tmp_path):
    tokens = np.arange(1000, dtype=np.uint16) + 3
    tokens.tofile(tmp_path / 'tokens')
    for source in (tokens, np.memmap(tmp_path / 'tokens', np.uint16, 'r')):
        x, y, weights = Text(source).batch(5, 16, torch.Generator().manual_seed(1))
        assert x.shape == y.shape == (5, 16) and weights is None
        assert (y == x + 1).all() and (x[:, 1:] == y[:, :-1]).all()
        assert len(set(x[:, 0].tolist())) > 1
        held_out = Text(source).held_out(5, 16, torch.Generator().manual_seed(1))
        assert torch.equal(x, held_out[0]) and torch.equal(y, held_out[1])


def test_text_reaches_both_ends_and_refuses_what_is_too_short():
    tokens = np.arange(6, dtype=np.uint16)
    x, y, _ = Text(tokens).batch(200, 4, torch.Generator().manual_seed(0))
    assert set(x[:, 0].tolist()) == {0, 1} and y.max() == 5
    assert Text(tokens).batch(3, 5, torch.Generator())[1].tolist() == [[1, 2, 3, 4, 5]] * 3
    message = fails('6 tokens', Text(tokens).batch, 1, 6, torch.Generator())
    assert '7' in message and '--block_size=5' in message


# -----------------------------------------------------------------------------
# recall


def test_recall():
    """Every pair is shown once and asked for once, after all were shown; the answer is the token that follows."""
    task = Recall(8, torch.arange(16), torch.arange(16, 32), 32)
    x, y, weights = task.batch(5, 64, torch.Generator().manual_seed(0))
    assert x.max() <= 32 and torch.equal(weights > 0, y >= 0)
    for row, answers in zip(x.tolist(), y.tolist()):
        shown = dict(zip(row[:16:2], row[1:16:2]))
        assert len(shown) == 8 and max(shown) < 16 <= min(shown.values()) and max(shown.values()) < 32
        asked = {row[t]: answers[t] for t in range(64) if answers[t] >= 0}
        assert asked == shown and all(row[t + 1] == answers[t] for t in range(64) if answers[t] >= 0)
        assert min(t for t in range(64) if answers[t] >= 0) >= 16
        assert all(token == 32 for t, token in enumerate(row[16:], 16) if answers[t] < 0 and answers[t - 1] < 0)


def test_recall_is_solved_by_remembering_what_followed():
    task = Recall(8, LETTERS, LETTERS + 26, 52)
    assert task.report(Program(remembering), 64, 10) == {'8 pairs': 1.0}
    half = task.report(Program(lambda idx: remembering(idx) * (idx < 13)), 64, 10)['8 pairs']
    assert 0.3 < half < 0.7, 'of a reader that knows half of the keys'


def test_weights_of_recall_make_any_part_of_a_row_a_share_of_its_loss():
    _, targets, weights = Recall(4, LETTERS, LETTERS + 26, 52).batch(6, 60, torch.Generator().manual_seed(0))
    losses = torch.rand(6, 60)
    parts = [(losses * weights)[:, t:t + 20].mean() for t in (0, 20, 40)]       # the first has hardly any question
    assert torch.isclose(torch.stack(parts).mean(), losses[targets >= 0].mean())


def test_recall_refuses_what_does_not_fit():
    with pytest.raises(AssertionError, match='27 pairs take as many keys'):
        Recall(27, LETTERS, LETTERS + 26, 52)
    with pytest.raises(AssertionError, match='8 pairs do not fit in 31 tokens'):
        Recall(8, LETTERS, LETTERS + 26, 52).batch(1, 31, torch.Generator())


# -----------------------------------------------------------------------------
# by name


def test_tasks_by_name(text, capsys):
    task, held_out, enc, info = tasks.load(text)
    assert isinstance(task, Text) and task.is_text and len(task.tokens) > len(held_out.tokens)
    assert info['name'] == text and info['bytes_per_token'] and text in capsys.readouterr().out
    for name, digits in (('niah', 4), ('niah:full', 7)):
        task, held_out, enc, info = tasks.load(name, quiet=True)
        assert task.form['number'] == held_out.form['number'] == digits and info['bytes_per_token']
        assert len(task.text.tokens) > len(held_out.text.tokens) and not task.is_text
    for name, n_pairs in (('recall', 8), ('recall:3', 3), ('recall:26', 26)):
        task, held_out, enc, info = tasks.load(name)
        assert task.n_pairs == held_out.n_pairs == n_pairs and enc.n_vocab == 257 and not task.is_text
        assert info['name'] == name and info['sha256'] and 'bytes_per_token' not in info
        assert f'{n_pairs} pairs' in capsys.readouterr().out
    assert all(c.isalpha() or c == '.' for c in enc.decode(task.batch(1, 200, torch.Generator())[0][0].tolist()))


@pytest.mark.parametrize('data, tokenizer, words', [
    ('recall:0', 'bytes', '--data=recall takes 1 to 26 pairs'), ('recall:27', 'bytes', "not '27'"),
    ('recall:x', 'bytes', "not 'x'"), ('recall', 'gpt2', '--tokenizer=bytes'), ('recall:4', 'bpe:300', 'recall:4'),
    ('niah:long', 'bytes', "short, full behind its colon, not 'long'"), ('needles', 'bytes', "'needles'")])
def test_names_that_are_refused(data, tokenizer, words):
    fails(words, tasks.load, data, tokenizer)


def test_the_rows_that_are_shown(capsys):
    tasks.main()
    shown = capsys.readouterr().out
    assert shown.count('--- --data=') == 3 and shown.count('[') >= 20


def test_a_model_of_other_tokens_is_told_so_and_a_preset_names_no_tokenizer(tmp_path):
    """A preset's tokenizer would be in the way of tasks and small texts: --tokenizer=auto suits them all."""
    args = ['--n_layer=1', '--n_embd=8', '--n_head=1', '--block_size=32', '--batch_size=1', '--max_steps=1',
            '--eval_batches=1', '--mixer=linear', '--device=cpu', '--sample_tokens=4', '--compile=false']
    script = inside('train.py', '--preset=small', '--data=recall:2', f'--out_dir={tmp_path}/recall', *args)
    assert script['run'].tokenizer == 'bytes' and 'tokenizer' not in script['PRESETS']['small']
    text = tmp_path / 'a.txt'
    text.write_text('so many words to be learned from, and more. ' * 200)
    inside('train.py', f'--data={text}', '--tokenizer=bpe:270', f'--out_dir={tmp_path}/bpe', *args)
    with pytest.raises(UserError, match='--tokenizer=bytes'):
        inside('train.py', '--data=recall:2', f'--init_from={tmp_path}/bpe/ckpt.pt', f'--out_dir={tmp_path}/x')
    script = inside('train.py', f'--data={text}', f'--init_from={tmp_path}/bpe/ckpt.pt', '--tokenizer=auto',
                    f'--out_dir={tmp_path}/y', *args[5:])
    assert script['run'].tokenizer == 'bpe:270'
