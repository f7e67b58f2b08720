"""Needles: exact lengths, depths, what the oracle and chance score, training batches, then the script end to end."""
import json
import os
import random
import re

import numpy as np
import pytest
import torch
from conftest import assert_near
from test_scripts import inside, shell, train_until

import niah
from cli import UserError
from model import Config, Hope
from niah import FORMS, TASKS, Needles, found, oracle
from tokenizer import encode, get_tokenizer

PROSE = ' '.join(random.Random(0).choices('a tale of two plain words told at some length by nobody'.split(), k=9000))


def make(tokenizer='bytes', form='short'):
    enc = get_tokenizer(tokenizer, texts=[PROSE.encode(), b' The secret number of oak is 12345678 '])
    text = encode(enc, PROSE.encode())
    return Needles(enc, np.insert(text, range(0, len(text), 500), enc.eot_token), form)


@pytest.fixture(params=['bytes', 'bpe:300'])
def needles(request):
    return make(request.param)


def text_of(needles, ids):
    return needles.enc.decode([i for i in ids.tolist() if i != needles.enc.eot_token])


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('tokenizer', ['bytes', 'bpe:300'])
def test_prompts_have_the_length_asked_for_and_hold_their_needles_once(tokenizer, form, task):
    needles = make(tokenizer, form)
    for seed, length in enumerate((600, 601, 777, 2048)):
        example = needles.example(task, length, seed)
        assert len(example.prompt) == length - needles.answer_room(task) <= length - len(example.answer)
        assert (example.prompt == needles.enc.eot_token).nonzero()[0].tolist() == [0], 'only at the start'
        text = text_of(needles, example.prompt)
        assert all(text.count(gold) == 1 for gold in example.golds) and len(set(example.golds)) == len(example.golds)
        assert text.count(' The secret ') == TASKS[task].n_keys * TASKS[task].n_values + 1      # and the question's
        assert all(found(oracle(text), example.golds)), 'a program that can copy must find them'
        assert all(found(text_of(needles, example.answer), example.golds)), 'the right answer must score'
        if tokenizer == 'bytes':
            assert (encode(needles.enc, text.encode()) == example.prompt[1:]).all()


@pytest.mark.parametrize('task', ['s1', 's2', 's3', 'mk'])
def test_the_needle_lies_where_it_is_asked_to(needles, task):
    for depth in (0, 0.25, 0.5, 0.9, 1):
        example = needles.example(task, 4000, 7, depth)
        text = text_of(needles, example.prompt).rsplit('\n', 1)[0]
        before = text.index(f'is {example.golds[0]}') / len(text)
        assert abs(before - depth) < 0.06, f'asked for {depth}, is at {before:.3f}'
        assert example.depths[0] == depth


def test_an_example_is_a_matter_of_its_seed():
    needles = make()
    one, two, other = (needles.example('mq', 700, seed).prompt for seed in ('eval 3', 'eval 3', 'eval 4'))
    assert len(one) == len(other) and (one == two).all() and not (one == other).all()
    # the same on every machine: these were drawn on another one than yours
    assert needles.example('mv', 400, 0).golds == GOLDS and needles.example('s3', 400, 0).golds == CODE


GOLDS, CODE = ['7890', '1663', '5242', '9376'], ['c2094cac']


def test_values_and_keys_are_all_different_and_of_the_form():
    full, rng = make(form='full'), random.Random(0)
    for _ in range(100):
        values, keys = full.values('number', 4, rng), full.keys(4, rng)
        assert len(set(values)) == 4 and {len(v) for v in values} == {7}
        assert len({key.split('-')[1] for key in keys}) == 4
    assert [len(part) for part in full.values('code', 1, rng)[0].split('-')] == [8, 4, 4, 4, 12]
    assert len(set(niah.NOUNS)) == len(niah.NOUNS) and not set(niah.NOUNS) & {'and'}


def test_a_prompt_too_short_is_refused(needles):
    with pytest.raises(UserError, match='50 tokens are too few for the task mq: needles, question and answer alone'):
        needles.example('mq', 50, 0)
    shortest = needles.draw('s2', random.Random(5)).n_tokens()
    bare = needles.example('s2', shortest, 5)               # nothing but needle, question and answer
    assert len(bare.prompt) + len(bare.answer) == shortest <= needles.shortest         # of numbers all are as long


