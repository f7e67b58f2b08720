"""Claims: each row of README's table has one, the verdict follows from numbers, one end to end, wrong command lines."""
import json
import re

import pytest
from conftest import ROOT
from test_scripts import inside

import claims
import cli
from cli import UserError


def test_every_row_of_the_table_has_a_claim_and_every_claim_a_row(capsys):
    with open(f'{ROOT}/README.md') as file:
        rows = re.findall(r'^\| .* \| \[.*\]\(results/.*\|$', file.read(), flags=re.M)
    of = {name: [i for i, row in enumerate(rows) if it['row'] in row and it.get('full', '') in row]
          for name, it in claims.CLAIMS.items()}
    assert all(len(found) == 1 for found in of.values()), of
    assert sorted({i for found in of.values() for i in found}) == list(range(len(rows)))
    inside('claims.py')
    listed = capsys.readouterr().out
    for name, it in claims.CLAIMS.items():
        assert re.search(rf'^{name} +{re.escape(it["says"])}\n +in full: .+ \(results/\w+\.md\)$', listed, flags=re.M)
    assert 'in full: holds, not by default (results/races.md)' in listed


@pytest.mark.parametrize('a, b, lower, verdict', [
    ([3, 4, 3.5], [1, 2, 1], False, 'holds'), ([3, 4, 3.5], [1, 2, 1], True, 'does not hold'),
    ([3, 1, 2], [2, 2, 1], False, 'cannot be told'), ([9], [1], False, 'cannot be told'),
    ([0.95, 0.95], 0.9, False, 'holds'), (0.02, [0.03, 0.03], False, 'does not hold')])
def test_the_verdict_on_two_numbers(a, b, lower, verdict):
    """Beyond two standard errors over seeds, in the claimed direction; never from one seed."""
    found = {name: x for name, x in (('a', a), ('b', b)) if isinstance(x, list)}
    pair = [name if name in found else x for name, x in (('a', a), ('b', b))]
    assert claims.judge([('', *pair)], found, lower)[1] == verdict


def test_the_verdict_on_several_comparisons():
    found = {'a': [3, 3.1], 'b': [2, 2.1], 'c': [1, 9], 'd': [7, 7]}
    def of(*pairs): return claims.judge([pair for a, b in pairs for pair in claims.before(a, b)], found)
    assert of('ab', 'db')[1] == 'holds' and of('ab', 'ac')[1] == 'cannot be told'
    assert of('ac', 'ad', 'ab')[1] == 'does not hold'
    lines, _ = of('ab')
    assert lines[0]['claim'] == 'a before b' and lines[0]['numbers']['mean'] == pytest.approx(1)


def pretend(monkeypatch, number):
    """Scripts that run in no time: number(options) is what training ends with. -> [(script, options)] as they come"""
    ran = []

    def run_script(script, its):
        ran.append((script, its))
        if script == 'train.py':
            end = {'step': int(its['max_steps']), 'val_loss': 1.0, 'val_bpb': number(its), 'tokens_per_second': 512}
            with cli.atomic_write(f"{its['out_dir']}/log.jsonl") as file:
                file.write(json.dumps(end).encode())
            return
        run = {'kept': [0.5, 0.5], 'gained': [1.0, 1.0], 'lost': 0.0, 'R': [[{'right': 1.0}, {'right': 2.0}]]}
        cells = [{'length': int(n), 'score': 0.5, 'state_bytes': 8} for n in its.get('lengths', '').split(',') if n]
        n, names = int(its.get('seeds', 1)), its.get('learners', its.get('mixers', '')).split(',')
        result = {'learners': {name: {'seeds': [run] * n} for name in names}, 'cells': cells,
                  'runs': [{'mixer': name, 'right': {n: {'whole words': 1.0} for n in '128'}} for name in names * n]}
        with cli.atomic_write(its['json']) as file:
            file.write(json.dumps(result).encode())
    monkeypatch.setattr(cli, 'run_script', run_script)
    return ran


@pytest.mark.parametrize('quick', ([], ['--quick']))
@pytest.mark.parametrize('name', claims.CLAIMS)
def test_commands_that_are_understood_and_a_last_line(name, quick, tmp_path, monkeypatch, capsys):
    """Every comparison has its numbers, one for each seed; options and seeds are those that the scripts take."""
    ran = pretend(monkeypatch, lambda its: 1.0)
    inside('claims.py', name, '--seeds=2', f'--out_dir={tmp_path}', f'--json={tmp_path}/claim.json', *quick)
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match('verdict: (holds|does not hold|cannot be told): .* (before|above|below) ', last), last
    with open(tmp_path / 'claim.json') as file:
        result = json.load(file)
    assert {len(numbers) for numbers in result['numbers'].values()} == {2}
    assert [line['claim'] for line in result['comparisons']] == [text for text, *_ in claims.CLAIMS[name]['compare']]
    for script, options in ran:
        with open(f'{ROOT}/{script}') as file, open(f'{ROOT}/model.py') as model:
            known = {*re.findall(r'^    (\w+): ', file.read() + model.read(), flags=re.M)}
        assert {*options} <= known, (script, options)


def test_lower_is_better_where_it_is(tmp_path, monkeypatch, capsys):
    ran = pretend(monkeypatch, lambda its: {'m3': 3.0, 'muon': 2.0, 'adamw': 4.0}[its['optimizer']] + int(its['seed']))
    inside('claims.py', 'optimizers', f'--out_dir={tmp_path}')
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == ('verdict: does not hold: m3 before muon: -1.000 +- 0.000 (asked: 0); '
                    'muon before adamw: 2.000 +- 0.000 (asked: 0)')
    assert len(ran) == 9 and not any('n_embd' in options for _, options in ran)


@pytest.mark.parametrize('args, named', [
    (['partz'], "not 'partz'"), (['--quick'], 'name a claim'), (['parts', '--seeds=-1'], '--seeds'),
    (['parts', '--steps=3'], '--steps'), (['parts', '--json=.'], 'is a folder')])
def test_wrong_command_lines(args, named):
    with pytest.raises(UserError, match='^[^\n]*$') as caught:
        inside('claims.py', *args)
    assert named in str(caught.value) and caught.value.exit_code == 2


def test_a_script_that_fails_is_one_line(capsys):
    said = 'python claims.py --seed=1 failed: unknown option --seed, '
    with pytest.raises(UserError, match=f'^{said}[^\n]*$') as caught:
        cli.run_script('claims.py', {'seed': 1})
    assert caught.value.exit_code == 1 and capsys.readouterr().out == 'python claims.py --seed=1\n'
