"""One room per task: only what the task adds to MONAI."""
