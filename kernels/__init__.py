"""Kernels that measure the machine: what its memory, matrix units, attention and links really reach.

Every case is a value (:class:`kernels.case.Case`), each family of cases is one file, and ``kernels.suite`` runs them in a
child process and writes the files that ``docs/kernels.md`` describes. Nothing here imports torch before a case needs it.
"""
