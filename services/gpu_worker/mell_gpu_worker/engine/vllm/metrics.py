"""What a vLLM server's Prometheus metrics say of its KV cache and its queue. Pure."""

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

_CACHE = "vllm:cache_config_info"
_USAGE = "vllm:kv_cache_usage_perc"
_WAITING = "vllm:num_requests_waiting"
_NAMES = (_CACHE, _USAGE, _WAITING)


class NoMetricsError(Exception):
    """The metrics lack something; the message names it."""


@dataclass(frozen=True, slots=True)
class CacheState:
    """The KV cache of all of a server's engines together, and how many requests wait for room in it."""

    blocks: int
    block_tokens: int
    prefix_cache: bool
    used_blocks: int
    waiting: int


def read_metrics(text: str) -> CacheState:
    """Return what the metrics say; raises `NoMetricsError`."""
    # A server tells more than a thousand lines: only these few are parsed.
    lines = [line for line in text.splitlines() if line.startswith(_NAMES)]
    samples = [
        sample for family in text_string_to_metric_families("\n".join(lines) + "\n") for sample in family.samples
    ]
    caches = [sample.labels for sample in samples if sample.name == _CACHE]
    try:
        block_tokens = int(caches[0]["block_size"])
        each = {cache.get("engine", ""): _blocks(cache, block_tokens) for cache in caches}
    except (LookupError, ValueError) as error:
        raise NoMetricsError(f"{_CACHE} with num_gpu_blocks and block_size") from error
    usage = {sample.labels.get("engine", ""): sample.value for sample in _named(samples, _USAGE)}
    return CacheState(
        blocks=sum(each.values()),
        block_tokens=block_tokens,
        prefix_cache=caches[0].get("enable_prefix_caching") == "True",
        used_blocks=round(sum(blocks * usage.get(engine, 0.0) for engine, blocks in each.items())),
        waiting=round(sum(sample.value for sample in _named(samples, _WAITING))),
    )


def _blocks(cache: dict[str, str], block_tokens: int) -> int:
    """Return how many blocks of tokens an engine holds; one of its own stands for no block and is never given out."""
    blocks = int(cache["num_gpu_blocks"])
    told = cache.get("kv_cache_size_tokens", "")
    # Models with several kinds of layers take several of its blocks for the same tokens.
    return (min(blocks, int(told) // block_tokens) if told.isdigit() else blocks) - 1


def _named(samples: list[Sample], name: str) -> list[Sample]:
    return [sample for sample in samples if sample.name == name]
