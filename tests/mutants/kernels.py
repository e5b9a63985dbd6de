"""Slips in the CUDA kernels, as they are made: a barrier left out, an index off by one, a mask the wrong way round."""

from .bug import Bug

CUDA = "engine/cuda.py"

BUGS = [
    # --- the launch -----------------------------------------------------------------------------------------
    Bug("a version later than MINIDIFF_KERNEL_VERSION", CUDA, "if s.number <= latest)", "if s.number <= latest + 1)"),
    Bug("float32 rounded to TF32 unasked", CUDA,
        'tf32, latest = os.environ.get("CUPY_TF32") == "1", _latest()', "tf32, latest = True, _latest()"),
    Bug("sm_90a taken for sm_90 and later", CUDA,
        'return needed == capability + "a" if needed.endswith("a") else int(capability) >= int(needed)',
        'return int(capability) >= int(needed.removesuffix("a"))'),
    Bug("an array of another dtype is launched", CUDA, "    if array.dtype != expected:\n", "    if False:\n"),
    Bug("strides are not looked at", CUDA, "if not (any_strides or array.flags.c_contiguous):", "if False:"),
    Bug("2^31 elements, counted in int", CUDA, "    if array.size >= 2**31:\n", "    if array.size > 2**31:\n"),
    Bug("a grid without blocks goes to the driver", CUDA, "if min(grid) < 1:", "if min(grid) < 0:"),
    Bug("a header pasted in twice", CUDA, "if header and header[1] not in seen:", "if header:"),
    Bug("the kernel of one type of element for all", CUDA,
        'f"-DELEMENT={C_TYPES[dtype]}"', 'f"-DELEMENT={C_TYPES[source.takes[0]]}"'),
]
