"""Choices: their likelihood per byte, items from files and from held-out text, the table; bits per byte by place."""
import json
import math
import random
import re

import pytest
import torch
from test_scripts import inside

from cli import UserError, interval
from corpora import load_documents, side

SMALL = ['--n_layer=2', '--n_embd=16', '--n_head=2', '--block_size=64', '--batch_size=2', '--max_steps=3',
         '--warmup_steps=1', '--eval_every=3', '--eval_batches=1', '--sample_tokens=0', '--device=cpu', '--seed=1']
NAMES = sorted(f'{i}.txt' for i in range(190) if side(f'{i}.txt') == 'val' or i < 20)        # 7 of 27 are held out


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    """A folder of texts in which no two lines are alike."""
    folder, rng = tmp_path_factory.mktemp('corpus'), random.Random(0)
    for name in NAMES:
        lines = (' '.join(''.join(rng.choices('abcdefgh', k=4)) for _ in range(6)) for _ in range(60))
        (folder / name).write_text(''.join(f'{name} {line}\n' for line in lines))
    return str(folder)


@pytest.fixture(scope='module')
def runs(corpus, tmp_path_factory):
    """{mixer: its folder}, of tokens of several bytes and of single bytes."""
    folder = tmp_path_factory.mktemp('runs')
    for mixer, tokenizer in (('hope', 'bpe:300'), ('attention', 'bytes')):
        inside('train.py', f'--data={corpus}', f'--mixer={mixer}', f'--tokenizer={tokenizer}', *SMALL,
               f'--out_dir={folder}/{mixer}')
    return {mixer: f'{folder}/{mixer}' for mixer in ('hope', 'attention')}


def evaluate(out_dir, *args):
    return inside('eval_choices.py', f'--out_dir={out_dir}', '--device=cpu', *args)


def direct(script, reader, item, choice):
    """Bits per byte of a choice: context and choice through the reader as one row, no state carried."""
    enc, encode = script['enc'], script['encode']
    context, rest = (encode(enc, text).tolist() for text in (item.context, choice))
    row = torch.tensor([[enc.eot_token, *context, *rest]])
    with torch.no_grad():
        logits = reader(row[:, :-1])[0][0].log_softmax(-1)
    nats = -sum(logits[len(context) + i, token].item() for i, token in enumerate(rest))
    return nats / math.log(2) / len(choice)


@pytest.mark.parametrize('mixer', ['hope', 'attention'])
@pytest.mark.parametrize('learn', [False, True])
def test_a_choice_costs_what_it_costs_after_its_context(runs, mixer, learn):
    """Also a context longer than attention sees, none at all, and choices of one token."""
    script = evaluate(runs[mixer], '--n=1', '--context=40', '--data=near', f'--learn={learn}')
    Item, score, reader, enc = (script[name] for name in ('Item', 'bits_per_byte', 'reader', 'enc'))
    texts = ['a', ' of the', 'abcd efgh bcde\nabc', 'ö' * 9, 'h' * 70]
    for context in ('', 'x', 'abcd efgh ' * 30):
        item = Item('', context.encode(), [text.encode() for text in texts], 0)
        want = [direct(script, reader, item, choice) for choice in item.choices]
        assert score(reader, enc, [item], together=False)[0] == pytest.approx(want, rel=1e-4)
        if not learn:
            assert score(reader, enc, [item])[0] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize('mixer', ['hope', 'attention'])
def test_a_batch_is_its_items_one_at_a_time(runs, mixer):
    script = evaluate(runs[mixer], '--n=1', '--context=99', '--data=near')
    enc, items = script['enc'], script['draw_items']('near', script['documents'], 30, 99, 64, 0)
    groups = sorted(script['batches'](enc, items, 4), key=len)
    assert sorted(i for group in groups for i in group) == [*range(30)] and len(groups[-1]) == 4
    items[groups[-1][1]].choices.pop()                                          # they may have different numbers
    for group in groups[-2:]:
        together = script['bits_per_byte'](script['reader'], enc, [items[i] for i in group])
        for i, bits in zip(group, together):
            alone = script['bits_per_byte'](script['reader'], enc, [items[i]], together=False)[0]
            assert bits == pytest.approx(alone, rel=1e-4) and len(bits) == len(items[i].choices)


