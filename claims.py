"""
Claims: what the paper says and README's table names, each tried by one command that ends with a verdict.

    python claims.py                        all of them, and what came out in full
    python claims.py parts --quick          tiny models, few steps: whether it works, in less than two minutes
    python claims.py parts                  in full, as the page in results/ has it: hours, mostly
    python claims.py parts --seeds=3 --json=parts.json

Each command is printed before it runs, with all its options: it can be run by hand. Models are kept in OUT_DIR, where
what was interrupted goes on; what is finished is not trained again: give another --out_dir once the code has changed.

The rule: two numbers are compared by their difference in the claimed direction, one for each seed. If its mean is above
0 by more than two standard errors, the comparison holds; if below by as much, it does not; else, and with one seed
always, it cannot be told (metrics.py). A claim holds if all of its comparisons do, and does not if one does not.

Does NOT include: a search for learning rates (those that the pages found best are given); of sleep the day of one text;
figures; learners and models of the pages that nothing is compared with.
"""
import json
import os
import re
import sys
from dataclasses import asdict, dataclass

from cli import (UsageError, UserError, atomic_write, build, check, git_commit, one_line_errors, read_args, read_file,
                 run_script)
from log import read_log
from metrics import claim, print_claims, summary, told

# what train.py is given: now; as the default was until commit 6baa90a, and hope then; if it is to be quick
NOW = dict(max_steps=1000, batch_size=4, block_size=512, eval_every=500, sample_tokens=0, compile='true')
THEN = NOW | dict(eval_every=1000, tokenizer='bytes', n_layer=4, n_head=4, share_qk='false', optimizer='adamw',
                  learning_rate=4e-3)
HOPE = dict(mixer='hope', n_hidden=319, adaptive='kvg', memory_read='after')
TINY = dict(max_steps=20, eval_every=20, eval_batches=2, batch_size=2, block_size=128, warmup_steps=5, compile='false',
            tokenizer='bytes', n_layer=2, n_embd=32, n_hidden=64, n_head=2)

# needles: stages of training, whose gradients reach further and further; all but the first know the model already;
# and who looks for them: options, how many stages, which gates are made to close, how far, in how many examples
STAGES = (dict(max_steps=3000, cooldown=0.001, eval_every=500, eval_batches=10),
          dict(block_size=2048, batch_size=1, carry=4, max_steps=1500, cooldown=1, eval_every=1500, eval_batches=10),
          dict(block_size=8192, batch_size=1, carry=4, max_steps=250, warmup_steps=20, cooldown=1, eval_every=250,
               eval_batches=2))
TINY_STAGE = dict(max_steps=5, eval_every=5, eval_batches=1, block_size=512, batch_size=1, warmup_steps=2)
OF_MODEL = 'mixer', 'n_hidden', 'adaptive', 'memory_read', 'n_layer', 'n_embd', 'n_head', 'share_qk', 'tokenizer'
FINDERS = {'hope': (HOPE, 3, 0.2, ('near', 'far'), 33),
           'titans': (dict(mixer='titans', n_hidden=340), 3, 0.2, ('far',), 11),
           'gated_deltanet': (dict(mixer='gated_deltanet', n_hidden=352), 3, 0.1, ('far',), 11),
           'attention': (dict(mixer='attention', n_hidden=400), 2, 0.0, ('near',), 33)}

# states: formal languages, and how long race.py trains on their words
CIRCLE = dict(max_steps=100, batch_size=4, length=16, stop_at=2)
WORDS = {'parity': dict(task='parity', max_steps=200, stop_at=2), 'aa': CIRCLE | dict(task='aa'),
         'abab': CIRCLE | dict(task='abab')}

