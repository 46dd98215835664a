"""Reading and writing files for every task: images, data lists, overlays, prediction tables."""
