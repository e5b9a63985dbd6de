// Adds partial sums: the second half of a sum that several blocks share, in a launch of its own.
//
// If blocks added to the same number, they would need atomic additions, whose order differs each time, and a
// floating-point sum depends on the order.  So each block writes its own part, and here one thread for each number adds
// the parts, always from the first to the last: the result is the same, bit for bit, every time.
//
//     Which thread does what: neighbouring threads take neighbouring numbers, so each read of a warp is one request.
//
//     partial (splits, n)    thread 0  1  2  3 ...
//         split 0                   |  |  |  |
//         split 1                   |  |  |  |         downwards, one after another
//         ...                       v  v  v  v
//     sum (n)                       .  .  .  .
//
// Counted:  n (splits - 1) additions; n splits numbers read and n written.  dw of 3 x 3, 64 -> 64 channels from 52
// parts, float32:  1.9 million additions; 7.7 MB read, most of it from the L2 cache, where it has just been written.
//
// measured  not yet (benchmarks/kernels.py)
//
// What limits it: for large n, the speed of memory; for small n, that only n threads run, each waiting for its reads.
// Reads do not wait for each other, so each thread has sixteen in transit at a time.
//
// takes   float32, float64, float16, bfloat16
// needs   sm_75
#include "element.cuh"

constexpr int THREADS = 256;

__device__ __forceinline__ Acc column(const Acc* partial, int i, int n, int splits) {
    Acc sum = 0;
    #pragma unroll 16
    for (int split = 0; split < splits; ++split) sum += partial[split * n + i];
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
sum_partials(const Acc* partial, T* sum, int n, int splits) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i < n) sum[i] = narrow(column(partial, i, n, splits));
}
