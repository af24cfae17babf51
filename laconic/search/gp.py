"""The Gaussian process behind the search, from scikit-learn."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from laconic.errors import SearchError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Prior:
    """What is believed of a curve before it is seen: k(x, x') = variance * Matern(|x - x'| / length; nu = 2.5), targets
    normalised.

    `noise` is the variance on the kernel's diagonal; all variances are in units of the targets' own. The length scale
    is in units of x, which callers put on the unit interval. `optimize` fits the length scale to the samples by maximum
    likelihood, with `restarts` private random starts from `seed`; otherwise nothing is random.
    Source: Condensa section 4, "Bayesian Optimizer Settings": Matern, nu 2.5, length scale 1.0, "alpha value of 0.1",
    normalised predictions, noise level 1e-6. What alpha is the paper leaves open. Measured on 60 synthetic profiles
    (Algorithm 1 as published, samples until the best one is within 0.01 of s*, at most 30): alpha ignored 9 (median),
    alpha as the kernel's variance 11.5, alpha as noise on the diagonal none (the mean no longer passes near the
    samples); with a fitted length scale 10, as in the package the authors used. Only the first keeps to the paper's
    ten, so the default is a fixed length of 1, variance 1 and noise 1e-6.
    """

    length: float = 1.0
    variance: float = 1.0
    noise: float = 1e-6
    optimize: bool = False
    restarts: int = 5
    seed: int = 0


def posterior(
    x: Sequence[float] | Array, y: Sequence[float] | Array, at: Array, prior: Prior | None = None
) -> tuple[Array, Array]:
    """Mean and standard deviation of the process at the points `at`, given y at x; all one-dimensional, results in y's
    units.

    No samples give mean 0 and the prior's deviation. Raises: SearchError when scikit-learn is missing, or a value is
    not finite.
    Source: Rasmussen and Williams 2006, equations 2.25 and 2.26. Cost: O(n^3 + n points), n samples.
    """
    prior = prior or Prior()
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise SearchError(
            f"a Gaussian process needs one finite value per point, got values {y.tolist()} at {x.tolist()}"
        )
    if not len(x):
        return np.zeros(len(at)), np.full(len(at), prior.variance**0.5)
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern
    except ImportError as error:
        raise SearchError("the search needs scikit-learn; pip install 'laconic[search]'") from error
    bounds = (1e-2, 1e2) if prior.optimize else "fixed"
    kernel = ConstantKernel(prior.variance, "fixed") * Matern(
        length_scale=prior.length, length_scale_bounds=bounds, nu=2.5
    )
    regressor = GaussianProcessRegressor(
        kernel,
        alpha=prior.noise,
        normalize_y=True,
        optimizer="fmin_l_bfgs_b" if prior.optimize else None,
        n_restarts_optimizer=prior.restarts if prior.optimize else 0,
        random_state=prior.seed,
    )
    with warnings.catch_warnings():
        # a length scale at its bound is what two or three samples often ask for
        warnings.simplefilter("ignore", ConvergenceWarning)
        mean, deviation = regressor.fit(x[:, None], y).predict(at[:, None], return_std=True)
    return np.asarray(mean), np.asarray(deviation)