# writing: puzzles for memories that write their keys or gates, and of the same size those that do not
OPEN = dict(mixers='hope', batch_size=64, max_steps=400, eval_every=100, generate_shift=3, gate_gain=8)
NAMES = OPEN | dict(task='names', length=48, memory_chunk=8)
TRUST = OPEN | dict(task='trust', length=64, memory_chunk=16, max_steps=800)
WRITERS = {'names': NAMES | dict(adaptive='kvg'), 'names-fixed': NAMES | dict(adaptive='', n_hidden=235),
           'trust': TRUST | dict(adaptive='g'), 'trust-fixed': TRUST | dict(adaptive='')}


# -----------------------------------------------------------------------------
# what runs, and the numbers that it leaves: measure(folder, seeds, quick) -> {what: [a number for each seed]}


def train(out, options, what='val_bpb'):
    """Train into the folder `out`, or go on there -> what the log says at the last step."""
    begun = os.path.exists(os.path.join(out, 'ckpt.pt'))
    run_script('train.py', ({'resume': 'true'} if begun else options) | {'out_dir': out})
    found = [line[what] for line in read_log(os.path.join(out, 'log.jsonl'), options['max_steps'])
             if line.get('step') == options['max_steps'] and what in line]
    if not found:
        raise UserError(f"training into {out} did not end at step {options['max_steps']}; the same command goes on, "
                        'another --out_dir begins anew')
    return found[-1]


def written(script, options, path):
    """What a script writes to --json=path."""
    run_script(script, options | {'json': path})
    return json.loads(read_file(path))


def trained(common, models, minutes=0):
    """Bits per byte, lower is better, of models {name: options of train.py}; minutes: of training, measured before."""
    def measure(folder, seeds, quick):
        found = {}
        for name, own in models.items():
            options = common | own | (TINY if quick else {})
            if minutes:
                few = options | dict(max_steps=20 if quick else 150, eval_batches=1)
                speed = train(f'{folder}/{name}-speed', few, 'tokens_per_second')
                seconds = 2 if quick else 60 * minutes
                steps = max(1, round(seconds * speed / options['batch_size'] / options['block_size']))
                options |= dict(max_steps=steps, eval_every=steps)
            found[name] = [train(f'{folder}/{name}-{seed}', options | dict(seed=seed)) for seed in seeds]
        return found
    return measure


def staged(out, options, stages):
    """Train in stages, each from the checkpoint of the one before -> the folder of the last."""
    for i, stage in enumerate(stages):
        train(f'{out}-{i}', options | stage, 'val_loss')
        options = {name: x for name, x in options.items() if name not in OF_MODEL}
        options['init_from'] = f'{out}-{i}/ckpt.pt'
    return f'{out}-{len(stages) - 1}'


def needles(folder, seeds, quick):
    """Of three kinds of single needles the share that is found, a mean, near and far; and how the state grows."""
    common = THEN | dict(data='niah', tokenizer='bpe:1024', start_lr=0.1, schedule='trapezoid', compile='auto')
    found, lengths = {}, dict(near=512, far=1024) if quick else dict(near=8192, far=32768)
    for name, (own, n_stages, floor, places, n) in FINDERS.items():
        for seed in seeds:
            stages = [stage | (TINY_STAGE if quick else {}) for stage in STAGES[:2 if quick else n_stages]]
            options = common | own | (TINY if quick else {}) | dict(seed=seed)
            out = staged(f'{folder}/{name}-{seed}', options, stages)
            asked = dict(out_dir=out, tasks='s1,s2,s3', lengths=','.join(str(lengths[place]) for place in places),
                         n=2 if quick else n, depths=2 if quick else 11, gate_floor=floor)
            cells = written('eval_niah.py', asked, f'{out}/found.json')['cells']
            for place in places:
                shares = [cell['score'] for cell in cells if cell['length'] == lengths[place]]
                found.setdefault(f'{name}, {place}', []).append(sum(shares) / len(shares))
            if len(places) > 1:
                size = cells[0]['state_bytes'] / cells[-1]['state_bytes']
                found.setdefault(f'{name}, state near over far', []).append(size)
    return found


