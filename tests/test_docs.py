"""What README and the pages in results/, models/ name is there: files, links, images, options; and README is short."""
import glob
import os
import re

import pytest
from conftest import ROOT

PAGES = ['README.md', 'models/README.md',
         *sorted(os.path.relpath(path, ROOT) for path in glob.glob(os.path.join(ROOT, 'results', '*.md')))]
OTHERS = {'nproc_per_node', 'durations', 'dist', 'no-deps', 'chunk_size', 'form', 'key'}    # others', the past's


def page(name):
    with open(os.path.join(ROOT, name), encoding='utf-8') as file:
        return file.read()


@pytest.mark.parametrize('name', PAGES)
def test_links_lead_somewhere(name):
    for target in re.findall(r'\]\(([^)#]+)\)', page(name)):
        if not target.startswith('http'):
            assert os.path.exists(os.path.join(ROOT, os.path.dirname(name), target)), f'{name} links to {target}'


@pytest.mark.parametrize('name', PAGES)
def test_scripts_and_options_exist(name):
    source = ''.join(page(os.path.basename(path)) for path in glob.glob(os.path.join(ROOT, '*.py')))
    fields = {*re.findall(r'^    (\w+): ', source, flags=re.M)} | {*re.findall(r"'--([\w-]+)'", source)} | OTHERS
    for script in re.findall(r'python (\w+\.py)', page(name)):
        assert os.path.exists(os.path.join(ROOT, script)), f'{name} runs {script}'
    for option in re.findall(r'(?<![\w-])--([a-z][\w-]*)', page(name)):
        assert option in fields | {'help'}, f'{name} names --{option}'


def test_every_file_is_on_the_map():
    on_map = {*re.findall(r'^(\w+\.py) ', page('README.md'), flags=re.M)}
    assert on_map == {os.path.basename(path) for path in glob.glob(os.path.join(ROOT, '*.py'))}


def test_the_readme_can_be_read_in_five_minutes():
    text = page('README.md')
    assert text.count('\n') <= 200 and len(text.encode()) <= 12 * 1024, (text.count('\n'), len(text.encode()))
