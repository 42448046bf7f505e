"""Finds the model and calibrates prompts before anything is measured."""

import random

from mell_console.bench.client import Target, ask
from mell_console.bench.measure import Outcome
from mell_console.bench.prompts import Calibration, calibrate, make_prompt
from mell_console.bench.settings import BenchSettings
from mell_console.get import GetError, get_json

_ANSWER_S = 30.0
_OUTPUT_TOKENS = 4
_WORDS = (8, 72)
_SEED_BITS = 48


class BenchError(Exception):
    """The server cannot be measured; the message is one line that says why and what to do."""


def find_model(settings: BenchSettings) -> str:
    """Return the model to ask for: the one named, else the first that the server lists. Raises `BenchError`."""
    if settings.model:
        return settings.model
    url = f"{settings.origin}/v1/models"
    try:
        return str(get_json(url, settings.api_key, _ANSWER_S)["data"][0]["id"])
    except GetError as error:
        raise BenchError(f"{error}; check the URL and --api-key, or name a --model") from error
    except (LookupError, TypeError) as error:
        raise BenchError(f"{url} lists no models: name one with --model") from error


async def warm_up(target: Target) -> Calibration:
    """Send the warm-up requests, one after another, and return what they say of prompt lengths.

    Raises `BenchError` if one fails: measuring errors only would say nothing.
    """
    seeds = random.Random(target.settings.seed)  # noqa: S311 - not for secrets
    measured: list[tuple[int, int]] = []
    for number in range(target.settings.warm_up):
        words = _WORDS[number % len(_WORDS)]
        outcome = await ask(target, make_prompt(seeds.getrandbits(_SEED_BITS), words), _OUTPUT_TOKENS)
        if outcome.error:
            raise BenchError(_advice(target, outcome))
        measured.append((words, outcome.prompt_tokens))
    return calibrate(measured[0], measured[1])


def _advice(target: Target, outcome: Outcome) -> str:
    said = f"{target.settings.origin}{target.path} failed in the warm-up: {outcome.error}"
    if outcome.error.startswith("400") and target.settings.ignore_eos:
        return f"{said}; if the server does not know ignore_eos, use --no-ignore-eos"
    return said
