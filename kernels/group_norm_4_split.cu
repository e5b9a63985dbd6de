// Group norm, version 4: a slab's pixels are split over many blocks, in two kernels.
//
// Version 3 has one block for each slab.  Two images of 64 x 64 x 320 make 16 slabs: 116 of an H100's 132
// multiprocessors would be idle, and no block could keep its 655 KB.  Here a first kernel has `splits` blocks for each
// slab, each with `part` pixels, and writes its sums to memory; a second kernel, with as many blocks, reads all these
// sums, and the pixels again.
//
// Forward, block s computes the mean m_s of its n_s elements and their sum of squares about it, M_s.  These combine
// (Chan, Golub & LeVeque 1979) without a subtraction of two large numbers:
//
//     mean = sum n_s m_s / n,     n var = sum M_s + sum n_s (m_s - mean)^2
//
// Backward, block s computes each channel's sums of dz and dz x_hat over its pixels, and these are simply added.  All
// blocks of the second kernel add them in the same order, so all get the same bits, in every run.
//
// Which thread does what: as in version 3, within a block's part.
//
//                      channels  slab 0 | slab 1 | slab 2 |                 blocks (x, y)
//     pixels 0    .. part-1       0, 0  |  1, 0  |  2, 0  |
//     pixels part .. 2 part-1     0, 1  |  1, 1  |  2, 1  |
//     ...                         0, 2  |  1, 2  |  2, 2  |
//
// The second kernel goes backwards, from the last part: the pixels that were read last are most likely still in L2.
//
// Bytes    forward: x read twice and y written once, 3 B N C elements; backward: x and dy twice, dx once, 5.  What is
//          still in L2 (50 MB on an H100) is not read from memory again: then it is 2 and 3, as in version 3.
//          2 images of 64 x 64 x 320 in float32 (10.5 MB): 31 and 52 MB in all, of which 21 and 31 must come from
//          memory; slabs of 40 channels, 21 splits, 336 blocks, each of 196 pixels (31 KB).
//          In between, 2 splits B G and 2 splits B C sums are stored, which every block of a slab reads: 2 MB here.
// Work     as version 3.
// Speed    measured  not yet (benchmarks/kernels.py)
//
// What limits it.  There are two launches, and between them the whole card waits for its slowest block.  Arrays larger
// than L2 are moved 3 times, and in version 3 twice: the host code chooses this version only if version 3 has too few
// blocks or too large ones.  On Hopper, a cluster of blocks could keep one slab in their shared memories together and
// read it once; that is not done here.
//
// row      numbers from one image's gamma (and beta) to the next: C or more, or 0 if all images share them
// takes   float32, float64, float16, bfloat16
// needs   sm_75
#include "element.cuh"

// The most threads of a block; fewer may be launched, in whole warps.  The 1 next to it below (blocks that must fit on
// a multiprocessor) allows each thread 128 registers: without it the compiler stops at 64, and spills.
constexpr int MOST_THREADS = 512;

__device__ __forceinline__ Acc warp_sum(Acc x) {
    for (int away = 16; away > 0; away /= 2) x += __shfl_xor_sync(0xffffffffu, x, away);
    return x;
}

// V neighbouring elements, read or written by one instruction.
template <int V> struct alignas(V == 4 ? alignof(Four) : alignof(T)) Piece { T at[V]; };

template <int V> __device__ __forceinline__ Piece<V> read(const T* from) {
    return *reinterpret_cast<const Piece<V>*>(from);
}

template <int V> __device__ __forceinline__ void write(T* to, const Piece<V>& piece) {
    *reinterpret_cast<Piece<V>*>(to) = piece;
}

// A thread's place in the picture above.  The spare threads at the end of a block have row == rows.
struct Place {
    int lanes, rows, lane, row;
    __device__ __forceinline__ Place(int pieces) {
        lanes = min(pieces, int(blockDim.x));
        rows = int(blockDim.x) / lanes;
        lane = int(threadIdx.x) % lanes;
        row = int(threadIdx.x) / lanes;
    }
};

// Adds the sums of each column, K for each thread; the threads of row 0 then hold the sums of the columns.
template <int K> __device__ __forceinline__ void add_rows(Acc (&sum)[K], Acc* partial, const Place& at) {
    Acc* own = partial + threadIdx.x;
    for (int k = 0; k < K; k++) own[k * blockDim.x] = sum[k];
    __syncthreads();
    for (int left = at.rows; left > 1;) {
        const int half = (left + 1) / 2;
        if (at.row + half < left)
            for (int k = 0; k < K; k++) own[k * blockDim.x] += own[k * blockDim.x + half * at.lanes];
        __syncthreads();
        left = half;
    }
    for (int k = 0; k < K; k++) sum[k] = own[k * blockDim.x];       // all threads have read what they need
}

