"""Workloads, timing, memory and result files of benchmarks."""
