"""Weight clustering during training: differentiable k-means whose exact gradient needs nothing but the weight itself.

`dkm_decode` is the call; `naive` is the formula by plain autograd, `recursion` the iteration and its derivative,
`table` and `blocks` the two ways through a weight, `start` what comes before and after the training.
"""

from laconic.clustering.decode import dkm_decode
from laconic.clustering.naive import dkm_naive
from laconic.clustering.start import annealed, harden, init_centroids, temperature

__all__ = ["annealed", "dkm_decode", "dkm_naive", "harden", "init_centroids", "temperature"]
