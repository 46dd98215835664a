"""MLflow: what a run records about itself, and how it reaches the store without holding up the training."""
