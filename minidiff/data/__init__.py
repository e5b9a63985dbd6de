"""Captioned images: the contract of a data set, and the digits of MNIST, whose captions are measured from their pixels.

Reading order: dataset, pixels, idx, download, mnist, attributes, digit_captions, digits.
"""
