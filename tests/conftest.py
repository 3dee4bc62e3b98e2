"""Eight simulated CPU devices for every test of this process, and one cache of what is compiled.

The cache is new in each session: it saves the many small runs of the tests from compiling the same
steps again, in this process and in those that the tests start.
"""

import atexit
import os
import shutil
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:  # else a parallel worker, or the user's wish
    CACHE = tempfile.mkdtemp(prefix='vit_jax_tests_')
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = CACHE
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'
