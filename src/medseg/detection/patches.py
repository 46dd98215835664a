"""Detection in volumes larger than a patch: overlapping patches where there is something to see, then one list."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch.nn import functional

from medseg.detection.merging import merge_boxes
from medseg.detection.roi_heads import Detections

Tensor = torch.Tensor
Size = tuple[int, int, int]

__all__ = ["PatchDetection", "paste_masks", "patch_starts"]


class PatchDetection:
    """An inferer: finds the objects of whole volumes patch by patch.

    Patches lie on a grid with overlap. The volume is 0 outside of the body: the grid spans the body's rows and columns
    only, and patches that hold next to nothing of it are skipped. A box in the outer half of an overlap counts less,
    because the neighbouring patch sees its object whole.

    Args:
        size: (d, h, w) of a patch; a side that the volume is shorter than is padded with 0.
        overlap: share of a patch, in [0, 1).
        skip_below: patches with a smaller share of non-zero columns (along d) are skipped; 0 skips only empty ones,
            ``None`` none, and the grid spans the whole volume.
        batch_size: patches at a time.
        merge: ``nms``, or ``wbc`` (weighted box clustering).
        iou_threshold: boxes of several patches from this IoU on are the same object.
        edge_weight: weight of a box in the outer half of an overlap.
        score_threshold: lowest score of a merged detection.
        flips: test-time augmentation: each patch is also seen flipped along these axes (0 is d), and what is found
            counts like that of another patch, e.g. ``[[0], [1]]``; weighted box clustering averages the boxes.
        min_score: detections below take no part in ``probability``.
        segment: gives masks (N, d, h, w) of the boxes (N, 6) in a volume (D, H, W) instead of the network's own.
    """

    def __init__(
        self,
        size: Sequence[int],
        overlap: float = 0.25,
        skip_below: float | None = 0.02,
        batch_size: int = 1,
        merge: str = "wbc",
        iou_threshold: float = 0.2,
        edge_weight: float = 0.5,
        score_threshold: float = 0.02,
        flips: Sequence[Sequence[int]] = (),
        min_score: float = 0.0,
        segment: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap is {overlap}; give a share of a patch in [0, 1)")
        d, h, w = (int(s) for s in size)
        self.size: Size = (d, h, w)
        self.overlap, self.skip_below, self.batch_size = overlap, skip_below, batch_size
        self.merge, self.iou_threshold, self.edge_weight = merge, iou_threshold, edge_weight
        self.score_threshold, self.min_score, self.segment = score_threshold, min_score, segment
        self.views: list[tuple[int, ...]] = [(), *(tuple(int(a) for a in axes) for axes in flips)]

    def __call__(self, inputs: Tensor, network: Callable[[Tensor], list[Detections]], **_: Any) -> dict[str, Tensor]:
        """Objects of one volume.

        Args:
            inputs: (1, 1, D, H, W), 0 outside of the body.
            network: gives the detections of patches (B, 1, d, h, w).

        Returns:
            ``boxes`` (1, N, 6) in voxels, ``scores`` (1, N) falling, ``masks`` (1, N, d, h, w) probabilities inside
            the boxes, and ``probability`` (1, 1, D, H, W) of an object, of a voxel in several masks the highest.

        Raises:
            ValueError: if there are several volumes in the batch.
        """
        if inputs.ndim != 5 or inputs.shape[:2] != (1, 1):
            raise ValueError(f"the volumes are {tuple(inputs.shape)}; give one at a time, (1, 1, D, H, W)")
        volume = _plain(inputs)[0, 0]
        starts = self.starts(volume)
        boxes, scores, masks, weights = [], [], [], []
        for i in range(0, len(starts), self.batch_size):
            chosen = starts[i : i + self.batch_size]
            patches = torch.stack([self._patch(volume, start) for start in chosen])[:, None]
            for axes in self.views:
                for start, found in zip(chosen, self._seen(network, patches, axes), strict=True):
                    offset = found.boxes.new_tensor([*start, *start])
                    boxes.append(found.boxes + offset)
                    scores.append(found.scores)
                    masks.append(found.masks)
                    weights.append(self._weights(found.boxes, start, starts))
        if not boxes:
            empty = volume.new_zeros((0, 6))
            return _batched(empty, empty[:, 0], volume.new_zeros((0, 2, 2, 2)), volume, empty[:, 0] > 0)
        found = self._merged(torch.cat(boxes), torch.cat(scores), torch.cat(masks), torch.cat(weights), starts, volume)
        return _batched(found.boxes, found.scores, found.masks, volume, found.scores >= self.min_score)

    def _seen(
        self, network: Callable[[Tensor], list[Detections]], patches: Tensor, axes: tuple[int, ...]
    ) -> list[Detections]:
        """Detections of patches (B, 1, d, h, w) seen flipped along some axes, turned back."""
        if not axes:
            return network(patches)
        found = network(patches.flip([a + 2 for a in axes]))
        return [Detections(self._flipped(f.boxes, axes), f.scores, f.masks.flip([a + 1 for a in axes])) for f in found]

    def _flipped(self, boxes: Tensor, axes: tuple[int, ...]) -> Tensor:
        turned = boxes.clone()
        for a in axes:
            turned[:, a], turned[:, a + 3] = self.size[a] - boxes[:, a + 3], self.size[a] - boxes[:, a]
        return turned

    def starts(self, volume: Tensor) -> list[Size]:
        """Corners of the patches of a volume (D, H, W) that hold enough of the body."""
        if self.skip_below is None:
            return patch_starts(volume.shape, self.size, self.overlap)
        body = (volume != 0).any(dim=0).float()
        if not body.any():
            return []
        area = self.size[1] * self.size[2]
        kept = []
        for d, h, w in self._body_grid(body, volume.shape):
            share = float(body[h : h + self.size[1], w : w + self.size[2]].sum()) / area
            if share > 0 and share >= self.skip_below:
                kept.append((d, h, w))
        return kept

    def _body_grid(self, body: Tensor, shape: Sequence[int]) -> list[Size]:
        """Corners of the patches of the rectangle around a body (H, W)."""
        low, high = [0], [int(shape[0])]
        for axis in (0, 1):
            filled = torch.nonzero(body.any(dim=1 - axis))[:, 0]
            first, last = int(filled[0]), int(filled[-1]) + 1
            room = self.size[axis + 1] - (last - first)
            centred = first - max(0, room) // 2  # a small body lies in the middle of its patch
            low.append(max(0, min(centred, int(shape[axis + 1]) - self.size[axis + 1])))
            high.append(last)
        starts = patch_starts([b - a for a, b in zip(low, high, strict=True)], self.size, self.overlap)
        return [(d + low[0], h + low[1], w + low[2]) for d, h, w in starts]

    def _patch(self, volume: Tensor, start: Size) -> Tensor:
        d, h, w = (slice(s, s + n) for s, n in zip(start, self.size, strict=True))
        patch = volume[d, h, w]
        missing = [n - p for n, p in zip(self.size, patch.shape, strict=True)]
        return functional.pad(patch, (0, missing[2], 0, missing[1], 0, missing[0])) if any(missing) else patch

    def _weights(self, boxes: Tensor, start: Size, starts: Sequence[Size]) -> Tensor:
        """Weight of each box of a patch, by where its centre lies: at the rim of the grid no neighbour sees more."""
        centre = (boxes[:, :3] + boxes[:, 3:]) / 2
        inside = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
        for axis in range(3):
            band = self.size[axis] * self.overlap / 2
            if start[axis] > min(s[axis] for s in starts):
                inside &= centre[:, axis] >= band
            if start[axis] < max(s[axis] for s in starts):
                inside &= centre[:, axis] <= self.size[axis] - band
        return torch.where(inside, 1.0, self.edge_weight).to(boxes.dtype)

    def _merged(
        self, boxes: Tensor, scores: Tensor, masks: Tensor, weights: Tensor, starts: list[Size], volume: Tensor
    ) -> Detections:
        centres = (boxes[:, :3] + boxes[:, 3:]) / 2
        low = centres.new_tensor(starts)
        high = low + centres.new_tensor(self.size)
        covering = ((centres[:, None] >= low) & (centres[:, None] < high)).all(dim=2).sum(dim=1)
        expected = covering.clamp(min=1) * len(self.views)
        merged, merged_scores, members = merge_boxes(
            boxes, scores, weights, expected.to(boxes.dtype), self.merge, self.iou_threshold
        )
        good = merged_scores >= self.score_threshold
        kept, kept_scores = merged[good], merged_scores[good]
        if self.segment is not None:
            return Detections(kept, kept_scores, self.segment(volume, kept))
        of_kept = [m for m, g in zip(members, good.tolist(), strict=True) if g]
        found = [_merged_mask(box, boxes[m], masks[m], scores[m]) for box, m in zip(kept, of_kept, strict=True)]
        return Detections(kept, kept_scores, torch.stack(found) if found else masks[:0])


def patch_starts(shape: Sequence[int], size: Sequence[int], overlap: float) -> list[Size]:
    """Corners of patches of one size that cover a volume, evenly spaced, with at least so much overlap."""
    axes = []
    for length, patch in zip(shape, size, strict=True):
        step = max(1, int(patch * (1 - overlap)))
        count = max(0, -(-(length - patch) // step)) + 1
        last = max(0, length - patch)
        axes.append([round(i * last / max(1, count - 1)) for i in range(count)])
    return [(d, h, w) for d, h, w in product(*axes)]


def paste_masks(boxes: Tensor, masks: Tensor, shape: Sequence[int]) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """Masks in the voxels of a volume, one after the other.

    Args:
        boxes: (N, 6) in the volume's voxels; they may reach beyond it.
        masks: (N, d, h, w) probabilities inside the boxes.
        shape: (D, H, W) of the volume.

    Yields:
        Of each box the slices of the volume that it covers and the probability of these voxels (trilinear).
    """
    for box, mask in zip(boxes, masks, strict=True):
        where, axes = [], []
        for axis in range(3):
            low, high = float(box[axis]), float(box[axis + 3])
            first, last = max(0, int(low)), min(int(shape[axis]), int(-(-high // 1)))
            where.append(slice(first, max(first, last)))
            centres = torch.arange(first, max(first, last), device=mask.device, dtype=mask.dtype) + 0.5
            axes.append(2 * (centres - low) / max(high - low, 1e-6) - 1)
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)[None]
        if not grid.numel():
            yield tuple(where), mask.new_zeros(grid.shape[1:4])
            continue
        pasted = functional.grid_sample(mask[None, None], grid, align_corners=False, padding_mode="border")[0, 0]
        inside = (grid[0].abs() <= 1).all(dim=-1)  # the centre of a voxel, not its edge, decides
        yield tuple(where), pasted * inside


def _merged_mask(box: Tensor, boxes: Tensor, masks: Tensor, scores: Tensor) -> Tensor:
    """Score-weighted mean of masks in the frame of the merged box."""
    if len(boxes) == 1 and torch.equal(box, boxes[0]):
        return masks[0]
    total = torch.zeros_like(masks[0])
    for other, mask, score in zip(boxes, masks, scores, strict=True):
        axes: list[Tensor] = []
        for axis, count in enumerate(mask.shape):
            centres = (torch.arange(count, device=mask.device, dtype=mask.dtype) + 0.5) / count
            place = box[axis] + centres * (box[axis + 3] - box[axis])
            axes.append(2 * (place - other[axis]) / (other[axis + 3] - other[axis]) - 1)
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)[None].to(mask.dtype)
        total += score * functional.grid_sample(mask[None, None], grid, align_corners=False)[0, 0]
    return total / scores.sum()


def _batched(boxes: Tensor, scores: Tensor, masks: Tensor, volume: Tensor, shown: Tensor) -> dict[str, Tensor]:
    probability = torch.zeros_like(volume, dtype=torch.float32)
    for where, mask in paste_masks(boxes[shown].float(), masks[shown].float(), volume.shape):
        probability[where] = torch.maximum(probability[where], mask)
    return {"boxes": boxes[None], "scores": scores[None], "masks": masks[None], "probability": probability[None, None]}


def _plain(value: Any) -> Tensor:
    """A plain tensor: MONAI's MetaTensor makes every small operation many times slower."""
    tensor: Tensor = value.as_tensor() if hasattr(value, "as_tensor") else value
    return tensor
