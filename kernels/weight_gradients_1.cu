// The gradients of many layers' weights and biases in one launch.
//
//     y = x w + b                             x (M, C), w (C, D), b (D,), y (M, D)
//     dw = x^T dy         db = 1^T dy         [dw; db] = [x, 1]^T dy
//
// The bias is the weight of an input that is always 1.  So db is one more row of the same product, and needs no kernel
// of its own.  A sum of rows alone, such as a convolution's db, is the case C = 0.
//
// A single layer is too small for a card: 128 x 128 weights are 16 tiles, and an H100 has 132 multiprocessors.  But no
// gradient of a weight is read before the backward pass ends.  So the layers wait, and one launch computes them all.
//
//     Which thread does what: a block computes 32 x 32 numbers of one layer, and goes through all M rows, 32 at a time.
//     A thread has 2 x 2 sums, 16 rows and 16 columns apart, so a warp reads neighbouring numbers of shared memory.
//
//                dy (32 rows m, 32 columns d)
//                +--------+
//     x^T        |        |         blocks, of all layers:   0 1 2 3 | 4 5 | 6 7 8 9 10 11 | ...
//     +--------+ +--------+                                  layer 0 | 1   | layer 2       |
//     | c, m   | | c, d   |
//     +--------+ +--------+         a block goes through the table of layers until it finds its own
//     | 1 .. 1 | | db     |
//     +--------+ +--------+
//
// The table is an argument of the kernel, passed by value, so no copy to the card precedes the launch.  Each sum goes
// through the rows in order, so the result is the same, bit for bit, every time.
//
// Work     2 M (C + 1) D operations a layer.  40 layers of 392 x 128 x 128: 0.5 GFLOP.
// Bytes    x and dy, once for each tile of dw's columns or rows, mostly from the L2 cache.
// Speed    measured  not yet
//
// What limits it: a sum reads two numbers from shared memory for one product, and M rows are one block's work.
// Layers with many rows, or with enough tiles to fill the card, use a matrix product of their own.
//
// takes   float32, float64, float16, bfloat16
// needs   sm_75
#include "element.cuh"

constexpr int THREADS = 256;
constexpr int TILE = 32;
constexpr int MOST = 80;                                    // layers in a table: a kernel takes 4 KB of arguments

struct Layer {
    const void *x, *dy;                                     // (M, C); (M, D), of type Acc if `sums`
    T *dw, *db;                                             // (C, D); (D,), or null
    int M, C, D, sums;
};
struct Layers { Layer at[MOST]; };

__device__ __forceinline__ int tiles(int n) { return (n + TILE - 1) / TILE; }

// sum[r][q] of row c0 + ty + 16 r and column d0 + tx + 16 q.
template <typename From>
__device__ __forceinline__ void multiply(const T* x, const From* dy, int M, int C, int D, int c0, int d0,
                                         Acc (*a)[TILE], Acc (*b)[TILE], Acc (&sum)[2][2]) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    for (int m0 = 0; m0 < M; m0 += TILE) {
        #pragma unroll
        for (int i = threadIdx.x; i < TILE * TILE; i += THREADS) {
            const int m = m0 + i / TILE, c = c0 + i % TILE, d = d0 + i % TILE;
            a[i / TILE][i % TILE] = m < M && c < C ? wide(x[m * C + c]) : Acc(c == C);          // the input 1
            b[i / TILE][i % TILE] = m < M && d < D ? Acc(wide(dy[m * D + d])) : Acc(0);
        }
        __syncthreads();
        #pragma unroll
        for (int k = 0; k < TILE; ++k)
            for (int r = 0; r < 2; ++r)
                for (int q = 0; q < 2; ++q) sum[r][q] += a[k][ty + 16 * r] * b[k][tx + 16 * q];
        __syncthreads();                                    // before the next rows are written
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) weight_gradients(const Layers layers) {
    __shared__ Acc a[TILE][TILE], b[TILE][TILE];            // (m, c), (m, d)
    int block = blockIdx.x, p = 0;
    for (;; ++p) {
        const int blocks = tiles(layers.at[p].C + (layers.at[p].db != nullptr)) * tiles(layers.at[p].D);
        if (block < blocks) break;
        block -= blocks;
    }
    const int M = layers.at[p].M, C = layers.at[p].C, D = layers.at[p].D;
    const int c0 = block / tiles(D) * TILE, d0 = block % tiles(D) * TILE;
    const T* x = static_cast<const T*>(layers.at[p].x);
    const void* dy = layers.at[p].dy;
    Acc sum[2][2] = {};
    if (layers.at[p].sums) multiply(x, static_cast<const Acc*>(dy), M, C, D, c0, d0, a, b, sum);
    else                   multiply(x, static_cast<const T*>(dy), M, C, D, c0, d0, a, b, sum);

    T *dw = layers.at[p].dw, *db = layers.at[p].db;
    for (int r = 0; r < 2; ++r)
        for (int q = 0; q < 2; ++q) {
            const int c = c0 + threadIdx.x / 16 + 16 * r, d = d0 + threadIdx.x % 16 + 16 * q;
            if (d >= D) continue;
            if (c < C) dw[c * D + d] = narrow(sum[r][q]);
            else if (c == C && db) db[d] = narrow(sum[r][q]);
        }
}
