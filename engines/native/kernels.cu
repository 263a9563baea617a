// The operators' kernels. Entry points have C names, which a driver or a plugin finds in PTX and in machine code:
//
//     depthwise_temporal_conv_FORM_TYPE_LANES(x, weight, bias, clips, time, rows, columns, channels,
//                                             kernel of time, rows, columns; stride of time, rows, columns; out)
//     depthwise_temporal_conv_input_gradient_TYPE_LANES(gradient, weight, as above, out)
//     depthwise_temporal_conv_weight_gradientN_TYPE_LANES(x, gradient, as above, sums of thread blocks)
//     weighted_average_pool_TYPE(x, clips, nt, t, nh, h, nw, w, channels, bits of scale, out)
//     weighted_average_pool_any_TYPE_LANES, likewise
//
// FORM is temporal4, temporal2, strided222, strided211 or any; TYPE fp32, fp16 or bf16; LANES what 16 bytes hold, where
// channels divide by 8 and addresses by 16, or 1. Integers have 32 bits and lie between inputs and output, as TensorRT's
// ahead-of-time plugins pass them. `with_residual` entries take a tensor more, behind the bias.

#include "depthwise_temporal_conv.h"
#include "weighted_average_pool.h"

#ifdef __CUDACC__
__device__ inline float* dynamic_shared() {
    extern __shared__ __align__(16) float memory[];
    return memory;
}
#endif

namespace liteframe {

constexpr int THREADS = 256;
constexpr int SLAB = 64;  // channels of a thread block: 128 bytes in FP16, a line of the cache

// -- DepthwiseTemporalConv

// Which channels and positions are a thread block's, and which of them this thread's. Thread blocks with neighbouring
// numbers have neighbouring channels of the same positions: so what is read at a time lies together in memory.
template <int W>
struct Slab {
    static constexpr int lanes = SLAB / W, columns = THREADS / lanes, fours = W < 4 ? 1 : W / 4;
    const int slabs, first, channels;  // of the tensor; the first of this one, and how many of SLAB it has
    const int number, numbers;  // among the thread blocks with these channels
    const int lane, column;

    __device__ explicit Slab(const ConvShape& s)
        : slabs((s.channels + SLAB - 1) / SLAB),
          first(blockIdx.x % slabs * SLAB),
          channels(min(SLAB, s.channels - first)),
          number(blockIdx.x / slabs),
          numbers(gridDim.x / slabs),
          lane(threadIdx.x % lanes),
          column(threadIdx.x / lanes) {}

    __device__ bool idle() const { return lane * W >= channels; }

    // In shared memory: the first four channels of all lanes, then their second four, so that lanes which read four at
    // once read from different banks.
    static __device__ int place(int channel) {
        return W < 4 ? channel : channel % W / 4 * (SLAB / fours) + channel / W * 4 + channel % 4;
    }

