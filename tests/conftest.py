"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# Shared machines pause for longer than hypothesis' deadline; time is measured in reports/bench, never in a test.
settings.register_profile("planner", deadline=None)
settings.load_profile("planner")