// group[g] = sum of the channels of group g: one warp for each group.
__device__ __forceinline__ void add_channels(const Acc* channel, Acc* group, int slab, int size) {
    for (int g = threadIdx.x / 32; g < slab; g += blockDim.x / 32) {
        Acc sum = 0;
        for (int c = threadIdx.x % 32; c < size; c += 32) sum += channel[g * size + c];
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) group[g] = sum;
    }
    __syncthreads();
}

// tile = the first `kept` pixels of x.  Each thread copies what only it will read, so no barrier is needed.
template <int V> __device__ __forceinline__ void stage(
        const T* x, T* tile, int C, int W, int kept, const Place& at) {
    constexpr int AT_ONCE = 4;                              // loads in transit at once, to hide the latency of memory
    for (int c = at.lane * V; c < W && at.row < at.rows; c += at.lanes * V)
        for (int p = at.row; p < kept; p += AT_ONCE * at.rows) {
            Piece<V> piece[AT_ONCE];
            #pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (p + i * at.rows < kept) piece[i] = read<V>(x + (p + i * at.rows) * C + c);
            #pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (p + i * at.rows < kept) write<V>(tile + (p + i * at.rows) * W + c, piece[i]);
        }
}

template <int V> __device__ __forceinline__ void add(Acc (&sum)[V], const Piece<V>& x, const Acc (&first)[V]) {
    for (int k = 0; k < V; k++) sum[k] += wide(x.at[k]) - first[k];
}

template <int V> __device__ __forceinline__ void add_squares(Acc (&sum)[V], const Piece<V>& x, const Acc (&mean)[V]) {
    for (int k = 0; k < V; k++) sum[k] += (wide(x.at[k]) - mean[k]) * (wide(x.at[k]) - mean[k]);
}

// A thread's numbers of its V channels.
template <int V> struct Channels {
    Acc mean[V], rstd[V], a[V], shift[V];                   // z = a (x - mean) + shift
    __device__ __forceinline__ Channels(const Acc* mean_, const Acc* rstd_, const T* gamma, const T* beta,
                                        int c, int size) {
        for (int k = 0; k < V; k++) {
            mean[k] = mean_[(c + k) / size];
            rstd[k] = rstd_[(c + k) / size];
            a[k] = wide(gamma[c + k]) * rstd[k];
            shift[k] = wide(beta[c + k]);
        }
    }
};

template <int V> __device__ __forceinline__ Piece<V> normalised(Piece<V> x, const Channels<V>& of, int with_silu) {
    for (int k = 0; k < V; k++) {
        const Acc z = of.a[k] * (wide(x.at[k]) - of.mean[k]) + of.shift[k];
        x.at[k] = narrow(with_silu ? silu(z) : z);
    }
    return x;
}

// x points to the block's part of a slab, which has N pixels; mean and squares to its results, (slab) each.
template <int V> __device__ __forceinline__ void sums(
        const T* x, int N, int C, int size, int slab, int kept, Acc* partial, Acc* mean, Acc* squares) {
    const int W = slab * size;
    const Acc n = Acc(N) * size;
    Acc* channel = partial + 4 * blockDim.x;
    Acc *mean_of = channel + 2 * W, *squares_of = mean_of + slab;
    T* tile = reinterpret_cast<T*>(mean_of + 4 * slab);     // (kept, W)
    const Place at(W / V);
    stage<V>(x, tile, C, W, kept, at);

    // mean = first + sum (x - first) / n
    for (int base = 0; base < W; base += at.lanes * V) {    // one iteration, unless W > V threads
        const int c = base + at.lane * V;
        const bool busy = c < W && at.row < at.rows;
        Acc sum[V] = {}, first[V];
        for (int k = 0; k < V && busy; k++) first[k] = wide(x[(c + k) / size * size]);
        int p = busy ? at.row : N;
        for (; p < kept; p += at.rows) add<V>(sum, read<V>(tile + p * W + c), first);
        for (; p < N; p += at.rows) add<V>(sum, read<V>(x + p * C + c), first);
        add_rows(sum, partial, at);
        for (int k = 0; k < V && c < W && at.row == 0; k++) channel[c + k] = sum[k];
    }
    __syncthreads();
    add_channels(channel, mean_of, slab, size);
    for (int g = threadIdx.x; g < slab; g += blockDim.x) mean[g] = mean_of[g] = wide(x[g * size]) + mean_of[g] / n;
    __syncthreads();

    // sum (x - mean)^2
    for (int base = 0; base < W; base += at.lanes * V) {
        const int c = base + at.lane * V;
        const bool busy = c < W && at.row < at.rows;
        Acc sum[V] = {}, m[V];
        for (int k = 0; k < V && busy; k++) m[k] = mean_of[(c + k) / size];
        int p = busy ? at.row : N;
        for (; p < kept; p += at.rows) add_squares<V>(sum, read<V>(tile + p * W + c), m);
        for (; p < N; p += at.rows) add_squares<V>(sum, read<V>(x + p * C + c), m);
        add_rows(sum, partial, at);
        for (int k = 0; k < V && c < W && at.row == 0; k++) channel[c + k] = sum[k];
    }
    __syncthreads();
    add_channels(channel, squares_of, slab, size);
    for (int g = threadIdx.x; g < slab; g += blockDim.x) squares[g] = squares_of[g];
}

