"""Classifies errors of fsspec's many backends: external or a bug, an answer or none, the reason."""

import errno
import http
import os
import socket
import ssl
from collections.abc import Iterator


def is_external(error: BaseException) -> bool:
    """Whether an error is external, rather than a bug in this package."""
    outside = isinstance(error, (OSError, ValueError, NotImplementedError))
    module = type(error).__module__
    return outside or not (module == 'builtins' or module.startswith('vit_jax'))


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def http_status(error: BaseException) -> int | None:
    """HTTP status of an error or of one of its causes, by the names that the backends use."""
    for e in chain(error):
        code = getattr(e, 'status', None) or getattr(getattr(e, 'response', None), 'status_code', 0)
        code = code or (getattr(e, 'code', None) if type(e).__name__ == 'HttpError' else None)
        if isinstance(code, int) and code:
            return code
    return None


def is_unanswered(error: BaseException) -> bool:
    """Whether there was no answer: no connection, no such host, a time-out, a failing server."""
    code = http_status(error)
    if code:
        return code >= 500 or code == 429
    kinds = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
    names = {'ClientConnectionError', 'TransportError'}  # aiohttp; httpx and google.auth
    return any(
        isinstance(e, kinds) or names & {base.__name__ for base in type(e).__mro__}
        for e in chain(error)
    )


def reason(error: BaseException) -> str:
    """Reason of an error in one line: the status of the answer, else the innermost system error."""
    code = http_status(error)
    if code:
        phrase = http.HTTPStatus(code).phrase if code in set(http.HTTPStatus) else 'no such status'
        return f'the server answers {code} {phrase}'
    errors = list(chain(error))
    for e in reversed(errors):
        if isinstance(e, (socket.gaierror, ssl.SSLError)) and len(e.args) > 1:
            return str(e.args[1])
        if isinstance(e, OSError) and e.errno in errno.errorcode:
            where = f': {e.filename}' if e.filename else ''
            return os.strerror(e.errno) + where
    if any(isinstance(e, FileNotFoundError) for e in errors):
        return 'no such file or folder'
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
