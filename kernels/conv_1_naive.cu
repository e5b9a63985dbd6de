// Convolution 1: one thread for each number of the result.
//
// Each of the three sums is written as in its formula.  Threads share nothing except the caches.  Yet two choices
// already matter.  Neighbouring threads take neighbouring channels, so in forward and dw a warp reads 32 neighbours of
// one array (one request) and one number of the other (the same for all).  And dx is gathered: each thread finds the
// pixels of y that depend on its own pixel, so no two threads add to the same number.
//
//     Which thread does what: the result is a matrix (rows, columns), and a block of 256 threads takes 8 x 32 of it.
//
//               columns: d of y, c of dx, d of dw
//               +--------- 32 ----------+
//     rows:     | warp 0                |     forward: rows are the pixels (b, i, j) of y
//     pixels    | warp 1                |     dx:      rows are pixels of x
//     or taps   | ...                   |     dw:      rows are (m, n, c), tap and channel; each sums a share of pixels
//               | warp 7                |
//               +-----------------------+     the blocks of one row of tiles are neighbours: they read the same pixels
//
// dx with stride s: the same taps reach all pixels with the same remainder of (i + p, j + p) by s.  Each such class is
// a convolution with about kh kw / s^2 taps, and one layer of the grid.  So no thread visits taps that do not reach its
// pixel, and the threads of a warp do the same work.
//
// dw has few results, each a sum over all pixels of the batch.  `splits` layers of the grid share the pixels, and
// sum_partials_1.cu adds their sums in order: the result is always the same, bit for bit, unlike with atomic additions.
//
// Counted, forward, M = B Ho Wo, K = kh kw C:  2 M K D operations, and 2 M K D reads.  B = 128, 14 x 14, 64 -> 64
// channels, 3 x 3, float32:  1.85 GFLOP;  13 MB of x, w and y if each is moved once, and 7.4 GB read from the caches.
//
// measured  not yet (benchmarks/kernels.py)
//
// What limits it: two reads for each multiply-add.  The load unit serves at most one warp a clock, and four warps could
// multiply in that time, so at best it reaches an eighth of the card's speed.  dx is far slower: the neighbouring
// channels c of w (kh, kw, C, D) are D numbers apart, which takes 32 requests for a warp instead of one.
//
// takes   float32, float64, float16, bfloat16
// needs   sm_75
#include "element.cuh"

constexpr int THREADS = 256;
constexpr int TILE_M = 8;
constexpr int TILE_N = 32;

// One axis of conv_dx, for the pixels of x with (i + padding) mod stride = r: only the taps with m mod stride = r
// reach them.  Pixel first + stride u and tap r + stride m belong to row u + shift - m of dy.
struct Class {
    int first, pixels, taps, shift;
    __device__ __forceinline__ Class(int r, int size, int k, int stride, int padding) {
        first = ((r - padding) % stride + stride) % stride;
        pixels = first < size ? (size - first + stride - 1) / stride : 0;
        taps = r < k ? (k - r + stride - 1) / stride : 0;
        shift = (first + padding - r) / stride;
    }
};

// --- y[b,i,j,d] = sum_{m,n,c} x[b, i s + m - p, j s + n - p, c] w[m,n,c,d] --------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS)
conv_forward(const T* x, const T* w, const T* bias, T* y, int B, int H, int W, int C, int Ho, int Wo, int D,
             int kh, int kw, int stride, int padding, int activate) {
    const int tiles_n = (D + TILE_N - 1) / TILE_N;
    const int pixel = blockIdx.x / tiles_n * TILE_M + threadIdx.x / TILE_N;
    const int d = blockIdx.x % tiles_n * TILE_N + threadIdx.x % TILE_N;
    if (pixel >= B * Ho * Wo || d >= D) return;
    const int b = pixel / (Ho * Wo), i = pixel / Wo % Ho, j = pixel % Wo;
    Acc sum = 0;
    for (int m = 0; m < kh; ++m) {
        const int row = i * stride + m - padding;
        if (row < 0 || row >= H) continue;              // the padding is zeros
        for (int n = 0; n < kw; ++n) {
            const int column = j * stride + n - padding;
            if (column < 0 || column >= W) continue;
            const T* x_pixel = x + ((b * H + row) * W + column) * C;
            const T* w_tap = w + (m * kw + n) * C * D + d;
            for (int c = 0; c < C; ++c) sum += wide(x_pixel[c]) * wide(w_tap[c * D]);
        }
    }
    if (bias) sum += wide(bias[d]);
    y[pixel * D + d] = narrow(activate ? silu(sum) : sum);
}