def test_a_haystack_longer_than_its_text_goes_on_from_the_start():
    needles = make()
    example = needles.example('s2', 200_000, 0)
    assert len(example.prompt) + needles.answer_room('s2') == 200_000


def test_what_is_found():
    assert found(' 4821.', ['4821']) == [True]
    assert found(' 48215', ['4821']) == [False], 'a part of a longer number is not it'
    assert found('', ['4821']) == [False]
    assert found(' 1, of owl is 2, of elm is 3.', ['1', '3', '4']) == [True, True, False]
    assert found(' it is 0f3c-11-aa, I think', ['0f3c-11-aa']) == [True]


@pytest.mark.parametrize('task', TASKS)
def test_random_values_score_chance(monkeypatch, task):
    monkeypatch.setitem(FORMS, 'short', dict(number=1, code=1, adjectives=False))
    needles, rng, n = make(), random.Random(0), 2000
    kind, scores = TASKS[task].kind, []
    for i in range(n):
        golds = needles.draw(task, random.Random(i)).golds
        scores.append(np.mean(found(', '.join(needles.values(kind, len(golds), rng)), golds)))
    assert abs(np.mean(scores) - needles.chance(task)) < 0.03


def test_a_training_batch(needles):
    x, y, weights = needles.batch(16, 512, torch.Generator().manual_seed(0))
    again = needles.batch(16, 512, torch.Generator().manual_seed(0))
    other = needles.batch(16, 512, torch.Generator().manual_seed(1))
    assert torch.equal(x, again[0]) and torch.equal(weights, again[2]) and not torch.equal(x, other[0])
    assert x.shape == y.shape == weights.shape == (16, 512) and torch.equal(x[:, 1:], y[:, :-1])
    assert weights.mean().item() == pytest.approx(1)
    heavy = weights > weights.min()
    assert (weights * heavy).sum().item() / weights.numel() == pytest.approx(niah.ANSWERS_WEIGH)
    assert not heavy.all(1).any() and (~heavy).all(1).any(), 'some rows are text'


def test_what_is_weighted_up_is_what_a_program_would_answer(needles):
    rng, n = random.Random(0), 0
    for _ in range(20):
        tokens, marked = (sum(map(list, x), []) for x in zip(*[
            (part.tolist(), np.full(len(part), weigh).tolist()) for part, weigh in needles.task_row(512, rng)]))
        assert len(tokens) <= 512
        ends = [i for i, token in enumerate(tokens) if token == needles.enc.eot_token]
        for start, end in zip([-1] + ends, ends):
            first = next(i for i in range(start + 1, end) if marked[i])
            assert all(marked[first:end + 1]) and not any(marked[start + 1:first])
            prompt, answer = (needles.enc.decode(x) for x in (tokens[start + 1:first], tokens[first:end]))
            golds = oracle(prompt).split(', ')
            assert golds[0] and all(found(answer, golds)) and answer[-1] == '.'
            begins = {word.start() for word in re.finditer(r'[\w-]+', answer) if word[0] not in ('of', 'is')}
            edges = np.cumsum([0] + [len(needles.bytes_of[token]) for token in tokens[first:end]])
            heavy = [bool(begins & {*range(a, b)}) for a, b in zip(edges, edges[1:])]
            assert heavy == [weight == niah.FIRST_WEIGHS for weight in marked[first:end]], 'where values and keys begin'
            n += 1
    assert n >= 30