    __device__ Taps weights(const float* taps, const float* biases) const {
        return {taps + place(lane * W), SLAB, SLAB / fours, biases + place(lane * W)};
    }
};

// Weights of a slab in FP32, rearranged; ends with all threads in step.
template <int W, class T>
__device__ __forceinline__ void stage(const Slab<W>& slab, int count, const T* weight, float* taps) {
    for (int i = threadIdx.x; i < slab.channels * count; i += THREADS)
        taps[i % count * SLAB + slab.place(i / count)] =
            to_float(weight[static_cast<long long>(slab.first) * count + i]);
    __syncthreads();
}

// Calls work(column) for those of a grid of so many columns that are this thread's; a thread block's lie together.
template <int W, class Work>
__device__ void each_column(const Slab<W>& slab, int clips, int rows, int columns, const Work& work) {
    const unsigned positions = rows * columns, all = clips * positions, width = columns;
    const unsigned rounds = (all + slab.numbers * slab.columns - 1) / (slab.numbers * slab.columns);
    const unsigned first = slab.number * rounds * slab.columns + slab.column;
    for (unsigned round = 0; round < rounds; round++) {
        const unsigned n = first + round * slab.columns, position = n % positions;
        if (n >= all) break;
        work(Column{
            static_cast<int>(n / positions), static_cast<int>(position / width), static_cast<int>(position % width),
            slab.first + slab.lane * W
        });
    }
}

// Of forms with so many taps, that fit a multiprocessor without spilling.
template <int TAPS>
constexpr int BLOCKS = TAPS == 3 ? 4 : TAPS == 27 ? 2 : 1;

template <class F, int W, class T>
__device__ void convolve_all(
    const ConvShape& s, const T* x, const T* weight, const T* bias, const T* residual, T* out
) {
    alignas(16) __shared__ float taps[F::most_taps * SLAB], biases[SLAB];
    const Slab<W> slab(s);
    for (int i = threadIdx.x; i < slab.channels; i += THREADS) biases[slab.place(i)] = to_float(bias[slab.first + i]);
    stage(slab, F::taps(s), weight, taps);
    if (slab.idle()) return;
    const Taps weights = slab.weights(taps, biases);
    each_column(slab, s.clips, s.rows.out(), s.columns.out(), [&](const Column& at) {
        F::template convolve<W>(s, x, weights, residual, out, at);
    });
}

template <int W, class T>
__device__ void gather_all(const ConvShape& s, const T* grad, const T* weight, T* out) {
    alignas(16) __shared__ float taps[MOST_TAPS * SLAB];
    const Slab<W> slab(s);
    stage(slab, s.taps(), weight, taps);
    if (slab.idle()) return;
    const Taps weights = slab.weights(taps, taps);
    each_column(slab, s.clips, s.rows.size, s.columns.size, [&](const Column& at) {
        gather_input_gradient<W>(s, grad, weights, out, at);
    });
}

// What each thread block adds to the gradients: out (blocks, taps + 1, channels), the bias's last. The grid's second
// index counts places in the kernel, at each of which N taps through time are summed up at once. Blocks are added up
// elsewhere, in a fixed order, so that results repeat.
template <int N, int W, class T>
__device__ void sum_weight_gradient(const ConvShape& s, const T* x, const T* grad, float* out) {
    __shared__ float shared[THREADS / (SLAB / W)][SLAB];
    const Slab<W> slab(s);
    const int area = s.rows.kernel * s.columns.kernel, inside = blockIdx.y % area;
    const Place place{static_cast<int>(blockIdx.y / area * N), inside / s.columns.kernel, inside % s.columns.kernel};
    float taps[N][W] = {}, bias[W] = {};
    if (!slab.idle()) {
        each_column(slab, s.clips, s.rows.out(), s.columns.out(), [&](const Column& at) {
            add_weight_gradient<N, W>(s, x, grad, place, at, taps, bias);
        });
    }
    float* const to = out + static_cast<long long>(slab.number) * (s.taps() + 1) * s.channels + slab.first;
    LITEFRAME_UNROLL
    for (int k = 0; k <= N; k++) {
        if (k == N && blockIdx.y) break;  // one place is enough for the bias
        __syncthreads();
        LITEFRAME_UNROLL
        for (int c = 0; c < W; c++) shared[slab.column][slab.lane * W + c] = k < N ? taps[k % N][c] : bias[c];
        __syncthreads();
        for (int c = threadIdx.x; c < slab.channels; c += THREADS) {
            float sum = 0.0f;
            for (int column = 0; column < slab.columns; column++) sum += shared[column][c];
            const int tap = k < N ? (place.first + k) * area + inside : s.taps();
            to[static_cast<long long>(tap) * s.channels + c] = sum;
        }
    }
}

#define CONV_SHAPE                                                                                                  \
    int clips, int time, int rows, int columns, int channels, int kt, int kh, int kw, int st, int sh, int sw
#define SHAPE                                                                                                       \
    liteframe::ConvShape { clips, {time, kt, st}, {rows, kh, sh}, {columns, kw, sw}, channels }
// THREADS and `blocks`: of so many thread blocks the registers must fit a multiprocessor, for more loads under way
#define ENTRY(blocks) extern "C" __global__ void __launch_bounds__(liteframe::THREADS, blocks)
#define CONV_ENTRY(Form) ENTRY(liteframe::BLOCKS<liteframe::Form::most_taps>)
#define CONV(form, Form, type, T, W)                                                                                \
    CONV_ENTRY(Form)                                                                                                \
    depthwise_temporal_conv_##form##_##type##_##W(const T* x, const T* weight, const T* bias, CONV_SHAPE, T* out) { \
        liteframe::convolve_all<liteframe::Form, W, T>(SHAPE, x, weight, bias, nullptr, out);                       \
    }
#define CONV_WITH_RESIDUAL(form, Form, type, T, W)                                                                  \
    CONV_ENTRY(Form)                                                                                                \
    depthwise_temporal_conv_with_residual_##form##_##type##_##W(                                                    \
        const T* x, const T* weight, const T* bias, const T* residual, CONV_SHAPE, T* out                           \
    ) {                                                                                                             \
        liteframe::convolve_all<liteframe::Form, W, T>(SHAPE, x, weight, bias, residual, out);                      \
    }
