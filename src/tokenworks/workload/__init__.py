"""What comes in: traces read and changed, arrivals and lengths drawn, named workloads. Pure: files
arrive as bytes, chance as an argument.
"""

from tokenworks.workload.arrivals import (
    Daily,
    Gamma,
    OnOff,
    Poisson,
    Process,
    Swing,
    Swinging,
    mean_rate_per_s,
    times,
    with_rate,
)
from tokenworks.workload.assign import Mix, Share, assigned
from tokenworks.workload.lengths import Fixed, Geometric, Length, Lengths, Lognormal, Quantiles
from tokenworks.workload.named import Check, Source, Workload, generate, given, named, names
from tokenworks.workload.read import read, write
from tokenworks.workload.request import SERVICE_CLASSES, Request
from tokenworks.workload.rng import Rng
from tokenworks.workload.sessions import Sessions
from tokenworks.workload.trace import Trace

__all__ = [
    "SERVICE_CLASSES",
    "Check",
    "Daily",
    "Fixed",
    "Gamma",
    "Geometric",
    "Length",
    "Lengths",
    "Lognormal",
    "Mix",
    "OnOff",
    "Poisson",
    "Process",
    "Quantiles",
    "Request",
    "Rng",
    "Sessions",
    "Share",
    "Source",
    "Swing",
    "Swinging",
    "Trace",
    "Workload",
    "assigned",
    "generate",
    "given",
    "mean_rate_per_s",
    "named",
    "names",
    "read",
    "times",
    "with_rate",
    "write",
]
