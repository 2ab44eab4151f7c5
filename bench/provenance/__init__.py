"""Where a number comes from: machine, software, code, command line; with secrets and home folders removed.

>>> manifest["provenance"] = collect(sys.argv)
"""

from bench.provenance.facts import collect
from bench.provenance.secrets import REMOVED, redact_command_line, redact_environment, redact_text

__all__ = ["REMOVED", "collect", "redact_command_line", "redact_environment", "redact_text"]
