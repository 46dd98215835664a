from __future__ import annotations

import pytest
import torch

from medseg.detection.patches import paste_masks
from medseg.detection.roi_heads import moved_to_masks

BOX = torch.tensor([[2.0, 4, 6, 18, 36, 38]])


def a_mask() -> torch.Tensor:
    mask = torch.zeros(1, 8, 16, 16)
    mask[0, 2:6, 4:12, 0:8] = 1
    return mask


@pytest.mark.parametrize(("share", "box"), [(1.0, [6, 12, 6, 14, 28, 22]), (0.5, [4, 8, 6, 16, 32, 30])])
def test_a_box_moves_towards_the_box_of_its_mask(share, box):
    moved, _ = moved_to_masks(BOX, a_mask(), share)
    torch.testing.assert_close(moved, torch.tensor([box], dtype=torch.float32))


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_the_mask_stays_where_it_was_in_the_volume(share):
    def pasted(boxes, masks):
        volume = torch.zeros(20, 40, 40)
        ((where, mask),) = paste_masks(boxes, masks, volume.shape)
        volume[where] = mask
        return volume >= 0.5

    before, after = pasted(BOX, a_mask()), pasted(*moved_to_masks(BOX, a_mask(), share))
    overlap = 2 * int((before & after).sum()) / int(before.sum() + after.sum())
    assert overlap > 0.93


def test_no_mask_and_no_share_leave_the_box():
    nothing = torch.full((1, 8, 16, 16), 0.4)
    torch.testing.assert_close(moved_to_masks(BOX, nothing, 0.5)[0], BOX)
    assert moved_to_masks(BOX, a_mask(), 0.0)[0] is BOX
    assert len(moved_to_masks(BOX[:0], a_mask()[:0], 0.5)[0]) == 0
