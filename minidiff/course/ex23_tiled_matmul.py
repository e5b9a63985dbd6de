"""Exercise 23: a matrix product in CUDA, judged by NumPy's, by another order of the threads, and by what it reads."""

import numpy as np

from minidiff.course.compare import differs, stream
from minidiff.course.emulator import Launched, launch
from minidiff.course.exercise import Exercise, Wrong
from minidiff.course.judge import Fault

SIZES = [(16, 16, 16), (32, 48, 16), (1, 1, 1), (17, 5, 30), (20, 33, 18)]            # M, K, N

# as multiply in kernels/conv_2_tiles.cu, with tiles of 16 x 16
SOURCE = """
extern "C" __global__ void matmul(In a, In b, Out c, int M, int K, int N) {
    __shared__ float tile_a[16][16], tile_b[16][16];
    const int row = threadIdx.y, column = threadIdx.x;
    const int i = blockIdx.y * 16 + row, j = blockIdx.x * 16 + column;
    float sum = 0;
    for (int k0 = 0; k0 < K; k0 += 16) {
        const int ka = k0 + column, kb = k0 + row;
        tile_a[row][column] = i < M && ka < K ? a[i * K + ka] : 0;
        tile_b[row][column] = kb < K && j < N ? b[kb * N + j] : 0;
        __syncthreads();
        for (int k = 0; k < 16; ++k) sum += tile_a[row][k] * tile_b[k][column];
        __syncthreads();
    }
    if (i < M && j < N) c[i * N + j] = sum;
}
"""


def solution():
    return SOURCE


# ---- laws --------------------------------------------------------------------------------------------------

