import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mell_console.up.backoff import FIRST_DELAY_US, HEALTHY_US, LONGEST_DELAY_US, next_delay_us
from mell_console.up.loglines import LogLine, last_words, parse_line


def test_a_json_event_is_read_with_its_fields() -> None:
    """Level, event and fields come from a service's JSON line; the summary leaves out what does not help."""
    line = parse_line('{"event": "worker lost", "level": "warning", "timestamp": "t", "worker": "w-1"}')
    assert (line.event, line.level, line.loud) == ("worker lost", "warning", True)
    assert line.summary() == "worker lost worker=w-1"


@pytest.mark.parametrize("text", ["plain words", "{broken", "[1, 2]", '{"no": "event"}', '{"event": 3}', "", "{}"])
def test_anything_else_is_plain_text(text: str) -> None:
    """A line that is no JSON event is kept as it is and is not loud."""
    assert parse_line(text) == LogLine(text, text)


@given(st.text())
def test_no_line_can_break_the_reader(text: str) -> None:
    """Whatever a child writes is read without an error and has a summary."""
    assert isinstance(parse_line(text).summary(), str)
    assert isinstance(parse_line(json.dumps({"event": text, "level": "error"})).summary(), str)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], "it said nothing"),
        (["", ""], "it said nothing"),
        (['{"event": "starting", "level": "info"}'], "starting"),
        (['{"event": "starting", "level": "info"}', "mell: no such model"], "no such model"),
        (['{"event": "broke", "level": "error", "why": "x"}', "Traceback", "ValueError: x"], "broke why=x"),
        (["Traceback (most recent call last):", "ValueError: x", ""], "ValueError: x"),
    ],
)
def test_last_words_are_what_best_says_why(texts: list[str], words: str) -> None:
    """The last error event, else the last plain line, else the last line at all."""
    assert last_words(tuple(parse_line(text) for text in texts)) == words


def test_the_delay_doubles_up_to_a_limit_and_starts_again_after_health() -> None:
    """Deaths one after another wait longer and longer; one after a healthy time counts as the first."""
    delays = [0]
    for _ in range(9):
        delays.append(next_delay_us(delays[-1], ran_us=1000))
    assert delays[1:5] == [FIRST_DELAY_US * factor for factor in (1, 2, 4, 8)]
    assert delays[-1] == LONGEST_DELAY_US
    assert next_delay_us(LONGEST_DELAY_US, ran_us=HEALTHY_US) == FIRST_DELAY_US
