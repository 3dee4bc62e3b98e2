"""README.md and the pages of docs/, for tests."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
PAGES = (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')))
FENCED = re.compile(r'^```(\w*)\n(.*?)^```$', re.M | re.S)  # (language, code)
INDENTED = re.compile(r'^ {4}.*\n', re.M)


def prose(page):
    """The text of a page without its blocks of code."""
    return INDENTED.sub('', FENCED.sub('', page.read_text()))


def commands():
    """{command: name of its page} of the indented blocks of all pages."""
    found = {}
    for page in PAGES:
        text = FENCED.sub('', page.read_text())
        form = r'^ {4}(?:\$ )?(?:\.venv/bin/)?((?:python|bash) (?:[^\n]*\\\n)*[^\n]*)'
        for line in re.findall(form, text, re.M):
            found[re.sub(r'\s*\\\n\s*', ' ', re.sub(r'\s+# .*', '', line))] = page.name
    return found
