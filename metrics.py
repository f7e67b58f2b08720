"""
Metrics: what follows from scores of one text after another (eval_continual.py), and when a claim holds.

R[i, j] is the score on j after reading i: gained R[j, j] - b_j; kept what is left of j's gain in the end, as a share of
what is gained if j alone is read; lost of the base text. A claim holds, or does not, beyond two standard errors over
seeds; else it cannot be told.

Does NOT include: corrections for many claims at once.
"""
import math


def main_score(scores):
    """The one number of a score that is larger where it is better."""
    return -scores['bpb'] if 'bpb' in scores else scores['right']


def metrics(R, alone, first, at_once=False):
    """
    R       rows of scores, before any text and after each, larger is better; the base text's first, if first = 1
    alone   the score of each text after it alone was read
    returns {'gained': by each text when it was read, 'kept': its share in the end, 'lost': of the base}
    """
    n, before, last = len(alone), R[0][first:], R[-1][first:]
    lost = R[0][0] - R[-1][0] if first else 0.0
    if at_once:                                         # all texts were read together: there is no before and after
        return {'gained': [last[j] - before[j] for j in range(n)], 'kept': [1.0] * n, 'lost': lost}
    return {'gained': [R[j + 1][first + j] - before[j] for j in range(n)], 'lost': lost,
            'kept': [(last[j] - before[j]) / (alone[j] - before[j]) if alone[j] > before[j] else 0.0
                     for j in range(n)]}


UNITS = {'domains': 'bits per byte', 'languages': '% of meanings right', 'intents': '% of requests right',
         'facts': '% of questions answered', 'days': '% of questions answered, of the base in bits per byte'}
PASSAGE = ('before', 'read', 'other text')      # rows of facts


def mean_and_error(values):
    """The mean of one number per seed, and its standard error (None of one seed)."""
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((x - mean) ** 2 for x in values) / max(1, len(values) - 1) / len(values))
    return mean, spread if len(values) > 1 else None


def summary(runs):
    """
    {'gained', 'kept', 'kept_first', 'lost', 'final': (mean, standard error)} over seeds, means over texts; final: over
    all that is scored in the last text's unit.
    """
    def mean(values): return sum(values) / len(values)
    rows = {'gained': [mean(r['gained']) for r in runs], 'kept': [mean(r['kept']) for r in runs],
            'kept_first': [mean(r['kept'][:-1] or r['kept']) for r in runs], 'lost': [r['lost'] for r in runs],
            'final': [mean([main_score(x) for x in r['R'][-1] if ('bpb' in x) == ('bpb' in r['R'][-1][-1])])
                      for r in runs]}
    return {name: mean_and_error(values) for name, values in rows.items()}


def claim(text, numbers, low=0.0):
    """A claim that a number is above low: it holds beyond two standard errors, does not, or cannot be told."""
    mean, error = mean_and_error(numbers)
    margin = 2 * error if error is not None else math.inf
    holds = True if mean - margin > low else False if mean + margin < low else None
    return {'claim': text, 'holds': holds, 'numbers': {'mean': mean, 'standard_error': error, 'asked': low}}


def told(line):
    """A claim and its number, with two standard errors where there are several seeds, and what was asked of it."""
    mean, error, asked = line['numbers'].values()
    spread = f' +- {2 * error:.3f}' if error is not None else ''
    return f"{line['claim']}: {mean:.3f}{spread} (asked: {asked:g})"


def print_claims(lines):
    """A line for each claim: whether it holds, and its number."""
    print('\nholds beyond two standard errors, does not, or cannot be told (?)')
    for line in lines:
        print(f"{ {True: 'yes', False: 'no ', None: '?  '}[line['holds']]} {told(line)}")


