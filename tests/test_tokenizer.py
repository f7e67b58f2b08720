"""
Tokenizers (tokenizer.py): bytes to ids and back, byte-pair encoding against the naive count, what they refuse.

    python -m pytest tests/test_tokenizer.py
"""
import base64
import collections
import os
import re

import numpy as np
import pytest
from test_data import TEXT, fails, gpt2, python, write

import data
import tokenizer

# Bytes that a tokenizer can stumble on: invalid UTF-8 of each kind, encoded surrogates, a spelled-out special token.
HARD = [b'', b'plain', b'\xff', bytes(range(256)), 'naïve 😀 日本\u200d'.encode(), '😀'.encode()[:3] + b'x',
        b'\xed\xa0\x80', b'a\x80\xc3\xa9 \xc3', b'<|endoftext|>', b'  \n\n\t x   ', b'\x1c\x1d \xc2\x85',
        'e\u0301 \u0663'.encode()]


def learned(n_vocab=285):
    return tokenizer.get_tokenizer(f'bpe:{n_vocab}', texts=[TEXT])


def round_trips(enc):
    for text in [*HARD, TEXT, b''.join(HARD), np.random.default_rng(0).bytes(5000)]:
        ids = tokenizer.encode(enc, text)
        assert ids.dtype == np.uint16 and ids.ndim == 1
        assert enc.decode_bytes(ids.tolist()) == text
        assert enc.eot_token not in ids
    text = 'def f(x):\n    return "café 😀"  # 2024\n\n\n' * 3
    assert tokenizer.encode(enc, text.encode()).tolist() == enc.encode_ordinary(text)


def test_bytes_round_trip():
    enc = tokenizer.get_tokenizer('bytes')
    assert enc.n_vocab == 257 and enc.eot_token == 256
    assert tokenizer.encode(enc, b'\x00a\xff').tolist() == [0, 97, 255]
    round_trips(enc)


def test_bpe_round_trip():
    enc = learned()
    assert enc.n_vocab == 285 and enc.eot_token == 284
    assert len(tokenizer.encode(enc, TEXT)) < len(TEXT) / 2
    round_trips(enc)


def test_gpt2_round_trip(tmp_path, monkeypatch):
    enc = gpt2(tmp_path, monkeypatch)
    assert enc.n_vocab == 50257 and tokenizer.encode(enc, b'hello world').tolist() == [31373, 995]
    round_trips(enc)


def test_gpt2_without_a_network_says_what_to_fetch(tmp_path, monkeypatch):
    def unreachable(name):
        raise OSError('no route to host\nsecond line')
    monkeypatch.setattr(tokenizer.tiktoken, 'get_encoding', unreachable)
    message = fails('TIKTOKEN_CACHE_DIR', tokenizer.get_tokenizer, 'gpt2')
    base = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'
    assert base + 'vocab.bpe' in message and base + 'encoder.json' in message
    assert '6d1cbeee0f20b3d9449abfede4726ed8212e3aee (vocab.bpe)' in message
    assert '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6 (encoder.json)' in message


@pytest.mark.parametrize('text', [b' ' * 1_100_000 + b'x', b'\n' * 1_100_000, b'ab' * 600_000, b'word ' * 300_000],
                         ids=['spaces', 'newlines', 'letters', 'words'])
def test_long_runs(text):
    """A million blanks in a row end tiktoken 0.14 in a panic ('StackOverflow') when they come in one call."""
    enc = learned()
    ids = tokenizer.encode(enc, text)
    assert enc.decode_bytes(ids.tolist()) == text
    if text.startswith(b'word'):        # the places where text is cut for the call leave no trace
        assert ids.tolist() == enc.encode_ordinary(text.decode())


def naive_bpe(texts, n_merges):
    """Count all pairs anew for every merge, as one would write it down."""
    words = [word for text in texts for word in re.findall(tokenizer.WORD, text.decode())]
    words = [[bytes([b]) for b in word.encode()] for word in words]
    tokens = [bytes([i]) for i in range(256)]
    for _ in range(n_merges):
        counts = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        a, b = min(counts, key=lambda pair: (-counts[pair], tokens.index(pair[0]), tokens.index(pair[1])))
        tokens.append(a + b)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (a, b):
                    word[i:i + 2] = [a + b]
                i += 1
    return tokens, words


GREEDY = {'runs': b'aaaa aaa aa aaaaaaa baaab abab', 'words': TEXT[:400],
          'utf8': 'äöü äöä 😀😀😀 x==y===z '.encode() * 2,
          'digits': b''.join(b'%d' % (7 ** i) for i in range(60))}