// Whether a slab can be read and written four elements at a time.
__device__ __forceinline__ bool in_fours(const T* x, const T* y, int C, int W) {
    return C % 4 == 0 && W % 4 == 0 && (reinterpret_cast<unsigned long long>(x) % alignof(Four) == 0)
                                    && (reinterpret_cast<unsigned long long>(y) % alignof(Four) == 0);
}

// slab    groups of a block, which divides `groups`           grid (B groups / slab, splits)
// kept    pixels of a part that stay in shared memory, 0 .. part
// found   (splits, 2, B, groups), mean and squares
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1) group_norm_forward_sums(
        const T* x, Acc* found, int B, int N, int C, int groups, int slab, int kept, int part) {
    extern __shared__ float4 dynamic_shared[];
    Acc* partial = reinterpret_cast<Acc*>(dynamic_shared);
    const int slabs = groups / slab, b = blockIdx.x / slabs, g = blockIdx.x % slabs * slab, size = C / groups;
    const int from = blockIdx.y * part, pixels = min(part, N - from);
    x += (b * N + from) * C + g * size;                     // (pixels, W), rows C apart
    Acc* mean = found + (blockIdx.y * 2 * B + b) * groups + g;
    kept = min(kept, pixels);
    if (in_fours(x, x, C, slab * size)) sums<4>(x, pixels, C, size, slab, kept, partial, mean, mean + B * groups);
    else                                sums<1>(x, pixels, C, size, slab, kept, partial, mean, mean + B * groups);
}

template <int V> __device__ __forceinline__ void apply(
        const T* x, const T* gamma, const T* beta, T* y, const Acc* mean, const Acc* rstd,
        int pixels, int C, int size, int W, int with_silu) {
    const Place at(W / V);
    for (int c = at.lane * V; c < W && at.row < at.rows; c += at.lanes * V) {
        const Channels<V> of(mean, rstd, gamma, beta, c, size);
        #pragma unroll 2
        for (int p = at.row; p < pixels; p += at.rows)
            write<V>(y + p * C + c, normalised<V>(read<V>(x + p * C + c), of, with_silu));
    }
}

// Shared memory: Acc [2][slab].
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1) group_norm_forward(
        const T* x, const T* gamma, const T* beta, const Acc* found, T* y, Acc* mean, Acc* rstd,
        int B, int N, int C, int groups, int row, int with_silu, Acc eps, int slab, int part) {
    extern __shared__ float4 dynamic_shared[];
    Acc *mean_of = reinterpret_cast<Acc*>(dynamic_shared), *rstd_of = mean_of + slab;
    const int block = gridDim.x - 1 - blockIdx.x, split = gridDim.y - 1 - blockIdx.y, splits = gridDim.y;
    const int slabs = groups / slab, b = block / slabs, g = block % slabs * slab, size = C / groups;
    const int from = split * part, pixels = min(part, N - from);

    // combines the means and squares of the splits: one warp for each group
    for (int i = threadIdx.x / 32; i < slab; i += blockDim.x / 32) {
        const Acc* m = found + b * groups + g + i;          // (splits), 2 B groups apart
        const Acc first = m[0], n = Acc(N) * size;
        Acc sum = 0, squares = 0;
        for (int s = threadIdx.x % 32; s < splits; s += 32)
            sum += Acc(min(part, N - s * part)) * size * (m[s * 2 * B * groups] - first);
        const Acc all = first + warp_sum(sum) / n;
        for (int s = threadIdx.x % 32; s < splits; s += 32) {
            const Acc off = m[s * 2 * B * groups] - all;
            squares += m[(s * 2 + 1) * B * groups] + Acc(min(part, N - s * part)) * size * off * off;
        }
        const Acc r = rstd_of_variance(warp_sum(squares) / n + eps);
        if (threadIdx.x % 32 == 0) {
            mean_of[i] = all;
            rstd_of[i] = r;
            if (split == 0) mean[b * groups + g + i] = all, rstd[b * groups + g + i] = r;
        }
    }
    __syncthreads();

    x += (b * N + from) * C + g * size;                     // (pixels, W), rows C apart
    y += (b * N + from) * C + g * size;
    gamma += b * row + g * size;                           // (W)
    beta  += b * row + g * size;
    if (in_fours(x, y, C, slab * size))
        apply<4>(x, gamma, beta, y, mean_of, rstd_of, pixels, C, size, slab * size, with_silu);
    else
        apply<1>(x, gamma, beta, y, mean_of, rstd_of, pixels, C, size, slab * size, with_silu);
}

