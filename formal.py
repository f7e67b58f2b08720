"""
Formal languages, the paper's table 5: puzzles (puzzles.py) in which each answer is the set of symbols that may follow.

    parity  aa  abab            they count in circles                           Bhattamishra 2020, Irie 2023
    anbn  anbncn  shuffle-2     they count up and down                          Bhattamishra 2020

    python formal.py                            a word of each, the sets below it, and chance
    python race.py --task=parity                ranks memories on one, at up to 8 times the words' length

Does NOT include: permutations, which track states without being a language (puzzles.py).
"""
from puzzles import END, PUZZLES, UPPER, Puzzle, show


class FormalLanguage(Puzzle):
    """
    A word of a formal language, or the beginning of one. After each symbol the answer is the set of all symbols that
    may follow, '.' among them if the word may end: each possible set is a symbol of its own, A, B, .. in the order of
    `sets`. Words fill more than half of a row, so that in one twice as long there is none that training has seen. As in
    the papers, a word is right when the sets at all its places are; of (aa)*, (abab)* there is one row of a length.
    """
    asked, begin_with = 'sets', 4

    def __init__(self, tokens=None):
        self.name_of = dict(zip(self.sets, UPPER))
        self.symbols = self.alphabet + END + UPPER[:len(self.sets)]
        super().__init__(tokens)

    def row(self, T, rng):
        word = self.word(T, rng)
        answers = ''.join(self.name_of[self.may_follow(word[:t + 1])] for t in range(len(word)))
        return word.ljust(T, END), answers.ljust(T)

    def shares(self, right, asked):
        return super().shares(right, asked) | {'whole words': (right | ~asked).all(1).float().mean().item()}


class Parity(FormalLanguage):
    """Bits with an even number of 1s. Chance 1/2, of whole words 0."""
    alphabet, sets = '01', ('01', '01.')

    def word(self, T, rng): return ''.join(rng.choices('01', k=T))
    def may_follow(self, start): return '01' + END * (start.count('1') % 2 == 0)


class AA(FormalLanguage):
    """(aa)*: an even number of a. Chance 1/2, of whole words 0."""
    alphabet, sets = 'a', ('a', 'a.')

    def word(self, T, rng): return T * 'a'
    def may_follow(self, start): return 'a' + END * (len(start) % 2 == 0)


class ABAB(FormalLanguage):
    """(abab)*. Chance 3/4, as only after b there is a question; of whole words 0."""
    alphabet, sets = 'ab', ('b', 'a', 'a.')

    def word(self, T, rng): return (T * 'ab')[:T]
    def may_follow(self, start): return 'ab'[len(start) % 2] + END * (len(start) % 4 == 0)


class AnBn(FormalLanguage):
    """a^n b^n. Chance 1 - 1/(2n), as only the word's end is a question; of whole words 0."""
    alphabet, sets = 'ab', ('ab', 'b', END)

    def word(self, T, rng):
        n = rng.randint(T // 4 + 1, T // 2)
        return n * 'a' + n * 'b'

    def may_follow(self, start):
        a, b = start.count('a'), start.count('b')
        return 'ab' if b == 0 else 'b' if b < a else END


class AnBnCn(FormalLanguage):
    """a^n b^n c^n. Chance 1 - 2/(3n), of whole words 0."""
    alphabet, sets, shortest = 'abc', ('ab', 'b', 'c', END), 3

    def word(self, T, rng):
        n = rng.randint(T // 6 + 1, T // 3)
        return n * 'a' + n * 'b' + n * 'c'

    def may_follow(self, start):
        a, b, c = map(start.count, 'abc')
        return 'ab' if b == 0 else 'b' if b < a else 'c' if c < a else END


class Shuffle2(FormalLanguage):
    """Shuffle-2: two kinds of brackets, each balanced by itself, in any mixture. Chance counted, of whole words 0."""
    alphabet, sets = '([)]', ('([.', '([)', '([]', '([)]')

    def word(self, T, rng):
        word = ''
        while len(word) < T:
            word += rng.choice(self.may_follow(word).rstrip(END))
        return word

    def may_follow(self, start):
        within = [start.count(opening) > start.count(closing) for opening, closing in ('()', '[]')]
        return '([' + ')' * within[0] + ']' * within[1] + END * (not any(within))


FORMAL = {'parity': Parity, 'aa': AA, 'abab': ABAB, 'anbn': AnBn, 'anbncn': AnBnCn, 'shuffle-2': Shuffle2}
ALL_PUZZLES = PUZZLES | FORMAL          # of --data and --task, beside recall

if __name__ == '__main__':
    show(FORMAL)
