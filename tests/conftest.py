"""Eight simulated CPU devices for every test of this process, and one cache of what is compiled.

The cache is new in each session: it saves the many small runs of the tests from compiling the same
steps again, in this process and in those that the tests start.
"""

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile

import xla_flags

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = xla_flags.devices(8)
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:  # else a parallel worker, or the user's wish
    CACHE = tempfile.mkdtemp(prefix='vit_jax_tests_')
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = CACHE
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'

# Processes of tests import the package hundreds of times: its bytecode is kept in any case.
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)
sys.dont_write_bytecode = False

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes of tests inherit it
# The TPU's compiler ignores SIGHUP where nothing handles it, nohup does, too: processes of tests
# would inherit that. A handler they don't inherit.
signal.signal(signal.SIGHUP, lambda signum, frame: sys.exit(128 + signum))

import jax  # noqa: E402 - it reads the environment
import launching  # noqa: E402
import pytest  # noqa: E402

jax.devices()  # XLA for CPUs reads its flags here, libtpu later
os.environ['XLA_FLAGS'] = xla_flags.devices(8, cpu_alone=False)


@pytest.fixture
def place(tmp_path):
    """A machine on which launch.sh calls stand-ins."""
    with launching.held(tmp_path) as place:
        yield place


def pytest_collection_finish():
    """Spares the collector what was imported: it takes a tenth of the time of tests that trace."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def pytest_sessionfinish():
    """Spares pytest a last collection, which takes seconds: xdist interrupts a worker after 5."""
    gc.freeze()
