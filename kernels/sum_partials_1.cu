// Partial sums added up: the second half of every sum that several blocks share.
//
// Blocks that add to one number would need atomic additions, which come in another order each time, and floating-point
// sums depend on it.  So each block writes its own part, and here one thread for each number adds the parts, always
// from the first to the last: the same bits every time.
//
//     Which thread does what: neighbouring threads take neighbouring numbers, and each read of a warp is one request.
//
//     partial (splits, n)    thread 0  1  2  3 ...
//         split 0                   |  |  |  |
//         split 1                   |  |  |  |         down, one after the other
//         ...                       v  v  v  v
//     sum (n)                       .  .  .  .
//
// Counted:  n (splits - 1) additions; n splits numbers read and n written.  dw of 3 x 3, 64 -> 64 channels from 52
// parts, float32:  1.9 million additions; 7.7 MB read, most of it from the L2 cache, to which it was written just now.
//
// measured  not yet (benchmarks/kernels.py)
//
// What limits it: the memory's speed for large n; for small n, that only n threads run, each waiting for its reads.
// Those do not wait for each other, so sixteen are under way at a time.
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

// The same, where rows of D numbers take a bias (or none, null) and SiLU: what conv_forward does to a whole sum.
extern "C" __global__ void __launch_bounds__(THREADS)
sum_partials_bias(const Acc* partial, const T* bias, T* y, int n, int splits, int D, int activate) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    Acc sum = column(partial, i, n, splits);
    if (bias) sum += wide(bias[i % D]);
    y[i] = narrow(activate ? silu(sum) : sum);
}
