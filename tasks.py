"""
Tasks: whatever can be trained on, behind one small protocol. train.py and what evaluates a run know it, and no task.

    task.batch(n, T, generator, progress=1.0)   rows to train on -> idx, targets (n, T), -1 where nothing is asked;
                                                weights (n, T) of the tokens in the loss, of mean 1, or None: all alike.
                                                progress: the share of training that is done, should there be lessons
    task.held_out(n, T, generator)              rows whose loss validation measures -> idx, targets. The generator is
                                                seeded as training's is: a task whose rows are no text draws others
    task.report(reader, T, batch_size)          {what: share of answers right}, of rows of T tokens
    task.shortest                               the fewest tokens that a row needs
    task.is_text                                whether a training loss is of text, so that bits per byte mean something

The least that is one, in which every token is to be said again:

    class Echo:
        shortest, is_text = 1, False
        def batch(self, n, T, generator, progress=1.0):
            idx = torch.randint(256, (n, T), generator=generator)
            return idx, idx, None
        def held_out(self, n, T, generator):
            seed = 2 ** 41 + torch.randint(2 ** 40, (), generator=generator).item()
            return self.batch(n, T, torch.Generator().manual_seed(seed))[:2]
        def report(self, reader, T, batch_size): return {}

`load` finds a task by the name that --data gives it. Another one is a class, and a line there:

        if kind == 'echo': return Echo(), Echo(), get_tokenizer('bytes'), dict(name=data, sha256='')

    python tasks.py                             rows of each task

--data       niah, niah:full        needles in text; full: long keys and values (niah.py)
             recall, recall:PAIRS   associative recall of 8, or of so many pairs of letters (Recall below)
             languages              lines of invented languages and what they mean (languages.py)
             facts                  questions on a passage of invented facts, after other text (facts.py)
             whatever else          a corpus (corpora.py)

Does NOT include: mixtures of tasks, lessons that wait for what was learned (mqar.py has its own).
"""
import hashlib
import itertools

import torch

from cli import UsageError, UserError
from data import Text, prepare
from facts import Facts
from languages import Languages, specimen_text
from niah import FORMS, Needles
from tokenizer import encode, get_tokenizer

KEYS, VALUES, GAP = b'abcdefghijklmnopqrstuvwxyz', b'ABCDEFGHIJKLMNOPQRSTUVWXYZ', b'.'       # of --data=recall


class Recall:
    """
    Multi-query associative recall (Arora 2023): pairs k v of distinct keys, then each k v once more, in random order
    and at random gaps. The value after each second k is asked for.

        k1 v1 k2 v2 ... kP vP  _ _ k2 v2 _ _ _ _ k1 v1 _ _

    n_pairs         P
    keys, values    1-D tensors of token ids, at least P keys; values may repeat
    gap             the token id _
    """
    is_text = False

    def __init__(self, n_pairs, keys, values, gap):
        assert 1 <= n_pairs <= len(keys), f'{n_pairs} pairs take as many keys, not {len(keys)}'
        self.n_pairs, self.keys, self.values, self.gap, self.shortest = n_pairs, keys, values, gap, 4 * n_pairs

    def batch(self, n, T, generator, progress=1.0):
        """
        -> idx, targets (n, T) int64, the value at each second key and -1 elsewhere, and weights (n, T): the mean over
        all tokens is that over what is asked, also where a row is read in parts and some of them ask nothing
        """
        P, slots = self.n_pairs, (T - 2 * self.n_pairs) // 2
        assert slots >= P, f'{P} pairs do not fit in {T} tokens'
        def draw(most): return torch.rand(n, most, generator=generator).argsort(-1)[:, :P]     # no two alike
        keys, places = self.keys[draw(len(self.keys))], 2 * P + 2 * draw(slots)                 # (n, P)
        values = self.values[torch.randint(len(self.values), (n, P), generator=generator)]
        idx, targets = torch.full((n, T), self.gap), torch.full((n, T), -1)
        idx[:, 0:2 * P:2], idx[:, 1:2 * P:2] = keys, values
        idx.scatter_(1, places, keys).scatter_(1, places + 1, values)
        targets.scatter_(1, places, values)
        return idx, targets, (targets >= 0) * (T / P)

    def held_out(self, n, T, generator):
        """As batch, from a generator that no training begins with."""
        seed = torch.randint(2 ** 40, (), generator=generator).item()
        return self.batch(n, T, torch.Generator().manual_seed(2 ** 41 + seed))[:2]

    @torch.no_grad()
    def report(self, reader, T, batch_size, n=64):
        """{'P pairs': share of the values that the reader names}, over n rows that training does not see."""
        idx, targets, _ = self.batch(n, T, torch.Generator().manual_seed(2 ** 40))
        device = next(reader.parameters()).device
        said = torch.cat([reader(part.to(device))[0].argmax(-1).cpu() for part in idx.split(batch_size)])       # (n, T)
        asked = targets >= 0
        return {f'{self.n_pairs} pairs': (said[asked] == targets[asked]).float().mean().item()}


