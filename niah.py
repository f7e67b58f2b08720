"""
Needles in a haystack: RULER's needle tasks (Hsieh 2024) in our own words, of exact length in any tokens.

    ... about the order of the entries. The secret number of otter is 4821. Note that a dictionary that is ...
    What is the secret number of otter? The secret number of otter is                      -> 4821.

    python niah.py                      an example of each task

    task   haystack      needles                              asked for
    s1     one line, over and over      a number              the number (RULER's passkey)
    s2     text          a number                             the number
    s3     text          a code (full form: a uuid)           the code
    mk     text          a number for each of four keys       one of them
    mv     text          four numbers for one key             all four
    mq     text          a number for each of four keys       all four

The short form, for small models, has values of few digits and keys of one word; the full form (--data=niah:full) is
RULER's: seven digits, uuids, keys of two words. An example depends on its arguments and its seed alone; the text of the
haystack is a corpus.

Does NOT include: RULER's other tasks, words as values.
"""
import functools
import random
import re
import uuid
from dataclasses import dataclass

import numpy as np
import torch

from cli import UserError
from data import Text, prepare, weights_for
from tokenizer import encode, vocabulary

NOUNS = '''acorn anvil apple badge barn basil bell birch boat brick bridge broom cabin candle canoe cello chalk cliff
clover coral crane crow daisy desk drum eagle elm fern flute fox gate goat harp hawk heron hill ivy jar kettle kite
ladder lake lamp lily lynx maple mill moth oak otter owl pearl pine plum pond quill raven reed sail spoon stone swan
tulip wolf'''.split()
ADJECTIVES = '''amber bold brave brisk calm clever cold crisp dark deep dry early faint fair fast fine fond free gentle
glad gold grand green happy icy jolly keen kind late lean light lively loud lucky mild misty neat noble old pale patient
plain proud quick quiet rapid red rich rough round sharp shy silent silver slow small soft solid steady sweet swift tall
warm wild'''.split()
NOISE = ' The clock ticks. The rain falls. The road is long. Nobody is home. And on it goes.'
# digits of a number, digits of a code, whether keys are two words
FORMS = {'short': dict(number=4, code=8, adjectives=False),
         'full': dict(number=7, code=32, adjectives=True)}
LESSONS = (0.1, 0.2, 0.3)               # the shares of training at which the lessons with 1, 2 and 4 keys end
ROWS = {'text': 0.2, 'drill': 0.2, 'tasks': 0.6}                # the shares of a training batch after that
ANSWERS_WEIGH = 0.8                     # the share of a batch's loss that its answers have
FIRST_WEIGHS = 4                        # the weight of an answer's tokens that begin a value or a key; of others 1


@dataclass(frozen=True)
class Task:
    haystack: str = 'text'              # text | noise
    kind: str = 'number'                # number | code
    n_keys: int = 1                     # keys that have needles
    n_values: int = 1                   # needles per key
    n_asked: int = 1                    # keys that the question names


TASKS = {'s1': Task(haystack='noise'), 's2': Task(), 's3': Task(kind='code'), 'mk': Task(n_keys=4),
         'mv': Task(n_values=4), 'mq': Task(n_keys=4, n_asked=4)}


@dataclass
class Example:
    needles: list                       # [(depth, token ids)]: depth 0 is where the haystack starts, 1 where it ends
    question: np.ndarray                # token ids; it ends in the first words of the answer
    answer: np.ndarray                  # token ids of a right answer
    weights: np.ndarray                 # of these, in training
    golds: list                         # the values asked for, in the order of the answer
    depths: list                        # the depth of each gold's needle
    prompt: np.ndarray = None           # token ids: end of text, the haystack with its needles, the question

    def n_tokens(self):
        """Tokens of prompt and answer without any haystack."""
        return 1 + sum(len(needle) for _, needle in self.needles) + len(self.question) + len(self.answer)


