"""
Protocols: what is read one after the other in eval_continual.py, how it is scored, and which base model begins.

    domains     kinds of text that the base model has never seen; bits per byte of other documents of each
    languages   lines of invented languages; % of the meanings right in other lines (languages.py)
    intents     classes of requests, fifteen at a time; % of other requests whose likeliest name, among all names so
                far, is the right one (intents.py)
    facts       passages of invented facts, each by itself; % of the questions answered, before it is read, after, and
                after other text (facts.py)
    days        one such passage after the other, other text behind each: how much of the first one is left, of the
                last, of all; who sleeps does so after each
    levels      needles in 4,096 tokens, and bits per byte of a long text, by a reader of one to four levels that move
                by clocks (eval_continual.py alone)

    base, tasks, others = texts(o, enc, seed)       others: what step sizes are chosen by, which is not scored
    score(text, reader, state, enc, names)          of what a learner has become (learners.py)

Does NOT include: learning (learners.py), what follows from the scores (eval_continual.py).
"""
import dataclasses
import functools
import hashlib
import math
import random
from dataclasses import dataclass, field

import torch

from corpora import SAYS_GENERATED, load_documents
from data import prepare
from facts import Facts, asked, draw
from intents import (Requests, classes, content_words, likeliest, load_intents, name_of, prompt_of,
                     ranked_above)
from languages import Language, chrf, tokens_of
from learners import read
from tokenizer import encode

DOMAINS, CHOOSE_BY = 'pip:torch:.h,pip:torch:.yaml,pip:torch:.cmake', 'pip:numpy:.f90,.f'      # Fortran
BASE = 8                        # times n_bytes of the base text are at hand, 5 % of its corpus, for those who keep some
PASSAGES = 8                    # facts: passages of one fact; of more facts fewer, but one at least

# what train.py is given for the base models, in stages: that there is something to recall is found in short rows
SHORT = dict(block_size=128, batch_size=32, max_steps=800, learning_rate=4e-3)
MIDDLE = dict(block_size=512, batch_size=8, max_steps=500, learning_rate=2e-3)
LONG = dict(block_size=2048, batch_size=2, max_steps=1000, learning_rate=2e-3)
ROWS = dict(start_lr=0.1, eval_every=500)
FACTS = dict(data='facts', schedule='trapezoid', cooldown=0.4) | ROWS
BASES = {'domains': [('', dict(max_steps=2850, learning_rate=4e-3))],
         'languages': [(name, dict(data='languages') | ROWS | stage)
                       for name, stage in (('-short', SHORT), ('-middle', MIDDLE), ('', LONG))],
         'intents': [('-short', dict(data='intents') | ROWS | SHORT),
                     ('', dict(data='intents') | ROWS | LONG | dict(max_steps=800))],
         'facts': [('-short', FACTS | dict(n_head=2, memory_read='after', conv_width=8) | SHORT
                    | dict(max_steps=500, learning_rate=8e-3)),
                   ('-middle', FACTS | MIDDLE | dict(max_steps=800, learning_rate=6e-3)),
                   ('', FACTS | LONG | dict(max_steps=1200, batch_size=1, carry=4, learning_rate=4e-3))],
         'levels': [('', dict(data='niah', tokenizer='bpe:1024', max_steps=3000, learning_rate=4e-3, start_lr=0.1,
                              schedule='trapezoid', cooldown=0.3, eval_every=1000))]}
BASES['days'] = BASES['facts']

# levels: clocks of four levels for each slowest one, in tokens; of fewer levels the slowest of them
CLOCKS = {512: (64, 128, 256, 512), 2048: (64, 256, 1024, 2048), 8192: (64, 512, 2048, 8192)}


@dataclass
class Text:
    """Something to be read, tokens (1-D), and what is scored of it."""
    name: str
    tokens: torch.Tensor
    scored: list = field(default_factory=list)      # [(token ids, which of them count, bytes)]
    unit: str = 'right'                             # bpb | right (tokens) | whole (answers) | intents: see score
    pairs: list = field(default_factory=list)       # intents: [(prompt, name)] as they were read
    names: list = field(default_factory=list)       # ... the names that it brings
    none: list = field(default_factory=list)        # ... prompts of no intent
    passages: list = field(default_factory=list)    # facts: each is read by a learner of its own, and then tokens
    night: bool = False                             # ... and days: whether who sleeps does so behind it


