// The sum of the parts that several blocks wrote, (splits, n) -> (n), in a launch of its own.
//
//     sum[i] = partial[0, i] + partial[1, i] + ...
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
// The parts are those of a convolution's dw, and each image's share of a group norm's dgamma and dbeta.  Within a
// backward pass up to 4096 parts wait, and weight_gradients_1.cu adds them together with other layers'; all other sums
// are added here.  A convolution's y and dx need neither: the block that is last adds their parts (last_block.cuh).
//
// Bytes    n splits sums read, n numbers written.  dw of 3 x 3, 64 -> 64 channels in float32, from 128 images of
//          14 x 14 in 51 parts (conv_3 on an H100): 7.7 MB, most of it from the L2 cache, where it has just been
//          written.
// Work     n (splits - 1) additions: 1.8 million.
// Speed    measured  not yet
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
