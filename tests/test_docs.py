"""What README.md and docs/ name is there: links, files, commands, tests, the map, the example."""

import re

import pytest
from pages import FENCED, PAGES, ROOT, prose

# Folders of the repository: text in code marks that begins with one of these names a file.
PLACES = ('vit_jax', 'tests', 'experiments', 'benchmarks', 'docs', 'launch')
each_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)


def anchors(page):
    """What links to the headings of a page end in, as GitHub and mkdocs both make it."""
    found = re.findall(r'^#+ (.*)$', prose(page), re.M)
    return {re.sub(r'[^\w -]', '', heading).strip().lower().replace(' ', '-') for heading in found}


@each_page
def test_links_lead_somewhere(page):
    text, wrong = prose(page), []
    links = re.findall(r'\]\(([^)\s]+)\)', text)
    for link in links:
        if re.match(r'https?://', link):
            continue
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        inside = target.is_relative_to(page.parent)  # a site of docs/ has nothing else
        if not (target.exists() and inside) or anchor and anchor not in anchors(target):
            wrong.append(link)
    assert not wrong
    assert page.parent != ROOT or len(links) > 10


@each_page
def test_a_page_has_one_title_and_no_heading_twice(page):
    headings = re.findall(r'^(#+) (.*)$', prose(page), re.M)
    assert [len(level) for level, _ in headings].count(1) == 1 and len(headings[0][0]) == 1
    assert len(anchors(page)) == len(headings)
    assert not any('--' in anchor for anchor in anchors(page))  # GitHub and mkdocs differ there


@each_page
def test_files_that_a_page_names_exist(page):
    named = re.findall(rf'(?<![\w/.-])(?:{"|".join(PLACES)})/[\w/]+\.\w+', page.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]


@each_page
def test_commands_and_functions_that_a_page_names_exist(page):
    text, wrong = page.read_text(), []
    for name in re.findall(r'python -m ([\w.]+)', text):
        place = ROOT / name.replace('.', '/')
        if not place.with_suffix('.py').exists() and not (place / '__main__.py').exists():
            wrong.append(name)
    for name in re.findall(r'`(vit_jax\.[\w.]+)`', text):
        module, _, attribute = name.rpartition('.')
        place = ROOT / module.replace('.', '/')
        place = place / '__init__.py' if place.is_dir() else place.with_suffix('.py')
        command = ROOT / name.replace('.', '/')  # vit_jax.evaluate
        command = command.with_suffix('.py').exists() or (command / '__main__.py').exists()
        if not command and not re.search(rf'\b{attribute}\b', place.read_text()):
            wrong.append(name)
    assert not wrong


@each_page
def test_tests_that_a_page_names_exist(page):
    form = r'pytest (?:-m slow )?((?:tests/\w+\.py ?)+)(?:-k "?([\w ]+))?'
    for files, words in re.findall(form, page.read_text()):
        texts = [(ROOT / name).read_text() for name in files.split()]
        functions = ' '.join(re.findall(r'^def (test_\w+)', '\n'.join(texts), re.M))
        assert all(word in functions for word in words.split(' or ')), (files, words)


def test_the_map_names_every_file_of_the_package():
    text = (ROOT / 'docs' / 'architecture.md').read_text()
    drawn, stack = set(), []
    for indent, name in re.findall(r'^((?: {4})(?:  )*)([\w/]+/|\w+\.py)(?=\s)', text, re.M):
        depth = (len(indent) - 4) // 2
        stack[depth:] = [name.rstrip('/')]
        path = '/'.join(stack)
        drawn.add(path if name.endswith('.py') else f'{path}/__init__.py')
    files = {str(p.relative_to(ROOT)) for p in (ROOT / 'vit_jax').rglob('*.py')}
    assert drawn == files, (sorted(files - drawn), sorted(drawn - files))
    assert all(f'`{p.name}`' in text for p in (ROOT / 'benchmarks').glob('[a-z]*.py')
               if p.name != 'peers.py')  # fmt: skip


def test_the_page_on_extending_shows_the_whole_example():
    blocks = FENCED.findall((ROOT / 'docs' / 'extending.md').read_text())
    shown = ''.join(code for kind, code in blocks if kind == 'python')
    source = (ROOT / 'tests' / 'denoise.py').read_text().replace('  # fmt: skip', '')
    assert list(filter(None, shown.splitlines())) == list(filter(None, source.splitlines()))
