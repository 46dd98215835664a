"""Training with Lightning: one module and one trainer for all segmentation bundles, composed by the config."""
