"""Tensors that autograd saves for backward, held in as few bytes as they take: on the CPU, each storage once, row maps
as tables, shared out.

Three techniques, each switchable (Source: eDKM, Cho et al. 2023, section 2): marshaling (M), uniquification (U),
sharding (S). `context` is the call, `packer` the two hooks, `held` what stands for a saved tensor, `rows` how row maps
are found, `learners` how processes agree.
"""

from laconic.offload.context import offload_saved
from laconic.offload.held import Saved

__all__ = ["Saved", "offload_saved"]
