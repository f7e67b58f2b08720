"""
Invented languages: what a model can only know from the lines that it has read.

Each language has sounds of its own, words made of them for the same 36 of English, an order of subject, verb and
object, adjectives before or after their noun, and affixes for the plural and the past, all drawn from a seed. A line is
a sentence with the meaning of each word behind it, as linguists gloss a text:

     mako red, tigu-ro dogs, kara-mi pulled, guta star.

    python train.py --data=languages --start_lr=0.1 --out_dir=out-languages     learn to gloss a language by its lines
    python languages.py                                         lines of three languages, a guess and its score

A row of training is one language that no other row has: a model that is to gloss its later lines must learn it from the
earlier ones. Short rows have few words, and come first: that there is something to recall is hard to find. In
eval_continual.py languages are read one after the other.

Does NOT include: translation into English order (a model of the default's size did not find it in 1,200 steps), words
of several meanings.
"""
import collections
import itertools
import random

from data import Marked

NOUNS = 'dog cat bird horse king tree stone river house boat star snake friend road cloud lamp'.split()
VERBS = 'pull push call help follow paint lift turn watch fill load count'.split()
ADJECTIVES = 'red small old big cold kind black young'.split()
CONSONANTS, VOWELS = 'bdfgklmnprtz', 'aeiou'
ROW_OF_ALL = 800                # tokens of a row in which all words of a language are used; in a shorter one fewer


class Language:
    """One language: .line(rng) -> a sentence with its meanings; .words {English: its own}."""
    def __init__(self, seed, share=1.0):
        """share: of the words of each kind that are used, at least one."""
        rng = random.Random(f'language {seed}')
        sounds = rng.sample(CONSONANTS, 6), rng.sample(VOWELS, 4)
        syllables = [''.join(pair) for pair in itertools.product(*sounds)]
        stems = [''.join(pair) for pair in itertools.product(syllables, syllables)]
        self.words = dict(zip(NOUNS + VERBS + ADJECTIVES, rng.sample(stems, 36)))
        self.order, self.adjective_first = rng.sample('SVO', 3), rng.random() < 0.5
        self.affixes, self.prefix = rng.sample(syllables, 2), rng.random() < 0.5        # of the plural, of the past
        self.used = [rng.sample(kind, max(1, round(share * len(kind)))) for kind in (NOUNS, VERBS, ADJECTIVES)]

    def pair(self, word, ending, affix=None):
        """A word of the language and what it means."""
        if affix is None:
            return self.words[word], word
        parts = (affix, self.words[word]) if self.prefix else (self.words[word], affix)
        return '-'.join(parts), word + ending

    def noun_phrase(self, rng):
        """-> [(word, meaning)], a noun and perhaps an adjective."""
        plural = self.affixes[0] if rng.random() < 0.3 else None
        phrase = [self.pair(rng.choice(self.used[0]), 's', plural)]
        if rng.random() < 0.4:
            phrase.insert(0 if self.adjective_first else 1, self.pair(rng.choice(self.used[2]), ''))
        return phrase

    def line(self, rng):
        """A sentence, ((word, meaning), ..): (('mako', 'red'), ('tigu-ro', 'dogs'), ..)."""
        past = self.affixes[1] if rng.random() < 0.5 else None
        parts = {'S': self.noun_phrase(rng), 'V': [self.pair(rng.choice(self.used[1]), 'ed', past)],
                 'O': self.noun_phrase(rng)}
        return tuple(pair for part in self.order for pair in parts[part])

    def lines(self, n, seed, but=()):
        """n different sentences, none of those in but."""
        rng, found, but = random.Random(f'lines {seed}'), {}, {*but}
        while len(found) < n:
            line = self.line(rng)
            if line not in but:
                found[line] = None
        return [*found]


def written(line):
    """A line as it stands in a text, in parts: (text, is it a meaning)."""
    for i, (word, meaning) in enumerate(line):
        yield f' {word}', False
        yield f' {meaning}', True
        yield '.\n' if i + 1 == len(line) else ',', False


def tokens_of(enc, lines):
    """Token ids of lines, and whether each is part of a meaning."""
    ids, marks = [], []
    for line in lines:
        for text, is_meaning in written(line):
            tokens = enc.encode_ordinary(text)
            ids += tokens
            marks += [is_meaning] * len(tokens)
    return ids, marks


def specimen_text(n_languages=200, n_lines=40):
    """What a tokenizer is learned on: lines of languages that nobody is asked for."""
    return [''.join(text for line in Language(f'specimen {i}').lines(n_lines, i) for text, _ in written(line)).encode()
            for i in range(n_languages)]


class Languages(Marked):
    """
    Rows of lines, each row in a language of its own, as a task. Half of the loss are the meanings, the rest the words,
    which say which language it is.
    enc     the tokenizer
    """
    shortest, marked = 64, 'meanings'

    def __init__(self, enc):
        self.enc = enc

    def row(self, n, seed):
        """n tokens of lines in a language -> token ids, whether each is part of a meaning. Words come back in a row."""
        rng = random.Random(seed)
        language = Language(seed, rng.uniform(0, min(1, n / ROW_OF_ALL)))
        ids, marks = [self.enc.eot_token], [False]
        while len(ids) < n:
            more, are_meanings = tokens_of(self.enc, [language.line(rng)])
            ids, marks = ids + more, marks + are_meanings
        return ids[:n], marks[:n]


# -----------------------------------------------------------------------------
# scoring


def chrf(said, meant, n=6, beta=2):
    """
    chrF (Popovic 2015) of one text, 0 to 1: the F-score of its character n-grams, n = 1 to 6, without blanks, recall
    twice as important as precision.
    """
    said, meant, scores = said.replace(' ', ''), meant.replace(' ', ''), []
    for k in range(1, n + 1):
        a, b = (collections.Counter(text[i:i + k] for i in range(len(text) - k + 1)) for text in (said, meant))
        if a and b:
            common = (a & b).total()
            scores.append((common / a.total(), common / b.total()))
    if not scores:
        return float(said == meant)
    precision, recall = (sum(column) / len(scores) for column in zip(*scores))
    return 0.0 if precision + recall == 0 else (1 + beta ** 2) * precision * recall / (beta ** 2 * precision + recall)


# -----------------------------------------------------------------------------
# python languages.py


def main():
    for seed in range(3):
        language = Language(seed)
        print(f"--- language {seed}: {''.join(language.order)}, adjectives "
              f"{'before' if language.adjective_first else 'after'} their noun, {language.affixes[0]} for the plural, "
              f'{language.affixes[1]} for the past')
        for line in language.lines(4, 0):
            print(''.join(text for text, _ in written(line)), end='')
    guess, meant = (' '.join(meaning for _, meaning in language.line(random.Random(i))) for i in range(2))
    print(f'\na guess, the meaning of another line of it: chrF {chrf(guess, meant):.2f}')


if __name__ == '__main__':
    main()
