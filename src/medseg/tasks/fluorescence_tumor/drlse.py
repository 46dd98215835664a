"""Distance-regularised level set evolution (DRLSE), the paper's classical baseline.

Source: C. Li, C. Xu, C. Gui, M. D. Fox, IEEE Transactions on Image Processing 19(12), 2010: the edge-based active
contour with the double-well potential,

    dphi/dt = mu div(d_p(|grad phi|) grad phi) + lambda delta(phi) div(g grad phi / |grad phi|) + alpha g delta(phi)
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

__all__ = ["DRLSE", "edge_indicator", "evolve", "initial_level_set"]


class DRLSE(nn.Module):
    """The level set in the place of a network: images in, something to threshold at 0 out.

    It has no parameters to train and no memory of other images. A contour starts as a rectangle near the border and
    shrinks (``alpha`` > 0) until edges stop it. Known limits, which the paper's low scores show: one contour from
    outside merges many lesions, a highlight can hold it, and with ``alpha`` > 0 a dark rim may pin it to the border.

    Args:
        iterations: at most; the front moves about half a pixel in each.
        margin: distance of the first rectangle from the border, as a fraction of each side.
        sigma: standard deviation of the Gaussian before the gradient, in pixels.
        alpha: weight of the area term; positive shrinks, negative grows the contour.
        lambda_: weight of the length term.
        mu: weight of the distance regularisation; ``mu * dt`` must stay below 0.25.
        dt: time step.
        epsilon: half width of the smoothed Dirac function, in units of the level set.

    Raises:
        ValueError: if ``mu * dt`` is not stable.
    """

    def __init__(
        self,
        iterations: int = 250,
        margin: float = 1 / 16,
        sigma: float = 3.0,
        alpha: float = 1.5,
        lambda_: float = 5.0,
        mu: float = 0.04,
        dt: float = 5.0,
        epsilon: float = 1.5,
    ) -> None:
        super().__init__()
        if not 0 < mu * dt < 0.25:
            raise ValueError(f"mu * dt is {mu * dt:g}; the scheme is stable for values in (0, 0.25)")
        self.iterations, self.margin, self.sigma = iterations, margin, sigma
        self.terms = {"alpha": alpha, "lambda_": lambda_, "mu": mu, "dt": dt, "epsilon": epsilon}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Segment images one by one.

        Args:
            images: (B, 1, H, W), intensities in 0..255. In 0..1 every edge is too weak to stop the contour.

        Returns:
            Minus the final level set, (B, 1, H, W): positive inside.

        Raises:
            ValueError: if the images have more than one channel or a range that cannot be 0..255.
        """
        if images.ndim != 4 or images.shape[1] != 1:
            raise ValueError(f"images have shape {tuple(images.shape)}; DRLSE takes (B, 1, H, W)")
        if images.numel() and 0 < images.max() <= 1:
            raise ValueError("intensities are in 0..1; DRLSE takes 0..255 (normalize: scale_0_255)")
        levels = []
        for image in images[:, 0].float():
            g = edge_indicator(image, self.sigma)
            start = initial_level_set(tuple(image.shape), self.margin).to(image)
            levels.append(-evolve(start, g, self.iterations, **self.terms))
        return torch.stack(levels)[:, None]


def edge_indicator(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Edge indicator ``g = 1 / (1 + |grad(G_sigma * I)|^2)``.

    Args:
        image: (H, W), intensities in 0..255.
        sigma: standard deviation of the Gaussian in pixels.

    Returns:
        (H, W), near 0 on edges and 1 in flat regions.
    """
    dy, dx = _gradient(_blur(image, sigma))
    return 1 / (1 + dx**2 + dy**2)


def initial_level_set(shape: tuple[int, ...], margin: float) -> torch.Tensor:
    """Binary step: -2 inside a rectangle, +2 outside.

    Args:
        shape: (H, W).
        margin: distance from the border as a fraction of each side, below one half.
    """
    level = torch.full(shape, 2.0)
    border = [max(1, round(margin * side)) for side in shape]
    level[border[0] : shape[0] - border[0], border[1] : shape[1] - border[1]] = -2.0
    return level


def evolve(
    level: torch.Tensor,
    g: torch.Tensor,
    iterations: int,
    alpha: float = 1.5,
    lambda_: float = 5.0,
    mu: float = 0.04,
    dt: float = 5.0,
    epsilon: float = 1.5,
) -> torch.Tensor:
    """Move a level set by the flow in the module's description.

    Args:
        level: start (H, W), negative inside; not modified.
        g: edge indicator (H, W).
        iterations: at most; it stops when the inside changes by less than 0.1 % over 20 iterations.
        alpha: weight of the area term.
        lambda_: weight of the length term.
        mu: weight of the distance regularisation.
        dt: time step.
        epsilon: half width of the smoothed Dirac function.

    Returns:
        The final level set (H, W).
    """
    phi = level.clone()
    g_y, g_x = _gradient(g)
    area = (phi < 0).sum().item()
    for step in range(1, iterations + 1):
        _neumann(phi)
        phi_y, phi_x = _gradient(phi)
        slope = torch.sqrt(phi_x**2 + phi_y**2)
        n_y, n_x = phi_y / (slope + 1e-10), phi_x / (slope + 1e-10)
        # d_p(s) - 1 for the double well: sin(2 pi s)/(2 pi s) - 1 up to s = 1, -1/s above it
        pull = torch.where(slope <= 1, torch.sinc(2 * slope), 1 - 1 / slope.clamp_min(1e-10)) - 1
        regular = _divergence(pull * phi_y, pull * phi_x) + _laplace(phi)
        dirac = torch.where(phi.abs() <= epsilon, (1 + torch.cos(math.pi / epsilon * phi)) / (2 * epsilon), 0.0)
        edge = g_y * n_y + g_x * n_x + g * _divergence(n_y, n_x)
        phi = phi + dt * (mu * regular + dirac * (lambda_ * edge + alpha * g))
        if step % 20 == 0:
            before, area = area, (phi < 0).sum().item()
            if abs(area - before) < 0.001 * max(before, 1):
                break
    return phi


def _neumann(phi: torch.Tensor) -> None:
    """Zero normal derivative at the border, in place."""
    phi[0], phi[-1] = phi[2].clone(), phi[-3].clone()
    phi[:, 0], phi[:, -1] = phi[:, 2].clone(), phi[:, -3].clone()


def _gradient(field: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dy, dx = torch.gradient(field)
    return dy, dx


def _divergence(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.gradient(y, dim=0)[0] + torch.gradient(x, dim=1)[0]


def _laplace(field: torch.Tensor) -> torch.Tensor:
    padded = functional.pad(field[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    return padded[2:, 1:-1] + padded[:-2, 1:-1] + padded[1:-1, 2:] + padded[1:-1, :-2] - 4 * field


def _blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    reach = max(1, math.ceil(4 * sigma))
    x = torch.arange(-reach, reach + 1, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = (kernel / kernel.sum())[None, None, None]
    padded = functional.pad(image[None, None], (reach, reach, reach, reach), mode="replicate")
    return functional.conv2d(functional.conv2d(padded, kernel), kernel.transpose(2, 3))[0, 0]