def test_a_drill_tells_values_again(needles):
    rng, again = random.Random(0), 0
    for _ in range(20):
        told = {}
        parts = needles.drill_row(512, rng)
        assert sum(len(tokens) for tokens, _ in parts) >= 512
        for (_, no), (cue, _), (tokens, answer) in zip(*[iter(parts)] * 3):
            cue, value = needles.enc.decode(cue.tolist()), needles.enc.decode(tokens.tolist())
            first = next(i for i in range(len(tokens)) if needles.enc.decode(tokens[:i + 1].tolist()).strip())
            weights = [niah.FIRST_WEIGHS if i == first else 1 for i in range(len(tokens))] if cue in told else 0
            assert not no and np.array_equal(answer, weights) and told.setdefault(cue, value) == value
            again += np.any(answer)
    assert again >= 60
    for progress, n_keys in ((0, 1), (0.15, 2), (0.25, 4)):
        for row in needles.batch(4, 1024, torch.Generator().manual_seed(0), progress)[0].tolist():
            text = needles.enc.decode(row[1:])
            assert len(set(re.findall(r' The secret (?:number|code) of (\w+) is', text))) == n_keys
            assert re.fullmatch(r'( The secret \w+ of \w+ is \w+\.)+ ?.{0,60}', text), 'a lesson has no text'


def test_weights_in_the_loss():
    torch.manual_seed(0)
    model = Hope(Config(n_layer=1, n_head=2, n_embd=16, mixer='mamba2')).double()
    idx, targets = torch.randint(256, (2, 3, 20))
    weights = torch.rand(3, 20).double()
    log_p = model(idx)[0].log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert_near('loss', model(idx, targets, weights=weights)[1], -(weights * log_p).mean(), 1e-12)
    assert_near('ones', model(idx, targets, weights=torch.ones(3, 20).double())[1], model(idx, targets)[1], 1e-12)


# -----------------------------------------------------------------------------
# the scripts

SMALL = ['--data=niah', '--mixer=mamba2', '--n_layer=1', '--n_embd=32', '--n_head=2', '--block_size=320',
         '--eval_every=10', '--eval_batches=1', '--carry=8', '--sample_tokens=0', '--device=cpu', '--preset=cpu']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    out_dir = str(tmp_path_factory.mktemp('run') / 'out')
    return out_dir, shell('train.py', f'--out_dir={out_dir}', '--max_steps=20', *SMALL).stdout


def test_training_says_what_is_recalled_and_resumes_exactly(trained, tmp_path):
    out_dir, stdout = trained
    assert stdout.count('answers right, %: s1 0  s2 0') == 2
    other = str(tmp_path / 'out')
    train_until(4, other, '--max_steps=20', *SMALL)
    assert 4 <= torch.load(f'{other}/ckpt.pt')['step'] < 20 and torch.load(f'{other}/ckpt.pt')['carried']
    inside('train.py', f'--out_dir={other}', '--resume')
    a, b = (torch.load(f'{d}/ckpt.pt', weights_only=True) for d in (out_dir, other))
    assert torch.equal(a['batch_rng'], b['batch_rng'])
    assert all(torch.equal(p, b['model'][name]) for name, p in a['model'].items())


def test_evaluation(trained, tmp_path):
    out_dir, _ = trained
    path = str(tmp_path / 'niah.json')
    done = shell('eval_niah.py', f'--out_dir={out_dir}', '--lengths=1500,400', '--n=3', '--depths=3', f'--json={path}')
    assert 's1 0.0 [0-56] 0.0 [0-56] 0.011 100' in ' '.join(done.stdout.split()), done.stdout
    assert 'tenths found' in done.stdout and f'written to {path}' in done.stdout
    with open(path) as file:
        result = json.load(file)
    assert len(result['cells']) == 12 and result['form'] == FORMS['short'] and 'eval_niah.py' in result['command']
    assert len({cell['state_bytes'] for cell in result['cells']}) == 1, 'constant memory'
    assert {(cell['task'], cell['length']) for cell in result['cells']} == {(t, n) for t in TASKS for n in (400, 1500)}
    assert all(len(cell['by_depth']) == 3 and len(cell['answers']) == 3 for cell in result['cells'])
    shell('eval_niah.py', f'--out_dir={out_dir}', '--lengths=300', '--n=2', '--depths=2', '--tasks=s1', '--learn',
          f'--json={tmp_path}/learn.json')
    floor = inside('eval_niah.py', f'--out_dir={out_dir}', '--lengths=300', '--n=2', '--depths=2', '--tasks=s1',
                   '--gate_floor=0.2', f'--json={tmp_path}/floor.json')
    assert floor['model'].config.gate_floor == 0.2


