"""The checksum of a chunk: XXH3, 64 bits, from the xxhash package.

It finds damage, not malice. Of what was measured (`tests/benchmarks/bench_transport.py`) it and ISA-L's CRC-32 are
the only ones several times faster than a loopback connection; zlib's CRC-32 would halve the bandwidth.
"""

import xxhash

from mell_gpu_worker.transport.regions import HostRegion, Region


def checksum_of(region: Region) -> int | None:
    """Return the checksum of host memory; None for device memory, which cannot be read from here."""
    if isinstance(region, HostRegion):
        return xxhash.xxh3_64_intdigest(region.raw)
    return None
