"""
What every script needs from the command line and the disk, in one place below everything else (imports none of ours).

    @dataclass
    class Run:
        learning_rate: float = 3e-3     # peak learning rate       <- the comment is the help text
    given = read_args([Run], sys.argv[1:])      # --learning_rate=1e-3; an unknown or ill-typed key is refused by name
    run, = build([Run], PRESET | given)         # a value out of range is refused by the dataclass itself

Errors that a user can cause are UserError: one line on stderr, exit code 1 (2 for a wrong command line), no traceback.
Files are written whole or not at all: to a temporary file beside the target, flushed to the disk, then renamed. Links
are followed; devices and pipes are written to as they are.

Does NOT include: config files, nested keys, environment variables.
"""
import ast
import atexit
import contextlib
import dataclasses
import difflib
import errno
import glob
import inspect
import math
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import unicodedata


# options that earlier versions had: what takes their place, if anything does, and what to say
RENAMED = {'chunk_size': ('tile', 'is now --tile'), 'form': ('data', 'is now a part of --data, as in --data=niah:full'),
           'cms_inner': ('', 'is gone: the levels move by gradient descent alone'),
           'cms_meta': ('', 'is gone: what training learns about the moves is of first order')}


# what torch and numpy say when memory is short, or when the size alone is more than a number holds
NO_MEMORY = ("OutOfMemoryError|can't allocate memory|Storage size calculation overflowed|array is too big"
             '|Maximum allowed dimension exceeded|Invalid buffer size')


class UserError(Exception):
    """Something the user can mend. The message says what is wrong and what to do."""
    exit_code = 1


class UsageError(UserError):
    """A wrong command line."""
    exit_code = 2


class Switch(str):
    """The kind of a knob that is 'true', 'false' or 'auto': given as a flag is."""


def one_line_errors(speaks=lambda: True):
    """
    Report a UserError as one line on stderr, and a Ctrl-C as nothing; a bug keeps its traceback. speaks: asked before
    an error is reported, whether this process is the one to do it, should several have met the same.
    """
    for name in ('stdin', 'stdout', 'stderr'):      # one that is closed, as in >&-, is None: it holds and takes nothing
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'r' if name == 'stdin' else 'w'))
    for stream, errors in ((sys.stdin, 'surrogateescape'), (sys.stdout, 'replace'), (sys.stderr, 'replace')):
        if hasattr(stream, 'reconfigure'):  # a character that the terminal cannot show must not end a training run
            stream.reconfigure(errors=errors)

    def hook(kind, error, traceback):
        if issubclass(kind, MemoryError) or re.search(NO_MEMORY, f'{kind.__name__}: {error}'):
            kind, error = UserError, UserError('out of memory; try a larger --grad_accum, or a smaller --batch_size, '
                                               '--block_size or model')
        if issubclass(kind, (KeyboardInterrupt, BrokenPipeError)):
            leave(130)
        if not speaks():
            leave(getattr(error, 'exit_code', 1))
        if issubclass(kind, OSError):           # what the system refuses and nobody has named: mostly a full stdout
            kind, error = UserError, UserError(f"{error.filename or 'standard input or output'}: "
                                               f'{error.strerror or error}')
        if issubclass(kind, UserError):
            leave(error.exit_code, error)       # sys.excepthook cannot choose the exit code
        sys.__excepthook__(kind, error, traceback)
    sys.excepthook = hook
    atexit.register(flush_last)


def leave(code, error=''):
    """End at once, with that error as a line on stderr if there is one. A stream that takes nothing is no obstacle."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        if error:
            print(f"{clear(sys.stderr)}error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    os._exit(code)                              # nothing is left to flush, or it cannot be


def flush_last():
    """At the end: what stdout does not take any more is an error, and not a warning of Python's."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        leave(130)
    except (OSError, ValueError) as error:
        leave(1, f"standard output: {getattr(error, 'strerror', error)}")


# -----------------------------------------------------------------------------
# flat dataclasses as command lines


def comments(cls):
    """{field name: the comment behind it in the source}, so that the knob block is also the help text."""
    return dict(re.findall(r'^    (\w+): .*?  # (.*)$', inspect.getsource(cls), flags=re.M))


