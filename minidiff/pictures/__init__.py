"""Pictures for people: sheets of images with Pillow (sheets.py), plots with matplotlib (plots.py)."""

from minidiff.pictures.sheets import *  # noqa: F401, F403
