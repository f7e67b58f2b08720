"""
Tokenizers: bytes to token ids and back, exactly, whatever the bytes. All of them are tiktoken.Encoding objects.

    --tokenizer=bytes       256 bytes + end of text
                bpe:N       N tokens in all, learned from the training documents and kept beside the checkpoint
                gpt2        the 50,257 of tiktoken

    python tokenizer.py     learns from its own source and shows how a line of it is cut as tokens are added

Does NOT include: chat templates, special tokens other than the end of text.
"""
import base64
import collections
import hashlib
import heapq
import os
import re
import sys
import time

import numpy as np
import tiktoken

from cli import UserError, atomic_write, read_file

GPT2 = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'

# A word with its leading space; up to 3 digits; a run of punctuation; white space, less the space that the next word
# takes. Both Python's re and tiktoken's Rust read it. They disagree about a few characters (combining marks are letters
# to Rust only), which costs some compression and nothing else: to both, every character is in one of the branches.
WORD = r' ?[^\W\d_]+|\d{1,3}| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+'
# A word is learned from in parts: a million letters without a blank would be gone through at every merge.
PART = re.compile('(?s:.{1,128})')
NOT_UTF8 = re.compile('([\udc80-\udcff]+)')       # what errors='surrogateescape' makes of the bytes 80 to ff
# Rust's matcher dies of a million blanks in a row, so text goes to it in pieces, that end where words end anyway.
PIECE = re.compile(r'(?s:.{1,500000})(?:(?<=\S)(?=[ \n])|\Z)|(?s:.{1,500000})')


def utf8_pieces(data):
    """Bytes as a list of str: even places hold text, odd places the bytes that are not UTF-8, as surrogates."""
    return NOT_UTF8.split(data.decode('utf-8', 'surrogateescape'))


def train_bpe(texts, n_merges):
    """
    Byte-pair encoding: n_merges times, the most frequent pair of neighbours inside a word becomes a token.
    Ties go to the pair of the smaller ids, so that the same texts give the same tokens everywhere.

    texts     iterable of bytes
    returns {token bytes: rank}, the 256 bytes first; tiktoken merges the lowest rank first, which is the same order
    raises  UserError if the texts run out of pairs
    """
    counts = collections.Counter()
    for data in texts:
        for text in utf8_pieces(data)[::2]:
            counts.update(part for word in re.findall(WORD, text) for part in PART.findall(word))
    words, n_seen = [list(word.encode()) for word in counts], list(counts.values())

    pairs, where = collections.Counter(), collections.defaultdict(set)      # pair -> count, pair -> words that have it
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += n_seen[i]
            where[pair].add(i)

    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    tokens, said = [bytes([i]) for i in range(256)], time.monotonic()
    while len(tokens) < 256 + n_merges:
        if time.monotonic() > said + 5:
            print(f'learning the tokenizer: {len(tokens) - 256:,} of {n_merges:,} merges', file=sys.stderr, flush=True)
            said = time.monotonic()
        if not heap:
            raise UserError(f"the text is too small to learn {n_merges} merges, it has only {len(tokens) - 256}: "
                            f"use --tokenizer=bpe:{len(tokens) + 1} or less, or more text")
        n, pair = heapq.heappop(heap)
        if -n != pairs[pair]:       # out of date: other merges took some. Counts only fall, so none is popped too late
            if pairs[pair]:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue

        new, fresh = len(tokens), set()
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for i in where.pop(pair):
            for old in zip(words[i], words[i][1:]):
                pairs[old] -= n_seen[i]
            word = words[i] = merge(words[i], pair, new)
            for now in zip(word, word[1:]):
                pairs[now] += n_seen[i]
                if new in now:
                    where[now].add(i)
                    fresh.add(now)
        for now in fresh:
            heapq.heappush(heap, (-pairs[now], now))
    return {token: rank for rank, token in enumerate(tokens)}


def merge(word, pair, new):
    """A list of ids with `new` in place of every occurrence of pair, taken from the left."""
    out = []
    for token in word:
        if out and token == pair[1] and out[-1] == pair[0]:
            out[-1] = new           # never mistaken for half of the pair: new is neither of its ids
        else:
            out.append(token)
    return out


