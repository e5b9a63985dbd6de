"""Captioned images: the contract of a data set, the digits of MNIST, whose captions are measured from their pixels, and
a person's own pictures.

Reading order: dataset, pixels, idx, download, mnist, attributes, digit_captions, digits; layouts, fitting,
picture_cache, own_pictures; emoji.
"""
