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
BREAKS = re.compile('\r\n|[\r\u2028\u2029]')
SPACES = re.compile(r'\s+')


@functools.cache
def fixer() -> Callable[[str], str] | None:
    """ftfy's fix_text; None where ftfy is not installed."""
    try:
        from ftfy import fix_text
    except ImportError:
        return None
    return fix_text


def named(protocol: str) -> str:
    """A protocol that calls ftfy, with a note where ftfy is not installed."""
    return protocol if fixer() else f'{protocol}, without ftfy'


def fix(text: str) -> str:
    """Straight quotes, letters of one width, no ligatures and control characters, composed (NFC).

    This is what ftfy's fix_text does to characters (rspeer/python-ftfy ftfy/chardata.py). Where
    ftfy is installed, it is called; it also repairs text that was decoded by a wrong encoding.
    """
    found = fixer()
    if found:
        return found(text)
    return unicodedata.normalize('NFC', BREAKS.sub('\n', text.translate(plain())))


@functools.cache
def plain() -> dict[int, str | None]:
    """What `fix` makes of characters; U+0080 to U+009F are meant as bytes of Windows-1252."""
    compatible = [*'ĲĳŉǱǲǳǄǅǆǇǈǉǊǋǌﬀﬁﬂﬃﬄﬆ\u3000', *map(chr, range(0xFF01, 0xFFF0))]
    table = {ord(one): unicodedata.normalize('NFKC', one) for one in compatible} | {0xFB05: 'ſt'}
    for code in range(0x80, 0xA0):
        table[code] = bytes([code]).decode('cp1252', 'ignore') or chr(code)
    quotes = {0x2BC: "'"} | dict.fromkeys(range(0x2018, 0x201C), "'")
    quotes |= dict.fromkeys(range(0x201C, 0x2020), '"')
    removed = (range(9), (11,), range(14, 32), (127,), range(0x206A, 0x2070), (0xFEFF,),
               range(0xFFF9, 0xFFFD))  # fmt: skip
    table = {code: one.translate(quotes) for code, one in table.items()} | quotes
    return table | dict.fromkeys(code for codes in removed for code in codes)


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
