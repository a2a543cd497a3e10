"""Published length distributions by name: a few facts each, with their source. No I/O.

Shares of sequences and tokens are printed figures; what they leave open is filled by `lengths.from_segments` and,
where only the tail is known, by a log-normal through the known points. Each entry says which it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from planner.lengths import Lengths, Segment, from_lognormal, from_segments

K = 1024
_WIKIPEDIA = "github:PKU-DAIR/Hetu-Galvatron@flexsp, wikipedia.txt: 1,000,000 lengths in 12 classes"
_WIKIPEDIA_MEAN = 1013.65
# (upper edge, % of sequences, % of tokens)
_WIKIPEDIA_ROWS = (
    (256, 41.6499, 5.52275), (512, 21.0355, 7.80815), (1024, 16.1233, 11.57689), (2048, 10.8382, 15.37406),
    (4096, 5.9582, 16.73034), (8192, 2.7959, 15.52316), (16384, 1.1221, 12.33956), (32768, 0.3465, 7.57143),
    (65536, 0.1027, 4.46973), (131072, 0.0228, 1.96659), (262144, 0.0042, 0.75339), (1823777, 0.0007, 0.36395),
)  # fmt: skip


def _wikipedia() -> Lengths:
    segments, low = [], 0
    for high, sequences, tokens in _WIKIPEDIA_ROWS:
        mean = tokens / sequences * _WIKIPEDIA_MEAN
        segments.append(Segment(low=low, high=high, share=sequences / 100, mean_tokens=mean))
        low = high
    return from_segments(tuple(segments), "wikipedia", _WIKIPEDIA)


def _byted() -> Lengths:
    """ByteScale's production mix. Printed: about 80 % of samples up to 4K; 1 % from 128K on with 44.3 % of tokens;
    tokens beyond 256K 37 %; 0.05 % from 2M on with 12.1 %. Those being 2M long, a sample has 8,667 tokens on average.
    """
    mean = 0.0005 * 2048 * K / 0.121
    short = Segment(low=63, high=4 * K, share=0.80)
    short_tokens = from_segments((short,), "", "").mean_tokens * short.share
    below_256k = 0.073 * mean / (180 * K)
    rest = 0.01 - 0.0005 - below_256k
    segments = (
        short,
        Segment(low=4 * K, high=128 * K - 1, share=0.19, mean_tokens=(0.557 * mean - short_tokens) / 0.19),
        Segment(low=128 * K - 1, high=256 * K, share=below_256k, mean_tokens=180 * K),
        Segment(low=256 * K, high=2048 * K - 1, share=rest, mean_tokens=0.249 * mean / rest),
        Segment(low=2048 * K - 1, high=2048 * K, share=0.0005),
    )
    source = "ByteScale (arXiv 2502.21231): printed shares; longest taken as 2M, 128K-256K as 180K on average"
    return from_segments(segments, "byted", source)


def _github() -> Lengths:
    """Log-normal through tokens beyond 128K = 16.2 % and beyond 256K = 9.8 %: sigma = ln 2 / (1.293 - 0.986)."""
    source = "ByteScale (arXiv 2502.21231): token shares beyond 128K and 256K; log-normal through both (ASSUMED shape)"
    return from_lognormal(86.4, 2.258, "github", source)


def _refinedweb() -> Lengths:
    """Log-normal with mean 598 and, as 9/96 of the tokens lie in 8K chunks, 13 % of tokens in longer documents."""
    source = "Dataset Decomposition: mean and share of 8K chunks; log-normal through both (ASSUMED shape)"
    return from_lognormal(216.6, 1.425, "refinedweb", source)


def _hh_rlhf() -> Lengths:
    knots = ((16, 0.0), (165, 0.50), (423, 0.90), (530, 0.95), (835, 0.99), (1964, 1.0))
    pairs = zip(knots, knots[1:], strict=False)
    segments = tuple(Segment(low=a, high=b, share=q - p) for (a, p), (b, q) in pairs)
    return from_segments(segments, "hh-rlhf", "dataset-analysis page (Qwen2 tokens): p50, p90, p95, p99, max")


def _articles() -> Lengths:
    rows = ((63, K, 22.6), (K, 2 * K, 16.2), (2 * K, 4 * K, 30.3), (4 * K, 8 * K, 26.3), (8 * K, 16 * K, 4.5),
            (16 * K, 32 * K, 0.1))  # fmt: skip
    segments = tuple(Segment(low=low, high=high, share=share / 100) for low, high, share in rows)
    return from_segments(segments, "articles", "gemma3-pt articles: dataset card, shares of documents")


_NAMED: dict[str, Callable[[], Lengths]] = {
    "wikipedia": _wikipedia, "byted": _byted, "github": _github, "refinedweb": _refinedweb, "hh-rlhf": _hh_rlhf,
    "articles": _articles,
}  # fmt: skip
NAMES = tuple(_NAMED)


@cache
def named(name: str) -> Lengths:
    """The distribution called `name`; KeyError if there is none."""
    return _NAMED[name]()
