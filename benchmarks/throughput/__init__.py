"""How fast many trials train: `python -m benchmarks.throughput`.

Needs torch, transformers, safetensors, peft and numpy only, and no installation: it runs in a checkout on a bare CUDA
machine. The command measures each peer in a process of its own, repeatedly and in turn.

peers.py: the ways to train that are measured. lab.py: what they train. models.py: random weights of a known shape.
lengths.py: rows of random tokens, as long as newswire's. measuring.py: the process of one peer. measurement.py: what
passes between the processes. table.py: the result file.
"""