// dz, from dy:  d silu(z) / dz = s (1 + z (1 - s)),  s = sigmoid(z)
__device__ __forceinline__ Acc before_silu(Acc dy, Acc z) {
    const Acc s = sigmoid(z);
    return dy * s * (1 + z * (1 - s));
}

// sum += (dz, dz (x - mean))
template <int V> __device__ __forceinline__ void add_products(
        Acc (&sum)[2 * V], const Piece<V>& x, const Piece<V>& dy, const Channels<V>& of, int with_silu) {
    for (int k = 0; k < V; k++) {
        const Acc centred = wide(x.at[k]) - of.mean[k];
        Acc dz = wide(dy.at[k]);
        if (with_silu) dz = before_silu(dz, of.a[k] * centred + of.shift[k]);
        sum[k] += dz;
        sum[V + k] += dz * centred;
    }
}

// dx = a dz - m0 - m1 (x - mean), plus what `plus` points to, unless it is null
template <int V> __device__ __forceinline__ Piece<V> gradient(
        const Piece<V>& x, Piece<V> dy, const Channels<V>& of, const Acc (&m0)[V], const Acc (&m1)[V], int with_silu,
        const T* plus) {
    Piece<V> more = {};
    if (plus) more = read<V>(plus);
    for (int k = 0; k < V; k++) {
        const Acc centred = wide(x.at[k]) - of.mean[k];
        Acc dz = wide(dy.at[k]);
        if (with_silu) dz = before_silu(dz, of.a[k] * centred + of.shift[k]);
        dy.at[k] = narrow(of.a[k] * dz - m0[k] - m1[k] * centred + wide(more.at[k]));
    }
    return dy;
}

// dbeta and dgamma (W): sums over the N pixels of the block's part.
template <int V> __device__ __forceinline__ void backward_sums(
        const T* x, const T* dy, const T* gamma, const T* beta, const Acc* mean, const Acc* rstd,
        Acc* dgamma, Acc* dbeta, int N, int C, int size, int W, int with_silu, Acc* partial) {
    const Place at(W / V);
    for (int base = 0; base < W; base += at.lanes * V) {    // one iteration, unless W > V threads
        const int c = base + at.lane * V;
        const Channels<V> of(mean, rstd, gamma, beta, min(c, W - V), size);
        Acc sum[2 * V] = {};
        #pragma unroll 2
        for (int p = c < W && at.row < at.rows ? at.row : N; p < N; p += at.rows)
            add_products<V>(sum, read<V>(x + p * C + c), read<V>(dy + p * C + c), of, with_silu);
        add_rows(sum, partial, at);
        for (int k = 0; k < V && c < W && at.row == 0; k++) {
            dbeta[c + k] = sum[k];
            dgamma[c + k] = sum[V + k] * of.rstd[k];
        }
    }
}

// found   (splits, 2, B, C), dgamma and dbeta of each part
// Shared memory: Acc [8][threads].
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1) group_norm_backward_sums(
        const T* x, const T* dy, const T* gamma, const T* beta, const Acc* mean, const Acc* rstd, Acc* found,
        int B, int N, int C, int groups, int row, int with_silu, int slab, int part) {
    extern __shared__ float4 dynamic_shared[];
    Acc* partial = reinterpret_cast<Acc*>(dynamic_shared);
    const int slabs = groups / slab, b = blockIdx.x / slabs, g = blockIdx.x % slabs * slab, size = C / groups;
    const int from = blockIdx.y * part, pixels = min(part, N - from);
    x  += (b * N + from) * C + g * size;                    // (pixels, W), rows C apart
    dy += (b * N + from) * C + g * size;
    gamma += b * row + g * size;                           // (W)
    beta  += b * row + g * size;
    mean += b * groups + g;                                 // (slab)
    rstd += b * groups + g;
    Acc* dgamma = found + (blockIdx.y * 2 * B + b) * C + g * size;
    Acc* dbeta = dgamma + B * C;
    if (in_fours(x, dy, C, slab * size))
        backward_sums<4>(x, dy, gamma, beta, mean, rstd, dgamma, dbeta, pixels, C, size, slab * size, with_silu,
                         partial);
    else
        backward_sums<1>(x, dy, gamma, beta, mean, rstd, dgamma, dbeta, pixels, C, size, slab * size, with_silu,
                         partial);
}