def test_numbers_by_hand(runs, capsys):
    script = evaluate(runs['hope'], '--n=2', '--context=40', '--data=far')
    right, paired = script['is_right'], script['paired']
    assert right([2.0, 1.0, 3.0], 1) and not right([2.0, 1.0, 3.0], 0) and not right([1.0, 1.0], 0), 'a tie is wrong'
    assert interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)              # Wilson
    a, b = [True] * 50 + [False] * 50, [True] * 40 + [False] * 10 + [True] * 30 + [False] * 20
    assert paired(a, b) == pytest.approx((0.2, 0.0824, 0.3176), abs=1e-9)   # 30 won, 10 lost: se = sqrt(40 - 4) / 100
    assert paired(a, a) == (0, 0, 0)


FILES = {'hellaswag': [{'ctx': 'He sits', 'endings': ['down.', 'up a tree.', 'x', 'y'], 'label': '1'},
                       {'ctx': 'She', 'endings': ['a', 'b', 'c', 'd'], 'label': 2, 'more': 1}],
         'piqa': [{'goal': 'He sits', 'sol1': 'down.', 'sol2': 'up a tree.', 'label': 1}],
         'plain': [{'context': 'He sits', 'choices': [' down.', ' up a tree.', 'x'], 'answer': 1}]}


@pytest.mark.parametrize('form', FILES)
def test_files(runs, form, tmp_path, capsys):
    path = tmp_path / 'data.jsonl'
    path.write_text('\n'.join(json.dumps(row) for row in FILES[form]) + '\n\n')
    script = evaluate(runs['hope'], f'--data={path}')
    items = script['read_items'](str(path))
    assert (items[0].context, items[0].choices[:2], items[0].answer) == (b'He sits', [b' down.', b' up a tree.'], 1)
    chance = {'hellaswag': '25.0', 'piqa': '50.0', 'plain': '33.3'}[form]
    assert capsys.readouterr().out.splitlines()[-1].split()[3] == chance and len(items) == len(FILES[form])

    labels = tmp_path / 'labels.lst'
    labels.write_text('0\n' * len(items))
    without = tmp_path / 'without.jsonl'
    without.write_text('\n'.join(json.dumps({key: x for key, x in row.items() if key not in ('label', 'answer')})
                                 for row in FILES[form]))
    assert [item.answer for item in script['read_items'](str(without), str(labels))] == [0] * len(items)
    with pytest.raises(UserError, match="without.jsonl, line 1: the label must be one of 0 to ., not 'None'"):
        script['read_items'](str(without))


def test_near_and_far_are_of_held_out_documents_and_one_choice_is_true(runs, corpus):
    held_out = [text for (_, text), which in zip(*load_documents(corpus)) if which == 'val']
    for mixer in runs:
        script = evaluate(runs[mixer], '--n=1', '--context=40')
        documents = script['held_out_documents'](script['checkpoint'], script['enc'], runs[mixer])
        assert documents == held_out and len(held_out) > 1
    near, far = (script['draw_items'](kind, documents, 40, 100, 64, 0) for kind in ('near', 'far'))
    assert len(near) == len(far) == 40
    assert near[:9] == script['draw_items']('near', documents, 9, 100, 64, 0), 'the same, whatever n is'
    for kind, items in (('near', near), ('far', far)):
        for item in items:
            own, = [text for text in documents if item.context in text]     # no two lines are alike
            true, *others = item.choices
            assert item.answer == 0 and item.context + true in own and len(item.context) == 100
            assert {len(choice) for choice in item.choices} == {64} and len({*item.choices}) == 4
            assert all(choice[:1] == b'\n' and choice[1:2] != b'\n' for choice in item.choices)
            for other in others:
                source, = [text for text in documents if other in text]
                assert (source == own) == (kind == 'near')
                assert kind == 'far' or abs(own.index(other) - own.index(true)) >= 64
                assert other[1:30] not in item.context
    assert len({item.choices[0] for item in near}) == 40


def test_the_table_of_two_models_and_the_file(runs, tmp_path, capsys):
    path, folders = tmp_path / 'a.json', ','.join(runs.values())
    evaluate(folders, '--n=8', '--context=100', f'--json={path}')
    printed = capsys.readouterr()
    rows = re.findall(r'(near|far) +8 +25\.0 +(\d+\.\d) \[.*\] +(\d+\.\d) \[', printed.out)
    assert [name for name, _, _ in rows] == ['near', 'far', 'near', 'far']
    assert not printed.err and '\r' not in printed.out, 'no progress but on a terminal'
    assert printed.out.count('on the same items') == 4, 'items are bytes, whatever tokens a model has'
    result = json.loads(path.read_text())
    assert {'command', 'commit', 'machine', 'torch'} <= {*result} and len(result['results']) == 4
    for line, (_, *shares) in zip(result['results'], rows):
        assert [f"{100 * line[score]['share']:.1f}" for score in ('likelihood', 'gain')] == shares
        costs = [(item['bits_per_byte'], item['without_context']) for item in line['items']]
        assert line['likelihood']['share'] == sum(min(bits) == bits[0] for bits, _ in costs) / 8
        saved = [[y - x for x, y in zip(*pair)] for pair in costs]
        assert line['gain']['share'] == sum(max(gains) == gains[0] for gains in saved) / 8
    first = result['differences'][0]
    assert first['difference'] == result['results'][2]['likelihood']['share'] \
        - result['results'][0]['likelihood']['share'] and (first['data'], first['score']) == ('near', 'likelihood')