def raced(races):
    """Shares right at one, two and eight times the training length, of whole words if there are any."""
    def measure(folder, seeds, quick):
        found = {}
        for name, options in races.items():
            options = dict(n_layer=1, seed=seeds[0], seeds=len(seeds)) | options
            options |= dict(max_steps=4, eval_every=4, batch_size=4, n_embd=16) if quick else {}
            for run in written('race.py', options, f'{folder}/{name}.json')['runs']:
                for times in ('1', '2', '8'):
                    right = run['right'][times]
                    what = f"{run['mixer']}, {name}, {times}x"
                    found.setdefault(what, []).append(right.get('whole words', right.get('values')))
        return found
    return measure


def in_turn(whats, readings, **tiny):
    """
    What metrics.summary says of learners that read in turn; readings: {name: options of eval_continual.py}; tiny: more
    of them with --quick.
    """
    def measure(folder, seeds, quick):
        found, bases = {}, os.path.join(os.path.dirname(folder), 'continual')     # base models, of several claims
        for reading, options in readings.items():
            options = options | dict(seeds=len(seeds), out_dir=bases) | (dict(quick='true') | tiny if quick else {})
            for name, its in written('eval_continual.py', options, f'{folder}/{reading}.json')['learners'].items():
                found |= {f'{name}, {reading}, {what}': [summary([run])[what][0] for run in its['seeds']]
                          for what in whats}
        return found
    return measure


# -----------------------------------------------------------------------------
# the claims, in the order of README's table


def before(better, *others):
    """Comparisons: (what is said, the larger number, the smaller), each by its name, or the number itself."""
    return [(f'{better} before {other}', better, other) for other in others]


def above(asked, *names):
    return [(f'{name} above {asked:g}', name, asked) for name in names]


def below(asked, *names):
    return [(f'{name} below {asked:g}', asked, name) for name in names]


