"""Readings of GPUs and of the host while something is measured, and what can be concluded from them.

* ``sampler``: start and stop the sampling process from a runner.
* ``nvml``, ``host``, ``replay``: the three sources of samples; ``loop`` is the process that asks them.
* ``gpus``: which GPUs an engine holds, who else runs there, and when their memory is free again.
* ``columns``, ``series``: the recorded file, and its columns per device.
* ``window``, ``energy``, ``baseline``: energy, throttling, clocks and temperatures of a window of time.

pynvml and pyarrow are imported where they are used, so everything here imports without them.
"""
