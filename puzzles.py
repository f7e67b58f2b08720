"""
Puzzles: small tasks that a program of a few lines solves, one for each skill on which memories differ.

    recall              the value of each key, asked for at random gaps             Arora 2023
    in-context-recall   ... as soon as a key comes again                            MAD: Poli 2024
    fuzzy-recall        ... keys and values of one to three symbols                 MAD
    noisy-recall        ... with symbols in between that mean nothing               MAD
    selective-copying   letters among noise, in their order                         MAD
    compression         all symbols of a short block, by their places               MAD
    memorisation        facts that are the same in all rows                         MAD
    s3 s5               the product of permutations so far: state tracking          Liu 2023, Merrill 2024
    shift               a language that changes within a row, unmarked              for memories that write their rules
    hop-1 hop-2 hop-3   where is it? over one to three shuffled facts               after BABILong's qa1 to qa3
    names               what is told of a thing by one name, asked by another       for memories that write their keys
    trust               what honest speakers say, who are named in the row          ... and their gates

    python puzzles.py                           a row of each, what is asked below it, and chance
    python train.py --data=s3                   trains on one
    python race.py --task=s3                    ranks memories on it

A puzzle is a task (the interface of tasks.py). Its rows are written in characters, one a symbol, and under each symbol
that is asked about stands the answer, which is one symbol as well:

    def row(self, T, rng): return text, answers         two strings of T; a blank: nothing is asked

Chance is the share right of a reader that sees the last symbol alone and knows how often each answer follows it; it is
counted (`Puzzle.chance`). Guessing among what stands in the row may be better.

Does NOT include: formal languages (formal.py), text (data.py), needles (niah.py), invented languages with words
(languages.py).
"""
import itertools
import random
import string
from functools import partial

import torch

from data import another, most_likely

LOWER, UPPER, END, ASK = string.ascii_lowercase, string.ascii_uppercase, '.', '|'
# a character each for 120 permutations, all of them of one byte in latin-1
NAMES = string.ascii_letters + string.digits + string.punctuation + ''.join(map(chr, range(161, 187)))


class Puzzle:
    """
    What all of them share. A puzzle makes rows, and says

    symbols     which characters they have
    asked       what is asked for
    shortest    the fewest symbols of a row in which something is asked
    begin_with  how long rows are best in the beginning, where an answer needs what was found out at each place before

    tokens: a 1-D tensor, the token id of each symbol; without it they are counted from 0, the smallest vocabulary.
    """
    is_text, shortest, begin_with = False, 2, None

    def __init__(self, tokens=None):
        self.token_of = torch.full((256,), -1)              # -1 for the blank: nothing is asked
        codes = list(self.symbols.encode('latin-1'))
        self.token_of[codes] = torch.arange(len(codes)) if tokens is None else tokens

    def batch(self, n, T, generator, progress=1.0):
        """-> idx, targets, weights (n, T): the mean over all tokens is that over what is asked."""
        assert T >= self.shortest, f'a row takes at least {self.shortest} tokens, not {T}'
        seeds = torch.randint(2 ** 40, (n,), generator=generator).tolist()
        text, answers = zip(*(self.row(T, random.Random(seed)) for seed in seeds))
        idx, targets = self.encode(text), self.encode(answers)
        asked = (targets >= 0).float()
        return idx, targets, asked / asked.mean()

    def encode(self, rows):
        """n strings of T symbols -> tokens (n, T)."""
        codes = torch.frombuffer(bytearray(''.join(rows), 'latin-1'), dtype=torch.uint8)
        return self.token_of[codes.long()].view(len(rows), -1)                      # (n T,) -> (n, T)

    def held_out(self, n, T, generator):
        """As batch, of rows of other seeds; of short ones there may be no others."""
        return self.batch(n, T, another(generator))[:2]

    def report(self, reader, T, batch_size, n=64):
        """{what: share of answers that the reader gives}, over n rows of another seed."""
        idx, targets, _ = self.batch(n, T, torch.Generator().manual_seed(2 ** 40))
        return self.shares(most_likely(reader, idx, batch_size) == targets, targets >= 0)

    def shares(self, right, asked):
        """right, asked (n, T) -> what report says."""
        return {self.asked: right[asked].float().mean().item()}

    def chance(self, T, n=256):
        """The share right of whoever knows the last symbol and nothing before it: counted over n rows, asked over n."""
        idx, targets, _ = self.batch(2 * n, T, torch.Generator().manual_seed(2 ** 40 + 1))
        asked, size = targets >= 0, self.token_of.max() + 1
        counts = torch.zeros(size, size)                                            # (last symbol, answer)
        last, answer = idx[:n][asked[:n]], targets[:n][asked[:n]]
        counts.index_put_((last, answer), torch.ones(len(last)), accumulate=True)
        return (counts.argmax(1)[idx] == targets)[n:][asked[n:]].float().mean().item()


