"""Floor I: arrays with gradients.  Read tensor.py first, then ops.py, conv.py, norm.py, attention.py.

ops gives Tensor its operators, x + y, x @ y, x[i].  It is imported here, so that every Tensor has them, whichever
module of the engine a program imports.
"""

from minidiff.engine import ops  # noqa: F401

