from mell_frontend.logprobs import LegacyLogprobs, chat_logprobs
from mell_frontend.tokenizer import ByteTokenizer
from mell_shared.messages.frontend import TokenLogprobs

SCORES = TokenLogprobs(logprob=-0.25, top_ids=[104, 0xE4], top_logprobs=(-0.25, -2.0))


def test_chat_form_has_text_bytes_and_alternatives() -> None:
    """Each token has its text and bytes, and the most likely alternatives in order."""
    [entry] = chat_logprobs(ByteTokenizer(), [104], [SCORES])
    assert entry == {
        "token": "h",
        "logprob": -0.25,
        "bytes": [104],
        "top_logprobs": [
            {"token": "h", "logprob": -0.25, "bytes": [104]},
            {"token": "\ufffd", "logprob": -2.0, "bytes": [0xE4]},
        ],
    }


def test_special_tokens_are_spelled_out() -> None:
    """A token that the text does not show is named in its log-probabilities."""
    [entry] = chat_logprobs(ByteTokenizer(), [257], [TokenLogprobs(logprob=0.0)])
    assert (entry["token"], entry["top_logprobs"]) == ("<eos>", [])


def test_legacy_form_keeps_offsets_over_pieces() -> None:
    """The four columns go on with the offset where the last piece ended; half characters keep their bytes."""
    columns = LegacyLogprobs(ByteTokenizer())
    first = columns.columns([104, 105], [SCORES, SCORES])
    second = columns.columns([106], [SCORES])
    assert first["text_offset"] + second["text_offset"] == [0, 1, 2]
    assert second == {
        "tokens": ["j"],
        "token_logprobs": [-0.25],
        "top_logprobs": [{"h": -0.25, "bytes:\\xe4": -2.0}],
        "text_offset": [2],
    }
