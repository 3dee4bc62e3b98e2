"""docs/config.md has every setting with its meaning, and docstrings document what there is."""

import ast
import pathlib

import launched

from vit_jax import config
from vit_jax.config import reference

ROOT = pathlib.Path(__file__).parents[1]


def test_the_page_is_what_the_command_prints():
    page = (ROOT / 'docs' / 'config.md').read_text()
    assert page == reference.markdown(), 'run: python -m vit_jax.config > docs/config.md'


def test_every_setting_has_a_meaning():
    found = list(reference.sections())
    bare = [(s.title, key) for s in found for key in s.keys if not s.meanings.get(key)]
    assert not bare, 'these have no line in Args:, or no comment beside the field'
    assert sum(len(s.keys) for s in found) > 150


def test_the_page_has_the_keys_of_a_whole_config():
    full = config.load(f'{launched.TINY}:/images').to_dict()
    known, title = {}, None
    for section in reference.sections():
        title = section.title if section.level == 2 else title
        known.setdefault(title, set()).update(section.keys)
    parts = {k: v for k, v in full.items() if isinstance(v, dict)}
    assert full.keys() - parts.keys() <= known['Top level']
    assert parts.keys() == known.keys() - {'Top level'}
    for name, part in parts.items():
        for keys in part.values() if name == 'evals' else [part]:
            groups = {key.partition('.')[0] for key in known[name]}
            assert keys.keys() <= known[name] | groups, name


def test_documented_arguments_exist():
    seen = 0
    for path in (ROOT / 'vit_jax').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                continue
            documented = set(reference.arguments(ast.get_docstring(node) or ''))
            inits = [f for f in node.body if getattr(f, 'name', '') == '__init__']
            if documented:
                a = (inits[0] if isinstance(node, ast.ClassDef) else node).args
                there = {one.arg for one in (*a.posonlyargs, *a.args, *a.kwonlyargs)}
                assert documented <= there, f'{path.name}: {node.name}: {documented - there}'
                seen += 1
    assert seen > 15
