"""Floor I: arrays with gradients.  Read tensor.py first, then ops.py, conv.py, norm.py, attention.py."""
