"""The engine's ops on a GPU: these modules launch the kernels of kernels/*.cu on CuPy arrays.

launch.py reads, compiles and launches any kernel; read it first.
"""