#define INPUT_GRADIENT(type, T, W)                                                                                  \
    ENTRY(1)                                                                                                        \
    depthwise_temporal_conv_input_gradient_##type##_##W(const T* grad, const T* weight, CONV_SHAPE, T* out) {       \
        liteframe::gather_all<W, T>(SHAPE, grad, weight, out);                                                      \
    }
#define WEIGHT_GRADIENT(N, type, T, W)                                                                              \
    ENTRY(1)                                                                                                        \
    depthwise_temporal_conv_weight_gradient##N##_##type##_##W(                                                      \
        const T* x, const T* grad, CONV_SHAPE, float* out                                                           \
    ) {                                                                                                             \
        liteframe::sum_weight_gradient<N, W, T>(SHAPE, x, grad, out);                                               \
    }

// -- WeightedAveragePool: a thread block for each block of tokens

constexpr int WARPS = THREADS / 32;  // of a thread block, at most

// Where the N tokens of a chunk are; ends with all threads in step.
template <int N>
__device__ __forceinline__ void locate(const PoolShape& s, const Block& block, int first, Offsets (&at)[N]) {
    const int i = threadIdx.x;
    if (i < N) at[i] = block.offsets(s, min(first + i, s.size() - 1));
    __syncthreads();
}

// Adds up pairs of lanes that are HALF apart: one keeps the lower HALF of the scores, the other the upper.
template <int HALF, int N>
__device__ __forceinline__ void halve(float (&scores)[N]) {
    const bool upper = threadIdx.x & HALF;
    LITEFRAME_UNROLL
    for (int i = 0; i < HALF; i++) {
        const float low = scores[i], high = scores[i + HALF];
        scores[i] = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, HALF);
    }
}

// Of each score the sum over a warp, in the lanes whose number modulo N is the score's.
template <int N>
__device__ __forceinline__ float sum_over_warp(float (&scores)[N]) {
    static_assert(N == 8 || N == 16, "written out");
    if (N == 16) halve<N / 2>(scores);
    halve<4>(scores);
    halve<2>(scores);
    halve<1>(scores);
    float sum = scores[0];
    LITEFRAME_UNROLL
    for (int offset = N; offset < 32; offset *= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    return sum;
}

// Turns scores, of which each thread has what its channels add, into weights, zero from `count` on; returns by what
// earlier sums are to be multiplied. Threads were in step since they last did, and are once in between.
template <int N>
__device__ __forceinline__ float weigh(
    float (&scores)[N], int count, float scale, float (&sums)[WARPS][N], RunningSoftmax& softmax
) {
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32, token = lane % N;
    const float sum = sum_over_warp(scores);
    if (lane < N) sums[threadIdx.x / 32][token] = sum;
    __syncthreads();
    float score = 0.0f;
    for (int warp = 0; warp < warps; warp++) score += sums[warp][token];
    score *= scale;
    float largest = token < count ? score : -infinity();
    LITEFRAME_UNROLL
    for (int offset = N / 2; offset; offset /= 2) {
        const float other = __shfl_xor_sync(~0u, largest, offset);
        if (other > largest) largest = other;
    }
    const float factor = softmax.raise(largest);
    const float weight = token < count ? softmax.weight(score) : 0.0f;
    float total = weight;
    LITEFRAME_UNROLL
    for (int offset = N / 2; offset; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
    softmax.total += total;
    LITEFRAME_UNROLL
    for (int i = 0; i < N; i++) scores[i] = __shfl_sync(~0u, weight, i);
    return factor;
}

// A thread for every W channels, of which there are W * THREADS at most: what it read stays in its registers.
template <int W, class T>
__device__ void pool(const PoolShape& s, const T* x, T* out) {
    constexpr int N = 16;  // tokens that are read at once: a whole block at 16x
    __shared__ Offsets at[N];
    __shared__ float partial[WARPS][N];
    const Block block(s, blockIdx.x);
    const int channel = threadIdx.x * W;
    const bool active = channel < s.channels;
    RunningSoftmax softmax;
    float sums[W] = {};
    for (int first = 0; first < s.size(); first += N) {
        locate(s, block, first, at);
        const Chunk<T, W, N> chunk(x, at, active ? channel : 0);
        float scores[N] = {};
        if (active) chunk.score(x, at, channel, scores);
        const float factor = weigh(scores, s.size() - first, s.scale, partial, softmax);
        chunk.add(scores, factor, sums);
    }
    if (!active) return;
    scale(sums, softmax.share());
    store(out + static_cast<long long>(blockIdx.x) * s.channels + channel, sums);
}

template <int W>
__device__ void fetch(const float* address, float (&values)[W]) {
    const Lanes<float, W> read = load<W>(address);
    LITEFRAME_UNROLL
    for (int c = 0; c < W; c++) values[c] = read[c];
}

// Any number of channels: sums are in shared memory, and tokens are read again, from the caches, when they are added.
template <int W, class T>
__device__ void pool_any(const PoolShape& s, const T* x, T* out) {
    constexpr int N = 8;  // registers do for no more of any number of channels
    __shared__ Offsets at[N];
    __shared__ float partial[WARPS][N];
    float* const sums = dynamic_shared();  // each thread's are its own
    const Block block(s, blockIdx.x);
    RunningSoftmax softmax;
    const int mine = threadIdx.x * W, step = blockDim.x * W;
    for (int channel = mine; channel < s.channels; channel += step) {
        const float nothing[W] = {};
        store(sums + channel, nothing);
    }
    for (int first = 0; first < s.size(); first += N) {
        locate(s, block, first, at);
        float scores[N] = {};
        for (int channel = mine; channel < s.channels; channel += step)
            Chunk<T, W, N>(x, at, channel).score(x, at, channel, scores);
        const float factor = weigh(scores, s.size() - first, s.scale, partial, softmax);
        for (int channel = mine; channel < s.channels; channel += step) {
            float sum[W];
            fetch(sums + channel, sum);
            Chunk<T, W, N>(x, at, channel).add(scores, factor, sum);
            store(sums + channel, sum);
        }
        __syncthreads();
    }
    for (int channel = mine; channel < s.channels; channel += step) {
        float sum[W];
        fetch(sums + channel, sum);
        scale(sum, softmax.share());
        store(out + static_cast<long long>(blockIdx.x) * s.channels + channel, sum);
    }
}

#define POOL_SHAPE int clips, int nt, int t, int nh, int h, int nw, int w, int channels, int scale
#define POOLED                                                                                                      \
    liteframe::PoolShape { clips, nt, t, nh, h, nw, w, channels, __int_as_float(scale) }
#define POOL(type, T, W)                                                                                            \
    ENTRY(1) weighted_average_pool_##type(const T* x, POOL_SHAPE, T* out) {                                         \
        liteframe::pool<W, T>(POOLED, x, out);                                                                      \
    }
#define POOL_ANY(type, T, W)                                                                                        \
    ENTRY(1) weighted_average_pool_any_##type##_##W(const T* x, POOL_SHAPE, T* out) {                               \
        liteframe::pool_any<W, T>(POOLED, x, out);                                                                  \
    }

}  // namespace liteframe