class Needles:
    """
    Examples of the six tasks, and rows of them to train on (the interface of tasks.py).

    enc     the tiktoken.Encoding that lengths are counted in
    text    1-D array of token ids to cut haystacks from, at any word; one that reaches its end goes on from its start.
            Ends of text in it are left out: a model may take one as the word to forget what was before
    form    'short' or 'full'
    """
    is_text = False                     # a training loss is mostly of answers

    def __init__(self, enc, text, form='short'):
        assert form in FORMS, f'form is one of {list(FORMS)}, not {form}'
        self.enc, self.form, self.text = enc, FORMS[form], Text(text)
        text = text[text != enc.eot_token]
        # needles go where a word begins, in the noise where its line does
        self.bytes_of = vocabulary(enc)
        begins = np.array([word[:1] in (b' ', b'\n') for word in self.bytes_of])[text]
        noise = self.tokens(NOISE)
        if not begins.any():
            raise UserError('the text has no spaces, so there is no place in it for a needle')
        self.haystacks = {name: (tokens, first, np.flatnonzero(first)) for name, tokens, first in
                          (('text', text, begins), ('noise', noise, np.arange(len(noise)) == 0))}

    def tokens(self, words):
        return encode(self.enc, words.encode()).astype(np.int64)

    def weighed(self, words, looked_up):
        """The tokens of words, and their weights in training: those that begin a word of looked_up weigh more."""
        tokens = self.tokens(words)
        at = [word.start() for word in re.finditer(r'[\w-]+', words) if word[0] in looked_up]
        ends = np.cumsum([len(self.bytes_of[token]) for token in tokens])
        weights = np.ones(len(tokens), np.float32)
        weights[np.searchsorted(ends, at, side='right')] = FIRST_WEIGHS
        return tokens, weights

    def keys(self, n, rng):
        nouns = rng.sample(NOUNS, n)
        return [f'{rng.choice(ADJECTIVES)}-{noun}' for noun in nouns] if self.form['adjectives'] else nouns

    def values(self, kind, n, rng):
        digits = self.form[kind]
        if kind == 'number':
            return [str(value) for value in rng.sample(range(10 ** (digits - 1), 10 ** digits), n)]
        if digits == 32:
            return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(n)]
        return [f'{rng.getrandbits(4 * digits):0{digits}x}' for _ in range(n)]

    @functools.cached_property
    def shortest(self):
        """Tokens of a row that has room for an example of any task."""
        return max(self.draw(task, random.Random(i)).n_tokens() for task in TASKS for i in range(100))

    @functools.cache
    def answer_room(self, task):
        """Tokens of the longest answer to a task, of a hundred."""
        return max(len(self.draw(task, random.Random(i)).answer) for i in range(100))

    def chance(self, task):
        """The expected score of an answer that names random values of the right form, as many as are asked for."""
        t = TASKS[task]
        possible = 9 * 10 ** (self.form['number'] - 1) if t.kind == 'number' else 16 ** self.form['code']
        return t.n_values * t.n_asked / possible

    def draw(self, task, rng, depth=None):
        """An Example that has no prompt yet."""
        t = TASKS[task]
        keys = self.keys(t.n_keys, rng)
        values = self.values(t.kind, t.n_keys * t.n_values, rng)
        depths = [rng.random() for _ in values]
        depths = depths if depth is None else [depth] + depths[1:]
        depths = sorted(depths) if t.n_values > 1 else depths       # the values of one key are told in the text's order
        owners = [key for key in keys for _ in range(t.n_values)]
        needles = [(depth, self.tokens(f' The secret {t.kind} of {key} is {value}.'))
                   for depth, key, value in zip(depths, owners, values)]
        asked, golds = keys[:t.n_asked], values[:t.n_asked * t.n_values]
        names = ', '.join(asked[:-1]) + ' and ' * (len(asked) > 1) + asked[-1]
        verb, plural = ('What is', '') if len(golds) == 1 else ('What are all' if t.n_values > 1 else 'What are', 's')
        question = f'\n{verb} the secret {t.kind}{plural} of {names}? The secret {t.kind} of {asked[0]} is'
        more = [f', {value}' if t.n_values > 1 else f', of {key} is {value}'
                for key, value in zip(asked * t.n_values, golds)][1:]
        answer = f" {golds[0]}{''.join(more)}."
        weighed = self.weighed(answer, asked + golds)
        return Example(needles, self.tokens(question), *weighed, golds, depths[:len(golds)])

    def hay(self, haystack, n, rng):
        """n tokens of a haystack, from the start of a word on, and the places in them at which a needle may go."""
        text, first, starts = self.haystacks[haystack]
        where = (starts[rng.randrange(len(starts))] + np.arange(n)) % len(text)
        return text[where], np.append(np.flatnonzero(first[where]), n)

    def hide(self, task, example, n_hay, rng):
        """Give an Example its prompt, with n_hay tokens of haystack."""
        hay, places = self.hay(TASKS[task].haystack, n_hay, rng)
        parts, end = [[self.enc.eot_token]], 0
        for depth, needle in sorted(example.needles, key=lambda needle: needle[0]):
            place = places[np.abs(places - depth * n_hay).argmin()]
            parts += [hay[end:place], needle]
            end = place
        example.prompt = np.concatenate(parts + [hay[end:], example.question]).astype(np.int64)
        return example

    def example(self, task, length, seed, depth=None):
        """
        task        a key of TASKS
        length      tokens of the prompt and of room for the answer (answer_room), exactly: as in RULER, so that
                    attention over as many tokens has all of it in sight
        seed        int or str; the same one gives the same example
        depth       in [0, 1], of the needle that is asked for, or of one of them; the others lie anywhere
        raises      UserError if the length is too short for needles, question and answer
        """
        rng = random.Random(seed)
        example = self.draw(task, rng, depth)
        least = example.n_tokens() - len(example.answer) + self.answer_room(task)
        if length < least:
            raise UserError(f'{length} tokens are too few for the task {task}: needles, question and answer alone take '
                            f'{least}')
        n_hay = length - least
        return self.hide(task, example, n_hay, rng)

    def task_row(self, n, rng):
        """Examples of random tasks, as many as fit into n tokens -> [(token ids, 0 or, of an answer, its weights)]."""
        parts, eot = [], np.array([self.enc.eot_token])
        while True:
            for task in rng.sample(list(TASKS), len(TASKS)):
                example = self.draw(task, rng)
                room = n - example.n_tokens()
                if room >= 0:
                    break
            else:
                return parts
            # short haystacks are as frequent as long ones: more answers in a row, and the first ones to be learned
            prompt = self.hide(task, example, int((room + 1) ** rng.random()) - 1, rng).prompt
            parts += [(prompt[1:], 0), (example.answer, example.weights), (eot, 1)]
            n -= len(prompt) + len(example.answer)

    def drill_row(self, n, rng, n_keys=0):
        """
        A few needles, told again and again, n tokens or a few more -> as task_row. A value's first telling cannot be
        known, the later ones are answers: many more of them than in the tasks. Up to 8 keys, and text between them.
        n_keys > 0 is a lesson: that many keys and no text; with one key, numbers only. Without lessons a model is slow
        to find out that there is anything to recall.
        """
        parts, kind = [], 'number' if n_keys == 1 else rng.choice(('number', 'code'))
        gap = 1 if n_keys else 65
        n_keys = n_keys or 2 ** rng.randrange(4)
        values, told = dict(zip(self.keys(n_keys, rng), self.values(kind, n_keys, rng))), set()
        while n > 0:
            key = rng.choice(list(values))
            hay = self.hay('text', int(gap ** rng.random()) - 1, rng)[0]
            cue = self.tokens(f' The secret {kind} of {key} is')
            value, weights = self.weighed(f' {values[key]}.', [values[key]])
            parts += [(hay, 0), (cue, 0), (value, weights if key in told else 0)]
            n -= len(hay) + len(cue) + len(value)
            told.add(key)
        return parts

    def batch(self, n, T, generator, progress=1.0):
        """
        Rows to train on: text, drills, and examples of the tasks at random lengths, by the shares in ROWS; before that,
        by progress (the share of training that is done), the lessons.
        -> idx, targets (n, T) int64, weights (n, T) float32 of mean 1: answers together weigh ANSWERS_WEIGH, in them
        the first token of a value or a key, which has to be looked up, FIRST_WEIGHS times as much as others; all else
        the rest. A row depends on generator and progress alone.
        """
        rows, marks = [], []
        n_keys = next((2 ** i for i, end in enumerate(LESSONS) if progress < end), 0)
        for seed in torch.randint(2 ** 62, (n,), generator=generator).tolist():
            rng = random.Random(seed)
            kind, = ['drill'] if n_keys else rng.choices(list(ROWS), ROWS.values())
            parts = [(np.array([self.enc.eot_token]), 0)]
            if kind == 'tasks':
                parts += self.task_row(T, rng)
            if kind == 'drill':
                parts += self.drill_row(T, rng, n_keys)
            left = T + 1 - sum(len(tokens) for tokens, _ in parts)
            parts.append((self.hay('text', max(0, left), rng)[0], 0))
            rows.append(np.concatenate([tokens for tokens, _ in parts])[:T + 1])
            marks.append(np.concatenate([np.full(len(tokens), weigh, np.float32) for tokens, weigh in parts])[1:T + 1])
        rows, marks = torch.from_numpy(np.stack(rows).astype(np.int64)), torch.from_numpy(np.stack(marks))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), weights_for(marks, ANSWERS_WEIGH)

    def held_out(self, n, T, generator):
        """Windows of the text as it is: what the training costs in language."""
        return self.text.held_out(n, T, generator)

    @torch.no_grad()
    def report(self, reader, T, batch_size, n=20):
        """{task: share of n examples of T tokens, answer included, whose answer the reader predicts token by token}."""
        shares, device = {}, next(reader.parameters()).device
        for task in TASKS:
            rows, lengths = [], []
            for i in range(n):
                rng = random.Random(f'recall {task} {i}')
                example = self.draw(task, rng)
                n_hay = T + 1 - example.n_tokens()
                if n_hay >= 0:
                    prompt = self.hide(task, example, n_hay, rng).prompt
                    rows.append(torch.from_numpy(np.append(prompt, example.answer)))
                    lengths.append(len(example.answer))
            right = []
            for part in torch.stack(rows).to(device).split(batch_size) if rows else ():
                hit = reader(part[:, :-1])[0].argmax(-1) == part[:, 1:]                             # (batch_size, T)
                right += [row[-lengths[len(right) + j]:].all().item() for j, row in enumerate(hit)]
            if right:
                shares[task] = sum(right) / len(right)
        return shares


