"""Every public function of the package says the types of its arguments and of what it returns."""

import ast

from pages import ROOT


def public_functions(body, inside=''):
    """(name, node) of the functions of a module or class, as far as their names are public."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from public_functions(node.body, f'{inside}{node.name}.')
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if not node.name.startswith('_'):
                yield f'{inside}{node.name}', node


def missing(node, method):
    """Names of arguments without a type, and 'return'."""
    args = node.args
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    every = every[1:] if method and every and every[0].arg in ('self', 'cls') else every
    every += [a for a in (args.vararg, args.kwarg) if a]
    return [a.arg for a in every if a.annotation is None] + ['return'] * (node.returns is None)


def test_public_functions_are_annotated():
    wrong = []
    for path in sorted((ROOT / 'vit_jax').rglob('*.py')):
        for name, node in public_functions(ast.parse(path.read_text()).body):
            if found := missing(node, '.' in name):
                wrong.append(f'{path.relative_to(ROOT)}: {name}: {", ".join(found)}')
    assert not wrong, '\n'.join(wrong)
