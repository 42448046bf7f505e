from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer

from mell_frontend.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from mell_frontend.tokenizer import ByteTokenizer, FolderTokenizer, Tokenizer
from tests.frontend import folders

TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)
CUTS = st.lists(st.integers(0, 200), max_size=20)


def in_pieces(detokenizer: Detokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    """Push `ids` cut at `cuts`, flush, and return each piece of text."""
    places = sorted({min(cut, len(ids)) for cut in cuts} | {0, len(ids)})
    pieces = [detokenizer.push(ids[a:b]) for a, b in pairwise(places)]
    return [*pieces, detokenizer.flush()]


@pytest.fixture(scope="session")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[FolderTokenizer, RustTokenizer]]:
    """One of each kind of vocabulary: ours, and the library's that it is measured by."""
    kinds: dict[str, Callable[[], RustTokenizer]] = {
        "byte_level": folders.byte_level,
        "byte_fallback": folders.byte_fallback,
        "no_strip": lambda: folders.byte_fallback(strip=False),
        "metaspace": folders.metaspace,
        "word_piece": folders.word_piece,
    }
    made = {}
    for name, make in kinds.items():
        rust = make()
        made[name] = (FolderTokenizer(folders.save(tmp_path_factory.mktemp(name), rust)), rust)
    return made


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "no_strip"])
@given(text=TEXTS, cuts=CUTS)
def test_any_cut_gives_the_whole_text(
    vocabularies: dict[str, tuple[FolderTokenizer, RustTokenizer]], kind: str, text: str, cuts: list[int]
) -> None:
    """However the ids of a text arrive, the pieces make up what decoding all of them at once gives."""
    ours, rust = vocabularies[kind]
    ids = ours.encode(text, add_special_tokens=True)
    pieces = in_pieces(ours.detokenizer([]), ids, cuts)
    assert "".join(pieces) == rust.decode(ids, skip_special_tokens=True)


@given(data=st.data(), cuts=CUTS)
def test_any_ids_decode_as_the_library_does(
    vocabularies: dict[str, tuple[FolderTokenizer, RustTokenizer]], data: st.DataObject, cuts: list[int]
) -> None:
    """Ids that are no text (half characters, special tokens) give the library's text, replacement marks included."""
    ours, rust = vocabularies["byte_level"]
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=30))
    pieces = in_pieces(ours.detokenizer([]), ids, cuts)
    assert "".join(pieces) == rust.decode(ids, skip_special_tokens=True) == ours.decode(ids)


@pytest.mark.parametrize("kind", ["metaspace", "word_piece"])
@given(words=st.lists(st.sampled_from(["the", "fox", "foxes", "dog", "quick", "over"]), max_size=8), cuts=CUTS)
def test_vocabularies_with_context_join_words_rightly(
    vocabularies: dict[str, tuple[FolderTokenizer, RustTokenizer]], kind: str, words: list[str], cuts: list[int]
) -> None:
    """Where a token's text depends on its place, pieces still make up the whole text."""
    ours, rust = vocabularies[kind]
    ids = ours.encode(" ".join(words), add_special_tokens=False)
    assert "".join(in_pieces(ours.detokenizer([]), ids, cuts)) == rust.decode(ids)


@pytest.mark.parametrize("kind", ["byte_fallback", "metaspace", "word_piece"])
def test_the_space_after_a_prompt_is_kept(
    vocabularies: dict[str, tuple[FolderTokenizer, RustTokenizer]], kind: str
) -> None:
    """An output that follows a prompt begins with its space, which a text that begins there would not show."""
    ours, _ = vocabularies[kind]
    prompt = ours.encode("the fox", add_special_tokens=False)
    output = ours.encode("the fox", add_special_tokens=False)
    assert "".join(in_pieces(ours.detokenizer(prompt), output, [1])) == " the fox"


@given(text=TEXTS, cuts=CUTS)
def test_bytes_never_show_half_a_character(text: str, cuts: list[int]) -> None:
    """With a token per byte, no piece holds a replacement mark that is not in the text."""
    tokenizer = ByteTokenizer()
    pieces = in_pieces(tokenizer.detokenizer([]), tokenizer.encode(text, add_special_tokens=True), cuts)
    assert "".join(pieces) == text
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


def test_an_incomplete_character_is_shown_at_the_end_only() -> None:
    """Bytes that could still become a character are held until the end, then marked."""
    detokenizer = ByteTokenizer().detokenizer([])
    assert detokenizer.push([0x41, 0xE4, 0xBD]) == "A"
    assert detokenizer.flush() == "\ufffd"


def test_one_leading_space_is_dropped_where_text_begins() -> None:
    """A vocabulary that writes a space before the first word loses exactly that one."""
    detokenizer = ByteDetokenizer({0: b"", 1: b"  a"}, strip_space=True)
    assert detokenizer.push([0]) == ""
    assert detokenizer.push([1, 1]) == " a  a"


def test_a_window_does_not_wait_for_ever() -> None:
    """A text that really ends in replacement marks is shown before it grows without bound."""
    detokenizer = WindowDetokenizer(lambda ids: "\ufffd" * len(ids), [])
    pieces = [detokenizer.push([1]) for _ in range(40)]
    assert len("".join(pieces)) >= 32
    assert len("".join([*pieces, detokenizer.flush()])) == 40


def test_tool_marks_are_shown_even_if_special(tmp_path: Path) -> None:
    """Calls are found in the text, so their marks stay in it where the vocabulary calls them special."""
    rust = folders.byte_level()
    rust.add_special_tokens(["<tool_call>", "</tool_call>"])
    tokenizer: Tokenizer = FolderTokenizer(folders.save(tmp_path, rust))
    ids = tokenizer.encode("<|im_start|><tool_call>x</tool_call><|im_end|>", add_special_tokens=False)
    assert tokenizer.detokenizer([]).push(ids) == "<tool_call>x</tool_call>"
    assert tokenizer.decode(ids) == "<tool_call>x</tool_call>"
