"""One-shot classification and segmentation of cryo-ET subtomograms: COS-Net and its mean-field CRF."""
