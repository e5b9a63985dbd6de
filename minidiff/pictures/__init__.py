"""Pictures for people: sheets of images with Pillow (sheets.py), plots of numbers with matplotlib (plots.py)."""

from minidiff.pictures.plots import loss_curve
from minidiff.pictures.sheets import check_writable, gif, plain, save, sheet, strip

__all__ = ["check_writable", "gif", "loss_curve", "plain", "save", "sheet", "strip"]