@pytest.mark.parametrize('args, code, words', [
    (['--data=none.jsonl'], 1, 'could not read none.jsonl: No such file'),
    (['--data=bad.jsonl'], 1, 'bad.jsonl, line 2: Unterminated string'),
    (['--data=wrong.jsonl'], 1, "wrong.jsonl, line 1: the label must be one of 0 to 1, not '2'"),
    (['--data=form.jsonl'], 1, 'form.jsonl, line 1: it needs ctx, endings and label'),
    (['--data=empty.jsonl'], 1, 'empty.jsonl holds no items'),
    (['--data=fine.jsonl', '--labels=two.lst'], 1, 'two.lst has 2 labels, fine.jsonl 1 items'),
    (['--data=near', '--labels=two.lst'], 2, '--labels is for one file'),
    (['--data=near,near'], 2, '--data takes names with commas between, each once'),
    (['--n=0'], 2, '--n must be at least 1'),
    (['--context=9000'], 1, 'too short for near choices of 64 bytes after 9000'),
    (['--out_dir=nowhere'], 1, 'there is no checkpoint nowhere'),
])
def test_wrong_input(runs, args, code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fine = json.dumps(FILES['piqa'][0])
    for name, text in (('fine.jsonl', fine), ('bad.jsonl', fine + '\n{"ctx'), ('form.jsonl', '[1]'),
                       ('empty.jsonl', ''), ('wrong.jsonl', fine.replace('"label": 1', '"label": 2')),
                       ('two.lst', '0\n1\n')):
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match='^[^\n]*$') as error:
        inside('eval_choices.py', *args, *([] if 'nowhere' in args[0] else [f"--out_dir={runs['hope']}"]))
    assert words in str(error.value) and error.value.exit_code == code


def test_a_corpus_that_changed_or_is_a_task(runs, tmp_path):
    for run, data, words in (({}, {'sha256': '0'}, 'is not the one that'),
                             ({'data': 'recall'}, {'path': ''}, 'recall, which is no text')):
        checkpoint = torch.load(f"{runs['attention']}/ckpt.pt", weights_only=True)
        checkpoint['run'] |= run
        checkpoint['data'] |= data
        torch.save(checkpoint, tmp_path / 'ckpt.pt')
        with pytest.raises(UserError, match=words):
            evaluate(tmp_path)


# -----------------------------------------------------------------------------
# sample.py --places


@pytest.mark.parametrize('learn', [False, True])
def test_the_bits_of_all_places_are_those_of_the_whole(runs, learn, tmp_path, capsys):
    path = tmp_path / 'text.txt'
    path.write_text(__doc__ * 13)
    script = inside('sample.py', f'--score={path}', f"--out_dir={runs['hope']}", '--places', f'--learn={learn}')
    lines = dict(line.split(':', 1) for line in capsys.readouterr().out.splitlines())
    places = {name: (float(text.split()[0]), int(text.split()[-1].replace(',', '')))
              for name, text in lines.items() if 'bits per byte' in text}
    tokens = int(lines['tokens'])
    assert [*places] == ['0-512', '512-1,024', f'1,024-{tokens:,}'] and 1024 < tokens < 2048
    assert sum(n for _, n in places.values()) == int(lines['bytes'])
    whole = sum(bits * n for bits, n in places.values()) / int(lines['bytes'])
    assert whole == pytest.approx(float(lines['bits_per_byte']), abs=2e-4)
    if not learn:                                   # one stretch by itself, from the whole text given at once
        ids = torch.tensor([[script['enc'].eot_token, *script['encode'](script['enc'], path.read_bytes()).tolist()]])
        with torch.no_grad():
            nats = torch.nn.functional.cross_entropy(script['model'](ids[:, :1024])[0][0], ids[0, 1:1025],
                                                     reduction='none')
        bits = nats[512:].sum().item() / math.log(2) / places['512-1,024'][1]
        assert bits == pytest.approx(places['512-1,024'][0], abs=2e-4)


def test_places_are_of_a_text():
    with pytest.raises(UserError, match='--places is for --score'):
        inside('sample.py', '--places')