def verdicts(protocol, found, n_facts=()):
    """What the paper claims, and what was asked of the levels here, where the learners for it were run."""
    def pairs(a, b, value): return [value(x) - value(y) for x, y in zip(found[a], found[b])]
    def first_ones(r): return summary([r])['kept_first'][0]
    def final(r): return summary([r])['final'][0]
    def gained(r): return sum(r['gained']) / len(r['gained'])
    out, levels = [], [name for name in ('icl', 'hope-1', 'hope-2', 'hope-3') if name in found]
    for a, b in zip(levels, levels[1:]):
        out.append(claim(f'{b} ends better than {a}, mean over all that is scored', pairs(b, a, final)))
    for rival in found:
        if 'hope-3' in found and rival not in ('nothing', 'hope-3', *levels[-2:-1]):
            out.append(claim(f'hope-3 ends better than {rival}', pairs('hope-3', rival, final)))
    for rival in found if 'sleep-1' in found and protocol == 'days' else ():
        if rival not in ('nothing', 'sleep-1'):
            out.append(claim(f'sleep-1 knows more of all days in the end than {rival}', pairs('sleep-1', rival, final)))
    if 'hope-3' in found and protocol in ('domains', 'languages'):
        out.append(claim('hope-3 keeps 90 % of its gain on all but the last',
                         [first_ones(r) for r in found['hope-3']], 0.9))
    if 'hope-3' in found and protocol == 'domains':
        out.append(claim('hope-3 loses at most 0.02 bits per byte of the base text',
                         [-r['lost'] for r in found['hope-3']], -0.02))
    if {'hope-3', 'finetune'} <= {*found} and protocol != 'facts':
        out.append(claim('hope-3 gains more than 90 % of what fine-tuning gains',
                         [gained(a) - 0.9 * gained(b) for a, b in zip(found['hope-3'], found['finetune'])]))
    if {'least-squares', 'ridge'} <= {*found}:
        out.append(claim('the memory of least squares answers as ridge regression on all requests does, to 0.5 points',
                         [-abs(x) for x in pairs('least-squares', 'ridge', final)], -0.5))
    for j, n in enumerate(n_facts if protocol == 'facts' else ()):      # in points above what was answered before
        def left(r): return main_score(r['R'][2][j]) - main_score(r['R'][0][j])
        if {'hope-3', 'finetune'} <= {*found}:
            out.append(claim(f'of {n} facts hope-3 keeps twice what fine-tuning keeps, and some',
                             [left(a) - 2 * max(0, left(b)) for a, b in zip(found['hope-3'], found['finetune'])]))
        out += [claim(f'of {n} facts sleep-1 keeps more than {rival}', pairs('sleep-1', rival, left))
                for rival in ('finetune', 'icl', 'hope-1') if {'sleep-1', rival} <= {*found}]
    return out


def print_tables(protocol, found, names):
    unit = UNITS[protocol]
    width = 2 + max(8, *map(len, names))
    for name, runs in found.items():
        print(f'\n{name}: R, {unit}, mean over seeds; a row is what was read last, a column what is scored')
        print(f"{'':<{width}}" + ''.join(f'{column:>{width}}' for column in names))
        for i, first in enumerate(runs[0]['R']):
            cells = [mean_and_error([abs(main_score(r['R'][i][j])) for r in runs])[0] if first[j] else None
                     for j in range(len(names))]
            row = 'before' if not i else names[i - len(runs[0]['R'])] if protocol != 'facts' else PASSAGE[i]
            print(f'{row:<{width}}' + ''.join(f"{'-':>{width}}" if x is None else f'{x:>{width}.3f}' for x in cells))

    def cell(pair, scale=1.0):
        mean, error = pair
        return f'{scale * mean:.3f}' + (f' +- {2 * scale * error:.3f}' if error is not None else '')
    print(f'\n{len(next(iter(found.values())))} seeds, +- two standard errors; gained and lost in {unit}, kept in %')
    print(f"{'':<14}{'gained':>18}{'lost of the base':>18}{'kept, first ones':>20}{'kept, all':>18}{'in the end':>18}"
          f"{'bytes':>12}{'passes':>8}{'seconds':>9}")
    for name, runs in found.items():
        s = summary(runs)
        print(f"{name:<14}{cell(s['gained']):>18}{cell(s['lost']):>18}{cell(s['kept_first'], 100):>20}"
              f"{cell(s['kept'], 100):>18}{cell(s['final']):>18}{runs[0]['state_bytes']:>12,}{runs[0]['passes']:>8}"
              f"{sum(r['seconds'] for r in runs) / len(runs):>9.0f}")
    if any('none' in x for runs in found.values() for x in runs[0]['R'][-1] if x):
        told = {name: mean_and_error([r['R'][-1][-1]['none'] for r in runs]) for name, runs in found.items()}
        print('requests of an intent against requests of none, of which the first is likelier to be of one, in %: '
              + ', '.join(f'{name} {cell(pair, 100)}' for name, pair in told.items()))
