"""Where figures are served, and who may read them."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from reft_edge.errors import ConfigError, ResourceError
from reft_edge.metrics_page import parse_address, serving


def test_a_port_that_is_taken_is_one_error():
    with (
        serving(CollectorRegistry(), "0") as url,
        pytest.raises(ResourceError, match="cannot be served"),
        serving(CollectorRegistry(), url.split("/")[2]),
    ):
        pytest.fail("two listen on one port")


@pytest.mark.parametrize("text", ["", ":9464", "port", "host:", "70000", "host:1e3"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ConfigError, match="HOST:PORT"):
        parse_address(text)


def test_without_a_host_it_listens_on_this_machine_only():
    assert parse_address("9464") == ("127.0.0.1", 9464)
    assert parse_address("0.0.0.0:9464") == ("0.0.0.0", 9464)
    assert parse_address("[::1]:9464") == ("::1", 9464)
