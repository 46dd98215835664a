"""Bundles as text: what is in the repository, and what a running bundle was configured with. No torch, no MONAI."""
