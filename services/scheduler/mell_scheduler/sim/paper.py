"""The built-in workload `paper:RATE`: sampled to resemble the MELL paper's chats, lengths times ten.

Each request is with probability 1/2 LMSYS-like (prompt lognormal, mean 69.8, standard deviation 143.5;
output Weibull, shape 1.2, scale 188, cut at 511) or WildChat-like (prompt lognormal 295.6 / 1609; output
lognormal 441.3 / 410.9); both lengths times ten, total cut at 12,000; arrivals Poisson.
"""

from math import log, sqrt
from random import Random

from mell_scheduler.sim.requests import US_PER_S, Request, Workload

SPAN_S = 5_000
_LONGEST_TOKENS = 12_000


def paper_workload(rate_per_s: float, seed: int, span_s: float = SPAN_S) -> Workload:
    """Sample a workload; the same seed gives the same requests."""
    random = Random(seed)  # noqa: S311 - a reproducible workload, no secret
    requests = []
    now_s = random.expovariate(rate_per_s)
    while now_s < span_s:
        prompt, output = _lengths(random)
        requests.append(Request(round(now_s * US_PER_S), prompt, output))
        now_s += random.expovariate(rate_per_s)
    return Workload(f"paper:{rate_per_s:g}", requests)


def _lengths(random: Random) -> tuple[int, int]:
    if random.random() < 0.5:
        prompt = _lognormal(random, 69.8, 143.5)
        output = min(random.weibullvariate(188.0, 1.2), 511.0)
    else:
        prompt = _lognormal(random, 295.6, 1609.0)
        output = _lognormal(random, 441.3, 410.9)
    prompt_tokens = min(max(1, round(prompt * 10)), _LONGEST_TOKENS - 1)
    return prompt_tokens, min(max(1, round(output * 10)), _LONGEST_TOKENS - prompt_tokens)


def _lognormal(random: Random, mean: float, deviation: float) -> float:
    variance = log(1.0 + (deviation / mean) ** 2)
    return random.lognormvariate(log(mean) - variance / 2.0, sqrt(variance))
