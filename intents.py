"""
Intents: what a short request is about, learned a few classes at a time (class-incremental learning).

    when is my electricity bill due => bill due

A class is known by its name alone, written behind the arrow. CLINC150 (Larson 2019) has 150 of them with 100 requests
each; it is downloaded once. Without a network there are 150 invented ones, an action and a thing each, and what reads
them says so.

    python train.py --data=intents --start_lr=0.1 --out_dir=out-intents     learn to name a request by the lines before
    python intents.py                       requests of a few classes, and how the likeliest name is found

A row of training has classes of its own, each a name and a few words that its requests have, all drawn anew. So the
model learns to look for requests alike, and nothing of CLINC150.

Which of many names a model finds likeliest need not be asked for one by one: a name's probability only falls with every
token, so a search that always goes on with the likeliest beginning finds the best name, exactly, in a few steps.

Does NOT include: requests of several intents, slots, a threshold for requests that are of no class.
"""
import collections
import heapq
import json
import os
import random
import re

import torch

from cli import UserError, read_file
from corpora import DOWNLOADS, download, english_documents
from data import Marked

CLINC = ('https://raw.githubusercontent.com/clinc/oos-eval/828f8093932c8fe6ca7936c3d2e52903b1c523de/data/'
         'data_full.json',
         '36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0')
ARROW, END = ' =>', '\n'

# invented: an intent is an action and a thing
ACTIONS = {'start': 'start/turn on/switch on/get going with', 'stop': 'stop/turn off/switch off/put an end to',
           'find': 'find/look for/where is/show me', 'buy': 'buy/order/get me/pay for',
           'lose': 'lost/cannot find/miss/left', 'fix': 'fix/repair/mend/something is wrong with',
           'sell': 'sell/get rid of/find a buyer for/offer', 'lend': 'lend/give away for a week/let somebody use/share',
           'clean': 'clean/wash/get the dirt off/polish', 'move': 'move/carry/bring upstairs/put elsewhere'}
THINGS = '''lamp/light car/auto phone/mobile radio/music oven/stove ticket/pass garden/lawn bicycle/bike window/pane
book/novel boat/dinghy camera/lens heater/heating printer/paper kettle/tea'''.split()
PHRASES = ('{} my {}', 'please {} the {}', 'can you {} this {} for me', 'i want to {} a {}', '{} the {} now',
           'how do i {} the {}', 'would it be possible to {} that {} today', 'i need to {} the {} before noon',
           '{} the old {}', 'help me to {} my {}')


def invented():
    """{intent: requests}, 150 intents of 80 requests each."""
    found = {}
    for action, ways in ACTIONS.items():
        for thing in THINGS:
            found[f"{action} {thing.partition('/')[0]}"] = [
                phrase.format(way, word) for phrase in PHRASES for way in ways.split('/') for word in thing.split('/')]
    return found


def load_intents():
    """
    -> where they are from ('clinc150' or 'invented'); {intent: {'read': requests, 'scored': others}}; and requests that
    are of no intent.
    """
    try:
        path = download(CLINC[0], os.path.join(DOWNLOADS, 'clinc150.json'), CLINC[1])
    except UserError as error:
        print(f'{error}\nuntil then intents are invented ones')
        found, rng = {}, random.Random(0)
        for intent, requests in invented().items():
            rng.shuffle(requests)
            found[intent] = {'read': requests[:60], 'scored': requests[60:]}
        none = [f'{way} {noun}' for way in ('what is the meaning of', 'who invented the', 'tell me a joke about a')
                for noun in 'comet glacier sonnet treaty verb theorem planet fossil opera senate'.split()]
        return 'invented', found, none
    data, found = json.loads(read_file(path)), {}
    for part, use in (('train', 'read'), ('test', 'scored')):
        for request, intent in data[part]:
            found.setdefault(intent.replace('_', ' '), {'read': [], 'scored': []})[use].append(request)
    return 'clinc150', found, [request for request, _ in data['oos_test']]


