"""Log-probabilities in the two forms of the OpenAI API, as JSON-ready values; pure."""

from collections.abc import Sequence
from typing import Any

from mell_frontend.tokenizer import Tokenizer
from mell_shared.messages.frontend import TokenLogprobs


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> list[dict[str, Any]]:
    """Return one entry for each token: its text, bytes, log-probability and the most likely alternatives."""
    return [
        {
            **_entry(tokenizer, token, scores.logprob),
            "top_logprobs": [
                _entry(tokenizer, other, logprob)
                for other, logprob in zip(scores.top_ids, scores.top_logprobs, strict=True)
            ],
        }
        for token, scores in zip(token_ids, logprobs, strict=True)
    ]


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}


class LegacyLogprobs:
    r"""The legacy form: four columns, with each token's offset in the text; one object per choice.

    A token that is no whole text is written as `bytes:\xe2\x80`, so that two of them do not share a name.
    """

    def __init__(self, tokenizer: Tokenizer, offset: int = 0) -> None:
        self._tokenizer = tokenizer
        self._offset = offset

    def columns(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, list[Any]]:
        """Return the columns for the next tokens."""
        offsets = []
        for token in token_ids:
            offsets.append(self._offset)
            self._offset += len(self._tokenizer.token_bytes(token).decode(errors="replace"))
        return {
            "tokens": [self._name(token) for token in token_ids],
            "token_logprobs": [scores.logprob for scores in logprobs],
            "top_logprobs": [
                {self._name(other): logprob for other, logprob in zip(scores.top_ids, scores.top_logprobs, strict=True)}
                for scores in logprobs
            ],
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
