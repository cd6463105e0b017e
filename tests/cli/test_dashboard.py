"""`reft-edge dashboard` as a new user meets it when something is wrong."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest

from reft_edge.cli.main import main
from tests.written_run import SETTINGS


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "federation.toml"
    path.write_text(SETTINGS)
    return path


def test_a_port_that_is_taken_is_one_line(settings, capsys):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        assert main(["dashboard", str(settings), "--port", port]) == 9
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot listen at 127.0.0.1:{port}" in line


def test_wrong_settings_are_told_before_anything_is_served(settings, capsys):
    settings.write_text(SETTINGS.replace("n_outputs", "n_output"))
    assert main(["dashboard", str(settings)]) == 2
    assert "did you mean 'n_outputs'" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "x", "70000", "-1"])
def test_what_is_no_port_is_refused(settings, capsys, port):
    with pytest.raises(SystemExit) as ended:
        main(["dashboard", str(settings), f"--port={port}"])
    assert ended.value.code == 2
    assert "is no port" in capsys.readouterr().err
