"""Settings from environment variables."""

import pytest


pytest.importorskip("granian")

from trips_serving.settings import Settings  # noqa: E402


def test_settings_come_from_the_environment():
    settings = Settings.from_environment(
        {
            "TRIPS_MODEL": " org/model ",
            "TRIPS_QUEUE": " 7 ",
            "TRIPS_SCHEDULE": "1:image:0.5,2:text:0.3",
            "TRIPS_ALLOWED_HOSTS": "a.org, *.b.org",
            "TRIPS_KEEP_RATES": "0.0625, 1",
            "HOME": "/",
        }
    )
    assert settings.model == "org/model"
    assert settings.queue == 7
    assert settings.max_texts == Settings(model="m").max_texts
    assert settings.allowed_hosts == ["a.org", "*.b.org"]
    assert settings.keep_rates == [0.0625, 1.0]
    assert settings.schedule == "1:image:0.5,2:text:0.3"


def test_the_traceback_of_scripts_is_not_a_setting():
    settings = Settings.from_environment({"TRIPS_MODEL": "org/model", "TRIPS_TRACEBACK": "1"})
    assert settings == Settings(model="org/model")


@pytest.mark.parametrize(
    "name, value",
    [
        ("TRIPS_MODEL", ""),
        ("TRIPS_QUEUE", "0"),
        ("TRIPS_READ_TIMEOUT", "nan"),
        ("TRIPS_CACHE_BYTES", "-1"),
        ("TRIPS_KEEP_RATES", "0.5,1.5"),
        ("TRIPS_QUEUES", "7"),
        ("TRIPS_ALLOW_URLS", "yes"),  # of releases that fetched URLs
    ],
)
def test_bad_settings_raise(name, value):
    with pytest.raises(ValueError, match=name):
        Settings.from_environment({"TRIPS_MODEL": "org/model", name: value})
