"""Readings of GPUs and of the host while something is measured, and what can be concluded from them.

* ``sampler``: start and stop the sampling process from a runner.
* ``nvml``, ``host``, ``replay``: the three sources of samples.
* ``gpus``: which GPUs an engine holds, who else runs there, and when their memory is free again.
* ``columns``, ``series``: the recorded file, and its columns per device.
* ``window``, ``energy``, ``baseline``: energy, throttling, clocks and temperatures of a window of time.

Nothing here imports pynvml, pyarrow or numpy before it is used.
"""
