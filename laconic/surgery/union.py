"""Union-find over the indices of ports."""

Key = tuple[str, str]
"""A port: (module path, side)."""


class Union:
    """Union-find over (port, index); a class may carry marks: why it cannot be cut, and the operations its channels
    pass.
    """

    def __init__(self) -> None:
        self.sizes: dict[Key, int] = {}
        self._start: dict[Key, int] = {}
        self._parent: list[int] = []
        self.marks: list[tuple[int, str]] = []
        self.ops: list[tuple[int, str]] = []

    def add(self, key: Key, size: int) -> None:
        if key not in self.sizes:
            self.sizes[key], self._start[key] = size, len(self._parent)
            self._parent.extend(range(len(self._parent), len(self._parent) + size))

    def node(self, key: Key, index: int) -> int:
        return self._start[key] + index

    def find(self, node: int) -> int:
        while self._parent[node] != node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def join(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self._parent[max(a, b)] = min(a, b)

    def members(self) -> dict[int, list[tuple[Key, int]]]:
        """The (port, index) pairs of every class, by its root."""
        classes: dict[int, list[tuple[Key, int]]] = {}
        for key, size in self.sizes.items():
            for index in range(size):
                classes.setdefault(self.find(self.node(key, index)), []).append((key, index))
        return classes