def _run(source, a, b, order: int = 0) -> Launched:
    (M, K), N = a.shape, b.shape[1]
    if not isinstance(source, str):
        raise Fault("matmul_kernel should return the source of the kernel, a text")
    return launch(source, "matmul", (-(-N // 16), -(-M // 16)), (16, 16), (a, b), (M, N), (M, K, N), order=order)


def _cases():
    for M, K, N in SIZES:
        rng = stream(23, M + 100 * K + 10_000 * N)
        # whole numbers: sums of them are exact in float32
        a, b = (rng.integers(-4, 5, shape).astype(np.float32) for shape in ((M, K), (K, N)))
        yield a, b, f"for M, K, N = {M}, {K}, {N}"


def product(matmul_kernel):
    """c is the matrix product of a and b, at all sizes"""
    source = matmul_kernel()
    for a, b, where in _cases():
        if (said := differs("c", _run(source, a, b).result, a.astype(np.float64) @ b, where)):
            return said


def any_order_of_threads(matmul_kernel):
    """the threads of a block may run in any order between barriers"""
    source = matmul_kernel()
    for a, b, where in _cases():
        for order, name in ((1, "in reverse"), (2, "in a shuffled order")):
            if (said := differs("c", _run(source, a, b, order).result, a.astype(np.float64) @ b,
                                f"{where}, where the threads run {name}: a barrier is missing")):
                return said


def within_the_arrays(matmul_kernel):
    """nothing outside of a, b and c is read or written"""
    source = matmul_kernel()
    for a, b, where in _cases():
        outside = _run(source, a, b).outside
        if outside:
            return f"{outside} indices lie outside of a, b or c, {where}: ask whether the place is in the matrix first"


def reads_once(matmul_kernel):
    """a block reads each number of a and b that it needs once"""
    source = matmul_kernel()
    for a, b, where in _cases():
        (M, K), N = a.shape, b.shape[1]
        most = M * K * -(-N // 16) + K * N * -(-M // 16)
        reads = _run(source, a, b).reads
        if reads > most:
            return f"a and b are read {reads:,} times in all, where {most:,} are enough, {where}: each thread copies " \
                   "one number of each to shared memory"


# ---- known wrong answers -----------------------------------------------------------------------------------

BARRIER = "__syncthreads();"
FIRST, SECOND = SOURCE.index(BARRIER), SOURCE.rindex(BARRIER)


def _no_first_barrier():
    return SOURCE[:FIRST] + SOURCE[FIRST + len(BARRIER):]


def _no_second_barrier():
    return SOURCE[:SECOND] + SOURCE[SECOND + len(BARRIER):]


def _no_barriers():
    return SOURCE.replace(BARRIER, "")


def _without_tiles():
    return """
extern "C" __global__ void matmul(In a, In b, Out c, int M, int K, int N) {
    const int i = blockIdx.y * 16 + threadIdx.y, j = blockIdx.x * 16 + threadIdx.x;
    if (i >= M || j >= N) return;
    float sum = 0;
    for (int k = 0; k < K; ++k) sum += a[i * K + k] * b[k * N + j];
    c[i * N + j] = sum;
}
"""


def _whole_pieces_only():
    return SOURCE.replace("k0 < K; k0", "k0 + 16 <= K; k0")


def _one_piece_only():
    return SOURCE.replace("k0 < K; k0", "k0 < 1; k0")


def _sum_of_the_last_piece():
    return SOURCE.replace("for (int k = 0;", "sum = 0;\n        for (int k = 0;")


def _b_transposed():
    return SOURCE.replace("tile_b[k][column];", "tile_b[column][k];")


def _a_transposed():
    return SOURCE.replace("tile_a[row][k]", "tile_a[k][row]")


def _wrong_length_of_a_row():
    return SOURCE.replace("a[i * K + ka]", "a[i * N + ka]")


def _x_counts_rows():
    return SOURCE.replace("blockIdx.y * 16 + row, j = blockIdx.x", "blockIdx.x * 16 + row, j = blockIdx.y")


def _no_bound_of_k_in_a():
    return SOURCE.replace("i < M && ka < K ?", "i < M ?")


def _no_bound_of_i():
    return SOURCE.replace("i < M && ka < K ?", "ka < K ?")


def _no_bound_of_j():
    return SOURCE.replace("kb < K && j < N ?", "kb < K ?")


def _no_bounds():
    return SOURCE.replace("i < M && ka < K ? a[i * K + ka] : 0", "a[i * K + ka]") \
        .replace("kb < K && j < N ? b[kb * N + j] : 0", "b[kb * N + j]")


def _result_without_bounds():
    return SOURCE.replace("if (i < M && j < N) c[", "c[")


def _early_return():
    return SOURCE.replace("float sum = 0;", "if (i >= M || j >= N) return;\n    float sum = 0;")


def probe(matmul_kernel):
    source, found = matmul_kernel(), []
    for M, K, N in ((20, 37, 35), (33, 16, 16)):
        rng = stream(23)
        a, b = (rng.integers(-4, 5, shape).astype(np.float32) for shape in ((M, K), (K, N)))
        for order in (0, 1):
            done = _run(source, a, b, order)
            found += [done.result, done.outside, done.reads]
    return found


EXERCISE = Exercise(
    title="A matrix product in CUDA, in tiles", answer="matmul_kernel", minutes=45, chapter="10_engine",
    hint="for (int k0 = 0; k0 < K; k0 += 16): copy a's number (i, k0 + column) to tile_a[row][column] and b's number "
         "(k0 + row, j) to tile_b[row][column], or 0 outside of the matrices; barrier; add tile_a[row][k] * "
         "tile_b[k][column] for the 16 k; barrier.",
    solution=solution, place="kernels/conv_2_tiles.cu multiply", seconds=180,
    laws=(product, any_order_of_threads, within_the_arrays, reads_once), probe=probe,
    wrong=(
        Wrong(_no_first_barrier, "the barrier between the copies and the products is missing: a thread reads what "
                                 "others have not yet written"),
        Wrong(_no_second_barrier, "the barrier after the products is missing: a fast thread overwrites the tile that "
                                  "slower ones still read"),
        Wrong(_no_barriers, "both barriers are missing: one after the copies, and one after the products"),
        Wrong(_without_tiles, "each thread reads a whole row of a and a whole column of b from global memory: let "
                              "the threads of a block share them in tiles"),
        Wrong(_whole_pieces_only, "the last piece is left out where K is not a multiple of 16"),
        Wrong(_one_piece_only, "only the first 16 numbers k are summed: go on to the next piece until K"),
        Wrong(_sum_of_the_last_piece, "the sum starts at 0 again in each piece"),
        Wrong(_b_transposed, "it multiplies by the transpose of each tile of b: k is the row of b"),
        Wrong(_a_transposed, "it multiplies the transpose of each tile of a: k is the column of a"),
        Wrong(_wrong_length_of_a_row, "a row of a is taken to have N numbers: it has K"),
        Wrong(_x_counts_rows, "blockIdx.x and blockIdx.y have changed places: x counts along a row of c"),
        Wrong(_no_bound_of_k_in_a, "a is read beyond the end of its row, where k is K or more: the bound ka < K is "
                                   "missing"),
        Wrong(_no_bound_of_i, "a is read below its last row, where i is M or more"),
        Wrong(_no_bound_of_j, "b is read beyond the end of its row, where j is N or more"),
        Wrong(_no_bounds, "a and b are read outside of their rows and columns: take 0 there"),
        Wrong(_early_return, "threads outside of c return at once: the others need the numbers that they should "
                             "copy, and they miss at the barriers"),
        Wrong(_result_without_bounds, "c is written outside of its rows and columns: the last blocks stick out of "
                                      "the matrix"),
    ))
