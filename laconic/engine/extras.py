"""Gradient statistics of single sites, kept between the survey and the compression."""

import hashlib
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from laconic.disk.files import disk_errors, seal, write_tensors
from laconic.model.sites import Site, Stats


class Extras:
    """Gradient statistics of single sites, kept between the survey and the compression, in memory or in a run's
    folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._kept: dict[str, dict[str, Tensor]] = {}

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"extra-{hashlib.sha256(name.encode()).hexdigest()[:12]}.safetensors"

    def clear(self) -> None:
        """Forget what an earlier survey kept: one that is made again is not to be mixed with it."""
        self._kept.clear()
        for file in self.files():
            file.unlink()

    def files(self) -> list[Path]:
        """The files of what is kept in a run's folder, by name."""
        return sorted(self.folder.glob("extra-*.safetensors")) if self.folder is not None else []

    def put(self, site: Site, wanted: Stats) -> None:
        values = {}
        if wanted & Stats.FISHER and site.fisher is not None:
            values["fisher"] = site.fisher
        if wanted & Stats.OUTPUT_FISHER and site.output_fisher is not None:
            values["output_fisher"] = site.output_fisher
        if not values:
            return
        if self.folder is None:
            self._kept[site.name] = values
        else:
            with disk_errors(self.folder):
                write_tensors(self._file(site.name), values, seal(values))

    def given(self, site: Site) -> Site:
        """The site with what was kept for it."""
        values = self._kept.get(site.name, {})
        if self.folder is not None and self._file(site.name).is_file():
            values = load_file(self._file(site.name))
        return site.having(**values) if values else site
