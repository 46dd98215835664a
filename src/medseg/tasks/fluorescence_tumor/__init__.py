"""Tumour segmentation in intraoperative fluorescence images (Hou et al., Surgical Innovation 2024)."""
