// A linear layer, and its way back to x, for products that are too small to fill a card.
//
//     y  = x w + b  + plus                    x (M, C), w (C, D), b (D,), y (M, D)
//     dx = dy w^T   + plus                    plus: null, or an array of the result's shape
//
// A residual branch ends in a linear layer, x + branch(x), and on the way back a second path's cotangent is added to dx.
// Both sums are `plus`: they cost no launch, and no more than reading one array.
//
// The convolution kernels also compute such products, in tiles of 128 x 64.  A layer of 392 x 128 has 8 of these tiles,
// so blocks must share each tile's sum through memory, and one of them adds the parts (last_block.cuh).  In tiles of
// 32 x 32 it has 52 blocks, and each computes its sums alone.
//
//     Which thread does what: 256 threads compute 32 x 32 sums, 2 x 2 each, 16 rows and 16 columns apart.
//
//               b (32 k, 32 columns)          b is a tile of w; for dx it is w^T, whose tile is read along w's rows
//               +--------+                    and written to shared memory down a column: a row of 33 numbers keeps
//     a         +--------+                    the 32 writes of a warp in 32 banks.
//     +------+  +--------+
//     | k    |  | sums   |  32 x 32
//     +------+  +--------+
//
// Work     2 M C D operations.  392 x 128 x 128: 13 MFLOP.
// Bytes    a block reads (32 + 32) numbers for each k, one for 16 products; mostly from the L2 cache.
// Speed    measured  not yet
//
// What limits it: shared memory, with four reads for four products.  minidiff takes the tiles of conv_*.cu or CuPy's
// product for larger layers, which keep more sums in registers or use the tensor cores.
//
// takes   float32, float64, float16, bfloat16
// needs   sm_75
#include "element.cuh"

constexpr int THREADS = 256;
constexpr int TILE = 32;
constexpr int PITCH = TILE + 1;                             // distance between rows of a tile

// y (M, N) = a (M, K) B + bias + plus, where B is w (K, N), or with TURNED the transpose of w (N, K).
template <bool TURNED>
__device__ __forceinline__ void product(const T* a, const T* w, const T* bias, const T* plus, T* y, int M, int K, int N,
                                        Acc (*a_tile)[PITCH], Acc (*b_tile)[PITCH]) {
    const int blocks = (N + TILE - 1) / TILE, m0 = blockIdx.x / blocks * TILE, n0 = blockIdx.x % blocks * TILE;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    Acc sum[2][2] = {};
    for (int k0 = 0; k0 < K; k0 += TILE) {
        #pragma unroll
        for (int i = threadIdx.x; i < TILE * TILE; i += THREADS) {
            const int row = i / TILE, column = i % TILE;    // neighbouring threads read neighbouring numbers
            const int m = m0 + row, k = k0 + (TURNED ? column : row), n = n0 + (TURNED ? row : column);
            a_tile[row][column] = m < M && k0 + column < K ? wide(a[m * K + k0 + column]) : Acc(0);
            const Acc b = k < K && n < N ? wide(w[TURNED ? n * K + k : k * N + n]) : Acc(0);
            b_tile[TURNED ? column : row][TURNED ? row : column] = b;
        }
        __syncthreads();
        #pragma unroll
        for (int k = 0; k < TILE; ++k)
            for (int r = 0; r < 2; ++r)
                for (int q = 0; q < 2; ++q) sum[r][q] += a_tile[ty + 16 * r][k] * b_tile[k][tx + 16 * q];
        __syncthreads();                                    // before the next tiles are written
    }
    for (int r = 0; r < 2; ++r)
        for (int q = 0; q < 2; ++q) {
            const int m = m0 + ty + 16 * r, n = n0 + tx + 16 * q;
            if (m >= M || n >= N) continue;
            if (bias) sum[r][q] += wide(bias[n]);
            if (plus) sum[r][q] += wide(plus[m * N + n]);
            y[m * N + n] = narrow(sum[r][q]);
        }
}

// grid: tiles of y, (M / TILE) (D / TILE), rounded up
extern "C" __global__ void __launch_bounds__(THREADS) linear(
        const T* x, const T* w, const T* b, const T* plus, T* y, int M, int C, int D) {
    __shared__ Acc a_tile[TILE][PITCH], b_tile[TILE][PITCH];
    product<false>(x, w, b, plus, y, M, C, D, a_tile, b_tile);
}

// grid: tiles of dx, (M / TILE) (C / TILE), rounded up
extern "C" __global__ void __launch_bounds__(THREADS) linear_dx(
        const T* dy, const T* w, const T* plus, T* dx, int M, int C, int D) {
    __shared__ Acc a_tile[TILE][PITCH], b_tile[TILE][PITCH];
    product<true>(dy, w, nullptr, plus, dx, M, D, C, a_tile, b_tile);
}
