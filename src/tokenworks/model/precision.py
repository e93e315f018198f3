"""How many bytes a number of a model takes, by the precision it is kept in."""

import difflib
from typing import Final

from tokenworks.errors import UserError

# Block formats carry scales: MXFP4 one byte for 32 numbers (OCP MX 1.0), NVFP4 one FP8 for 16,
# int4 (AWQ, GPTQ) a 16-bit scale and a zero point for 128.
BYTES: Final = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "fp6": 0.75,
    "nvfp4": 0.5625,
    "mxfp4": 0.53125,
    "int4": 0.5195,
}
# The precisions, best first, that a processor may multiply in when weights are kept in the key.
# Weights that it can't multiply are widened on the way (weight-only quantisation).
MULTIPLIED_AS: Final = {
    "fp32": ("fp32", "tf32"),
    "bf16": ("bf16", "fp16"),
    "fp16": ("fp16", "bf16"),
    "fp8": ("fp8", "bf16", "fp16"),
    "int8": ("int8", "bf16", "fp16"),
    "fp6": ("fp6", "fp8", "bf16", "fp16"),
    "nvfp4": ("fp4", "fp8", "bf16", "fp16"),
    "mxfp4": ("bf16", "fp16"),  # served with 16-bit activations
    "int4": ("bf16", "fp16"),
}


def bytes_of(precision: str) -> float:
    """Bytes of one number; UserError with suggestions for a precision that is none."""
    found = BYTES.get(precision)
    if found is None:
        near = difflib.get_close_matches(precision, BYTES, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UserError(
            f"there is no precision {precision!r}", f"{hint}There is: {', '.join(BYTES)}."
        )
    return found
