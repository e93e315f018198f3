"""The numbers an answer rests on: read through here, so that it can name them."""

from tokenworks.catalog.book import Catalog, Record
from tokenworks.catalog.quantity import Quantity


class Facts:
    """The catalogue as seen for one processor; `used` keeps what was read, by its full name."""

    def __init__(self, catalog: Catalog, record: Record) -> None:
        self.catalog, self.record = catalog, record
        self.used: dict[str, Quantity] = {}

    def need(self, path: str) -> float:
        """A number of the processor's; UserError if it is not known."""
        return self._keep(f"processor.{self.record.name}.{path}", self.record.need(path))

    def get(self, path: str) -> float | None:
        """A number of the processor's, if it is known."""
        found = self.record.get(path)
        return None if found is None else self.need(path)

    def either(self, path: str, assumption: str) -> float:
        """A number of the processor's, or what is assumed in its place."""
        found = self.get(path)
        return self.assumed(assumption) if found is None else found

    def fit(self, path: str) -> float:
        """A fitted number."""
        return self._keep(f"fit.{self.record.name}.{path}", self.catalog.fit(self.record, path))

    def assumed(self, name: str) -> float:
        """An assumption."""
        return self._keep(f"assumption.{name}", self.catalog.assumed(name))

    def idle_w(self) -> float:
        """Watts of one device that does nothing: published, or a share of what it may draw."""
        found = self.get("idle_w")
        if found is not None:
            return found
        is_lpu = self.record.kind == "lpu"
        most = self.either("tdp_w", "groq_3_lpu_w") if is_lpu else self.need("tdp_w")
        return most * self.assumed("idle_fraction")

    def active_w(self) -> float:
        """Watts that one device draws beside idling, as soon as it works."""
        return self._own("active_w", "active_fraction", 1.0)

    def j_per_flop(self, flops_per_s: float) -> float:
        """Joules of one operation; `flops_per_s` is how many one device reaches."""
        return self._own("j_per_flop", "flop_power_fraction", flops_per_s)

    def j_per_byte(self, bytes_per_s: float) -> float:
        """Joules of one byte read; `bytes_per_s` is how many one device reaches."""
        return self._own("j_per_byte", "byte_power_fraction", bytes_per_s)

    def _own(self, path: str, fraction: str, per_s: float) -> float:
        """What was fitted for this processor; else what it makes if at full rate it takes so
        large a share of the watts between idle and TDP.
        """
        for name in (self.record.name, self.record.kind):
            fits = self.catalog.tables["fit"].get(name)
            if fits is not None and fits.get(path) is not None:
                return self.fit(path)
        return max(self.need("tdp_w") - self.idle_w(), 0.0) * self.fit(fraction) / per_s

    def _keep(self, name: str, quantity: Quantity) -> float:
        self.used[name] = quantity
        return quantity.value
