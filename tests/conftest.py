"""Settings of the property tests."""

from hypothesis import HealthCheck, settings

# Neither a deadline nor a verdict on slow data: a busy machine fails no test.
settings.register_profile("pellucid", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pellucid")
