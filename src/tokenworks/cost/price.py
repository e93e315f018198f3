"""Dollars: rented by the hour where a rental price is known, else bought and written off."""

from tokenworks.cost.facts import Facts
from tokenworks.cost.placement import Placement
from tokenworks.units import J_PER_KWH, S_PER_H

_H_PER_YEAR = 8766


def usd_per_s(placement: Placement, facts: Facts, energy_w: float, tariff: str) -> float:
    """Dollars a second of all devices, at `energy_w` watts; electricity is in a rental's price."""
    rented = facts.get("price_usd_per_h")
    if rented is not None:
        return placement.devices * rented / S_PER_H
    bought = facts.get("price_usd")
    if bought is None and placement.processor.kind == "lpu":
        bought = facts.assumed("groq_3_lpu_usd")
    if bought is None:
        facts.need("price_usd_per_h")  # raises
    assert bought is not None
    life_s = facts.assumed("amortisation_years") * _H_PER_YEAR * S_PER_H
    hardware = placement.devices * bought * (1 + facts.assumed("server_share")) / life_s
    power = facts.catalog.tariff(tariff)
    per_kwh, overhead = power.need("usd_per_kwh"), power.need("pue")
    for path, quantity in (("usd_per_kwh", per_kwh), ("pue", overhead)):
        facts.used[f"tariff.{power.name}.{path}"] = quantity
    return hardware + energy_w * overhead.value * per_kwh.value / J_PER_KWH
