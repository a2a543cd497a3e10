"""Lengths: published shares are met, readers say what is wrong in one line, drift is told from chance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from planner.distributions import _WIKIPEDIA_ROWS, NAMES, named
from planner.errors import UserError
from planner.lengths import Segment, drift, from_samples, from_segments
from planner.read_lengths import read_lengths

K = 1024


def quantile(name: str, share: float) -> int:
    lengths = named(name)
    return int(lengths.tokens_N[np.searchsorted(np.cumsum(lengths.share_N), share)])


def tokens_beyond(name: str, tokens: int) -> float:
    lengths = named(name)
    over = lengths.tokens_N >= tokens
    return float(lengths.tokens_N[over] @ lengths.share_N[over]) / lengths.mean_tokens


def test_wikipedia_has_the_published_shares_of_sequences_and_tokens_exactly() -> None:
    lengths, low = named("wikipedia"), 0
    for high, sequences, tokens in _WIKIPEDIA_ROWS:
        inside = (lengths.tokens_N > low) & (lengths.tokens_N <= high)
        assert 100 * lengths.share_N[inside].sum() == pytest.approx(sequences, rel=1e-5)
        held = 100 * (lengths.tokens_N[inside] @ lengths.share_N[inside]) / lengths.mean_tokens
        assert held == pytest.approx(tokens, rel=1e-3)
        low = high
    assert lengths.mean_tokens == pytest.approx(1013.65, rel=1e-4)


@pytest.mark.parametrize(("share", "tokens"), [(0.5, 347), (0.75, 862), (0.9, 2112), (0.95, 3720), (0.99, 10919),
                                               (0.999, 37353), (0.9999, 101537)])  # fmt: skip
def test_quantiles_of_wikipedia_that_built_nothing_are_met_within_two_percent(share: float, tokens: int) -> None:
    assert quantile("wikipedia", share) == pytest.approx(tokens, rel=0.02)


def test_published_tails() -> None:
    assert tokens_beyond("byted", 128 * K) == pytest.approx(0.443, abs=0.005)
    assert tokens_beyond("byted", 256 * K + 1) == pytest.approx(0.37, abs=0.005)
    assert tokens_beyond("byted", 2048 * K) == pytest.approx(0.121, abs=0.002)
    assert tokens_beyond("github", 128 * K) == pytest.approx(0.162, abs=0.01)
    assert tokens_beyond("github", 256 * K) == pytest.approx(0.098, abs=0.01)
    assert named("refinedweb").mean_tokens == pytest.approx(598, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_shares_sum_to_one_and_every_distribution_names_its_source(name: str) -> None:
    lengths = named(name)
    assert lengths.share_N.sum() == pytest.approx(1.0)
    assert lengths.tokens_N.min() >= 1 and (np.diff(lengths.tokens_N) > 0).all()
    assert lengths.source


def test_cut_moves_the_tail_to_the_longest_and_keeps_the_rest() -> None:
    lengths = from_samples(np.array([5, 5, 10, 90]), "x", "y").cut(10)
    assert lengths.tokens_N.tolist() == [5, 10]
    assert lengths.share_N.tolist() == [0.5, 0.5]
    assert lengths.cut_frac == 0.25


def test_samples_are_deterministic_and_follow_the_shares() -> None:
    lengths = named("wikipedia")
    first = lengths.sample(20_000, 3)
    assert np.array_equal(first, lengths.sample(20_000, 3))
    assert not np.array_equal(first, lengths.sample(20_000, 4))
    assert (first <= 347).mean() == pytest.approx(0.5, abs=0.02)


def test_segment_mean_outside_its_segment_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot have a mean of 300"):
        from_segments((Segment(low=0, high=256, share=1.0, mean_tokens=300.0),), "x", "y")


def test_drift_is_seen_and_chance_is_not() -> None:
    lengths = named("wikipedia")
    assert all(drift(lengths, lengths.sample(512, seed)) is None for seed in range(200))
    said = drift(lengths, named("articles").sample(512, 0))
    assert said is not None and "wikipedia" in said and "\n" not in said


def test_readers_agree_on_the_same_lengths(tmp_path: Path) -> None:
    values = np.array([7, 7, 300, 12_000])
    np.save(tmp_path / "a.npy", values)
    (tmp_path / "a.txt").write_text("# tokens\n7\n7\n\n300\n12000\n")
    (tmp_path / "a.csv").write_text("low,high,count,mean\n6,7,2,\n299,300,1,\n11999,12000,1,12000\n")
    for name in ("a.npy", "a.txt", "a.csv"):
        read = read_lengths(str(tmp_path / name))
        assert read.tokens_N.tolist() == [7, 300, 12_000]
        assert read.share_N.tolist() == [0.5, 0.25, 0.25]


BAD = {
    "pickle.npy": (lambda p: np.save(p, np.array([{}], dtype=object), allow_pickle=True), "plain numbers"),
    "floats.npy": (lambda p: np.save(p, np.array([1.5])), "integers"),
    "empty.npy": (lambda p: p.write_bytes(b""), "plain numbers"),
    "zero.txt": (lambda p: p.write_text("5\n0\n"), "sequence 1 has 0 tokens"),
    "word.txt": (lambda p: p.write_text("5\nfive\n"), "line 2: 'five'"),
    "minus.txt": (lambda p: p.write_text("-5\n"), "line 1: '-5'"),
    "none.txt": (lambda p: p.write_text("\n"), "no lengths"),
    "binary.txt": (lambda p: p.write_bytes(b"\xff\xfe\x00"), "decode"),
    "head.csv": (lambda p: p.write_text("a,b\n1,2\n"), "first line must be"),
    "row.csv": (lambda p: p.write_text("low,high,count\n5,4,1\n"), "line 2: needs 0 <= low < high"),
    "nan.csv": (lambda p: p.write_text("low,high,count\n1,4,nan\n"), "line 2"),
    "empty.csv": (lambda p: p.write_text("low,high,count\n"), "no sequences"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line_with_the_file(tmp_path: Path, name: str) -> None:
    write, expected = BAD[name]
    write(tmp_path / name)  # type: ignore[operator]
    with pytest.raises(UserError, match=expected) as caught:
        read_lengths(str(tmp_path / name))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_names_say_what_is_known() -> None:
    with pytest.raises(UserError, match="close: wikipedia"):
        read_lengths("wikipeda")
    with pytest.raises(UserError, match="by name: wikipedia"):
        read_lengths("nothing-like-it")