#define FP32 float
#define FP16 liteframe::Half
#define BF16 liteframe::Brain
#define FORMS(ENTRY_OF, type, T, W)                                                                                 \
    ENTRY_OF(temporal4, TemporalOf4, type, T, W)                                                                    \
    ENTRY_OF(temporal2, TemporalOf2, type, T, W)                                                                    \
    ENTRY_OF(strided222, Strided222, type, T, W)                                                                    \
    ENTRY_OF(strided211, Strided211, type, T, W)                                                                    \
    ENTRY_OF(any, AnyForm, type, T, W)                                                                              \
    ENTRY_OF(any, AnyForm, type, T, 1)
#define INFERENCE(type, T, W)                                                                                       \
    FORMS(CONV, type, T, W)                                                                                         \
    POOL(type, T, W)                                                                                                \
    POOL_ANY(type, T, W)                                                                                            \
    POOL_ANY(type, T, 1)
#define TRAINING(type, T, W)                                                                                        \
    FORMS(CONV_WITH_RESIDUAL, type, T, W)                                                                           \
    INPUT_GRADIENT(type, T, W)                                                                                      \
    INPUT_GRADIENT(type, T, 1)                                                                                      \
    WEIGHT_GRADIENT(3, type, T, W)                                                                                  \
    WEIGHT_GRADIENT(3, type, T, 1)                                                                                  \
    WEIGHT_GRADIENT(1, type, T, W)                                                                                  \
    WEIGHT_GRADIENT(1, type, T, 1)
#define OF_ALL_TYPES(ENTRIES)                                                                                       \
    ENTRIES(fp32, FP32, 4)                                                                                          \
    ENTRIES(fp16, FP16, 8)                                                                                          \
    ENTRIES(bf16, BF16, 8)

// Which entries are compiled: all, or those that are asked for, such as one by -DLITEFRAME_ENTRIES=POOL(fp16,FP16,8)
#ifndef LITEFRAME_ENTRIES
#define LITEFRAME_ENTRIES OF_ALL_TYPES(INFERENCE) OF_ALL_TYPES(TRAINING)
#endif
LITEFRAME_ENTRIES
