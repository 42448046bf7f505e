import json
import re
from pathlib import Path

import pytest

from mell_frontend.chat_template import ChatTemplate, TemplateFaultError, load_chat_template
from mell_frontend.served import ModelLoadError, load_models
from mell_frontend.token_form import token_form
from mell_frontend.tokenizer import ByteTokenizer, FolderTokenizer
from tests.frontend import folders

ASK = [{"role": "user", "content": "hi"}]


def test_a_folder_is_served_under_its_name(tmp_path: Path) -> None:
    """A model folder gives vocabulary, template and context; `NAME=MODEL` names it to clients."""
    folder = folders.save(tmp_path / "org--tiny", folders.byte_level())
    plain, named, fake = load_models(["org/tiny", f"chat={folder}", "fake"], tmp_path)
    assert (plain.name, plain.model, plain.max_model_len) == ("org/tiny", "org/tiny", 256)
    assert (named.name, named.model) == ("chat", str(folder))
    assert plain.template is not None
    assert plain.template.supports_tools
    assert (fake.name, fake.max_model_len, fake.tokenizer.vocab_size) == ("fake", None, 258)


def test_the_context_setting_wins(tmp_path: Path) -> None:
    """A context given as a setting replaces the model's own."""
    folders.save(tmp_path / "tiny", folders.byte_level(), config={"max_position_embeddings": 256})
    assert [model.max_model_len for model in load_models(["tiny", "fake"], tmp_path, 64)] == [64, 64]


@pytest.mark.parametrize(
    ("config", "context"),
    [({"n_positions": 7}, 7), ({"text_config": {"max_position_embeddings": 9}}, 9), ({}, None)],
)
def test_the_context_has_several_names(tmp_path: Path, config: dict[str, object], context: int | None) -> None:
    """The context is found under the names that configs use for it, or is left to the workers."""
    folder = folders.save(tmp_path / "tiny", folders.byte_level())
    (folder / "config.json").write_text(json.dumps(config))
    assert load_models(["tiny"], tmp_path)[0].max_model_len == context


def test_problems_are_told_in_one_line_that_helps(tmp_path: Path) -> None:
    """A model that cannot be served says in one line what to do."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    broken = folders.save(tmp_path / "broken", folders.byte_level())
    (broken / "tokenizer.json").write_text("{}")
    no_json = folders.save(tmp_path / "no-json", folders.byte_level())
    (no_json / "config.json").write_text("{")
    bad_template = folders.save(tmp_path / "bad-template", folders.byte_level(), template="{% for %}")
    expected = {
        "missing": "mell model pull missing",
        "=x": "NAME=MODEL",
        "x=": "NAME=MODEL",
        str(bare): "save_pretrained",
        str(broken): "pull the model again",
        str(no_json): "mell model pull",
        str(bad_template): "chat template",
    }
    for entry, hint in expected.items():
        with pytest.raises(ModelLoadError, match=re.escape(hint)) as told:
            load_models([entry], tmp_path)
        assert "\n" not in str(told.value)
    with pytest.raises(ModelLoadError, match="NAME=MODEL"):
        load_models(["fake", "fake"], tmp_path)


def test_templates_are_found_where_models_keep_them(tmp_path: Path) -> None:
    """A template may be a file, a field, or one of several named ones; a model may have none."""
    folder = folders.save(tmp_path, folders.byte_level(), template=None)
    assert load_chat_template(folder) is None
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "plain", "eos_token": "</s>"}))
    assert load_chat_template(folder).render(ASK, None, add_generation_prompt=True, variables={}) == "plain"  # type: ignore[union-attr]
    named = [{"name": "default", "template": "no"}, {"name": "tool_use", "template": "{{ tools[0] }}{{ eos_token }}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named, "eos_token": "</s>"}))
    template = load_chat_template(folder)
    assert template is not None
    assert template.supports_tools
    assert template.render(ASK, None, add_generation_prompt=True, variables={}) == "no"
    assert template.render(ASK, [{}], add_generation_prompt=True, variables={}) == "{}</s>"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("file")
    template = load_chat_template(folder)
    assert template is not None
    assert template.render(ASK, [{}], add_generation_prompt=True, variables={}) == "file"


def test_templates_have_what_transformers_gives_them() -> None:
    """The functions, tags and filters that templates use are there, and their refusals are told."""
    source = (
        "{% generation %}{{ {'b': 1, 'a': 'é<'} | tojson }}{% endgeneration %}"
        "{% for n in [1, 2] %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}"
        "{{ strftime_now('%Y')[:2] }}{{ bos_token }}{{ mood }}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"})
    rendered = template.render(ASK, None, add_generation_prompt=True, variables={"mood": "calm", "messages": 3})
    assert rendered == '{"b": 1, "a": "é<"}120<s>calm'
    assert not template.supports_tools
    for source in ("{{ raise_exception('roles must alternate') }}", "{{ 1 / 0 }}", "{{ messages[0].x.y }}"):
        with pytest.raises(TemplateFaultError):
            ChatTemplate(source, {}).render(ASK, None, add_generation_prompt=True, variables={})


def test_templates_cannot_reach_python() -> None:
    """A template runs in a sandbox."""
    template = ChatTemplate("{{ messages.__class__.__mro__ }}", {})
    with pytest.raises(TemplateFaultError):
        template.render(ASK, None, add_generation_prompt=True, variables={})


def test_vocabularies_encode_and_name_their_tokens(tmp_path: Path) -> None:
    """Special tokens are read in texts, added when asked for, and every id in range has bytes."""
    tokenizer = FolderTokenizer(folders.save(tmp_path, folders.byte_fallback()))
    assert tokenizer.encode("the", add_special_tokens=True)[0] == 1
    assert tokenizer.encode("<s>", add_special_tokens=False) == [1]
    assert tokenizer.is_special("<s>")
    assert not tokenizer.is_special("the")
    assert tokenizer.token_bytes(1) == b"<s>"
    assert tokenizer.token_bytes(3 + 0xE4) == b"\xe4"
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert all(tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size))


def test_the_fake_vocabulary() -> None:
    """The `fake` model's tokens are bytes."""
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é", add_special_tokens=True) == [256, 0xC3, 0xA9]
    assert tokenizer.decode([256, 0xC3, 0xA9, 257]) == "é"
    assert (tokenizer.token_bytes(0), tokenizer.token_bytes(256)) == (b"\x00", b"<bos>")
    assert tokenizer.is_special("<eos>")


@pytest.mark.parametrize(
    "decoder",
    [
        {},
        {"type": "WordPiece"},
        {"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "Fuse"}]},
        {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "_"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 2, "stop": 0},
            ],
        },
    ],
)
def test_unknown_decoders_are_not_guessed(decoder: dict[str, object]) -> None:
    """A decoder that is not known to be bytes in a row is left to the library."""
    assert not token_form(decoder).bytewise
