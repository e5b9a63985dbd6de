"""CuPy's side of the engine's ops: kernels/*.cu compiled and launched."""