@pytest.mark.parametrize('text', GREEDY.values(), ids=GREEDY)
def test_bpe_is_the_greedy_choice_of_the_most_frequent_pair(text):
    n_merges = 6 if text.startswith(b'aaaa') else 12
    tokens, words = naive_bpe([text], n_merges)
    ranks = tokenizer.train_bpe([text], n_merges)
    assert list(ranks) == tokens and list(ranks.values()) == list(range(256 + n_merges))
    enc = tokenizer.get_tokenizer(f'bpe:{257 + n_merges}', texts=[text])
    encoded = [enc.decode_single_token_bytes(i) for i in tokenizer.encode(enc, text)]
    assert encoded == [token for word in words for token in word]


def test_bpe_on_source_code_agrees_with_the_naive_count():
    text = dict(python()[0])['shutil.py'][:6000]
    assert list(tokenizer.train_bpe([text], 60)) == naive_bpe([text], 60)[0]


def test_bpe_does_not_learn_from_invalid_bytes():
    assert tokenizer.train_bpe([b'\xff\xfe' * 50 + b'abab'], 1).keys() - {bytes([i]) for i in range(256)} == {b'ab'}


def test_bpe_saved_and_loaded(tmp_path):
    folder = tmp_path / 'out'
    made = tokenizer.get_tokenizer('bpe:290', texts=[TEXT])
    tokenizer.save_tokenizer(made, str(folder))
    assert os.listdir(folder) == ['tokenizer.bpe']
    lines = (folder / 'tokenizer.bpe').read_text().split()
    assert [made.decode_single_token_bytes(i) for i in range(289)] == [base64.b64decode(line) for line in lines]
    loaded = tokenizer.get_tokenizer('bpe:290', str(folder))
    assert (tokenizer.encode(loaded, TEXT) == tokenizer.encode(made, TEXT)).all()
    another = tokenizer.get_tokenizer('bpe:290', texts=[b'quite another text, from which other merges would follow'])
    assert tokenizer.digest(loaded) == tokenizer.digest(made) != tokenizer.digest(another)
    fails(str(folder / 'tokenizer.bpe'), tokenizer.get_tokenizer, 'bpe:291', str(folder))
    for broken in (b'not base64!', b'\n'.join(line.encode() for line in lines[:-1] + lines[-2:-1]), b''):
        (folder / 'tokenizer.bpe').write_bytes(broken)
        fails(str(folder / 'tokenizer.bpe'), tokenizer.get_tokenizer, 'bpe:290', str(folder))


def test_bpe_learns_from_training_documents_alone(tmp_path):
    words = [first + second for first in 'abcde' for second in 'uvwxyz']        # 30 pairs, once each, then 9 of one
    path = write(tmp_path / 'a.txt', '\n'.join(words + ['z' * 10]).encode())
    enc = data.prepare(path, 'bpe:258', str(tmp_path / 'out'), quiet=True)[2]
    assert enc.decode_single_token_bytes(256) == b'au'


def test_tokenizers_that_cannot_be(tmp_path):
    for name in ('', 'word', 'bpe', 'bpe:', 'bpe:256', 'bpe:x', 'bpe:-300', 'gpt4', 'bpe:1e4'):
        message = fails(f"'{name}'", tokenizer.get_tokenizer, name, str(tmp_path), [TEXT])
        assert 'bytes' in message and 'bpe:N' in message and 'gpt2' in message
    fails(str(tmp_path), tokenizer.get_tokenizer, 'bpe:300', str(tmp_path))
    assert tokenizer.get_tokenizer('bpe:257', texts=[b'']).n_vocab == 257
    # 'abcd' has 3 merges in it: the number that is offered must be the largest that works
    fails('only 3', tokenizer.get_tokenizer, 'bpe:1000', texts=[b'abcd'])
    fails('bpe:260', tokenizer.get_tokenizer, 'bpe:261', texts=[b'abcd'])
    assert tokenizer.encode(tokenizer.get_tokenizer('bpe:260', texts=[b'abcd']), b'abcd').tolist() == [258]


def test_ids_past_uint16():
    ranks = {bytes([i]): i for i in range(256)}
    enc = tokenizer.tiktoken.Encoding('large', pat_str=tokenizer.WORD, mergeable_ranks=ranks,
                                 special_tokens={'<|endoftext|>': 70000})
    assert tokenizer.encode(enc, b'a\xff').dtype == np.uint32