# -----------------------------------------------------------------------------
# scoring


def found(text, golds):
    """
    Which of the golds a text names -> list of bool. RULER's string_match_all, but in whole words: a part of a longer
    number is not it. Like RULER's it does not ask which value belongs to which of several keys.
    """
    words = set(re.findall(r'[\w-]+', text))
    return [gold in words for gold in golds]


def oracle(text):
    """What a program that can copy answers to a prompt, from its text alone."""
    haystack, question = text.rsplit('\nWhat ', 1)
    asked = re.findall(r'[\w-]+', re.search(r' of ([^?]*)\?', question)[1].replace(' and ', ', '))
    needles = re.findall(r' The secret (?:number|code) of ([\w-]+) is ([\w-]+)\.', haystack)
    return ', '.join(value for key, value in needles if key in asked)


# -----------------------------------------------------------------------------
# python niah.py


def main():
    _, text, enc, _ = prepare('english', quiet=True)
    needles = Needles(enc, text)
    for task in TASKS:
        example = needles.example(task, 440, task, depth=0.5)           # 440 bytes with the answer
        prompt = enc.decode(example.prompt[1:].tolist(), errors='replace')
        print(f'--- {task}, a prompt of {len(example.prompt)} bytes, the end of text at its start included\n{prompt}'
              f'[{enc.decode(example.answer.tolist())}]')
        assert all(found(oracle(prompt), example.golds))


if __name__ == '__main__':
    main()
