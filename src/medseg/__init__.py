"""medseg: published medical-image-analysis methods as MONAI bundles that run.

Importing the package is free of torch and MONAI; the heavy modules load where they are used.
"""

__version__ = "0.1.0"
