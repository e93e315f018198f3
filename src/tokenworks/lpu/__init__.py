"""The deterministic processor: a compiler to cycles, a verifier, a machine and an oracle.

lower → place → schedule → Program → verify → machine; `chip`, `isa` and `numerics` are what they
all read. An independent model made from public papers. Pure: files come and go as bytes.
"""