def docstring(thing):
    """Of a class or a module, from its source as well: python -OO keeps none."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    return ast.get_docstring(tree if inspect.ismodule(thing) else tree.body[0])


def read_args(classes, argv, positional=None, hidden=()):
    """
    --key=value words (--flag alone means true) -> {key: value}, with the types of the dataclasses' fields.

    positional  the field that takes a bare word, at most one; None refuses bare words
    hidden      fields that are not for the command line
    """
    fields = {f.name: f for cls in classes for f in dataclasses.fields(cls) if f.name not in hidden}
    given, bare = {}, False
    dash = f"; a {positional} that begins with a dash is written --{positional}='...', or after --" * bool(positional)
    for word in argv:
        if word == '--' and positional and not bare:
            bare = True
            continue
        if word in ('-h', '--help') and not bare:
            print_help(classes, hidden)
            sys.exit(0)
        if word.startswith('--') and not bare:
            key, sep, text = word[2:].partition('=')
        elif positional and (bare or word == '-' or not word.startswith('-')):
            key, sep, text = positional, '=', word
        else:
            raise UsageError(f"'{word}' is not understood; options are written --key=value, --help lists them{dash}")
        if key not in fields and key in RENAMED and RENAMED[key][0] in ('', *fields):
            raise UsageError(f'--{key} {RENAMED[key][1]}')
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f', did you mean --{near[0]}?' if near else f'; --help lists them all{dash}'
            raise UsageError(f'unknown option --{key}{hint}')
        if key in given:
            hint = ': quote a prompt of several words' if key == positional else ''
            raise UsageError(f'--{key} is given twice{hint}')
        given[key] = convert(key, fields[key].type, text if sep else None)
    return given


def build(classes, values):
    """One instance of each dataclass from {key: value}; what a __post_init__ refuses is a wrong command line."""
    try:
        return [cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}) for cls in classes]
    except ValueError as error:
        raise UsageError(str(error)) from None


def convert(key, kind, text):
    """The text of one value as its field's type (bool, int, float or str)."""
    kind = kind if isinstance(kind, str) else kind.__name__
    if text is None:
        if kind not in ('bool', 'Switch'):
            raise UsageError(f"--{key} needs a value: --{key}=...")
        text = 'true'
    flags = {'true': True, '1': True, 'yes': True, 'false': False, '0': False, 'no': False}
    try:
        if kind == 'bool':
            return flags[text.lower()]
        if kind == 'Switch':
            return 'auto' if text.lower() == 'auto' else str(flags[text.lower()]).lower()
        value = {'int': int, 'float': float, 'str': str}[kind](text)
    except (KeyError, ValueError):
        takes = {'bool': 'true or false', 'Switch': 'true, false or auto',
                 'int': 'a whole number', 'float': 'a number'}[kind]
        raise UsageError(f"--{key} takes {takes}, not '{text}'") from None
    if kind == 'int' and abs(value) >= 2**63:                   # more than torch, numpy and files can count
        raise UsageError(f'--{key} must be below 2^63, not {text}')
    return value


def print_help(classes, hidden=()):
    """The script's own docstring, then every knob with its default and the comment behind it."""
    print(docstring(sys.modules['__main__']).strip())
    for cls in classes:
        print(f'\n{docstring(cls)}')
        notes = comments(cls)
        for f in dataclasses.fields(cls):
            if f.name not in hidden:
                print(f"  --{f'{f.name}={f.default}':<28} {notes.get(f.name, '')}")


def numbers(name, text):
    """'512,2048' -> [512, 2048], each at least 1 and none twice."""
    found = [int(n) if n.isdecimal() and len(n) < 19 else 0 for n in text.split(',')]
    check(min(found) >= 1 and len(set(found)) == len(found),
          f"--{name} takes different whole numbers above 0 with commas between, as in 512,2048, not '{text}'")
    return found


def words(name, text, known, joined=False):
    """'hope,attention' -> ['hope', 'attention'], each known and none twice; joined: or known ones with + between."""
    found = text.split(',')
    for word in found:
        check({*(word.split('+') if joined and '+' in word else [word])} <= {*known} and found.count(word) == 1,
              f"--{name} takes {', '.join(known)}, with commas between and each once, not '{word}'")
    return found


def check(condition, message):
    """For __post_init__: a value out of range becomes a ValueError, which build reports in one line."""
    if not condition:
        raise ValueError(message)


# -----------------------------------------------------------------------------
# files


def read_file(path, size=-1):
    """The bytes of a file, the first `size` of them; UserError if it cannot be read."""
    try:
        with open(path, 'rb') as file:
            return file.read(size)
    except OSError as error:
        raise UserError(f"could not read {path}: {error.strerror}; check the path and its permissions") from None


