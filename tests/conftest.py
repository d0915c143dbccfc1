"""Settings that JAX needs before it starts: eight CPU devices, a quick compiler, and one folder of compiled programs.

Compiling takes nearly all of the time, and many tests compile the same programs. So the processes of one test run, and
those that its tests start, share a folder, which the run creates and removes. It is never the user's folder and is not
kept, because JAX does not tell processors apart. No test is about LLVM's optimizations.
"""

import os
import shutil
import tempfile
from importlib.metadata import version
from importlib.util import find_spec

from hypothesis import settings

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
"""Whether this process is a worker of pytest-xdist, which has the environment of the run that started it."""

FLAGS: dict[str, object] = {"--xla_force_host_platform_device_count": 8, "--xla_backend_optimization_level": 0}
# Other versions of XLA stop at a flag that they do not know: later ones, and the one in libtpu, which reads them too.
if version("jaxlib").startswith("0.10.") and find_spec("libtpu") is None:
    FLAGS["--xla_cpu_parallel_codegen_split_count"] = 1
    FLAGS["--xla_cpu_use_fusion_emitters"] = "false"  # these emitters take two thirds of the time to compile
for flag, value in FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()

if not IS_WORKER:
    os.environ |= {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": tempfile.mkdtemp(prefix="adalomo-jax-tests-"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

import jax  # noqa: E402  (after its environment is set)
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Leaves the files in their order: pytest-xdist would begin the files of one long test last, alone on a core.

    If a worker dies, the others go on, and the test that it ran has failed. A worker in its place would wait for ever
    with ``--dist loadfile`` (pytest-xdist 3.8).
    """
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
        if config.option.maxworkerrestart is None:
            config.option.maxworkerrestart = "0"


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the folder at the end of the run."""
    if not IS_WORKER:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True)
def compiled_anew(request: pytest.FixtureRequest):
    """A test marked ``uncached`` reads the memory, HLO or times of programs compiled for it, not of cached ones."""
    is_marked = request.node.get_closest_marker("uncached") is not None
    if is_marked:
        _use_cache(False)
    yield
    if is_marked:
        _use_cache(True)


def _use_cache(used: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", used)
    compilation_cache.reset_cache()  # JAX checks only once whether it has a cache