# -----------------------------------------------------------------------------
# recall


class Recall(Puzzle):
    """
    Multi-query associative recall (Arora 2023): pairs k v of distinct keys, then each k v once more, in random order
    and at random gaps. The value after each second k is asked for.

        k1 v1 k2 v2 ... kP vP  _ _ k2 v2 _ _ _ _ k1 v1 _ _

    n_pairs         P
    keys, values    1-D tensors of token ids, at least P keys; values may repeat
    gap             the token id _
    """
    def __init__(self, n_pairs, keys, values, gap):
        assert 1 <= n_pairs <= len(keys), f'{n_pairs} pairs take as many keys, not {len(keys)}'
        self.n_pairs, self.keys, self.values, self.gap, self.shortest = n_pairs, keys, values, gap, 4 * n_pairs
        self.asked = f'{n_pairs} pairs'

    def batch(self, n, T, generator, progress=1.0):
        """As Puzzle.batch, without strings; of weights the mean is 1 also where a row is read in parts."""
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

    def chance(self, T, n=256):
        """Of a guess among the values shown."""
        return 1 / self.n_pairs


class InContextRecall(Puzzle):
    """
    MAD's in-context recall: pairs of eight keys in any order, so that they come again, and then the value is asked
    for. The values are drawn for each row. Chance 1/8.
    """
    symbols, asked, shortest = LOWER[:8] + UPPER[:8], 'values', 18          # of nine pairs one comes a second time
    longest, noise, noise_symbols = 1, 0.0, ''

    def row(self, T, rng):
        def word(letters): return ''.join(rng.choices(letters, k=rng.randint(1, self.longest)))
        value_of = {}
        while len(value_of) < 8:
            value_of[word(LOWER[:8])] = word(UPPER[:8])
        text, answers, shown = '', '', set()
        while len(text) < T:
            if rng.random() < self.noise:
                text, answers = text + rng.choice(self.noise_symbols), answers + ' '
            key, value = rng.choice([*value_of.items()])
            text += key + value
            answers += ' ' * (len(key) - 1) + (value if key in shown else ' ' * len(value)) + ' '
            shown.add(key)
        return text[:T], answers[:T]


class FuzzyRecall(InContextRecall):
    """MAD's fuzzy recall: keys and values of one to three symbols. Each symbol of a value is asked for. Chance 1/8."""
    longest, shortest = 3, 54


class NoisyRecall(InContextRecall):
    """MAD's noisy recall: before a pair there may be a symbol that means nothing, a fifth of all. Chance 1/8."""
    noise, noise_symbols, shortest = 0.5, string.digits[:8], 27
    symbols = InContextRecall.symbols + noise_symbols


# -----------------------------------------------------------------------------
# the rest of MAD


class SelectiveCopying(Puzzle):
    """
    MAD's selective copying: eight letters of sixteen among dots, then as many marks, at which the letters are asked for
    in their order. Chance 1/16.
    """
    symbols, asked, shortest = LOWER[:16] + END + ASK, 'letters', 16

    def row(self, T, rng):
        text, letters = [END] * (T - 8), rng.choices(LOWER[:16], k=8)
        for place, letter in zip(sorted(rng.sample(range(T - 8), 8)), letters):
            text[place] = letter
        return ''.join(text) + 8 * ASK, ''.join(letters).rjust(T)