# row: what stands in the claim's row of README's table alone; seeds: how many its page has, from the first one on;
# lower: whether lower numbers are better
CLAIMS = {
    'language': dict(
        says='Hope reads text better than Transformers and recurrent models, of equal size after as many tokens',
        row='of its size', first=1337, seeds=3, lower=True,
        measure=trained(NOW | dict(learning_rate=8e-3), {
            'hope_light': dict(mixer='hope_light', n_hidden=352), 'hope': dict(mixer='hope', n_hidden=352),
            'gated_deltanet': dict(mixer='gated_deltanet', n_hidden=374),
            'titans': dict(mixer='titans', n_hidden=352), 'mamba2': dict(mixer='mamba2', n_hidden=374),
            'attention': dict(mixer='attention', n_layer=4, n_head=4, n_hidden=120)}),
        compare=before('hope_light', 'gated_deltanet', 'titans', 'mamba2', 'attention')),
    'minutes': dict(
        says='... and after as many minutes', row='in the same five minutes', seeds=3, lower=True,
        measure=trained(NOW | dict(learning_rate=8e-3), {
            name: dict(mixer=name) for name in ('hope_light', 'hope', 'hope_light,attention', 'gated_deltanet')}
            | {'attention': dict(mixer='attention', n_layer=4, n_head=4)}, 5),
        compare=before('hope_light', 'gated_deltanet', 'attention')),
    'self_modification': dict(
        says='a memory that writes its own keys, values and gates is better', row='writes its own keys',
        seeds=3, lower=True,
        measure=trained(THEN | HOPE | dict(max_steps=500, eval_every=500), {
            'hope': {}, 'fixed': dict(n_hidden=341, adaptive='')}),
        compare=before('hope', 'fixed')),
    'writing': dict(
        says='... where the text itself says what is to be written, in one block', row='says what to write', first=0,
        seeds=3, measure=raced(WRITERS),
        compare=[pair for task in ('names', 'trust')
                 for pair in before(f'hope, {task}, 1x', f'hope, {task}-fixed, 1x')]),
    'parts': dict(
        says='erasing, forgetting and a hidden layer that is read within the chunk make it better',
        row='erasing, forgetting', lower=True,
        measure=trained(THEN | HOPE, {
            'hope': {}, 'not-erasing': dict(dgd='false'), 'not-forgetting': dict(n_hidden=320, forget='false'),
            'not-within': dict(memory_read='start')}),
        compare=before('hope', 'not-erasing', 'not-forgetting', 'not-within')),
    'needles': dict(
        says='it recalls over long contexts with constant memory', row='over long contexts', first=1337,
        measure=needles, compare=before('hope, far', 'titans, far', 'gated_deltanet, far') + before(
            'hope, near', 'attention, near') + above(0.999, 'hope, state near over far')),
    'domains': dict(
        says='levels keep what was learned of texts in turn, and more of them more', row='of three new texts', seeds=3,
        measure=in_turn(('kept_first', 'lost'), {'texts': dict(learners='finetune,ewc,hope-1,hope-2,hope-3')}),
        compare=before('hope-3, texts, kept_first', 'hope-1, texts, kept_first', 'finetune, texts, kept_first')
        + below(0.02, 'hope-3, texts, lost')),
    'languages': dict(
        says='... of languages in turn', row='four invented languages', seeds=3,
        measure=in_turn(('kept',), {
            'two': dict(protocol='languages', learners='finetune,replay-5,clocks,hope-3'),
            'four': dict(protocol='languages', n_languages=4, learners='icl,hope-1,hope-2,hope-3')}),
        compare=before('hope-3, two, kept', 'finetune, two, kept')
        + before('hope-3, four, kept', 'hope-1, four, kept', 'icl, four, kept')),
    'facts': dict(
        says='... of facts, after other text', row='facts told once', seeds=3,
        measure=in_turn(('final',), {'facts': dict(
            protocol='facts', facts=20, learners='icl,finetune,hope-3,sleep-1')}),
        compare=before('hope-3, facts, final', 'finetune, facts, final')
        + before('sleep-1, facts, final', 'finetune, facts, final', 'hope-3, facts, final')),
    'intents': dict(
        says='... of classes of requests', row='classes of requests',
        full='of 150 fine-tuning keeps 6 %, hope 1, least squares 63',
        measure=in_turn(('final',), {'classes': dict(
            protocol='intents', learners='icl,finetune,hope-1,least-squares')}, n_tasks=1, n_requests=1),
        compare=before('hope-1, classes, final', 'finetune, classes, final')),
    'sleep': dict(
        says='sleep makes room without forgetting', row='sleep makes room', seeds=3,
        measure=in_turn(('kept_first', 'lost'), {'texts': dict(learners='hope-1,sleep-1')}, n_bytes=14_000),
        compare=before('sleep-1, texts, kept_first', 'hope-1, texts, kept_first')
        + below(0.02, 'sleep-1, texts, lost')),
    'clocks': dict(
        says='clocks in training help', row='clocks in training', lower=True,
        measure=trained(THEN | HOPE | dict(max_steps=500, eval_every=500, compile='auto'), {
            name: dict(cms_periods=name) for name in ('1', '1,1,1,1', '1,2,4,8', '1,4,16,64')}),
        compare=before('1,2,4,8', '1') + before('1,4,16,64', '1')),
    'states': dict(
        says='it tracks states as an LSTM does, beyond the length of training', row='tracks states', first=0, seeds=3,
        measure=raced({task: its | dict(mixers='lstm,hope') for task, its in WORDS.items()}
                      | {f'{task}-turns': its | dict(mixers='hope', negative_eigenvalues='true', conv_width=1,
                                                     max_steps=400) for task, its in WORDS.items()}),
        compare=above(0.9, *(f'hope, {task}-turns, {times}x' for task in WORDS for times in (2, 8)))),
    'optimizers': dict(
        says='the optimizer is a memory: M3 before Muon before AdamW', row='is a memory: M3', seeds=3, lower=True,
        measure=trained(THEN | HOPE | dict(n_hidden=352, batch_size=2, max_steps=300, eval_every=300), {
            'm3': dict(optimizer='m3', matrix_lr=0.006), 'muon': dict(optimizer='muon', matrix_lr=0.006), 'adamw': {}}),
        compare=before('m3', 'muon') + before('muon', 'adamw'))}


