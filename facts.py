"""
Invented facts: told once in a passage, asked for after other text.

    The food of Bamilo is bread. As home, Bamilo has Oslo. ...      (other text)      Question: food of Bamilo? bread

Names are invented, so that nobody can know the answer beforehand; values are common words, sixteen for each of twelve
attributes, so that a guess is right one time in sixteen. A value is one token and stands right behind its key, name and
attribute, wherever it is told or asked for: what is asked here is to keep facts, not to find them in a sentence.

    python train.py --data=facts --start_lr=0.1 --out_dir=out-facts     learn to answer questions on a passage, best in
                                                                        the stages of protocols.py: short rows first
    python facts.py                                                     a passage, its questions, a row of training

A row of training has passages of its own, text behind each, then its questions. In eval_continual.py
(--protocol=facts) a passage of 1, 20 or 200 facts is read, then 10,000 tokens of other text, and then the questions are
asked.

Does NOT include: questions that take two facts, facts that change, answers that are no fact of the passage.
"""
import itertools
import random

from data import Marked
from tokenizer import encode

VALUES = {
    'food': 'bread rice soup cheese fish honey apples beans eggs nuts plums corn milk salt figs cake',
    'colour': 'red blue green white black brown grey pink gold silver orange purple yellow violet amber ivory',
    'home': 'Oslo Paris Rome Cairo Lima Delhi Tokyo Boston Madrid Berlin Vienna Athens Prague Dublin Lisbon Seoul',
    'job': 'baker pilot nurse farmer painter judge tailor sailor writer miner doctor teacher clerk hunter cook guard',
    'pet': 'dog cat horse parrot rabbit goat snake turtle hen duck mouse fox pony lamb crow toad',
    'tool': 'hammer saw knife rope needle brush spade axe ladder lamp nail file drill wheel key net',
    'sport': 'chess tennis golf rowing boxing skiing running diving judo rugby polo darts archery fencing squash '
             'hockey',
    'music': 'piano violin drum flute harp guitar cello trumpet organ banjo horn oboe lute fiddle bell viola',
    'month': 'January February March April May June July August September October November December spring summer '
             'autumn winter',
    'metal': 'iron copper tin lead zinc nickel steel brass bronze cobalt chrome radium sodium mercury titanium uranium',
    'tree': 'oak elm pine birch willow maple cedar ash palm olive cherry walnut spruce poplar larch beech',
    'drink': 'water tea coffee wine beer juice cider lemonade cocoa rum whisky vodka sherry port brandy gin'}
VALUES = {attribute: words.split() for attribute, words in VALUES.items()}
TOLD = ('The {attribute} of {name} is {value}.', 'As {attribute}, {name} has {value}.')
ASKED, ANSWERED = '\nQuestion: {attribute} of {name}?', ' {value}'
OF_A_NAME = 3                   # facts of each name, on average


def draw(n, rng, attributes=(*VALUES,), syllables=3):
    """n facts, (name, attribute, value), no two of the same attribute of the same name."""
    def name(): return ''.join(rng.choice(some) for some in ('bdfgklmnprstvz', 'aeiou') * syllables).capitalize()
    names, keys = set(), set()
    while len(names) < -(-n // min(OF_A_NAME, len(attributes))):
        names.add(name())
    names = sorted(names)
    while len(keys) < n:
        keys.add((rng.choice(names), rng.choice(attributes)))
    return [(name, attribute, rng.choice(VALUES[attribute])) for name, attribute in rng.sample(sorted(keys), n)]


def told(fact, rng):
    """A sentence that tells a fact."""
    name, attribute, value = fact
    return ' ' + rng.choice(TOLD).format(name=name, attribute=attribute, value=value)


def asked(fact):
    """(question, answer), two pieces of text."""
    name, attribute, value = fact
    return ASKED.format(name=name, attribute=attribute), ANSWERED.format(value=value)


def specimen_text(n=1000):
    """What a tokenizer is learned on, beside English: facts that nobody is asked for."""
    rng = random.Random('specimen')
    return [''.join(told(fact, rng) for fact in draw(40, rng)).encode() for _ in range(n)]


class Facts(Marked):
    """
    Rows of a passage, text, and questions on the passage, as a task. Half of the loss are the answers.
    enc     the tokenizer
    text    1-D array of token ids that lie between passage and questions
    """
    shortest, marked = 128, 'answers'

    def __init__(self, enc, text):
        self.enc, self.text, rng = enc, text[text != enc.eot_token], random.Random('specimen')
        pieces = [told(fact, rng) + ''.join(asked(fact)) for fact in draw(20, rng)]
        self.of_a_fact = len(self.tokens(''.join(pieces))) // 20 + 1    # tokens to tell and to ask for one

    def tokens(self, text):
        return encode(self.enc, text.encode()).tolist()

    def passage(self, facts, rng):
        """Token ids of sentences that tell the facts, in their order."""
        return [i for fact in facts for i in self.tokens(told(fact, rng))]

    def other(self, n, rng):
        """n tokens of other text."""
        start = rng.randrange(max(1, len(self.text) - n))
        return self.text[start:start + n].tolist()

    def row(self, n, seed):
        """
        n tokens -> token ids, whether each is part of an answer: passages, each with text and its questions behind it,
        each asked once. Few and many facts are equally frequent, short and long gaps, and few and many attributes: else
        the attribute alone tells most answers, and names are not learned to be looked up. In short rows a name has one
        syllable, so that it is found out what there is to recall.
        """
        rng, ids, marks = random.Random(f'facts {seed}'), [self.enc.eot_token], [False]
        while len(ids) < n:
            attributes = rng.sample([*VALUES], int((len(VALUES) + 1) ** rng.random()))
            most = max(1, (n - len(ids)) // self.of_a_fact)
            facts = draw(int((most + 1) ** rng.random()), rng, attributes, syllables=1 if n < 256 else 3)
            before = self.passage(facts, rng)
            questions = [[*map(self.tokens, asked(fact))] for fact in rng.sample(facts, len(facts))]
            room = max(0, n - len(ids) - len(before) - sum(map(len, itertools.chain(*questions))))
            before += self.other(int((room + 1) ** rng.random()) - 1, rng)
            ids, marks = ids + before, marks + [False] * len(before)
            for question, answer in questions:
                ids, marks = ids + question + answer, marks + [False] * len(question) + [True] * len(answer)
        return ids[:n], marks[:n]


# -----------------------------------------------------------------------------
# python facts.py


def main():
    from data import prepare
    rng = random.Random(0)
    facts = draw(6, rng)
    print('a passage:' + ''.join(told(fact, rng) for fact in facts))
    print('its questions:' + ''.join(question + answer for question, answer in map(asked, facts)))
    _, text, enc, _ = prepare('english', quiet=True)
    ids, marks = Facts(enc, text).row(700, 0)
    print(f'\na row of 700 bytes, of which {sum(marks)} are of answers:{enc.decode(ids[1:], errors="replace")}')


if __name__ == '__main__':
    main()
