import time
from pathlib import Path

import pytest

from mell_shared.bus import InvalidSubjectError
from mell_shared.clock import ManualClock, SystemClock
from mell_shared.ids import process_id, request_id, sequence_id
from mell_shared.models import ModelNotFoundError, default_model_dir, folder_name, locate_model
from mell_shared.subjects import Subjects, check_pattern, check_subject


@pytest.mark.parametrize("name", ["worker", "my worker.1", "", "  ", "größe", "a*b>c", "-x-"])
def test_a_process_id_is_new_at_every_start_and_one_subject_token(name: str) -> None:
    """Whatever the name, the id fits into a subject and never repeats."""
    ids = {process_id(name) for _ in range(100)}
    assert len(ids) == 100
    for made in ids:
        check_subject(made)
        assert "." not in made


def test_a_sequence_s_id_names_its_request_prompt_and_choice() -> None:
    """Ids of one request differ by prompt and choice; request ids say their kind."""
    request = request_id("chatcmpl")
    assert request.startswith("chatcmpl-")
    assert request != request_id("chatcmpl")
    assert sequence_id(request, 0, 1) == f"{request}.0.1"


def test_every_subject_is_one_and_stands_under_its_prefix() -> None:
    """Two deployments with different prefixes share a broker without hearing each other."""
    for prefix in ("mell", "other"):
        subjects = Subjects(prefix)
        names = [
            subjects.place,
            subjects.scheduler_events,
            subjects.worker_commands("w-1"),
            subjects.all_workers,
            subjects.frontend_tokens("f-1"),
            subjects.frontend_control("f-1"),
            subjects.admin("status"),
        ]
        assert len(set(names)) == len(names)
        for name in names:
            check_subject(name)
            check_pattern(name)
            assert name.startswith(f"{prefix}.")


def test_a_forged_id_makes_no_subject() -> None:
    """An id with a space, a wildcard or a line end does not pass as part of a subject."""
    for forged in ("a b", "*", ">", "x\r\nPUB", "", "a..b"):
        with pytest.raises(InvalidSubjectError):
            check_subject(Subjects().frontend_tokens(forged))


def test_the_system_s_clock_counts_microseconds_and_never_runs_back() -> None:
    """Its readings are integers, rise, and agree with the operating system's."""
    clock = SystemClock()
    before_ns = time.monotonic_ns()
    readings = [clock.now_us() for _ in range(1000)]
    after_ns = time.monotonic_ns()
    assert readings == sorted(readings)
    assert before_ns // 1000 <= readings[0] <= readings[-1] <= after_ns // 1000


def test_a_manual_clock_moves_when_told() -> None:
    """It stands still between steps and does not go back."""
    clock = ManualClock(5)
    assert clock.now_us() == clock.now_us() == 5
    clock.advance_us(10)
    assert clock.now_us() == 15
    with pytest.raises(AssertionError):
        clock.advance_us(-1)


def test_a_model_is_found_as_a_folder_or_in_the_store(tmp_path: Path) -> None:
    """A folder wins, then the store under the model's name; a hub id's slash is no folder."""
    store, own = tmp_path / "store", tmp_path / "own"
    for folder in (store / "tiny", store / "org--tiny", own):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    assert locate_model(str(own), store) == own
    assert locate_model("tiny", store) == store / "tiny"
    assert locate_model("org/tiny", store) == store / folder_name("org/tiny")


def test_a_missing_model_says_how_to_get_it(tmp_path: Path) -> None:
    """A folder without a configuration is no model; the error names the command."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFoundError, match="mell model pull empty"):
        locate_model("empty", tmp_path)
    assert default_model_dir().is_relative_to(Path.home())