class Compression(Puzzle):
    """
    After MAD's compression: a block of eight letters of sixteen, then their places in any order, and at each place the
    letter is asked for; then the next block. Chance 1/16.
    MAD: an MLP has to recover them from one token    here: the reader is asked on    because tasks are so; thus
    attention may look back, and what is measured is whether a memory keeps places apart
    """
    symbols, asked, shortest = LOWER[:16] + string.digits[:8], 'letters', 16

    def row(self, T, rng):
        text = answers = ''
        while len(text) < T:
            letters, places = rng.choices(LOWER[:16], k=8), rng.sample(range(8), 8)
            text += ''.join(letters) + ''.join(map(str, places))
            answers += ' ' * 8 + ''.join(letters[place] for place in places)
        return text[:T], answers[:T]


class Memorisation(Puzzle):
    """
    MAD's memorisation: keys of two letters, and a digit for each of the 256, the same in all rows, which never show it.
    Only training can tell. Chance 28 %: of the 16 keys with one second letter, some have the same digit.
    """
    symbols, asked = LOWER[:16] + UPPER[:16] + string.digits[:8], 'facts'
    keys = [a + b for a, b in itertools.product(LOWER[:16], UPPER[:16])]
    facts = dict(zip(keys, random.Random('facts').choices(string.digits[:8], k=len(keys))))

    def row(self, T, rng):
        keys = rng.choices(self.keys, k=T // 2 + 1)
        return ''.join(keys)[:T], ''.join(' ' + self.facts[key] for key in keys)[:T]


# -----------------------------------------------------------------------------
# states, rules, facts


class Permutations(Puzzle):
    """
    State tracking (Liu 2023, Merrill 2024): each symbol is a permutation of n things, the answer the product of all so
    far. S5 is as hard as all that circuits of logarithmic depth compute, S3 is easier. Chance 1/6, 1/120.
    """
    asked, shortest, begin_with = 'products', 1, 4

    def __init__(self, n, tokens=None):
        self.name_of = dict(zip(itertools.permutations(range(n)), NAMES))
        self.symbols = ''.join(self.name_of.values())
        super().__init__(tokens)

    def row(self, T, rng):
        steps, product, answers = rng.choices([*self.name_of], k=T), None, ''
        for step in steps:
            product = tuple(step[i] for i in product) if product else step          # first the product, then the step
            answers += self.name_of[product]
        return ''.join(self.name_of[step] for step in steps), answers


class Shift(Puzzle):
    """
    A language of eight letters in a circle: words are three to six neighbours, from anywhere on. Their order is drawn
    for each row, and again, unmarked, every 24 to 72 symbols. What follows a letter is asked for where that was shown
    since: a memory has to replace what it knew. Chance 1/7.
    """
    symbols, asked, shortest = LOWER[:8] + END, 'letters', 24

    def row(self, T, rng):
        text, answers, redraw_at = '', '', 0
        while len(text) < T:
            if len(text) >= redraw_at:
                circle, shown, redraw_at = rng.sample(LOWER[:8], 8), set(), len(text) + rng.randint(24, 72)
            start, n = rng.randrange(8), rng.randint(2, 5)
            word = ''.join(circle[(start + i) % 8] for i in range(n + 1))
            for letter, following in itertools.pairwise(word):
                answers += following if letter in shown else ' '
                shown.add(letter)
            text, answers = text + word + END, answers + '  '
        return text[:T], answers[:T]


class Hops(Puzzle):
    """
    After BABILong's qa1, qa2, qa3 (Kuratov 2024): four things, each in another one, of which each is in a room. In the
    first three quarters of a row the facts stand, shuffled and at gaps; then each of the innermost things is named, and
    its room is asked for, so many facts away:

        2 hops      kb .. bD aC mb cC ia .. dE jd ..     kD mD .. iC jE        the second letter is asked for

    Chance 1/8; 1/4 or more for a guess among the rooms of the row.
    """
    asked, shortest = 'rooms', 32

    def __init__(self, hops, tokens=None):
        self.kinds = [UPPER[:8]] + [LOWER[8 * i:8 * i + 8] for i in range(hops)]    # rooms, what is in them, ..
        self.symbols = ''.join(self.kinds) + END
        super().__init__(tokens)

    def row(self, T, rng):
        inside, things = {}, rng.choices(UPPER[:8], k=4)
        for kind in self.kinds[1:]:
            outer, things = things, rng.sample(kind, 4)
            inside.update((thing, rng.choice(outer)) for thing in things)
        pairs, answers, questions_at = [2 * END] * (T // 2), [' '] * T, T // 2 * 3 // 4
        for place, thing in zip(rng.sample(range(questions_at), len(inside)), inside):
            pairs[place] = thing + inside[thing]
        for place, thing in zip(rng.sample(range(questions_at, T // 2), 4), things):
            room = thing
            while room in inside:
                room = inside[room]
            pairs[place], answers[2 * place] = thing + room, room
        return ''.join(pairs).ljust(T, END), ''.join(answers)


class Names(Puzzle):
    """
    Four things have two names each. A row's first third says which belong together, the second tells a value of each
    thing by one name, the last asks for two of the values, by either name:

        ma .. kb jd .. lc       kX .. jY mX lZ      .. dY .. mX

    One block can tell it if its memory, when it writes at the key k, has learned in the row that b is meant. Chance
    1/8; 2/5 for the most frequent of the values told, 7/10 for a reader that ignores which names belong together.
    """
    asked, shortest = 'values', 48
    symbols = LOWER[:16] + UPPER[:8] + END

    def row(self, T, rng):
        pairs, answers, third = [2 * END] * (T // 2), [' '] * T, T // 6
        names, others = rng.sample(LOWER[:8], 4), rng.sample(LOWER[8:16], 4)
        values = dict(zip(others, rng.choices(UPPER[:8], k=4)))
        for start, told in enumerate((zip(others, names), values.items())):
            for place, pair in zip(rng.sample(range(start * third, (start + 1) * third), 4), told):
                pairs[place] = ''.join(pair)
        for place, (name, other) in zip(rng.sample(range(2 * third, T // 2), 2), zip(names, others)):
            pairs[place], answers[2 * place] = rng.choice((name, other)) + values[other], values[other]
        return ''.join(pairs).ljust(T, END), ''.join(answers)


class Trust(Puzzle):
    """
    A row begins with who of eight speakers is honest (+), and who is not. Then each of four keys is given a value by
    one who is and another by one who is not, in any order and at gaps; the honest one is asked for:

        a+ c- b- d+ ..      ckX .. akY dmY .. bmZ       mY kY

    One block can tell it if its memory has learned in the row whose words to write. Chance 1/8; 1/2 for a guess between
    the two, 3/4 for whom the answers before tell who is honest.
    """
    asked, shortest = 'values', 48
    symbols = LOWER[:16] + UPPER[:8] + '+-' + END

    def row(self, T, rng):
        speakers, keys = rng.sample(LOWER[:8], 8), rng.sample(LOWER[8:16], 4)
        said = [(key, *rng.sample(UPPER[:8], 2)) for key in keys]               # what is true comes first
        words = [rng.choice(speakers[4 * i:4 * i + 4]) + key + values[i] for key, *values in said for i in (0, 1)]
        marks = [name + ('+' if i < 4 else '-') for i, name in enumerate(speakers)]
        words += [END] * rng.randint(0, T - self.shortest)
        for part in (words, marks, said):
            rng.shuffle(part)
        start = ''.join(marks + words)
        asked = ''.join(key + true for key, true, _ in said)
        answers = ' ' * len(start) + ''.join(true + ' ' for _, true, _ in said)
        return (start + asked).ljust(T, END), answers.ljust(T)


# by name; recall, which takes a number of pairs, is made where it is needed
PUZZLES = {
    'in-context-recall': InContextRecall, 'fuzzy-recall': FuzzyRecall, 'noisy-recall': NoisyRecall,
    'selective-copying': SelectiveCopying, 'compression': Compression, 'memorisation': Memorisation,
    's3': partial(Permutations, 3), 's5': partial(Permutations, 5), 'shift': Shift,
    'hop-1': partial(Hops, 1), 'hop-2': partial(Hops, 2), 'hop-3': partial(Hops, 3), 'names': Names, 'trust': Trust,
}


# -----------------------------------------------------------------------------
# python puzzles.py


def show(puzzles):
    for name, make in puzzles.items():
        puzzle = make()
        for line in (f'--- {name}: chance {100 * puzzle.chance(96):.1f} %', *puzzle.row(96, random.Random(0))):
            print(line)


if __name__ == '__main__':
    show(PUZZLES)
