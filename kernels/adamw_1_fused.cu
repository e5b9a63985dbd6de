// The end of a training step in three launches: clipping, AdamW and the moving average, for all parameters at once.
//
//     g = g~ / S,   g <- g min(1, clip / |g|)                                    S: the loss scale; |g| over all
//     m <- b1 m + (1 - b1) g              v <- b2 v + (1 - b2) g^2               Kingma & Ba 2015, algorithm 1
//     w <- w - lr (m^ / (sqrt(v^) + eps) + decay w)                              Loshchilov & Hutter 2019
//     average <- average + (1 - d)(w - average)
//
// A network has hundreds of parameters, most of them small.  One launch for each parameter and each line above would be
// thousands of launches a step, of a few microseconds each.  Here a table of pointers lists the parameters, which are
// divided into chunks, one for each block; a bias of 64 numbers is one chunk, and a matrix of a million has many.
//
// The gradients of each step are new arrays.  Their pointers are an argument of the kernel, passed by value, so no copy
// to the card precedes the launch.  The other arrays stay where they are, and so does their table, on the card.
//
// No number is copied to the host in between: one thread on the device decides whether the gradient is finite, how it
// is clipped and how S changes.  For a skipped step, the launch changes nothing.
//
// Which thread does what:
//
//     square_sums       block c: the squares of chunk c            partial[c]
//                       each thread sums every 256th number of the chunk, then a tree in shared memory
//     decide            one block: |g| from the partial sums, in a fixed order; thread 0 writes
//                       state  of the run: S, good steps, skipped steps, and the step that failed
//                       step   of this step: whether it is done, and the factors that all numbers share
//     adamw             block c: chunk c of all five arrays
//
//         g         g_0 g_1 ...                                           pointers
//         table     w_0 w_1 ... | m_0 m_1 ... | v | average               pointers, `count` of each
//         chunks    (0, 0) (1, 0) (1, 4096) (1, 8192) (2, 0) ...          parameter, first number
//
// Bytes    square_sums: 4 read for each number; adamw: 20 read and 16 written.  2.2 million parameters: 88 MB.
// Work     2 and about 20 operations for each number, including a root and a division.  Limited by memory or, for a
//          model as small as ours, by its three launches.
// Speed    measured  not yet (benchmarks/kernels.py)
//
// What limits it.  Each thread reads one number at a time, 4 bytes.  A parameter may start anywhere, so reads of 16
// bytes at a time would need special code at both ends.  A bias of 64 numbers leaves 192 threads of its block idle.
//
// takes   float32, float64
// needs   sm_75
#include "element.cuh"

constexpr int THREADS = 256;
constexpr int CHUNK = 4096;
constexpr int MOST = 480;                                   // parameters of a launch: a kernel takes 4 KB of arguments

struct Gradients { const T* at[MOST]; };

// The numbers of the state, and of a step.
constexpr int SCALE = 0, GOOD = 1, SKIPPED = 2, FAILED = 3, NORM = 4;
constexpr int GO = 0, FACTOR = 1, RATE = 2, V_SCALE = 3, TOWARDS = 4;

__device__ __forceinline__ bool is_finite(Acc x) { return x - x == 0; }

// The sum of all threads' x, valid in thread 0; added in the same order every time.
__device__ __forceinline__ Acc block_sum(Acc x, Acc* sums) {
    const int t = threadIdx.x;
    sums[t] = x;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (t < half) sums[t] += sums[t + half];
    }
    return sums[0];
}

extern "C" __global__ void __launch_bounds__(THREADS) square_sums(
        const Gradients gradients, const int* lengths, const int* chunks, Acc* partial) {
    __shared__ Acc sums[THREADS];
    const int p = chunks[2 * blockIdx.x], first = chunks[2 * blockIdx.x + 1];
    const int last = min(first + CHUNK, lengths[p]);
    const T* g = gradients.at[p];
    Acc sum = 0;
    for (int i = first + threadIdx.x; i < last; i += THREADS) sum += g[i] * g[i];
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// number: of this step, counted from 1.  patience: good steps before S is doubled, up to `most`; 0 if S never changes.
extern "C" __global__ void __launch_bounds__(THREADS) decide(
        const Acc* loss, const Acc* partial, Acc* state, Acc* step, int blocks, int number, int patience,
        double most, double clip, double lr, double b1, double b2, double ema) {
    __shared__ Acc sums[THREADS];
    Acc sum = 0;
    for (int i = threadIdx.x; i < blocks; i += THREADS) sum += partial[i];
    sum = block_sum(sum, sums);
    if (threadIdx.x > 0) return;

    step[GO] = 0;
    if (state[FAILED] > 0) return;                          // an earlier step failed, and the host does not know yet
    const Acc scale = state[SCALE], norm = sqrt(sum) / scale;
    const bool good = is_finite(norm);
    if (!is_finite(*loss) || (!good && scale <= 1)) {          // a smaller scale would not help
        state[FAILED] = number;
        state[NORM] = norm;
        return;
    }
    if (patience > 0) {
        const bool grows = good && state[GOOD] + 1 == patience;
        state[GOOD] = good && !grows ? state[GOOD] + 1 : Acc(0);
        state[SCALE] = grows ? min(2 * scale, Acc(most)) : good ? scale : scale / 2;
        if (!good) state[SKIPPED] += 1;
    }
    if (!good) return;
    const double n = number - double(state[SKIPPED]);       // steps of AdamW and the average: skipped ones do not count
    const double d = (1 + (n - 1)) / (10 + (n - 1));
    step[GO] = 1;
    step[FACTOR] = (norm > Acc(clip) ? Acc(clip) / norm : Acc(1)) / scale;
    step[RATE] = Acc(lr / (1 - pow(b1, n)));
    step[V_SCALE] = Acc(1 / (1 - pow(b2, n)));
    step[TOWARDS] = Acc(1 - (d < ema ? d : ema));
}

// decays: whether a parameter is multiplied by `shrink`, 1 - lr decay, before its update;  c1 = 1 - b1, c2 = 1 - b2.
extern "C" __global__ void __launch_bounds__(THREADS) adamw(
        const Gradients gradients, const unsigned long long* table, const int* lengths, const int* chunks,
        const unsigned char* decays, const Acc* step, int count, Acc b1, Acc c1, Acc b2, Acc c2, Acc eps, Acc shrink) {
    if (step[GO] == 0) return;
    const int p = chunks[2 * blockIdx.x], first = chunks[2 * blockIdx.x + 1];
    const int last = min(first + CHUNK, lengths[p]);
    T* w = reinterpret_cast<T*>(table[p]);
    const T* g = gradients.at[p];
    T* m = reinterpret_cast<T*>(table[count + p]);
    T* v = reinterpret_cast<T*>(table[2 * count + p]);
    T* average = reinterpret_cast<T*>(table[3 * count + p]);
    const Acc keep = decays[p] ? shrink : Acc(1);
    const Acc factor = step[FACTOR], rate = step[RATE], v_scale = step[V_SCALE], towards = step[TOWARDS];
    for (int i = first + threadIdx.x; i < last; i += THREADS) {
        const Acc gi = g[i] * factor;
        const Acc mi = b1 * m[i] + c1 * gi;
        const Acc vi = b2 * v[i] + c2 * gi * gi;
        const Acc wi = keep * w[i] - rate * mi / (sqrt(vi * v_scale) + eps);
        m[i] = mi, v[i] = vi, w[i] = wi;
        average[i] = towards == 1 ? wi : average[i] + towards * (wi - average[i]);     // w to the last bit at d = 0
    }
}
