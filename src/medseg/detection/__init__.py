"""Detection in 3D: RoIAlign, non-maximum suppression, merging, a two-stage detector, and FROC analysis.

Boxes are (N, 6): first and last corner in d, h, w, half-open edges in voxels, so that voxel i covers [i, i + 1).
"""

from medseg.detection.free_response import Froc, froc, truth_areas
from medseg.detection.mask_rcnn import MaskRCNN3D
from medseg.detection.merging import merge_boxes, weighted_box_clustering
from medseg.detection.nms import nms_3d
from medseg.detection.patches import PatchDetection
from medseg.detection.region_proposal import ProposalSettings
from medseg.detection.roi_align import roi_align_3d
from medseg.detection.roi_heads import Detections, RoISettings

__all__ = [
    "Detections",
    "Froc",
    "MaskRCNN3D",
    "PatchDetection",
    "ProposalSettings",
    "RoISettings",
    "froc",
    "merge_boxes",
    "nms_3d",
    "roi_align_3d",
    "truth_areas",
    "weighted_box_clustering",
]
