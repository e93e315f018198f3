"""Joules: meters of replicas, and what each request pays of what they read."""