def classes(found, seed, n_tasks=10):
    """The names of all intents in a random order, in n_tasks parts: class-incremental tasks."""
    names = sorted(found)
    random.Random(f'order {seed}').shuffle(names)
    return [names[len(names) * i // n_tasks:len(names) * (i + 1) // n_tasks] for i in range(n_tasks)]


def prompt_of(enc, request):
    """Token ids of a request, begun on a line of its own, up to its arrow."""
    return tuple(enc.encode_ordinary(END)[-1:] + enc.encode_ordinary(' ' + request) + enc.encode_ordinary(ARROW))


def name_of(enc, intent):
    """Token ids of an intent's name, and of the end of its line: no name is the beginning of another."""
    return tuple(enc.encode_ordinary(' ' + intent) + enc.encode_ordinary(END)[-1:])


@torch.no_grad()
def likeliest(reader, prompt, names, state=None):
    """
    The likeliest of the names (tuples of token ids, none the beginning of another) behind a prompt, and its log
    probability. reader: called as the model is, from a state.
    """
    def after(tokens, state):
        logits, _, state = reader(torch.tensor([tokens]), None, state)
        return logits[0, -1].log_softmax(-1).tolist(), state
    follow, whole = {}, set(names)
    for name in names:
        for i, token in enumerate(name):
            follow.setdefault(name[:i], set()).add(token)
    read, queue = {(): after(prompt, state)}, [(0.0, ())]
    while True:
        nats, begun = heapq.heappop(queue)                      # whatever goes on from another is no likelier
        if begun in whole:
            return begun, -nats
        if begun:
            read[begun] = after(begun[-1:], read[begun[:-1]][1])
        for token in sorted(follow[begun]):
            heapq.heappush(queue, (nats - read[begun][0][token], (*begun, token)))


def ranked_above(ours, others):
    """How often one of ours is above one of the others (ties count half): the area under the ROC curve."""
    pairs = [(a > b) + (a == b) / 2 for a in ours for b in others]
    return sum(pairs) / max(1, len(pairs))


# -----------------------------------------------------------------------------
# rows to train on

PLAIN = '''a the my me i you is it to of for on in at with and how what when where can could please do does want need
tell show there this that some any from about will be have'''.split()


def content_words(n=3000):
    """The most frequent words of the corpus `english` that are not among the plain ones, of three letters or more."""
    text = b' '.join(text for _, text in english_documents()).decode('utf-8', 'replace').lower()
    counts = collections.Counter(re.findall(r'\b[a-z]{3,}\b', text))
    return [word for word, _ in counts.most_common(n + len(PLAIN)) if word not in PLAIN][:n]


class Requests(Marked):
    """
    Rows of requests and names, each row with classes of its own, as a task. A class is a name of one or two words and
    three words of which its requests have two, among plain ones: any two of them share one. In short rows it has one
    word and a name of one, so that it is found out what there is to recall. Half of the loss are the names of classes
    that the row has shown.
    enc     the tokenizer
    words   what names and classes are made of
    """
    shortest, marked = 96, 'names'

    def __init__(self, enc, words):
        self.enc, self.words = enc, words

    def row(self, n, seed):
        """n tokens -> token ids, whether each is part of a name that was shown before."""
        rng, ids, marks, shown = random.Random(f'requests {seed}'), [self.enc.eot_token], [False], set()
        k = rng.randint(2, max(2, min(n // 100, len(self.words) // 5)))
        words, most = rng.sample(self.words, 5 * k), 1 if n < 256 else 2        # no two classes share a word
        kinds = [(' '.join(words[5 * i:5 * i + rng.randint(1, most)]), words[5 * i + 2:5 * i + 2 * most + 1])
                 for i in range(k)]
        while len(ids) < n:
            name, of_it = rng.choice(kinds)
            words = rng.sample(of_it, most) + rng.choices(PLAIN, k=rng.randint(0, 3 * most))
            rng.shuffle(words)
            prompt, said = prompt_of(self.enc, ' '.join(words)), name_of(self.enc, name)[:-1]   # the next line ends it
            ids, marks = [*ids, *prompt, *said], marks + [False] * len(prompt) + [name in shown] * len(said)
            shown.add(name)
        return ids[:n], marks[:n]


# -----------------------------------------------------------------------------
# python intents.py


def main():
    found, rng = invented(), random.Random(0)
    for intent in rng.sample(sorted(found), 4):
        for request in rng.sample(found[intent], 2):
            print(f'{request}{ARROW} {intent}')
    from tokenizer import get_tokenizer
    enc, calls = get_tokenizer('bytes'), []
    table = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))

    def reader(idx, targets, state):                            # any model will do: this one knows the last byte alone
        calls.append(idx.shape[1])
        return table[idx], None, None
    names = {name_of(enc, intent): intent for intent in found}
    best, log_p = likeliest(reader, prompt_of(enc, 'mend the kettle'), names)
    print(f'\n{len(names)} names of {sum(map(len, names))} bytes; the likeliest to a model that knows nothing: '
          f'{names[best]}, {log_p:.1f} nats, found with {len(calls)} calls')


if __name__ == '__main__':
    main()
