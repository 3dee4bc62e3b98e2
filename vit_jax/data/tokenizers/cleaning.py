"""What is done to a text before its tokens are looked up, as steps by name.

    OPENAI      openai/CLIP clip/simple_tokenizer.py basic_clean, whitespace_clean, encode
    SIGLIP      transformers models/siglip/tokenization_siglip.py canonicalize_text
    BIG_VISION  google-research/big_vision pp/ops_text.py tokenize: tf.strings.lower, ASCII alone
    OPEN_CLIP   mlfoundations/open_clip src/open_clip/tokenizer.py, by the name of its `clean`

SigLIP's is that of google-research/big_vision evaluators/proj/image_text/prompt_engineering.py but
for the underscore, which there becomes a space, as in OpenCLIP.
"""

import functools
import html
import re
import string
import unicodedata
from collections.abc import Callable, Sequence

PUNCTUATION = str.maketrans('', '', string.punctuation)
ASCII_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
SPACES = re.compile(r'\s+')


@functools.cache
def fixer() -> Callable[[str], str] | None:
    """ftfy's fix_text; None where ftfy is not installed."""
    try:
        from ftfy import fix_text
    except ImportError:
        return None
    return fix_text


def fix(text: str) -> str:
    """Repairs wrongly decoded text by ftfy; without it, only composes letters (NFC)."""
    found = fixer()
    return found(text) if found else unicodedata.normalize('NFC', text)


STEPS = {
    'fix': fix,
    'unescape': lambda text: html.unescape(html.unescape(text)),
    'spaces': lambda text: SPACES.sub(' ', text).strip(),
    'lower': str.lower,
    'ascii_lower': lambda text: text.translate(ASCII_LOWER),
    'underscores': lambda text: text.replace('_', ' '),
    'punctuation': lambda text: text.translate(PUNCTUATION),
}
OPENAI = ('fix', 'unescape', 'spaces', 'lower')
SIGLIP = ('lower', 'punctuation', 'spaces')
BIG_VISION = ('ascii_lower',)
OPEN_CLIP = {
    'whitespace': ('fix', 'unescape', 'spaces'),
    'lower': OPENAI,
    'canonicalize': ('fix', 'unescape', 'underscores', 'punctuation', 'lower', 'spaces'),
}


def clean(text: str, steps: Sequence[str]) -> str:
    """A text after the steps, in their order."""
    for step in steps:
        text = STEPS[step](text)
    return text
