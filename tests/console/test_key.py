from typer.testing import CliRunner

from mell_console.cli import app
from mell_frontend.keys import KeyRing, parse_keys


def test_a_made_key_opens_the_door() -> None:
    """Standard output is an entry of a keys file, and the key that standard error shows is the one it lets in."""
    result = CliRunner().invoke(app, ["key", "team-a", "--requests-per-minute", "60", "--tokens-per-minute", "9000"])
    assert result.exit_code == 0
    [entry] = parse_keys(result.stdout)
    assert (entry.name, entry.requests_per_minute, entry.tokens_per_minute) == ("team-a", 60, 9000)
    key = result.stderr.split()[-1]
    assert key not in result.stdout
    assert KeyRing([entry]).find(f"Bearer {key}".encode()) == entry


def test_a_name_that_is_none_is_refused() -> None:
    """A wrong name or limit is one line, and nothing goes to the file."""
    for arguments in (["a b"], ["a", "--tokens-per-minute", "0"]):
        result = CliRunner().invoke(app, ["key", *arguments])
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.count("\n") == 1