def test_oracle_and_guess(capsys, monkeypatch):
    inside('eval_niah.py', '--oracle', '--n=4', '--depths=4', '--lengths=512,9000', '--form=full')
    printed = capsys.readouterr().out
    assert printed.count(' 100.0 % ') == 12 and printed.count('  **') == 24, printed
    inside('eval_niah.py', '--guess', '--n=4', '--depths=4', '--tasks=s3')
    assert ' 0.0 % ' in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setitem(FORMS, 'short', dict(number=1, code=1, adjectives=False))
        inside('eval_niah.py', '--guess', '--n=900', '--depths=9', '--tasks=mv')        # four of nine values
    assert 38 < float(re.search(r'examples \| +([\d.]+) %', capsys.readouterr().out)[1]) < 51


def test_an_interval():
    interval = inside('eval_niah.py', '--oracle', '--n=2', '--depths=2', '--tasks=s1')['interval']
    assert interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)      # Wilson, by hand
    assert interval(1.0, 33)[1] == 1 and interval(0.0, 33)[0] == 0 and 0.89 < interval(1.0, 33)[0] < 0.9


@pytest.mark.parametrize('args, code, words', [
    (['--oracle', '--tasks=s1,s4'], 2, "s1, s2, s3, mk, mv, mq, with commas between and each once, not 's4'"),
    (['--oracle', '--lengths=512,64'], 1, '64 tokens are too few for the task s1'),
    (['--oracle', '--lengths=1k'], 2, "not '1k'"),
    (['--oracle', '--lengths=512,512'], 2, 'different whole numbers above 0'),
    (['--oracle', '--n=3'], 2, '--n=3 must be a multiple of --depths=11'),
    (['--oracle', '--learn'], 2, 'give one of'),
    (['--oracle', '--gate_floor=0.5'], 2, '--gate_floor must be below 0.5'),
    (['--oracle', '--haystack=nowhere'], 1, "no such file, folder or corpus: 'nowhere'"),
    (['--out_dir=nowhere'], 1, 'there is no checkpoint nowhere'),
])
def test_wrong_input(args, code, words):
    with pytest.raises(UserError) as error:
        inside('eval_niah.py', *args)
    assert words in str(error.value) and error.value.exit_code == code


def test_a_missing_tokenizer_is_not_learned_anew(trained, tmp_path):
    checkpoint = torch.load(f'{trained[0]}/ckpt.pt', weights_only=True)
    checkpoint['run']['tokenizer'] = 'bpe:300'
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match='tokenizer.bpe is missing'):
        inside('eval_niah.py', f'--out_dir={tmp_path}')
    assert os.listdir(tmp_path) == ['ckpt.pt']


@pytest.mark.parametrize('args, words', [
    (['--data=niah', '--block_size=128'], '--block_size=128 is too short for --data=niah'),
    (['--form=full'], '--data=niah:full'),
])
def test_what_training_refuses(args, words, tmp_path):
    with pytest.raises(UserError) as error:
        inside('train.py', f'--out_dir={tmp_path}/out', *args)
    assert words in str(error.value) and error.value.exit_code == 2


def test_a_learner_trains_on_needles(tmp_path, capsys):
    args = [arg for arg in SMALL if 'carry' not in arg and 'data' not in arg and 'block' not in arg]
    inside('train.py', f'--out_dir={tmp_path}/out', '--data=niah:full', '--cms_chunks=64,256', '--block_size=640',
           '--max_steps=2', *args)
    assert 'answers right, %: s1 0' in capsys.readouterr().out
    script = inside('eval_niah.py', f'--out_dir={tmp_path}/out', '--lengths=400', '--n=2', '--depths=2', '--tasks=s3',
                    '--learn')
    assert script['form'] == 'full' and script['reader'] is not script['model'], 'as trained'


def test_a_text_without_places_for_needles(tmp_path):
    path = tmp_path / 'text.txt'
    path.write_text('x' * 5000)
    done = shell('eval_niah.py', '--oracle', f'--haystack={path}', code=1)
    assert 'no spaces' in done.stderr and done.stderr.count('\n') == 1
