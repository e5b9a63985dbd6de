// Casts many arrays in one launch: float32 to half precision, or back.
//
//     narrow_all   y_p = half(x_p)     the weights, at the beginning of a step in half precision
//     widen_all    y_p = float(x_p)    their gradients, at its end
//
// A network has hundreds of parameters, most of them small.  As in adamw_1_fused.cu, a table of pointers lists the
// arrays, which are divided into chunks, one for each block.  The table is an argument of the kernel, passed by value,
// so no copy to the card precedes the launch.  The results lie one after another in one array.
//
//     arrays    x_0 x_1 x_2 ...                          pointers
//     lengths   of the arrays
//     offsets   where y_p begins in `to`
//     chunks    (0, 0) (1, 0) (1, 4096) (2, 0) ...       array, first number
//
// Bytes    6 for each number.  2.2 million parameters: 13 MB.  Limited by memory.
// Speed    measured  not yet
//
// takes   float16, bfloat16
// needs   sm_75
#include "element.cuh"

constexpr int THREADS = 256;
constexpr int CHUNK = 4096;
constexpr int MOST = 480;                                   // arrays of a launch: a kernel takes 4 KB of arguments

struct Arrays { const void* at[MOST]; };

extern "C" __global__ void __launch_bounds__(THREADS) narrow_all(
        const Arrays arrays, const int* lengths, const int* offsets, const int* chunks, T* to) {
    const int p = chunks[2 * blockIdx.x], first = chunks[2 * blockIdx.x + 1];
    const int last = first + min(CHUNK, lengths[p] - first);
    const float* x = static_cast<const float*>(arrays.at[p]);
    for (int i = first + threadIdx.x; i < last; i += THREADS) to[offsets[p] + i] = narrow(x[i]);
}

extern "C" __global__ void __launch_bounds__(THREADS) widen_all(
        const Arrays arrays, const int* lengths, const int* offsets, const int* chunks, float* to) {
    const int p = chunks[2 * blockIdx.x], first = chunks[2 * blockIdx.x + 1];
    const int last = first + min(CHUNK, lengths[p] - first);
    const T* x = static_cast<const T*>(arrays.at[p]);
    for (int i = first + threadIdx.x; i < last; i += THREADS) to[offsets[p] + i] = wide(x[i]);
}
