"""Simulated near-infrared fluorescence images with exact tumour masks.

An image is built the way the light is: tissue autofluorescence with a gradient and texture, pooled dye that is no
tumour, tumour uptake blurred by scattering, vessels that absorb or shine, vignetting of the optics, specular
highlights, shot noise and read noise. The truth is the tumour itself, never a threshold of the picture.

The three styles imitate the look of the paper's data sets (many small lesions, one large lesion, another organ), not
their statistics: numbers measured on them are numbers on simulated data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medseg.io.datalist import write_datalist
from medseg.io.images import write_png
from medseg.progress import track

Array = npt.NDArray[np.float64]
Range = tuple[float, float]

#: The scene is wider than the picture, so that the camera can move between the frames of one video.
MARGIN = 1.2


@dataclass(frozen=True)
class Style:
    """Ranges that a style draws from; lengths are fractions of the image side, intensities relative to full scale."""

    lesions: tuple[int, int]
    radius: Range
    uptake: Range
    autofluorescence: Range
    gradient: Range
    scatter: Range
    vessels: tuple[int, int]
    vessel_signal: Range
    texture: float
    heterogeneity: float
    photons: Range
    retained_segment: bool = False  # a liver segment that keeps the dye
    frames_per_video: int = 1
    test_fraction: float = 0.2


STYLES: dict[str, Style] = {
    "abfm": Style(
        (6, 13), (0.028, 0.065), (0.45, 0.85), (0.25, 0.55), (0.4, 0.9), (0.005, 0.009),
        (2, 5), (-0.12, 0.30), 0.06, 0.35, (150, 400),
    ),
    "dthp": Style(
        (1, 1), (0.15, 0.25), (0.45, 0.80), (0.25, 0.55), (0.5, 1.0), (0.008, 0.016),
        (1, 4), (-0.15, 0.25), 0.06, 0.35, (150, 400), frames_per_video=2,
    ),
    "dthl": Style(
        (1, 2), (0.10, 0.20), (0.40, 0.70), (0.35, 0.65), (0.5, 1.0), (0.010, 0.020),
        (3, 7), (-0.25, -0.05), 0.12, 0.5, (100, 300), retained_segment=True, frames_per_video=2, test_fraction=1.0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """What lies in front of the camera: emitted light and the tumour, on a field ``MARGIN`` times the picture."""

    light: Array  # (m, m), >= 0
    tumour: Array  # (m, m), 0 or 1
    photons: float


def simulate(
    out: Path,
    count: int,
    seed: int = 0,
    style: Sequence[str] = ("abfm",),
    size: int = 1024,
    frames_per_video: int | None = None,
    test_fraction: float | None = None,
) -> Path:
    """Write ``count`` images and masks per style, and the ``datalist.json`` that lists them.

    Frames of one video share a fold (0 to 4) or the test part, so no scene is on two sides of a split. The same
    arguments give the same files.

    Args:
        out: folder to write to; ``images/``, ``masks/`` and ``datalist.json`` are made in it.
        count: images per style, at least 1.
        seed: seed of everything that is drawn.
        style: names from ``STYLES``.
        size: side of the square images in pixels, at least 32 (the paper's images have 1024).
        frames_per_video: frames of one scene; the style's own number by default.
        test_fraction: part of the videos that goes to ``test``; the style's own by default (all of dthl: it is the
            domain that is never trained on).

    Returns:
        Path of the data list.

    Raises:
        ValueError: on an unknown style or a number out of range.
    """
    _check(count, style, size, frames_per_video, test_fraction)
    if (out / "datalist.json").exists() and "(simulated)" not in (out / "datalist.json").read_text(encoding="utf-8"):
        raise ValueError(f"{out / 'datalist.json'} was not written by a simulation; choose another --out")
    for folder in ("images", "masks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    training, test = [], []
    for name in style:
        frames = frames_per_video or STYLES[name].frames_per_video
        videos = -(-count // frames)
        fraction = STYLES[name].test_fraction if test_fraction is None else test_fraction
        tested = round(videos * fraction)
        # The name is part of the seed: adding a style does not change the images of another.
        rng = np.random.default_rng([seed, *name.encode()])
        pictures = render(STYLES[name], size, rng, frames)
        for i in track(range(count), f"simulate {name}"):
            image, mask = next(pictures)
            video = i // frames
            file = f"{name}_{i:04d}.png"
            write_png(out / "images" / file, image)
            write_png(out / "masks" / file, mask.astype(np.uint8) * 255)
            item = {"image": f"images/{file}", "label": f"masks/{file}", "video": f"{name}_{video:04d}", "style": name}
            # The first videos are tested and the rest dealt to the folds in turn: all videos are drawn alike.
            if video < tested:
                test.append(item)
            else:
                training.append({**item, "fold": (video - tested) % 5})
    return write_datalist(
        out / "datalist.json",
        training,
        test,
        name="fluorescence_tumor (simulated)",
        description=f"medseg simulate fluorescence_tumor: styles {', '.join(style)}, {size} pixels, seed {seed}",
        labels={"0": "background", "1": "tumour"},
    )


def self_test_case(folder: Path) -> None:
    """Write the one tiny image that a packed bundle carries to be tested with: 128 x 128, several lesions.

    Args:
        folder: empty folder to write it to.
    """
    image, _ = next(render(STYLES["abfm"], 128, np.random.default_rng(0), 1))
    write_png(folder / "case.png", image)


def render(
    style: Style, size: int, rng: np.random.Generator, frames_per_video: int = 1
) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]]:
    """Yield images and masks without end, ``frames_per_video`` of each scene.

    Args:
        style: what to draw.
        size: side n of the images in pixels.
        rng: source of all randomness.
        frames_per_video: how many views of one scene follow each other.

    Yields:
        An image (n, n) uint8 and its mask (n, n) bool, which holds at least one pixel.
    """
    while True:
        scene = _scene(style, size, rng)
        for _ in range(frames_per_video):
            yield _photograph(scene, size, rng)


def _check(
    count: int, style: Sequence[str], size: int, frames_per_video: int | None, test_fraction: float | None
) -> None:
    unknown = [s for s in style if s not in STYLES]
    if unknown or not style:
        raise ValueError(f"unknown style {', '.join(unknown) or '(none)'}; choose from {', '.join(STYLES)}")
    if len(set(style)) != len(style):
        raise ValueError(f"a style is named twice: {', '.join(style)}")
    if count < 1:
        raise ValueError(f"count is {count}; ask for at least 1 image")
    if size < 32:
        raise ValueError(f"size is {size}; the smallest image has 32 pixels a side")
    if frames_per_video is not None and frames_per_video < 1:
        raise ValueError(f"frames_per_video is {frames_per_video}; it must be at least 1")
    if test_fraction is not None and not 0 <= test_fraction <= 1:
        raise ValueError(f"test_fraction is {test_fraction}; it must lie in [0, 1]")


def _scene(style: Style, size: int, rng: np.random.Generator) -> Scene:
    m = int(np.ceil(size * MARGIN))
    axis = (np.arange(m) - (m - 1) / 2) / size  # fractions of the picture's side, 0 in the middle
    y, x = np.meshgrid(axis, axis, indexing="ij")

    angle = rng.uniform(0, 2 * np.pi)
    ramp = x * np.cos(angle) + y * np.sin(angle)
    light = rng.uniform(*style.autofluorescence) * (0.6 + 0.8 * _smooth_noise(m, 7, rng))
    light = light + rng.uniform(*style.gradient) * (0.5 + 0.9 * ramp)
    grain = ndimage.gaussian_filter(rng.standard_normal((m, m)), size / 90)
    light *= 1 + style.texture * grain * size / 30

    for _ in range(rng.integers(1, 4)):  # pooled dye
        cx, cy = rng.uniform(-0.5, 0.5, 2)
        light += rng.uniform(0.25, 0.6) * np.exp(-0.5 * ((x - cx) ** 2 + (y - cy) ** 2) / rng.uniform(0.10, 0.22) ** 2)
    if style.retained_segment:
        angle = rng.uniform(0, 2 * np.pi)
        line = x * np.cos(angle) + y * np.sin(angle) - rng.uniform(-0.2, 0.2)
        light += rng.uniform(0.2, 0.4) / (1 + np.exp(-line / 0.05))

    tumour, uptake = _tumour(style, x, y, rng)
    uptake *= 1 - style.heterogeneity * _smooth_noise(m, 30, rng)
    scatter = rng.uniform(*style.scatter) * size
    light += 0.8 * ndimage.gaussian_filter(uptake, scatter) + 0.2 * ndimage.gaussian_filter(uptake, 3 * scatter)

    for _ in range(rng.integers(style.vessels[0], style.vessels[1] + 1)):
        light += _vessel(m, size, style.vessel_signal, rng)
    return Scene(np.maximum(light, 0), tumour, rng.uniform(*style.photons))


def _tumour(style: Style, x: Array, y: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Star-shaped lesions that keep a gap; returns the union (0 or 1) and the uptake inside it."""
    tumour, uptake = np.zeros_like(x), np.zeros_like(x)
    placed: list[tuple[float, float, float]] = []
    wanted = rng.integers(style.lesions[0], style.lesions[1] + 1)
    for _ in range(wanted * 20):
        if len(placed) == wanted:
            break
        r = rng.uniform(*style.radius)
        reach = max(0.42 - r, 0.05)  # keeps the lesion in view when the camera moves
        cx, cy = rng.uniform(-reach, reach, 2)
        if any(np.hypot(cx - px, cy - py) < 1.3 * (r + pr) for px, py, pr in placed):
            continue
        placed.append((cx, cy, r))
        turn, aspect = rng.uniform(0, np.pi), rng.uniform(0.65, 1)
        u = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
        v = (-(x - cx) * np.sin(turn) + (y - cy) * np.cos(turn)) / aspect
        theta = np.arctan2(v, u)
        outline = np.ones_like(x)
        for k in range(2, 7):
            outline += 0.25 / k * rng.standard_normal() * np.cos(k * theta + rng.uniform(0, 2 * np.pi))
        inside = np.hypot(u, v) < r * np.clip(outline, 0.4, 1.8)
        uptake[inside] = rng.uniform(*style.uptake)
        tumour[inside] = 1
    return tumour, uptake


