"""The counter-based random numbers, against Python integers and against what randomness should look like."""

from __future__ import annotations

import torch

from ess_monitor.tasks.counter import exponential, random_bits

MASK = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_bits_equal_split_mix_in_unbounded_integers() -> None:
    # The first output of the published generator for seed 1234567.
    assert mix((1234567 + STEP) & MASK) == 6457827717110365317
    for seed in (0, 5, -1, 2**64 - 1, 2**70 + 5):
        for index in (0, 1, 2**40):
            stream = mix((mix((seed + STEP) & MASK) + index * STEP) & MASK)
            expected = [mix((stream + n * STEP) & MASK) & (MASK >> 1) for n in range(1, 6)]
            assert random_bits(seed, torch.tensor([index]), 5)[0].tolist() == expected


def test_every_bit_is_fair_and_neighbors_are_unrelated() -> None:
    bits = random_bits(3, torch.arange(4000), 8)
    planes = ((bits[..., None] >> torch.arange(63)) & 1).double()
    assert (planes.mean((0, 1)) - 0.5).abs().max() < 0.5 * 4.5 / 32_000**0.5
    for shifted in ((bits[1:] ^ bits[:-1]), (bits[:, 1:] ^ bits[:, :-1])):
        flips = ((shifted[..., None] >> torch.arange(63)) & 1).double()
        assert (flips.mean((0, 1)) - 0.5).abs().max() < 0.5 * 4.5 / flips[..., 0].numel() ** 0.5


def test_exponentials_are_finite_positive_and_of_mean_one() -> None:
    extremes = exponential(torch.tensor([0, (1 << 63) - 1]))
    assert extremes.isfinite().all()
    assert (extremes > 0).all()
    drawn = exponential(random_bits(0, torch.arange(10_000), 4))
    assert abs(drawn.mean() - 1) < 0.02
    assert abs((drawn > 1).double().mean() - torch.tensor(-1.0).exp()) < 0.01