# -----------------------------------------------------------------------------
# from a name to a task


def load(data, tokenizer='bytes', directory=None, suffix='', quiet=False, enc=None, left_out=()):
    """
    data        what --data takes, see above; the other arguments are those of data.prepare
    returns the task to train on, the one whose held_out and report evaluate, the tiktoken.Encoding, and info: at least
            name, sha256 (of what rows are drawn from) and, where there is text (is_text), bytes_per_token
    raises  UserError for whatever is wrong with the data, by its name
    """
    kind, _, choice = data.partition(':')
    tokenizer = 'bytes' if kind in ('recall', 'niah') and tokenizer == 'auto' else tokenizer
    if data == 'languages':
        return load_languages(tokenizer, quiet, enc)
    if kind == 'recall':
        return load_recall(data, choice or '8', tokenizer, quiet)
    if data == 'facts':
        train, val, enc, info = prepare('english', tokenizer, directory, suffix, quiet, enc, left_out)
        return Facts(enc, train), Facts(enc, val), enc, info
    if kind == 'niah':
        form = choice or 'short'
        if form not in FORMS:
            raise UserError(f"--data=niah takes one of {', '.join(FORMS)} behind its colon, not '{form}'")
        train, val, enc, info = prepare('english', tokenizer, directory, suffix, quiet, enc, left_out)
        return Needles(enc, train, form), Needles(enc, val, form), enc, info
    train, val, enc, info = prepare(data, tokenizer, directory, suffix, quiet, enc, left_out)
    return Text(train), Text(val), enc, info


def check_enough(task, val_task, block_size, steps, data):
    """UserError unless --data=data is enough for rows that are read in so many steps of block_size tokens."""
    if task.shortest > block_size:
        raise UsageError(f'--block_size={block_size} is too short for --data={data}: a row takes at least '
                         f'{task.shortest} tokens')
    task.batch(1, steps * block_size, torch.Generator())
    val_task.held_out(1, block_size, torch.Generator())


def load_recall(data, n_pairs, tokenizer, quiet):
    if not (n_pairs.isdecimal() and 1 <= int(n_pairs) <= len(KEYS)):
        raise UserError(f"--data=recall takes 1 to {len(KEYS)} pairs behind its colon, not '{n_pairs}'")
    if tokenizer != 'bytes':
        raise UserError(f'--data={data} is made of letters: use --tokenizer=bytes')
    enc = get_tokenizer(tokenizer)
    keys, values, gap = (torch.from_numpy(encode(enc, letters).astype(int)) for letters in (KEYS, VALUES, GAP))
    task = Recall(int(n_pairs), keys, values, gap.item())
    if not quiet:
        print(f'data {data} | {n_pairs} pairs of {len(keys)} keys and {len(values)} values | vocabulary {enc.n_vocab}')
    return task, task, enc, dict(name=data, sha256=hashlib.sha256(KEYS + VALUES + GAP).hexdigest())


def load_languages(tokenizer, quiet, enc):
    texts = specimen_text()
    enc = enc or get_tokenizer('bpe:512' if tokenizer == 'auto' else tokenizer, texts=texts)
    if not quiet:
        print(f'data languages | one for each row | tokens {enc.name} | vocabulary {enc.n_vocab}')
    sha256 = hashlib.sha256(b''.join(texts)).hexdigest()
    return Languages(enc), Languages(enc), enc, dict(name='languages', sha256=sha256)


# -----------------------------------------------------------------------------
# python tasks.py


def main():
    """Two rows of each task; what is asked for (of needles: what weighs more than the rest) stands in brackets."""
    for data, T in (('english', 200), ('niah', 440), ('recall', 64)):
        task, _, enc, _ = load(data, quiet=True)
        print(f'--- --data={data}, rows of {task.shortest} tokens or more')
        idx, _, weights = task.batch(2, T, torch.Generator().manual_seed(0))
        asked = torch.zeros_like(idx) if weights is None else weights > weights.min()
        for row, marks in zip(idx.tolist(), asked.tolist()):
            marks = [False, *marks]                         # a target is the token one further on
            for marked, group in itertools.groupby(zip(marks, row), key=lambda pair: pair[0]):
                text = enc.decode([token for _, token in group], errors='replace')
                print(f'[{text}]' if marked else text, end='')
            print()


if __name__ == '__main__':
    main()
