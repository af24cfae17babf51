"""The closed algebra of weights: what is stored, how it decodes, how a tensor is projected onto it, and exactly how
many bits it takes.
"""

from laconic.weights.base import ColumnWeight, EntryWeight, Weight, unpack
from laconic.weights.codebook import Codebook
from laconic.weights.compose import Permuted, Scaled, Shared, Sum
from laconic.weights.dense import Dense
from laconic.weights.inputs import Inputs
from laconic.weights.install import View, bake, baked, install, installed
from laconic.weights.lowrank import LowRank
from laconic.weights.rotated import Rotated
from laconic.weights.sparse import Sparse
from laconic.weights.uniform import Uniform

__all__ = [
    "Codebook",
    "ColumnWeight",
    "Dense",
    "EntryWeight",
    "Inputs",
    "LowRank",
    "Permuted",
    "Rotated",
    "Scaled",
    "Shared",
    "Sparse",
    "Sum",
    "Uniform",
    "View",
    "Weight",
    "bake",
    "baked",
    "install",
    "installed",
    "unpack",
]
