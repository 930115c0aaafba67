"""The faults of one file, raised together, so that a person mends them all at once.

faults = Faults()
faults.add("train.jsonl, line 3: the row has no copies")
faults.raise_any()          InputError with the first ten, then a count
"""

from dataclasses import dataclass, field

from sg_local.errors import InputError


@dataclass
class Faults:
    """The faults of one file, raised together: the first `n_shown`, then a count."""

    n_shown: int = 10
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, fault: str) -> None:
        self.count += 1
        if self.count <= self.n_shown:
            self.first.append(fault)

    def raise_any(self) -> None:
        """Raises InputError if a fault was added."""
        if self.count > self.n_shown:
            raise InputError("\n".join([*self.first, f"… and {self.count - self.n_shown} more"]))
        if self.count:
            raise InputError("\n".join(self.first))

    def add_of(self, error: InputError) -> None:
        """Adds the faults of an error, which are its lines."""
        for fault in str(error).splitlines():
            self.add(fault)
