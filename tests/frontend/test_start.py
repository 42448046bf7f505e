import subprocess
import sys
from pathlib import Path

import pytest

from mell_frontend.settings import FrontendSettings
from tests.frontend import folders


def test_importing_the_frontend_does_not_import_torch(tmp_path: Path) -> None:
    """The HTTP side, with a model folder loaded, needs neither torch nor transformers."""
    folder = folders.save(tmp_path / "tiny", folders.byte_level())
    code = (
        "import sys; from pathlib import Path; import mell_frontend.app; from mell_frontend.served import load_models;"
        f"load_models([{str(folder)!r}, 'fake'], Path('.'));"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("given", "models"),
    [
        (["--models", "a"], ["a"]),
        (["--models", "a=b/c", "--models", "d"], ["a=b/c", "d"]),
        (["--models", "a, b"], ["a", "b"]),
        (["--models", '["a", "b"]'], ["a", "b"]),
        ([], ["q", "r"]),
    ],
)
def test_lists_are_repeated_flags_or_commas(
    monkeypatch: pytest.MonkeyPatch, given: list[str], models: list[str]
) -> None:
    """Several models may be given as repeated flags, with commas, as JSON, or in a variable."""
    monkeypatch.setenv("MELL_MODELS", "q,r")
    assert FrontendSettings.from_command_line(given).models == models


@pytest.mark.parametrize("given", [["--models", ""], ["--models", "[1"], ["--port", "70000"], ["--max-model-len", "0"]])
def test_wrong_settings_are_told_in_one_line(capsys: pytest.CaptureFixture[str], given: list[str]) -> None:
    """A wrong setting ends the start with one line that names its flag."""
    with pytest.raises(SystemExit) as ended:
        FrontendSettings.from_command_line(given)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert given[0] in message
    assert message.count("\n") == 1


def test_keys_do_not_show_in_the_settings() -> None:
    """Settings that are printed or logged do not give the keys away."""
    settings = FrontendSettings(api_keys=["the-key"])
    assert "the-key" not in repr(settings)
