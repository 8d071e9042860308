"""The one rule for seeds."""

import numpy as np

from torchcdm.random import derive, permutation, stream


def test_seeds_of_one_purpose_differ_for_all_indices():
    # Hashes of 32 bits would meet: 200 000 of them have four pairs on average.
    assert len({derive(0, "sample", i) for i in range(200_000)}) == 200_000


def test_seed_purpose_and_index_each_change_the_draw():
    keys = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", 1, 0), (0, "a", 0, 1)]
    draws = [derive(*key) for key in keys]
    assert len(set(draws)) == len(draws)
    assert all(0 <= value < 2**32 for value in draws)


def test_a_stream_is_a_function_of_its_arguments():
    assert stream(3, "noise", 5).initial_seed() == stream(3, "noise", 5).initial_seed() == derive(3, "noise", 5)
    assert derive(np.int64(3), "noise", np.int32(2), np.int64(5)) == derive(3, "noise", 2, 5)


def test_the_split_of_data_is_frozen():
    assert permutation(6, 0).tolist() == [5, 2, 1, 3, 0, 4]
    assert sorted(permutation(6, 2**40 + 1).tolist()) == list(range(6))