// dx = gamma rstd dz - m0 - m1 (x - mean);   m0_of and m1_of hold n m0 and n m1
template <int V> __device__ __forceinline__ void backward_apply(
        const T* x, const T* dy, const T* gamma, const T* beta, const Acc* mean, const Acc* rstd, const T* plus,
        T* dx, const Acc* m0_of, const Acc* m1_of, Acc n, int pixels, int C, int size, int W, int with_silu) {
    const Place at(W / V);
    for (int c = at.lane * V; c < W && at.row < at.rows; c += at.lanes * V) {
        const Channels<V> of(mean, rstd, gamma, beta, c, size);
        Acc m0[V], m1[V];
        for (int k = 0; k < V; k++) {
            m0[k] = m0_of[(c + k) / size] / n;
            m1[k] = m1_of[(c + k) / size] / n;
        }
        #pragma unroll 2
        for (int p = at.row; p < pixels; p += at.rows)
            write<V>(dx + p * C + c, gradient<V>(read<V>(x + p * C + c), read<V>(dy + p * C + c),
                                                 of, m0, m1, with_silu, plus ? plus + p * C + c : nullptr));
    }
}

// dgamma and dbeta are halves of an array (B, 2, C): one row of both for each image.  plus: null, or an array of
// x's shape, which is added to dx.
// Shared memory: Acc channel[2][W], group[2][slab].
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1) group_norm_backward(
        const T* x, const T* dy, const T* gamma, const T* beta, const Acc* mean, const Acc* rstd, const Acc* found,
        const T* plus, T* dx, Acc* dgamma, Acc* dbeta, int B, int N, int C, int groups, int row, int with_silu,
        int slab, int part) {
    extern __shared__ float4 dynamic_shared[];
    const int block = gridDim.x - 1 - blockIdx.x, split = gridDim.y - 1 - blockIdx.y, splits = gridDim.y;
    const int slabs = groups / slab, b = block / slabs, g = block % slabs * slab, size = C / groups;
    const int from = split * part, pixels = min(part, N - from), W = slab * size;
    Acc* channel = reinterpret_cast<Acc*>(dynamic_shared);
    Acc *m0_of = channel + 2 * W, *m1_of = m0_of + slab;
    x  += (b * N + from) * C + g * size;                    // (pixels, W), rows C apart
    dy += (b * N + from) * C + g * size;
    dx += (b * N + from) * C + g * size;
    if (plus) plus += (b * N + from) * C + g * size;
    gamma  += b * row + g * size;                           // (W)
    beta   += b * row + g * size;
    dgamma += b * 2 * C + g * size;
    dbeta  += b * 2 * C + g * size;
    mean += b * groups + g;                                 // (slab)
    rstd += b * groups + g;

    // these are n m0 and n m1:  m0 = rstd mean(gamma dz),   m1 = rstd^2 mean(gamma dz x_hat)
    for (int c = threadIdx.x; c < W; c += blockDim.x) {
        const Acc* of = found + b * C + g * size + c;       // (splits, 2), B C apart
        Acc sum_xhat = 0, sum = 0;
        for (int s = 0; s < splits; s++) {
            sum_xhat += of[s * 2 * B * C];
            sum += of[(s * 2 + 1) * B * C];
        }
        if (split == 0) dgamma[c] = sum_xhat, dbeta[c] = sum;
        const Acc r = rstd[c / size];
        channel[c] = wide(gamma[c]) * r * sum;
        channel[W + c] = wide(gamma[c]) * r * r * sum_xhat;
    }
    __syncthreads();
    add_channels(channel, m0_of, slab, size);
    add_channels(channel + W, m1_of, slab, size);

    const Acc n = Acc(N) * size;
    if (in_fours(x, dy, C, W) && in_fours(plus, dx, C, W))                                  // null is in fours
        backward_apply<4>(x, dy, gamma, beta, mean, rstd, plus, dx, m0_of, m1_of, n, pixels, C, size, W, with_silu);
    else
        backward_apply<1>(x, dy, gamma, beta, mean, rstd, plus, dx, m0_of, m1_of, n, pixels, C, size, W, with_silu);
}
