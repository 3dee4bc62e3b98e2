"""Texts of classes for zero-shot classification: labels, in templates with a place for them."""

import functools
import importlib.util
import pathlib
import re
from collections.abc import Sequence
from types import ModuleType

from etils import epath

from vit_jax.data.tokenizers import cleaning
from vit_jax.errors import UserError, shown
from vit_jax.io import storage

PLACE = '{}'  # of the label in a template
# Of the package open_clip (zero_shot_metadata.py), from openai/CLIP
# notebooks/Prompt_Engineering_for_ImageNet.ipynb.
TEMPLATES = {
    'openai_80': 'OPENAI_IMAGENET_TEMPLATES', 'openai_7': 'SIMPLE_IMAGENET_TEMPLATES',
}  # fmt: skip
LABELS = {'imagenet': 'IMAGENET_CLASSNAMES'}  # in the order of its 1,000 labels
MOST_BYTES = 2**24  # of a file of labels or templates
# google-research/big_vision evaluators/proj/image_text/prompt_engineering.py, canonicalize_text
CANONICAL = ('underscores', 'punctuation', 'lower', 'spaces')


def labels_of(given: str | Sequence[str] | None, classes: Sequence[str]) -> tuple[str, ...]:
    """Labels of the classes of a data set.

    Args:
      given: labels; 'imagenet', the names that CLIP has for its classes; or a text file with one a
        line. None: the names of the classes, with spaces for underscores.
      classes: names of the classes.

    Raises:
      UserError: there is not one for each class, or one is empty.
    """
    if given is None:
        found = tuple(name.replace('_', ' ') for name in classes)
    else:
        found = chosen('labels', given, LABELS)
    if len(found) != len(classes):
        raise UserError(
            f'there are {len(found)} labels, and the data set has {len(classes)} classes'
        )
    return found


def templates_of(given: str | Sequence[str]) -> tuple[str, ...]:
    """Templates; `given` as in `labels_of`, or 'openai_80' or 'openai_7' of CLIP.

    Raises UserError for a template that does not have one place for the label, {}.
    """
    found = chosen('templates', given, TEMPLATES)
    for template in found:
        if template.count(PLACE) != 1:
            raise UserError(
                f'template {shown(template)} has {template.count(PLACE)} places {PLACE} for the '
                'label, not 1'
            )
    return found


def prompts(
    labels: Sequence[str], templates: Sequence[str], canonical: bool = False
) -> list[str]:
    """All templates of the first label, then those of the second, ...

    `canonical` ones have no punctuation and no capitals, as big_vision's.
    """
    texts = [template.replace(PLACE, label) for label in labels for template in templates]
    return [cleaning.clean(text, CANONICAL) for text in texts] if canonical else texts


def chosen(setting: str, given: str | Sequence[str], known: dict[str, str]) -> tuple[str, ...]:
    """The texts of a setting: themselves, the lines of a file, or those of open_clip by name."""
    if not isinstance(given, str):
        found = tuple(given)
    elif given in known:
        found = tuple(getattr(of_open_clip(), known[given]))
        found = tuple(one if isinstance(one, str) else one(PLACE) for one in found)
    else:
        found = lines(setting, given, known)
    for text in found:
        if not isinstance(text, str) or not text.strip():
            raise UserError(f'{setting}: {shown(text)} is not a text')
    if not found:
        raise UserError(f'{setting}: there are none')
    return found


def lines(setting: str, path: str, known: dict[str, str]) -> tuple[str, ...]:
    """The lines of a text file, blank ones at its end left out.

    Raises UserError for another blank line, and for no file, naming the `known` names.
    """
    data = storage.read(epath.Path(path), MOST_BYTES)
    if data is None:
        raise UserError(f'{setting} is {path!r}, which is no file, and not {" or ".join(known)}')
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        raise UserError(f'{setting}: {path} is not UTF-8 at byte {e.start}') from None
    # Not splitlines, which cuts at characters that texts may have inside, such as U+2028.
    found = [line.strip() for line in re.split('\r\n|\n|\r', text.removeprefix('\ufeff').rstrip())]
    if '' in found[:-1]:
        raise UserError(f'{setting}: line {found.index("") + 1} of {path} is blank; remove it')
    return tuple(found) if found != [''] else ()


@functools.cache
def of_open_clip() -> ModuleType:
    """The module zero_shot_metadata of open_clip, which is not imported, as that needs PyTorch."""
    package = importlib.util.find_spec('open_clip')
    path = package and pathlib.Path(package.origin).parent / 'zero_shot_metadata.py'
    if not path or not path.exists():
        raise UserError(
            "CLIP's templates and names of ImageNet's classes are in the package open_clip: "
            'pip install --no-deps open_clip_torch; or name a file with one a line'
        )
    spec = importlib.util.spec_from_file_location('open_clip_zero_shot_metadata', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
