"""Fully connected conditional random field over all pairs of voxels, solved by mean-field.

Source: B. Zhou et al., One-Shot Learning With Attention-Guided Segmentation in Cryo-Electron Tomography, Frontiers in
Molecular Biosciences 7, 2020, equations (17) and (18):

    E(x) = sum_i psi_u(x_i) + sum_{i,j} psi_p(x_i, x_j),      psi_u(x_i) = -log p_i(x_i)
    psi_p = [x_i != x_j] { w1 exp(-|p_i - p_j|^2 / 2 sigma_alpha^2 - |I_i - I_j|^2 / 2 sigma_beta^2)
                         + w2 exp(-|p_i - p_j|^2 / 2 sigma_gamma^2) }

The mean-field of P. Kraehenbuehl and V. Koltun (NeurIPS 2011) repeats, for the marginals q and the weighted sum K of
both kernels, ``q <- softmax_l(log p_i(l) + sum_j K_ij q_j(l))``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from medseg.crf.filtering import GaussianFilter, Limits

__all__ = ["DenseCRF3D"]

#: Probabilities below this count as this: a saturated network would otherwise have the only word.
PROBABILITY_FLOOR = 1e-4

#: Beyond this many intensity sigmas between darkest and brightest voxel, one outlier governs the cost.
LARGEST_INTENSITY_EXTENT = 2000.0

NORMALIZATIONS = ("symmetric", "none")


class DenseCRF3D(nn.Module):
    """Fully connected CRF with a smoothness kernel (position) and an appearance kernel (position and intensity).

    Five scalars can be learned; all are positive because their logarithms are stored. The paper's names in brackets.

    No pair of voxels is left out. The Gaussians are replaced by short cosine series with errors up to
    ``tolerance``, and axes longer than 60 sigmas are cut into overlapping tiles, so that memory grows with the volume,
    not with its square.

    Args:
        smoothness_weight: weight of the smoothness kernel [w2].
        smoothness_sigma: its range [sigma_gamma], in voxels, or in the unit of ``spacing`` where that is given.
        appearance_weight: weight of the appearance kernel [w1].
        appearance_sigma: its range in position [sigma_alpha], same unit.
        intensity_sigma: its range in intensity [sigma_beta], in the unit of the image.
        iterations: mean-field iterations.
        normalization: ``"symmetric"`` divides every kernel by the square roots of both row sums (self included), as
            the CRF library of the paper's authors does: weights then compare with the unary whatever the sigmas.
            ``"none"`` is equation (18) as written, self excluded: a voxel then feels weight x kernel volume.
        tolerance: largest error of a kernel value (its maximum is 1) that is aimed at, in [1e-6, 0.1]. The default kept
            marginals within 0.01 of exact ones in 200 random cases with weights up to 30. For learning the sigmas
            1e-3 or less: a derivative has a larger error than its value.

    Raises:
        ValueError: if a weight or sigma is not a positive number, or an option has no meaning.

    Example:
        >>> import torch
        >>> foreground = torch.rand(1, 1, 8, 8, 8)
        >>> crf = DenseCRF3D(0.5, 1.0, 1.0, 3.0, 20.0, iterations=4)
        >>> with torch.no_grad():
        ...     marginals = crf(torch.cat([1 - foreground, foreground], 1), 255 * torch.rand(1, 1, 8, 8, 8))
        >>> marginals.shape
        torch.Size([1, 2, 8, 8, 8])
    """

    def __init__(
        self,
        smoothness_weight: float = 0.5,
        smoothness_sigma: float = 1.0,
        appearance_weight: float = 1.0,
        appearance_sigma: float = 3.0,
        intensity_sigma: float = 20.0,
        iterations: int = 4,
        normalization: str = "symmetric",
        *,
        tolerance: float = 3e-3,
    ) -> None:
        super().__init__()
        start = {
            "smoothness_weight": smoothness_weight,
            "smoothness_sigma": smoothness_sigma,
            "appearance_weight": appearance_weight,
            "appearance_sigma": appearance_sigma,
            "intensity_sigma": intensity_sigma,
        }
        for name, value in start.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value:g}; pass a positive number (1e-6 switches a weight off)")
        if iterations < 1:
            raise ValueError(f"iterations is {iterations}; mean-field needs at least 1")
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization is {normalization!r}; pass one of {', '.join(map(repr, NORMALIZATIONS))}")
        if not 1e-6 <= tolerance <= 0.1:
            raise ValueError(f"tolerance is {tolerance:g}; pass a value in [1e-6, 0.1], e.g. 3e-3")
        self.log_values = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(math.log(value))) for name, value in start.items()}
        )
        self.iterations, self.normalization, self.tolerance = iterations, normalization, tolerance
        self._limits = Limits()

    def values(self) -> dict[str, float]:
        """The five positive scalars by the names of the constructor's arguments."""
        return {name: math.exp(float(value.detach())) for name, value in self.log_values.items()}

    def extra_repr(self) -> str:
        """Values and options, for ``print``."""
        numbers = ", ".join(f"{name}={value:.4g}" for name, value in self.values().items())
        return f"{numbers}, iterations={self.iterations}, normalization={self.normalization!r}"

    def forward(self, probabilities: Tensor, image: Tensor, spacing: Sequence[float] | None = None) -> Tensor:
        """Refine probabilities.

        Args:
            probabilities: (B, L, D, H, W) in [0, 1], adding up to 1 over the L >= 2 labels.
            image: (B, 1, D, H, W), intensities in the unit of ``intensity_sigma``. One outlier voxel costs time and
                nothing else, but clip to percentiles before you rescale.
            spacing: distance of neighbours along D, H and W; the sigmas of position are then in its unit. None: 1
                along each axis, sigmas in voxels.

        Returns:
            Marginals (B, L, D, H, W) in [0, 1], adding up to 1; in float32 (float64 where ``probabilities`` are).

        Raises:
            ValueError: if shapes, labels, devices, spacing or values do not fit; the message says what to do.
        """
        steps = _checked(probabilities, image, spacing)
        dtype = torch.float64 if probabilities.dtype == torch.float64 else torch.float32
        with torch.autocast(probabilities.device.type, enabled=False):
            results = [
                self._mean_field(p.to(dtype), i[0].to(dtype), steps) for p, i in zip(probabilities, image, strict=True)
            ]
        return results[0][None] if len(results) == 1 else torch.stack(results)

    def _mean_field(self, probabilities: Tensor, image: Tensor, spacing: tuple[float, float, float]) -> Tensor:
        """One case: (L, D, H, W) and (D, H, W) -> (L, D, H, W).

        Only differences of labels matter, so L - 1 channels pass through the filters: those of every label but the
        last to the last. With two labels this is t <- tanh((d + K t) / 2) for t = q(0) - q(1), d = log p(0) / p(1).
        """
        pairwise = self._pairwise(probabilities, image, spacing)
        scores = probabilities.clamp_min(PROBABILITY_FLOOR).log()
        unary = scores[:-1] - scores[-1:]
        if len(probabilities) == 2:
            t = torch.tanh(unary / 2)
            for _ in range(self.iterations):
                t = torch.tanh((unary + pairwise(t)) / 2)
            return torch.cat([(1 + t) / 2, (1 - t) / 2])
        q = _softmax(unary)
        for _ in range(self.iterations):
            q = _softmax(unary + pairwise(q[:-1] - q[-1:]))
        return q

    def _pairwise(self, like: Tensor, image: Tensor, spacing: tuple[float, float, float]) -> Callable[[Tensor], Tensor]:
        """The weighted sum of both normalised kernels, as a function of (C, D, H, W)."""
        value = {name: log.to(like.device).exp() for name, log in self.log_values.items()}
        extent = float(image.max() - image.min()) / float(value["intensity_sigma"].detach())
        if extent > LARGEST_INTENSITY_EXTENT:
            raise ValueError(
                f"the image spans {extent:.3g} times intensity_sigma; clip outliers (e.g. to its 0.1 and 99.9"
                f" percentiles) or use a larger intensity_sigma: at most {LARGEST_INTENSITY_EXTENT:g} are possible"
            )
        shape = (image.shape[0], image.shape[1], image.shape[2])
        common = (self.tolerance, like.dtype)
        kernels = [
            (
                value["smoothness_weight"],
                GaussianFilter(shape, spacing, value["smoothness_sigma"], *common, limits=self._limits),
            ),
            (
                value["appearance_weight"],
                GaussianFilter(
                    shape,
                    spacing,
                    value["appearance_sigma"],
                    *common,
                    image=image,
                    intensity_sigma=value["intensity_sigma"],
                    limits=self._limits,
                ),
            ),
        ]
        if self.normalization == "none":
            return lambda v: _sum(weight * (kernel(v) - kernel.diagonal * v) for weight, kernel in kernels)
        # a row sum is at least 1, the voxel's own term; the error of the series must not push it to 0
        scaled = [
            (weight, kernel, kernel(image.new_ones(1, *shape)).clamp_min(1.0).rsqrt()) for weight, kernel in kernels
        ]
        return lambda v: _sum(weight * (scale * kernel(scale * v)) for weight, kernel, scale in scaled)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    first, second = terms
    return first + second


