"""What all tests share: how hard hypothesis tries.

`./dev test` uses the profile "ci", `./dev fuzz` sets HYPOTHESIS_PROFILE=fuzz.
"""

import os

from hypothesis import HealthCheck, settings

# No deadline: a shared machine's pauses are not a slow parser; pytest-timeout ends what hangs. Each run draws new
# examples, and print_blob gives the line that repeats a failure.
settings.register_profile("ci", deadline=None, derandomize=False, print_blob=True)
settings.register_profile(
    "fuzz", settings.get_profile("ci"), max_examples=20_000, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
