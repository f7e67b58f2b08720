"""
Invented languages: what a model can only know from the lines that it has read.

Each language has words of its own for the same 36 of English, an order of subject, verb and object, adjectives before or
after their noun, and affixes for the plural and the past, all drawn from a seed. A line is a sentence and what it means:

    mako tidu-lo bera > red dogs pulled star

    python train.py --data=languages --out_dir=out-languages    learn to translate a language from its first lines
    python languages.py                                         lines of three languages, a guess and its score

A row of training is one language that no other row has, with some of its words: a model that is to translate its later
lines must learn it from the earlier ones. In eval_continual.py two languages are read one after the other.

Does NOT include: grammar beyond order and affixes, words of several meanings.
"""
import collections
import itertools
import random

import numpy as np
import torch

NOUNS = 'dog cat bird horse king tree stone river house boat star snake friend road cloud lamp'.split()
VERBS = 'pull push call help follow paint lift turn watch lead load count'.split()
ADJECTIVES = 'red small old big cold kind black young'.split()
SYLLABLES = [c + v for c in 'bdfgklmnprtz' for v in 'aeiou']
LESSONS = (0.3, 0.6)            # shares of training: at first few words per row, at last all of them
PAST = {'lead': 'led'}          # else -ed
WEIGHT_OF_MEANING = 0.9         # of a row's loss; the rest is the sentences, which say which language it is


class Language:
    """One language: .line(rng) -> a sentence and its meaning; .words, its share of English."""
    def __init__(self, seed, share=1.0):
        """share: of the words of each kind that are used, at least two."""
        rng = random.Random(f'language {seed}')
        stems = [''.join(pair) for pair in itertools.product(SYLLABLES, SYLLABLES)]
        self.words = {word: stem for word, stem in zip(NOUNS + VERBS + ADJECTIVES, rng.sample(stems, 36))}
        self.order = rng.sample('SVO', 3)
        self.adjective_first = rng.random() < 0.5
        self.plural, self.past = rng.sample(SYLLABLES, 2)
        self.prefix = rng.random() < 0.5                        # or suffix
        self.used = [rng.sample(kind, max(2, round(share * len(kind)))) for kind in (NOUNS, VERBS, ADJECTIVES)]

    def affixed(self, word, affix):
        return f'{affix}-{word}' if self.prefix else f'{word}-{affix}'

    def noun_phrase(self, rng):
        """-> words of the language, words of English."""
        nouns, _, adjectives = self.used
        noun, adjective = rng.choice(nouns), rng.choice(adjectives) if rng.random() < 0.4 else None
        plural = rng.random() < 0.3
        theirs = self.affixed(self.words[noun], self.plural) if plural else self.words[noun]
        ours = noun + 's' * plural
        if not adjective:
            return [theirs], [ours]
        pair = [self.words[adjective], theirs]
        return pair if self.adjective_first else pair[::-1], [adjective, ours]

    def line(self, rng):
        """-> a sentence, what it means: 'tidu mako-lo', 'red dogs'."""
        verb, past = rng.choice(self.used[1]), rng.random() < 0.5
        theirs = self.affixed(self.words[verb], self.past) if past else self.words[verb]
        ours = PAST.get(verb, verb + 'ed') if past else f'will {verb}'
        parts = {'S': self.noun_phrase(rng), 'V': ([theirs], [ours]), 'O': self.noun_phrase(rng)}
        sentence = ' '.join(word for place in self.order for word in parts[place][0])
        return sentence, ' '.join(word for place in 'SVO' for word in parts[place][1])

    def lines(self, n, seed, but=()):
        """n different (sentence, meaning), none of those in but."""
        rng, found, but = random.Random(f'lines {seed}'), {}, set(but)
        while len(found) < n:
            sentence, meaning = self.line(rng)
            if (sentence, meaning) not in but:
                found[sentence] = meaning
        return list(found.items())


def written(sentence, meaning=None):
    """A line as it stands in a text; without its meaning what a model goes on from, up to the newline."""
    return f' {sentence} >' if meaning is None else f' {sentence} > {meaning}\n'


def specimen_text(n_languages=200, n_lines=40):
    """What a tokenizer is learned on: lines of languages that nobody is asked for."""
    return [''.join(written(*pair) for pair in Language(f'specimen {i}').lines(n_lines, i)).encode()
            for i in range(n_languages)]


class Languages:
    """
    Rows of lines, each row in a language of its own, as a task (the protocol of tasks.py). What counts is the meaning.
    enc     the tokenizer
    """
    shortest, is_text = 64, False

    def __init__(self, enc):
        self.enc = enc

    def row(self, n, seed, progress):
        """n tokens of lines in a language -> token ids, whether each is part of a meaning."""
        rng = random.Random(seed)
        few = 0.15 if progress < LESSONS[0] else 0.4 if progress < LESSONS[1] else 1.0
        language = Language(seed, few if rng.random() < 0.7 else rng.uniform(0.1, few))
        ids, marks = [self.enc.eot_token], [False]
        while len(ids) < n:
            sentence, meaning = language.line(rng)
            for text, is_meaning in ((written(sentence), False), (f' {meaning}\n', True)):
                tokens = self.enc.encode_ordinary(text)
                ids += tokens
                marks += [is_meaning] * len(tokens)
        return ids[:n], marks[:n]

    def batch(self, n, T, generator, progress=1.0):
        """-> idx, targets (n, T) int64, weights (n, T) of mean 1: meanings have nine tenths of the loss."""
        seeds = torch.randint(2 ** 40, (n,), generator=generator).tolist()
        ids, marks = zip(*(self.row(T + 1, seed, progress) for seed in seeds))
        ids, marks = torch.tensor(ids), torch.tensor(marks)[:, 1:]
        share = marks.float().mean()
        weights = torch.where(marks, WEIGHT_OF_MEANING / share, (1 - WEIGHT_OF_MEANING) / (1 - share))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), weights

    def held_out(self, n, T, generator):
        """As batch, in languages that no training sees; of sentences nothing is asked."""
        seed = 2 ** 41 + torch.randint(2 ** 40, (), generator=generator).item()
        idx, targets, weights = self.batch(n, T, torch.Generator().manual_seed(seed))
        return idx, targets.masked_fill(weights < 1, -1)

    @torch.no_grad()
    def report(self, reader, T, batch_size, n=32):
        """{'meanings': share of the tokens of meanings that the reader predicts, in the last quarter of n rows}."""
        idx, targets = self.held_out(n, T, torch.Generator().manual_seed(2 ** 40))
        device = next(reader.parameters()).device
        said = torch.cat([reader(part.to(device))[0].argmax(-1).cpu() for part in idx.split(batch_size)])
        said, targets = said[:, T * 3 // 4:-1], targets[:, T * 3 // 4:-1]
        asked = targets >= 0
        return {'meanings': (said[asked] == targets[asked]).float().mean().item()}


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
    precision, recall = np.mean(scores, axis=0)
    return 0.0 if precision + recall == 0 else (1 + beta ** 2) * precision * recall / (beta ** 2 * precision + recall)


# -----------------------------------------------------------------------------
# python languages.py


def main():
    for seed in range(3):
        language = Language(seed)
        print(f"--- language {seed}: {''.join(language.order)}, adjectives "
              f"{'before' if language.adjective_first else 'after'} their noun, plural -{language.plural}-, "
              f'past -{language.past}-')
        for sentence, meaning in language.lines(4, 0):
            print(written(sentence, meaning), end='')
    print(f'\na guess, another meaning of that language: chrF {chrf(language.line(random.Random(0))[1], meaning):.2f}')


if __name__ == '__main__':
    main()
