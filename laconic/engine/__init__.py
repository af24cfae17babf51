"""From a scheme and a model to weights: the method of every site, the walk over the blocks, statistics, solving."""