def _softmax(differences: Tensor) -> Tensor:
    """Softmax over labels from the scores of all but the last relative to the last; (L - 1, ...) -> (L, ...)."""
    return torch.softmax(torch.cat([differences, torch.zeros_like(differences[:1])]), dim=0)


def _checked(probabilities: Tensor, image: Tensor, spacing: Sequence[float] | None) -> tuple[float, float, float]:
    """Refuse what cannot be meant; the spacing as three floats."""
    if probabilities.ndim != 5 or probabilities.shape[1] < 2:
        raise ValueError(
            f"probabilities have shape {tuple(probabilities.shape)}; pass (B, L, D, H, W) with L >= 2 labels,"
            " e.g. torch.cat([1 - foreground, foreground], dim=1)"
        )
    expected = (probabilities.shape[0], 1, *probabilities.shape[2:])
    if tuple(image.shape) != expected:
        raise ValueError(f"image has shape {tuple(image.shape)}; for these probabilities it must have {expected}")
    if probabilities.numel() == 0:
        raise ValueError(f"probabilities have shape {tuple(probabilities.shape)}: no voxels; pass at least one")
    if image.device != probabilities.device:
        raise ValueError(f"image is on {image.device}, probabilities on {probabilities.device}; move one of them")
    if not probabilities.is_floating_point():
        raise ValueError(f"probabilities have type {probabilities.dtype}; pass floating-point numbers in [0, 1]")
    low, high = (float(v) for v in probabilities.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"probabilities lie in [{low:g}, {high:g}]; they must be in [0, 1] (missing a softmax, NaN?)")
    total = probabilities.detach().sum(1, dtype=torch.float32)
    if float((total - 1).abs().max()) > 0.02:
        raise ValueError(
            f"probabilities of a voxel add up to {float(total.min()):g} .. {float(total.max()):g} over the labels, not"
            " to 1; pass a softmax, or torch.cat([1 - foreground, foreground], dim=1)"
        )
    if not math.isfinite(sum(float(v) for v in image.detach().aminmax())):
        raise ValueError("image holds NaN or infinite intensities; replace them, e.g. by torch.nan_to_num")
    steps = [1.0, 1.0, 1.0] if spacing is None else [float(step) for step in spacing]
    if len(steps) != 3:
        raise ValueError(f"spacing has {len(steps)} values for a 3D image; pass 3, e.g. (2.5, 1.0, 1.0)")
    if not all(math.isfinite(step) and step > 0 for step in steps):
        raise ValueError(f"spacing is {tuple(steps)}; pass three positive numbers")
    return steps[0], steps[1], steps[2]
