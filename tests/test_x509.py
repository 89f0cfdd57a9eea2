"""When a certificate ends, as ``cryptography`` says; and hostile bytes in place of one."""

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.protocol.x509 import not_after
from tests.certificates import Authority

AUTHORITY = Authority("root")
DER = AUTHORITY.issue("localhost").der


@pytest.mark.parametrize("days", [-20_000, -1, 0, 1, 365, 8_000, 10_000, 100_000])
@pytest.mark.parametrize("key", ["ec", "rsa", "ed25519"])
def test_end_is_read(key, days):
    """Before and after 2050, which are written in two ways."""
    made = AUTHORITY.issue("localhost", key=key, ends=dt.timedelta(days=days))
    assert not_after(made.der) == made.certificate.not_valid_after_utc.timestamp()


@given(st.integers(0, len(DER) - 1), st.integers(0, 255))
def test_changed_certificate_is_read_or_refused(at, byte):
    try:
        not_after(DER[:at] + bytes([byte]) + DER[at + 1 :])
    except (ValueError, IndexError):
        pass


@given(st.binary(max_size=200))
def test_what_is_no_certificate_is_refused(data):
    with pytest.raises((ValueError, IndexError)):
        not_after(data)


@pytest.mark.parametrize("size", range(0, 200, 7))
def test_certificate_that_is_cut_off_is_refused(size):
    with pytest.raises((ValueError, IndexError)):
        not_after(DER[:size])
