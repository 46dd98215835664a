"""Experiments: cross-validation on any bundle, and the comparison of what it recorded in MLflow. No torch, no MONAI."""
