"""Output that libraries write stays out of an answer."""

import os

import pytest

from runtimes.host.output_capture import native_talk_on_stderr


def test_an_answer_on_the_standard_output_stays_alone(capfd: pytest.CaptureFixture[str]) -> None:
    with native_talk_on_stderr():
        os.write(1, b"WARNING: from a library in C\n")
    print("answer")
    assert capfd.readouterr() == ("answer\n", "WARNING: from a library in C\n")
