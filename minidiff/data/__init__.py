"""MNIST, what can be seen in its digits, and captions that say so.

Reading order: pixels, idx, download, mnist, attributes, captions.
"""
