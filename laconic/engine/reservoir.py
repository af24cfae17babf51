"""An even sample of inputs that come in parts, in bounded memory."""

import torch
from torch import Tensor

_ENTRIES = 1 << 18  # of a sample: a million bytes of float32
_ROWS = 256  # at least, however wide they are


class Reservoir:
    """Rows x [in], as many as hold 2^18 entries (256 at least), drawn without replacement from all that were added,
    each as likely.

    Every row gets a random number as it comes, from a private generator with a fixed seed, and those with the smallest
    stay (Efraimidis and Spirakis 2006, with equal weights): the sample depends on the rows and their order alone, not
    on the parts they come in.
    """

    def __init__(self, columns: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.most = max(_ROWS, _ENTRIES // columns)
        self.rows = torch.empty(0, columns, device=device, dtype=dtype)
        self._keys = torch.empty(0, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor) -> None:
        """Offer the rows of x [groups, tokens, in]."""
        x = x.flatten(0, 1)
        keys = torch.rand(len(x), generator=self._generator, dtype=torch.float64)
        bound = float(self._keys.max()) if len(self._keys) == self.most else 1.0
        taken = (keys < bound).nonzero().flatten()
        keys, rows = torch.cat([self._keys, keys[taken]]), torch.cat([self.rows, x[taken.to(x.device)].to(self.rows)])
        if len(keys) > self.most:
            kept = keys.topk(self.most, largest=False).indices.sort().values
            keys, rows = keys[kept], rows[kept.to(rows.device)]
        self._keys, self.rows = keys, rows

    def copy(self) -> "Reservoir":
        """One that goes on alone, from the same state."""
        other = Reservoir(self.rows.shape[1], self.rows.device, self.rows.dtype)
        other.rows, other._keys = self.rows, self._keys  # never changed in place
        other._generator.set_state(self._generator.get_state())
        return other