// --- dx[b,i,j,c] = sum_{m,n,d} dy[b, (i + p - m)/s, (j + p - n)/s, d] w[m,n,c,d], where these are whole ------------

extern "C" __global__ void __launch_bounds__(THREADS)
conv_dx(const T* dy, const T* w, T* dx, int B, int H, int W, int C, int Ho, int Wo, int D,
        int kh, int kw, int stride, int padding) {
    const int tiles_n = (C + TILE_N - 1) / TILE_N;
    const int pixel = blockIdx.x / tiles_n * TILE_M + threadIdx.x / TILE_N;
    const int c = blockIdx.x % tiles_n * TILE_N + threadIdx.x % TILE_N;
    const int ri = blockIdx.z / stride, rj = blockIdx.z % stride;
    const Class rows(ri, H, kh, stride, padding), columns(rj, W, kw, stride, padding);
    const int pixels = rows.pixels * columns.pixels;    // of this class, in one image
    if (pixel >= B * pixels || c >= C) return;
    const int b = pixel / pixels, u = pixel / columns.pixels % rows.pixels, v = pixel % columns.pixels;
    Acc sum = 0;
    for (int m = 0; m < rows.taps; ++m) {
        const int i = u + rows.shift - m;               // the pixel of y that this tap takes from ours
        if (i < 0 || i >= Ho) continue;
        for (int n = 0; n < columns.taps; ++n) {
            const int j = v + columns.shift - n;
            if (j < 0 || j >= Wo) continue;
            const T* dy_pixel = dy + ((b * Ho + i) * Wo + j) * D;
            const T* w_row = w + (((ri + stride * m) * kw + rj + stride * n) * C + c) * D;
            for (int d = 0; d < D; ++d) sum += wide(dy_pixel[d]) * wide(w_row[d]);
        }
    }
    dx[((b * H + rows.first + stride * u) * W + columns.first + stride * v) * C + c] = narrow(sum);
}

// --- dw[m,n,c,d] = sum_{b,i,j} x[b, i s + m - p, j s + n - p, c] dy[b,i,j,d] ------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS)
conv_dw(const T* x, const T* dy, Acc* partial, int B, int H, int W, int C, int Ho, int Wo, int D,
        int kh, int kw, int stride, int padding, int splits) {
    const int tiles_n = (D + TILE_N - 1) / TILE_N;
    const int q = blockIdx.x / tiles_n * TILE_M + threadIdx.x / TILE_N;
    const int d = blockIdx.x % tiles_n * TILE_N + threadIdx.x % TILE_N;
    if (q >= kh * kw * C || d >= D) return;
    const int m = q / (kw * C), n = q / C % kw, c = q % C;
    const int pixels = B * Ho * Wo, each = (pixels + splits - 1) / splits;
    const int begin = min(pixels, int(blockIdx.z) * each), end = min(pixels, begin + each);
    Acc sum = 0;
    for (int pixel = begin; pixel < end; ++pixel) {
        const int b = pixel / (Ho * Wo), i = pixel / Wo % Ho, j = pixel % Wo;
        const int row = i * stride + m - padding, column = j * stride + n - padding;
        if (row < 0 || row >= H || column < 0 || column >= W) continue;
        sum += wide(x[((b * H + row) * W + column) * C + c]) * wide(dy[pixel * D + d]);
    }
    partial[(int(blockIdx.z) * kh * kw * C + q) * D + d] = sum;
}