def remove_file(path):
    """Remove a file if it is there; UserError if the system refuses."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
    except OSError as error:
        raise UserError(f'could not remove {path}: {error.strerror}') from None


@contextlib.contextmanager
def atomic_write(path):
    """
    A binary file to write to that becomes `path` only when the block ends well: whatever happens before, a crash,
    a full disk, a Ctrl-C, the old file stays as it was, and so do its permissions. Makes the folder. Where path is a
    link, the file that it leads to is written; a device or a pipe takes the bytes as they come (a file put in its
    place would end it). Another hard link to the old file keeps the old file. Raises UserError if the disk refuses.
    """
    target, old = os.path.realpath(path), None
    temporary = f'{target}.{os.getpid()}.tmp'
    try:
        with contextlib.suppress(FileNotFoundError):
            old = os.stat(path).st_mode         # of path: what /dev/stdout leads to may have no name
        if os.path.basename(path) == '' or old and stat.S_ISDIR(old):
            raise IsADirectoryError(errno.EISDIR, 'it names a folder, and a file is needed')
        ours = [fd for fd in (1, 2) if old and same_file(fd, path)]
        if ours:                                # /dev/stdout, wherever it leads: behind what was printed before
            sys.stdout.flush()
        if ours or old and not stat.S_ISREG(old):
            with open(os.dup(ours[0]) if ours else path, 'wb') as file:
                yield file
            return
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if old:
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f'could not write {path}: {why}; what was there before is untouched') from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def same_file(descriptor, path):
    """Whether an open file is the one at path; a closed one is none."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


@contextlib.contextmanager
def locked(path):
    """
    Keep other processes that ask for the same path out until the block ends, by a lock on `path`.lock; UserError if
    one of them has it. The system lets go of it however a process ends. A link and the file that it leads to are one.
    Without fcntl (Windows), or on a disk that knows no locks (some NFS), nobody is kept out.
    """
    path = os.path.realpath(path)
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(f'{path}.lock', 'ab')
    except OSError as error:
        raise UserError(f'could not write {path}.lock: {error.strerror}') from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'{path} is in use by another process; wait until it ends, or name another file') from None
        except OSError as error:
            print(f'note: {path} cannot be locked on this disk ({error.strerror}); let no other process use it',
                  file=sys.stderr)
        else:                               # nobody writes: what is half written is of a process that was killed
            for rest in glob.glob(f'{glob.escape(path)}.*.tmp'):
                if re.fullmatch(r'\d+', rest[len(path) + 1:-4]):
                    remove_file(rest)
        yield


def git_commit():
    """The commit of this code, with -dirty if it was changed since, or 'unknown'."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        return subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=40'], cwd=here,
                              capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'


def run_script(script, options):
    """
    Run one of our scripts with {option: value}, after a line by which it can be run by hand. What it prints is for a
    terminal alone; UserError if it fails, with the last that it said.
    """
    words = [script, *(f'--{name}={value}' for name, value in options.items())]
    print(f'python {shlex.join(words)}', flush=True)
    here = os.path.dirname(os.path.abspath(__file__))
    with subprocess.Popen([sys.executable, os.path.join(here, script), *words[1:]], stderr=subprocess.PIPE, text=True,
                          stdout=None if sys.stdout.isatty() else subprocess.DEVNULL) as process:
        try:
            said = process.communicate()[1].splitlines()
        except KeyboardInterrupt:               # which reaches it too, and it may take time to save
            process.wait()
            raise
    if process.returncode:
        said = (said or [f'exit code {process.returncode}'])[-1]
        raise UserError(f"python {shlex.join(words)} failed: {said.removeprefix('error: ')}")


# -----------------------------------------------------------------------------
# the terminal


class Terminal:
    """A stream to a terminal that may be closed while we run: what it takes no more goes nowhere."""
    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.unless_closed(self.stream.write, text)

    def flush(self):
        self.unless_closed(self.stream.flush)

    @staticmethod
    def unless_closed(f, *args):
        try:
            f(*args)
        except OSError as error:
            if error.errno != errno.EIO:
                raise


def on_stop(handler):
    """
    Call it when this process is asked to stop: by Ctrl-C, by kill, or because its terminal was closed (not under nohup,
    nor on Windows), which must not end it first by refusing a line.
    """
    for name in ('stdout', 'stderr'):
        if getattr(sys, name).isatty():
            setattr(sys, name, Terminal(getattr(sys, name)))
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handler)
    if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, handler)


def clear(stream):
    """What erases the rest of a line on a terminal."""
    return '\033[K' if stream.isatty() else ''


def show_status(text):
    """A line that the next one is written over. Not on a terminal it is no line at all."""
    if sys.stdout.isatty():
        print(f'{clear(sys.stdout)}{text[:shutil.get_terminal_size().columns - 1]}', end='\r', flush=True)


def plain(text):
    """Text for a terminal, which would obey control characters: each but newline and tab is shown as a mark."""
    return ''.join('\ufffd' if unicodedata.category(c) == 'Cc' and c not in '\n\t' else c for c in text)


def print_block(**values):
    """`key: value` lines, the keys padded to one width, made to be grepped."""
    for key, value in values.items():
        print(f"{key + ':':<20}{value}")


def interval(share, n):
    """The 95 % interval of a share of n (Wilson)."""
    z = 1.96
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))
