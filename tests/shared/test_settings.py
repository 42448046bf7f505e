from pathlib import Path
from typing import Literal, Self

import pytest
from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from mell_shared.settings import ServiceSettings, StringList


def number_of_cores() -> int:
    """Stand for what is asked of the machine."""
    return 64


class KitchenSettings(ServiceSettings):
    """What a kitchen needs."""

    model_config = SettingsConfigDict(cli_prog_name="mell serve kitchen")

    dish_count: int = Field(4, ge=1, description="Dishes at once.")
    heat: Literal["low", "high"] = Field("low", description="How hot.")
    gas: bool = Field(True, description="Cook with gas.")
    dishes: StringList = Field(["soup"], description="What to cook.")
    limit: int | None = Field(None, description="Most guests.")
    book: Path = Field(default_factory=lambda: Path.home() / "recipes", description="Folder of recipes.")
    cores: int = Field(default_factory=number_of_cores, description="Cores to use.")

    @model_validator(mode="after")
    def _high_heat_needs_gas(self) -> Self:
        if self.heat == "high" and not self.gas:
            raise ValueError("high heat needs gas")
        return self


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in KitchenSettings.listing():
        monkeypatch.delenv(setting.variable, raising=False)


def test_a_flag_wins_over_a_variable_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source is read, in this order."""
    assert KitchenSettings.from_command_line([]).dish_count == 4
    monkeypatch.setenv("MELL_DISH_COUNT", "5")
    assert KitchenSettings.from_command_line([]).dish_count == 5
    assert KitchenSettings.from_command_line(["--dish-count", "6"]).dish_count == 6
    assert KitchenSettings.from_command_line(["--dish-count=7"]).dish_count == 7


def test_a_bool_has_both_flags() -> None:
    """`--gas` and `--no-gas` need no value."""
    assert KitchenSettings.from_command_line(["--gas"]).gas
    assert not KitchenSettings.from_command_line(["--no-gas"]).gas


@pytest.mark.parametrize(
    "arguments", [["--dishes", "a,b"], ["--dishes", "a", "--dishes", "b"], ["--dishes", '["a","b"]']]
)
def test_a_list_comes_repeated_with_commas_or_as_json(arguments: list[str]) -> None:
    """All three ways to give several values mean the same."""
    assert KitchenSettings.from_command_line(arguments).dishes == ["a", "b"]


def test_a_list_comes_from_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable holds several values separated by commas, or a JSON list."""
    for value in ("a, b", '["a", "b"]'):
        monkeypatch.setenv("MELL_DISHES", value)
        assert KitchenSettings.from_command_line([]).dishes == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--dish-count", "0"],
            "--dish-count (or MELL_DISH_COUNT): Input should be greater than or equal to 1, got '0'",
        ),
        (["--dish-count", "many"], "--dish-count (or MELL_DISH_COUNT): Input should be a valid integer"),
        (["--heat", "off"], "--heat (or MELL_HEAT): Input should be 'low' or 'high', got 'off'"),
        (["--heat", "high", "--no-gas"], "high heat needs gas; see --help"),
        (["--subject-prefix", "a.b"], "--subject-prefix (or MELL_SUBJECT_PREFIX)"),
        (["--nonsense"], "there is no --nonsense; see --help"),
        (["--dish", "3"], "there is no --dish 3; see --help"),
        (["soup"], "there is no soup; see --help"),
        (["--dish-count"], "argument --dish-count: expected one argument; see --help"),
        (["--dishes", "[1"], "--dishes (or MELL_DISHES): "),
        (["--log-level", "x" * 1000], "got 'xxxx"),
    ],
)
def test_a_wrong_setting_is_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong stands in one short line on stderr with the flag and the variable; the exit code is 2."""
    with pytest.raises(SystemExit) as caught:
        KitchenSettings.from_command_line(arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("mell serve kitchen: ")
    assert told in err
    assert err.count("\n") == 1
    assert len(err) < 300


def test_a_variable_that_cannot_be_read_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list variable that is no list names itself and shows what a list looks like."""

    class Plain(ServiceSettings):
        """A service with a list that only knows JSON."""

        ports: list[int] = Field([], description="Ports.")

    monkeypatch.setenv("MELL_PORTS", "a,b")
    with pytest.raises(SystemExit):
        Plain.from_command_line([])
    assert "--ports (or MELL_PORTS): cannot be read" in capsys.readouterr().err


def test_help_lists_every_flag_variable_default_and_description(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` prints all there is to know, whatever else was said, and exits 0."""
    with pytest.raises(SystemExit) as caught:
        KitchenSettings.from_command_line(["--nonsense", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: mell serve kitchen [--flag value]...\n\nWhat a kitchen needs.\n")
    for setting in KitchenSettings.listing():
        assert f"  {setting.flag}" in out
        assert f"{setting.variable}, {setting.default}" in out
        assert setting.description in out
    assert "--gas, --no-gas" in out


def test_the_listing_is_the_same_on_every_machine() -> None:
    """Kinds are words, defaults name no machine, and the inherited settings come first."""
    listing = KitchenSettings.listing()
    assert [setting.name for setting in listing][:2] == ["nats_url", "nats_nkey_seed_file"]
    own = {setting.name: (setting.kind, setting.default) for setting in listing[-7:]}
    assert own == {
        "dish_count": ("int", "default 4"),
        "heat": ("low|high", "default low"),
        "gas": ("bool", "default on"),
        "dishes": ("text,...", "default soup"),
        "limit": ("int", "no default"),
        "book": ("path", "default ~/recipes"),
        "cores": ("int", "default from the machine (number_of_cores)"),
    }
