from docs import generate_configuration


def test_the_configuration_page_is_what_the_settings_say() -> None:
    """The page lists exactly the settings of the code; `make docs` writes it anew."""
    assert generate_configuration.PAGE.read_text(encoding="utf-8") == generate_configuration.page()
