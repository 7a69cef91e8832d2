"""Measure how fast many trials train: `python -m benchmarks.throughput`.

Needs torch, transformers, safetensors, peft and numpy only, and no installation: it runs in a checkout on a bare CUDA
machine. The command measures each peer in a process of its own, repeatedly and in turn.

setup.py: the model, rows and trials. peers.py: the ways to train them, and the process of one. results.py: the values
that pass between the processes, and the result file.
"""
