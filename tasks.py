"""
Tasks: whatever can be trained on, behind one small interface. train.py and what evaluates a run know it, and no task.

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
             recall, recall:PAIRS   associative recall of 8, or of so many pairs of letters (puzzles.py)
             shift, parity, ..      all other puzzles (puzzles.py, formal.py)
             languages              lines of invented languages and what they mean (languages.py)
             facts                  questions on a passage of invented facts, after other text (facts.py)
             intents                requests of invented classes and the classes' names (intents.py)
             whatever else          a corpus (corpora.py)

Does NOT include: mixtures of tasks, lessons that wait for what was learned (race.py has some).
"""
import hashlib
import itertools

import torch

import facts
from cli import UsageError, UserError
from corpora import load_documents
from data import Text, prepare
from formal import ALL_PUZZLES
from intents import Requests, content_words
from languages import Languages, specimen_text
from niah import FORMS, Needles
from puzzles import Recall
from tokenizer import encode, get_tokenizer

KEYS, VALUES, GAP = b'abcdefghijklmnopqrstuvwxyz', b'ABCDEFGHIJKLMNOPQRSTUVWXYZ', b'.'       # of --data=recall


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
    tokenizer = 'bytes' if kind in ('recall', 'niah', *ALL_PUZZLES) and tokenizer == 'auto' else tokenizer
    if data == 'languages':
        return load_languages(tokenizer, quiet, enc)
    if kind == 'recall' or data in ALL_PUZZLES:
        return load_puzzle(data, tokenizer, quiet)
    form = choice or 'short'
    if kind == 'niah' and form not in FORMS:
        raise UserError(f"--data=niah takes one of {', '.join(FORMS)} behind its colon, not '{form}'")
    corpus = 'english' if kind == 'niah' or data in ('facts', 'intents') else data
    if data == 'facts' and tokenizer == 'auto' and enc is None:     # words of facts are a token each
        enc = get_tokenizer('bpe:1536', texts=[text for _, text in load_documents(corpus)[0]] + facts.specimen_text())
    train, val, enc, info = prepare(corpus, tokenizer, directory, suffix, quiet, enc, left_out)
    if kind == 'niah':
        return Needles(enc, train, form), Needles(enc, val, form), enc, info
    if data == 'facts':
        return facts.Facts(enc, train), facts.Facts(enc, val), enc, info
    if data == 'intents':
        task = Requests(enc, content_words())
        return task, task, enc, info
    return Text(train), Text(val), enc, info


def check_enough(task, val_task, block_size, steps, data):
    """UserError unless --data=data is enough for rows that are read in so many steps of block_size tokens."""
    if task.shortest > block_size:
        raise UsageError(f'--block_size={block_size} is too short for --data={data}: a row takes at least '
                         f'{task.shortest} tokens')
    task.batch(1, steps * block_size, torch.Generator())
    val_task.held_out(1, block_size, torch.Generator())


def load_puzzle(data, tokenizer, quiet):
    """Its symbols are bytes, so that a model that was trained on it can be asked: sample.py '0110'."""
    n_pairs = data.partition(':')[2] or '8'                     # of recall
    if data not in ALL_PUZZLES and not (n_pairs.isdecimal() and 1 <= int(n_pairs) <= len(KEYS)):
        raise UserError(f"--data=recall takes 1 to {len(KEYS)} pairs behind its colon, not '{n_pairs}'")
    if tokenizer != 'bytes':
        raise UserError(f'--data={data} is made of letters: use --tokenizer=bytes')
    enc = get_tokenizer(tokenizer)
    def tokens(letters): return torch.from_numpy(encode(enc, letters).astype(int))
    if data in ALL_PUZZLES:
        symbols = ALL_PUZZLES[data]().symbols.encode('latin-1')
        task, about = ALL_PUZZLES[data](tokens(symbols)), f'{len(symbols)} symbols'
    else:
        symbols = KEYS + VALUES + GAP
        task = Recall(int(n_pairs), tokens(KEYS), tokens(VALUES), tokens(GAP).item())
        about = f'{n_pairs} pairs of {len(KEYS)} keys and {len(VALUES)} values'
    if not quiet:
        print(f'data {data} | {about} | vocabulary {enc.n_vocab}')
    return task, task, enc, dict(name=data, sha256=hashlib.sha256(symbols).hexdigest())


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
