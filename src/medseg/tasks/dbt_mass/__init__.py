"""Mass detection and segmentation in digital breast tomosynthesis (Fan et al. 2020, 3D Mask R-CNN)."""
