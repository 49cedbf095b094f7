"""Lowerings of a Recurrence: a readable token loop (the oracle) and chunk-parallel schedules on torch."""
