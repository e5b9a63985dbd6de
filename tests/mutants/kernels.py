"""Slips in the CUDA kernels, as they are made: a barrier left out, an index off by one, a mask the wrong way round."""

from .bug import Bug

CUDA = "engine/cuda/launch.py"

BUGS = [
    # --- the launch -----------------------------------------------------------------------------------------
    Bug("a version later than MINIDIFF_KERNEL_VERSION", CUDA, "if s.number <= latest)", "if s.number <= latest + 1)"),
    Bug("float32 rounded to TF32 unasked", CUDA,
        'os.environ.get("CUPY_TF32") == "1"', "True"),
    Bug("sm_90a taken for sm_90 and later", CUDA,
        'return needed == capability + "a" if needed.endswith("a") else int(capability) >= int(needed)',
        'return int(capability) >= int(needed.removesuffix("a"))'),
    Bug("a version that asks for more shared memory than the card has", CUDA,
        "and s.runs_on(capability) and s.shared <= shared]",
        "and s.runs_on(capability)]"),
    Bug("an array of another dtype is launched", CUDA, "array.dtype == exact and ", ""),
    Bug("strides are not looked at", CUDA, "and array.flags.c_contiguous and", "and"),
    Bug("2^31 elements, counted in int", CUDA, "and array.size < 2**31", "and array.size <= 2**31"),
    Bug("whole numbers wrap around", CUDA, "type(number) is quick and low <= number <= high", "type(number) is quick"),
    Bug("a grid without blocks goes to the driver", CUDA, "if min(grid) < 1:", "if min(grid) < 0:"),
    Bug("a header pasted in twice", CUDA, "if header and header[1] not in seen:", "if header:"),
    Bug("the kernel of one type of element for all", CUDA,
        'f"-DELEMENT={C_TYPES[dtype]}"', 'f"-DELEMENT={C_TYPES[source.takes[0]]}"'),
    Bug("a sum that blocks share does not put its counter back", "kernels/last_block.cuh",
        "        if (last) *done = 0;\n",
        ""),
    Bug("the way back of an embedding forgets an id's second use", "kernels/embedding_backward_1.cu",
        "used &= used - 1",
        "used = 0"),
    Bug("a linear layer's bias is added to every tile's first column", "kernels/linear_1.cu",
        "sum[r][q] += wide(bias[n])",
        "sum[r][q] += wide(bias[n0])"),
    Bug("the way back of a linear layer takes w as it is", "kernels/linear_1.cu",
        "product<true>(dy, w, nullptr, plus, dx, M, D, C, a_tile, b_tile)",
        "product<false>(dy, w, nullptr, plus, dx, M, D, C, a_tile, b_tile)"),
    Bug("a bias's gradient counts the rows beyond the last", "kernels/weight_gradients_1.cu",
        "b[i / TILE][i % TILE] = m < M && d < D ?",
        "b[i / TILE][i % TILE] = d < D ?"),
    Bug("a gradient is read before it is computed", "engine/tensor.py",
        "    weight_gradients.ready(dy)\n",
        "    pass\n"),
    Bug("gradients of a weight used twice are added before they are computed", "engine/tensor.py",
        "    weight_gradients.ready(held, dx)\n",
        ""),
]
