"""Floor II: networks.  Read module.py, layers.py, transformer.py, unet.py, optim.py in that order."""