def get_tokenizer(name, directory=None, texts=None):
    """
    name        'bytes', 'bpe:N' or 'gpt2'
    directory   the folder whose tokenizer.bpe a bpe:N is, unless there are
    texts       iterable of bytes to learn it from; it stays in memory (save_tokenizer)
    returns a tiktoken.Encoding, whose eot_token is the end of text
    raises  UserError if the name is none of these, or the tokenizer can be neither loaded nor learned
    """
    if name == 'gpt2':
        try:
            return tiktoken.get_encoding('gpt2')
        except Exception as error:      # whatever the network, the disk or the check of the file's hash raise
            raise UserError(f"could not load the gpt2 tokenizer ({type(error).__name__}): fetch {GPT2}vocab.bpe and "
                            f"{GPT2}encoder.json by other means, and put them into the folder that TIKTOKEN_CACHE_DIR "
                            "names, as 6d1cbeee0f20b3d9449abfede4726ed8212e3aee (vocab.bpe) and "
                            "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6 (encoder.json)") from None

    tokens = [bytes([i]) for i in range(256)]
    if name != 'bytes':
        n_vocab = int(name[4:]) if re.fullmatch(r'bpe:[0-9]{3,7}', name) else 0
        if n_vocab < 257:
            raise UserError(f"no tokenizer '{name}': --tokenizer takes bytes, gpt2, or bpe:N with N of 257 or more")
        path = os.path.join(directory or '', 'tokenizer.bpe')       # one token a line, in order of rank
        if texts is not None:
            tokens = list(train_bpe(texts, n_vocab - 257))
        elif os.path.exists(path):
            lines = read_file(path).split()
            try:
                tokens = [base64.b64decode(line, validate=True) for line in lines]
            except ValueError:
                tokens = []
            if tokens[:256] != [bytes([i]) for i in range(256)] or not len(set(tokens)) == len(tokens) == n_vocab - 1:
                raise UserError(f"{path} is not a {name} of {n_vocab - 1} tokens and an end of text: put the file "
                                "back that the run learned")
        else:
            raise UserError(f"{path} is missing: the run that learned {name} keeps it next to its checkpoint")
    return tiktoken.Encoding(name, pat_str=WORD, mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
                             special_tokens={'<|endoftext|>': len(tokens)}, explicit_n_vocab=len(tokens) + 1)


def save_tokenizer(enc, directory):
    """Keep a bpe:N in directory; the others are the same everywhere."""
    if enc.name.startswith('bpe'):
        with atomic_write(os.path.join(directory, 'tokenizer.bpe')) as file:
            file.writelines(base64.b64encode(token) + b'\n' for token in vocabulary(enc)[:enc.eot_token])


def digest(enc):
    """What tells a tokenizer from all that cut text otherwise."""
    return hashlib.sha256(repr(vocabulary(enc)).encode()).hexdigest()


def token_type(enc):
    return np.dtype(np.uint16 if enc.n_vocab <= 65536 else np.uint32)


def encode(enc, data):
    """
    Bytes to a 1-D array of token ids, uint16 (uint32 past 65,536 tokens). enc.decode_bytes(ids.tolist()) gives the
    bytes back, always; an <|endoftext|> spelled out in the data is text like any other.
    """
    if enc.name == 'bytes':
        return np.frombuffer(data, np.uint8).astype(np.uint16)
    ids = [np.empty(0, token_type(enc))]
    for i, text in enumerate(utf8_pieces(data)):
        if i % 2:       # not UTF-8: each byte by itself
            ids.append(np.array([enc.encode_single_token(bytes([ord(c) - 0xdc00])) for c in text], token_type(enc)))
        else:
            ids += [np.array(enc.encode_ordinary(piece), token_type(enc)) for piece in PIECE.findall(text)]
    return np.concatenate(ids)


def vocabulary(enc):
    """The bytes of every token, in order of id; none for the end of text, which is no part of a document."""
    return [b'' if i == enc.eot_token else enc.decode_single_token_bytes(i) for i in range(enc.n_vocab)]


# -----------------------------------------------------------------------------
# python tokenizer.py


def main():
    """More merges, fewer tokens: one line of this file through tokenizers learned on all of it."""
    source = read_file(__file__)
    line = b'def get_tokenizer(name, directory=None, texts=None):'
    print(f'{len(source):,} bytes of source; one line of it:')
    for n_vocab in (257, 300, 400, 600):
        enc = get_tokenizer(f'bpe:{n_vocab}', texts=[source])
        pieces = [enc.decode_single_token_bytes(i).decode(errors='replace') for i in encode(enc, line)]
        print(f'bpe:{n_vocab} | {len(encode(enc, source)):>6,} tokens | ' + '|'.join(pieces))


if __name__ == '__main__':
    main()
