"""The memory of intermediate results: numbers by hand, and sizes that are refused before anything is made."""

import pytest

from minidiff.nn.activations import MOST, check_activations
from minidiff.nn.unet import UNetConfig


def test_the_most_is_allowed_and_one_position_more_is_not():
    # 2 blocks of 16 n C = 2 * 16 * 4096 * 256 = 2^25 numbers, without attention
    check_activations("a network", [(2, 4096, 256, 0)])
    with pytest.raises(ValueError, match="^a network would take 33,562,624 numbers for an image, and at most "
                                         "33,554,432 are allowed: use fewer pixels"):
        check_activations("a network", [(2, 4097, 256, 0)])


def test_attention_counts_the_square_of_the_positions_for_each_head():
    # 1 block of 16 * 1024 * 8 + h * 2^20 numbers: 31 heads fit beside the 2^17 of the block, 32 do not
    check_activations("a network", [(1, 1024, 8, 31)])
    with pytest.raises(ValueError, match="would take 33,685,504 numbers"):
        check_activations("a network", [(1, 1024, 8, 32)])


def test_all_levels_count_together():
    half = (1, 4096, 256, 0)
    check_activations("a network", [half, half])
    with pytest.raises(ValueError, match="would take 50,331,648 numbers"):
        check_activations("a network", [half, half, half])
    assert MOST == 2**25


def test_a_unet_that_attends_to_too_many_pixels_is_refused():
    config = UNetConfig(widths=(8, 8), attention=(True, True))
    config.check_image(64, 64)
    with pytest.raises(ValueError, match="^UNetConfig would take .* numbers for an image"):
        config.check_image(256, 256)                        # 4 heads of 16,384^2
    UNetConfig(widths=(8, 8), attention=(False, False)).check_image(64, 64)