NONE = torch.empty(0, dtype=torch.long)
load_once = functools.cache(load_intents)       # the same for every seed, and without a network one try is enough


def domain(name, enc, seed, n_bytes):
    """n_bytes of a corpus to read, and a fifth as many of its held-out documents. a+b: pieces of 500 bytes in turn."""
    if '+' in name:
        parts = [domain(part, enc, seed, n_bytes) for part in name.split('+')]
        pieces = [part.tokens.split(len(part.tokens) * 500 // n_bytes) for part in parts]
        mixed = torch.cat([piece for turn in zip(*pieces) for piece in turn])
        return Text(name, mixed, [scored for part in parts for scored in part.scored], 'bpb')
    data, _, suffix = name.rpartition(':') if name.count(':') > 1 else (name, '', '')
    documents = [pair for pair in zip(*load_documents(data, suffix)) if not SAYS_GENERATED.search(pair[0][1][:1000])]
    random.Random(seed).shuffle(documents)              # at most 20 kB of each, so that no large one is all there is

    def piece(side, n):
        text = b'\n'.join(text[:20_000] for (_, text), which in documents if which == side)[:n]
        return torch.from_numpy(encode(enc, text).astype(int)), len(text)
    test, n_scored = piece('val', n_bytes // 5)
    tokens, _ = piece('train', n_bytes * (BASE if name == 'python' else 1))
    return Text(name, tokens, [(test, torch.ones(len(test), dtype=bool), n_scored)], 'bpb')


def language(name, enc, seed, n_lines):
    """n_lines of a language to read, and others of it, each after one that was read: some levels begin mid-line."""
    language, newline = Language(f'{name} {seed}'), enc.encode_ordinary('\n')[-1:]
    lines, scored = language.lines(n_lines, 'read'), []
    for before, line in zip(lines, language.lines(max(2, n_lines // 6), 'scored', but=lines)):
        first, (ids, marks) = newline + tokens_of(enc, [before])[0], tokens_of(enc, [line])
        scored.append((torch.tensor(first + ids), torch.tensor([False] * len(first) + marks), 0))
    return Text(name, torch.tensor(tokens_of(enc, lines)[0]), scored)


def intents(o, enc, seed):
    """
    n_tasks of ten parts of the intents in a random order, n_intents of each part at most, n_requests of each as lines
    `request => name`; a tenth as many others are scored, but three of three or more. The last text has requests of no
    intent as well.
    """
    source, found, none = load_once()
    print(f'intents: {source}, {len(found)} of them')
    n, m = o.n_requests, max(min(3, o.n_requests), o.n_requests // 10)

    def pairs_of(names, requests_of):
        return [(prompt_of(enc, request), name_of(enc, name)) for name in names for request in requests_of(name)]

    def part(title, names, read_, scored):
        pairs = pairs_of(names, read_)
        random.Random(f'{title} {seed}').shuffle(pairs)
        lines = torch.tensor([i for prompt, name in pairs for i in (*prompt, *name[:-1])])     # a prompt begins with \n
        return Text(title, lines, pairs_of(names, scored), 'intents', pairs, [name_of(enc, name) for name in names])
    parts = [names[:o.n_intents] for names in classes(found, seed)[:o.n_tasks]]
    tasks = [part(f'{len(names)} {i + 1}', names, lambda name: found[name]['read'][:n],
                  lambda name: found[name]['scored'][:m]) for i, names in enumerate(parts)]
    tasks[-1].none = [prompt_of(enc, request) for request in none[:100]]
    others = [part('steps', names, lambda name: found[name]['read'][n:-m][:n], lambda name: found[name]['read'][-m:])
              for names in parts[:2]]
    return Text('base', rows_of(Requests(enc, content_words()), seed)), tasks, others


def rows_of(task, seed, n=8):
    """Rows of 2,048 tokens that a base model might have been trained on, for those who keep some."""
    return torch.tensor([i for row in range(n) for i in task.row(2048, f'base {seed} {row}')[0]])


def passages(o, enc, seed):
    """
    Passages of each number of facts, other text to be read after them, and passages that steps are chosen by. Of days
    a passage and other text for each, and of the base some text that nobody reads.
    """
    _, text, _, _ = prepare('english', quiet=True, enc=enc)
    if o.protocol == 'days':
        text, base = text[:-2000], text[-2000:]
    task = Facts(enc, text)
    after = torch.tensor(task.other(o.n_other, random.Random(f'other {seed}')))

    def passage(n, title):
        rng = random.Random(f'passage {title} {seed}')
        facts, scored = draw(n, rng), []
        for question, answer in ([task.tokens(part) for part in asked(fact)] for fact in facts):
            marks = [False] * len(question) + [True] * len(answer)
            scored.append((torch.tensor(question + answer), torch.tensor(marks), 0))
        tokens = torch.tensor([enc.eot_token] + task.passage(facts, rng))
        return Text(title, tokens.repeat(o.n_readings), scored, 'whole', night=True)
    def column(n, count, title):
        return Text(title, after, unit='whole', passages=[passage(n, f'{title} {i}') for i in range(count)])
    old, by = Text('base', rows_of(task, seed)), [column(20, 3, 'steps')]
    if o.protocol == 'facts':
        return old, [column(n, max(1, PASSAGES // (1 + n // 10)), f'{n} fact' + 's' * (n > 1)) for n in o.n_facts], by

    def day(title):
        text, behind = passage(o.n_facts[0], title), task.other(o.n_other, random.Random(f'other {title} {seed}'))
        return dataclasses.replace(text, tokens=torch.cat([text.tokens, torch.tensor(behind)]))
    base = torch.from_numpy(base.astype(int))
    old.unit, old.scored = 'bpb', [(base, base >= 0, len(enc.decode_bytes(base[1:].tolist())))]
    return old, [day(f'day {i + 1}') for i in range(o.n_days)], by


def texts(o, enc, seed):
    """
    The base text, those that are read one after the other (facts: each by itself), and one or two that step sizes are
    chosen by. o: the options of eval_continual.py.
    """
    if o.protocol == 'domains':
        base, *tasks = [domain(name, enc, seed, o.n_bytes) for name in ('python', *o.domains.split(','))]
        return base, tasks, [domain(CHOOSE_BY, enc, seed, o.n_bytes)]
    if o.protocol == 'languages':
        names = [chr(65 + i) for i in range(o.n_languages)]
        return Text('none', NONE), [language(name, enc, seed, o.n_lines) for name in names], \
            [language(name, enc, seed, o.n_lines) for name in ('steps', 'more steps')]
    return intents(o, enc, seed) if o.protocol == 'intents' else passages(o, enc, seed)


def digest(texts):
    """What a result of these texts is kept by."""
    about = [(text.name, text.tokens.tolist(), text.names, text.none, [[x if isinstance(x, (int, tuple)) else x.tolist()
              for x in item] for item in text.scored], digest(text.passages)) for text in texts]
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


# -----------------------------------------------------------------------------
# scores


def score(text, reader, state, enc, names=()):
    """
    {'bpb': ..}; {'right': % of the meanings right, each with the right ones before it, 'chrf': of what is said};
    {'right': % of the answers right, from first to last token}; or {'right': % of the requests whose likeliest name is
    theirs, 'none': how often such a name is likelier than the likeliest of a request of no intent}. Every piece is read
    from the state.
    """
    if text.unit == 'intents':
        return score_intents(text, reader, state, names)
    nats, right, said_all = 0.0, [], []
    for tokens, counts, n_bytes in text.scored:
        losses, said, _ = read(reader, tokens, state)
        counts, meant = counts[1:], tokens[1:]
        if text.unit == 'bpb':
            nats += losses.sum().item() / math.log(2) / n_bytes / len(text.scored)
        elif text.unit == 'whole':
            right.append(bool((said == meant)[counts].all()))
        else:
            right += (said == meant)[counts].tolist()
            said_all.append(chrf(*(enc.decode(x[counts].tolist(), errors='replace') for x in (said, meant))))
    if text.unit == 'bpb':
        return {'bpb': nats}
    found = {'right': 100 * sum(right) / max(1, len(right))}
    return found if text.unit == 'whole' else found | {'chrf': 100 * sum(said_all) / max(1, len(said_all))}


def score_intents(text, reader, state, names):
    """Of a model by the names' probabilities, of what stands on its features by its own choice among them."""
    def best(prompt):
        return reader.choose(prompt, names) if hasattr(reader, 'choose') else likeliest(reader, prompt, names, state)
    said = [best(prompt) for prompt, _ in text.scored] if names else []
    found = {'right': 100 * sum(name == right for (name, _), (_, right) in zip(said, text.scored)) / len(text.scored)}
    if not text.none or not names:
        return found
    none = [best(prompt)[1] for prompt in text.none]
    return found | {'none': ranked_above([sure for _, sure in said], none)}
