"""What must be set before JAX starts: eight CPU devices, a compiler in haste, and one folder of what it has compiled.

Nearly all of the time goes into compiling, and many tests compile the same. So the processes of one test run, and those
that its tests start, share a folder, which the run makes and takes away. It is never the user's, nor kept: JAX does not
tell processors apart. What LLVM would optimize no test is about.
"""

import os
import shutil
import tempfile
from importlib.metadata import version
from importlib.util import find_spec

from hypothesis import settings

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
"""Whether this process is one of pytest-xdist's, which has the environment of the run that started it."""

FLAGS: dict[str, object] = {"--xla_force_host_platform_device_count": 8, "--xla_backend_optimization_level": 0}
# Other versions of XLA end at a flag that they do not know: later ones, and that in libtpu, which reads them, too.
if version("jaxlib").startswith("0.10.") and find_spec("libtpu") is None:
    FLAGS["--xla_cpu_parallel_codegen_split_count"] = 1
    FLAGS["--xla_cpu_use_fusion_emitters"] = "false"  # which take two thirds of the time to compile
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

import jax  # noqa: E402  (after its environment)
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_unconfigure(config: pytest.Config) -> None:
    """The folder goes with the run."""
    if not IS_WORKER:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True)
def compiled_anew(request: pytest.FixtureRequest):
    """A test marked ``uncached`` reads memory, HLO or times: of what is compiled for it, not of what was kept."""
    is_marked = request.node.get_closest_marker("uncached") is not None
    if is_marked:
        _use_cache(False)
    yield
    if is_marked:
        _use_cache(True)


def _use_cache(used: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", used)
    compilation_cache.reset_cache()  # JAX asks once whether there is one
