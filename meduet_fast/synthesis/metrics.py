"""Compare two sets of features, or two images, and say how certain a mean over volumes is."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from torch import Tensor

from meduet_fast.errors import UserError

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM, from the finest scale on
KERNELS = ((11, 5), (7, 4), (7, 3))  # edge of MS-SSIM's window in voxels, and scales; the first that fits

DRAWS = 1000  # of a bootstrap


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Frechet distance of two normal distributions fitted to features, FID.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), after Heusel et al., "GANs Trained by a Two Time-Scale Update
    Rule". It grows as samples become fewer: compare figures of the same number of samples alone.

    Args:
        first: (N, D).
        second: (M, D).

    Raises:
        UserError: for fewer than 2 samples, features that are not finite, or different D.

    Warns:
        RuntimeWarning: if a set has no more samples than dimensions; its covariance is singular then.
    """
    first, second = _checked(first, second)
    if min(len(first), len(second)) <= first.shape[1]:
        what = "FID of no more samples than dimensions is mostly noise: hold it against that of real samples"
        warnings.warn(f"{what}, or take KID", RuntimeWarning, stacklevel=2)
    shift = first.mean(0) - second.mean(0)  # (D,)
    covariances = [np.atleast_2d(np.cov(samples, rowvar=False)) for samples in (first, second)]  # (D, D) each
    values, vectors = np.linalg.eigh(covariances[0])  # (D,), (D, D)
    root = vectors * values.clip(0) ** 0.5 @ vectors.T  # (D, D)
    shared = np.linalg.eigvalsh(root @ covariances[1] @ root).clip(0) ** 0.5  # (D,)
    return float(shift @ shift + sum(np.trace(covariance) for covariance in covariances) - 2 * shared.sum())


def kernel_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return the squared maximum mean discrepancy by the kernel (x y / D + 1)^3, KID.

    After Binkowski et al., "Demystifying MMD GANs". It is unbiased: 0 on average for samples of one
    distribution, however few they are, and then negative half of the time.

    Args:
        first: (N, D).
        second: (M, D).

    Raises:
        UserError: as :func:`frechet_distance`.
    """
    from sklearn.metrics.pairwise import polynomial_kernel

    return _discrepancy(*_checked(first, second), lambda x, y: polynomial_kernel(x, y, degree=3, coef0=1))


def rbf_mmd(first: np.ndarray, second: np.ndarray) -> float:
    """Return the squared maximum mean discrepancy by the kernel exp(-|x - y|^2 / 2 h^2), unbiased.

    The width h is the median distance of any two samples that are not equal, after Gretton et al., "A Kernel
    Two-Sample Test". Unlike a difference of means it sees any difference of the distributions.

    Args:
        first: (N, D).
        second: (M, D).

    Raises:
        UserError: as :func:`frechet_distance`.
    """
    from scipy.spatial.distance import pdist
    from sklearn.metrics.pairwise import rbf_kernel

    first, second = _checked(first, second)
    distances = pdist(np.concatenate([first, second]))  # one for each pair
    if not distances.any():
        return 0.0
    gamma = 0.5 / np.median(distances[distances > 0]) ** 2
    return _discrepancy(first, second, lambda x, y: rbf_kernel(x, y, gamma))


def ms_ssim(first: Tensor, second: Tensor) -> Tensor:
    """Return the multi-scale structural similarity of each pair of images, (N,), by MONAI.

    Its window has 11 voxels and 5 scales from 176 voxels on, 7 and 4 from 63, 7 and 3 from 28; the weights of
    fewer scales are the usual ones over their sum. Compare figures of images of one size alone.

    Args:
        first, second: (N, 1, X, Y, Z) in [0, 1].

    Raises:
        UserError: for images below 28 voxels, or of two shapes.
    """
    from monai.metrics.regression import compute_ms_ssim

    if first.shape != second.shape:
        found = " and ".join(" x ".join(map(str, images.shape)) for images in (first, second))
        raise UserError(f"MS-SSIM: found images of {found}, expected one shape")
    edge = min(first.shape[2:])
    for kernel, scales in KERNELS:
        if edge // (scales - 1) ** 2 >= kernel:
            weights = np.array(SCALE_WEIGHTS[:scales])
            return compute_ms_ssim(
                first.float(), second.float(), 3, kernel_size=kernel, weights=weights / weights.sum()
            )[:, 0]
    raise UserError(
        f"MS-SSIM: found images {edge} voxels wide, expected {kernel * (scales - 1) ** 2} or more"
    )


def bootstrap_interval(
    values: np.ndarray, volumes: np.ndarray, below: np.ndarray | None = None, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of a mean over samples, or of a ratio of means, by drawing volumes anew.

    Samples of a volume resemble each other, so all of them are drawn together: drawn one by one they would
    make the mean look more certain than it is.

    Args:
        values: (N,).
        volumes: (N,) volume that each sample is of, by any name.
        below: (N,) values whose mean divides that of ``values``; ones if not given.
        seed: of the draws.

    Raises:
        UserError: for fewer than 2 samples.

    Returns:
        Lower and upper end; of a single volume both are the mean, as nothing is known of others.
    """
    if len(values) < 2:
        raise UserError(
            f"bootstrap: found {len(values)} sample{'s' * (len(values) != 1)}, expected 2 or more"
        )
    names, member = np.unique(volumes, return_inverse=True)
    drawn = np.random.default_rng(seed).integers(len(names), size=(DRAWS, len(names)))  # (R, V)
    above, under = (
        np.bincount(member, column)[drawn].sum(1)  # (R,)
        for column in (values, np.ones(len(values)) if below is None else below)
    )
    low, high = np.quantile(above / under, (0.025, 0.975))
    return float(low), float(high)


def _checked(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two sets of features in float64, if they can be compared."""
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    for samples in (first, second):
        if len(samples) < 2:
            found = f"{len(samples)} sample{'s' * (len(samples) != 1)}"
            raise UserError(f"features: found {found}, expected 2 or more")
        if not np.isfinite(samples).all():
            raise UserError("features: found values that are not finite, expected numbers")
    if first.shape[1] != second.shape[1]:
        found = f"{first.shape[1]} and {second.shape[1]} dimensions"
        raise UserError(f"features: found {found}, expected the same")
    return first, second


def _discrepancy(
    first: np.ndarray, second: np.ndarray, kernel: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> float:
    """Return the sum of a kernel's means within both sets, over different samples, less twice that across."""
    within = 0.0
    for samples in (first, second):
        values, count = kernel(samples, samples), len(samples)  # (N, N)
        within += (values.sum() - np.trace(values)) / (count * (count - 1))
    return float(within - 2 * kernel(first, second).mean())