def _vessel(m: int, size: int, signal: Range, rng: np.random.Generator) -> Array:
    """One vessel: a random walk of the heading, with a Gaussian profile across."""
    steps = int(1.5 * size)
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.06, steps) * np.sqrt(256 / size))
    start = rng.uniform(0, m, 2)
    path = start[:, None] + np.stack([np.cumsum(np.sin(heading)), np.cumsum(np.cos(heading))])
    inside = ((path >= 0) & (path < m)).all(axis=0)
    off_line = np.ones((m, m), bool)
    off_line[tuple(path[:, inside].astype(int))] = False
    sigma = rng.uniform(0.004, 0.010) * size
    strength = rng.uniform(*signal)
    if off_line.all():
        return np.zeros((m, m))
    distance = ndimage.distance_transform_edt(off_line)
    vessel: Array = strength * np.exp(-0.5 * (distance / sigma) ** 2)
    return vessel


def _photograph(
    scene: Scene, size: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """One frame: the camera moves and the optics and the sensor add what they add."""
    m = len(scene.light)
    angle, zoom = rng.normal(0, 0.05), rng.uniform(0.96, 1.04)
    matrix = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = (m - 1) / 2 + rng.uniform(-0.03, 0.03, 2) * size
    offset = centre - matrix @ np.full(2, (size - 1) / 2)
    shape = (size, size)
    light = ndimage.affine_transform(scene.light, matrix, offset, shape, order=1, mode="nearest")
    mask = ndimage.affine_transform(scene.tumour, matrix, offset, shape, order=1, mode="constant") >= 0.5

    axis = (np.arange(size) - (size - 1) / 2) / size
    y, x = np.meshgrid(axis, axis, indexing="ij")
    light = np.maximum(light * (1 - rng.uniform(0.25, 0.55) * (x**2 + y**2) / 0.5), 0.02)
    light = np.maximum(light, _highlights(x, y, rng))
    photons = rng.poisson(light * scene.photons) / scene.photons
    noisy = photons + rng.normal(0, 0.012, shape)
    # The gain keeps the 99.5th percentile below saturation: a clipped tumour would merge with the tissue.
    image = np.clip(noisy * rng.uniform(0.85, 1) / np.percentile(noisy, 99.5), 0, 1)
    return np.round(image * 255).astype(np.uint8), mask


def _highlights(x: Array, y: Array, rng: np.random.Generator) -> Array:
    shine = np.zeros_like(x)
    for _ in range(rng.integers(2, 9)):
        cx, cy = rng.uniform(-0.5, 0.5, 2)
        distance = np.hypot(x - cx, y - cy) - rng.uniform(0.004, 0.014)
        # a disc with an edge blurred over 0.003 of the side
        shine = np.maximum(shine, rng.uniform(1.2, 2.2) / (1 + np.exp(np.clip(distance / 0.0015, -40, 40))))
    return shine


def _smooth_noise(m: int, s: float, rng: np.random.Generator) -> Array:
    """Noise of correlation length m / s pixels, scaled to 0..1, made on a coarse grid because it is smooth."""
    grid = max(int(8 * s), 16)
    coarse = ndimage.gaussian_filter(rng.standard_normal((grid, grid)), grid / s, mode="wrap")
    position = np.linspace(0, grid - 1, m)
    noise = ndimage.map_coordinates(coarse, np.meshgrid(position, position, indexing="ij"), order=1)
    noise = ndimage.gaussian_filter(noise, m / grid / 2) if m > grid else noise
    low, high = noise.min(), noise.max()
    scaled: Array = (noise - low) / (high - low)
    return scaled
