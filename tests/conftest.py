"""What must be set before JAX starts: eight CPU devices, for the tests on a mesh, and a compiler in haste.

Most of the time goes into compiling, much of that into LLVM's optimizations, which no test is about.
"""

import os

from hypothesis import settings

for flag, value in {"--xla_force_host_platform_device_count": 8, "--xla_backend_optimization_level": 1}.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()

os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # the user's cache is no place for what tests compile

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")