# -----------------------------------------------------------------------------
# what came out


def in_full(row, full=''):
    """What README's table says came out, in the row with these words (full: elsewhere in it), and of which page."""
    readme = read_file(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'README.md')).decode()
    found = re.search(rf'^\| .*{re.escape(row)}.* \| \[(.+?)\]\((results/\w+\.md)\)(.*) \|$', readme, flags=re.M)
    if not found:
        raise UserError(f"no row of README.md's table has the words '{row}'")
    return full or found[1] + found[3], found[2]


def judge(compare, found, lower=False):
    """-> what each comparison came to (metrics.claim), and the verdict on all of them. lower: lower is better"""
    sign, n, lines = -1 if lower else 1, len(next(iter(found.values()))), []
    for text, *pair in compare:
        large, small = (found[x] if isinstance(x, str) else [x] * n for x in pair)
        lines.append(claim(text, [sign * (x - y) for x, y in zip(large, small)]))
    holds = [line['holds'] for line in lines]
    return lines, 'holds' if all(holds) else 'does not hold' if False in holds else 'cannot be told'


@dataclass
class Try:
    """The try"""
    name: str = ''                      # which claim (the bare word; '' = list them)
    quick: bool = False                 # tiny models, few steps: whether it works
    seeds: int = 0                      # of each model (0 = as many as the page in results/ has, or one if quick)
    out_dir: str = 'out-claims'         # where models and results are kept
    json: str = ''                      # a file for the numbers

    def __post_init__(self):
        check(self.name in ('', *CLAIMS), f"a claim is one of {', '.join(CLAIMS)}, not '{self.name}'")
        check(self.seeds >= 0, f'--seeds must be at least 0, not {self.seeds}')
        check(not os.path.isdir(self.json), f'--json={self.json} is a folder; a file is needed')
        self.seeds = self.seeds or (CLAIMS[self.name].get('seeds', 1) if self.name and not self.quick else 1)


def main():
    given = read_args([Try], sys.argv[1:], positional='name')
    args, = build([Try], given)
    if not args.name:
        if given:
            raise UsageError('name a claim, or give nothing at all to see all of them')
        for name, it in CLAIMS.items():
            came_out, page = in_full(it['row'], it.get('full'))
            print(f"{name:<20}{it['says']}\n{'':<20}in full: {came_out} ({page})")
        return
    it = CLAIMS[args.name]
    came_out, page = in_full(it['row'], it.get('full'))
    print(f"{it['says']}\nin full: {came_out} ({page})\n")
    first = it.get('first', 1)
    seeds = list(range(first, first + args.seeds))
    found = it['measure'](os.path.join(args.out_dir, args.name + '-quick' * args.quick), seeds, args.quick)
    lines, verdict = judge(it['compare'], found, it.get('lower'))
    print(f"\nfor each seed ({', '.join(map(str, seeds))})" + ', bits per byte' * it.get('lower', False))
    for what, numbers in found.items():
        print(f'{what:<44}' + '  '.join(f'{x:.4f}' for x in numbers))
    print_claims(lines)
    if args.json:
        with atomic_write(args.json) as file:
            file.write(json.dumps({'claim': args.name, 'commit': git_commit(), 'args': asdict(args), 'numbers': found,
                                   'comparisons': lines, 'verdict': verdict}, indent=1).encode())
    if args.quick:
        print('\nquick: the models are tiny and have learned next to nothing; the verdict says that this works')
    print(f'verdict: {verdict}: ' + '; '.join(map(told, lines)))


if __name__ == '__main__':
    one_line_errors()
    main()
